"""FlashAttention-4: `flash_attn.cute`, which compiles its kernels at run time."""

from __future__ import annotations

import functools
from typing import Any

from rtk.benchmarks.peers.base import Peer, Prepared, from_bshd, to_bshd, window_of
from rtk.benchmarks.peers.versions import installed


@functools.cache
def _function() -> Any:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    causal, window = window_of(problem, unbounded=None)
    q, k, v = to_bshd(q, k, v)
    options: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": causal}
    if window != (None, None):
        options["window_size"] = window
    if problem.softcap:
        options["softcap"] = problem.softcap
    function = _function()

    def call() -> Any:
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return Prepared(call, from_bshd)


_IMPORT = "from flash_attn.cute import flash_attn_func"

PEERS = [Peer("fa4", _function, lambda: installed("flash-attn-4"), {"attention_fwd": _attention_fwd}, _IMPORT)]
