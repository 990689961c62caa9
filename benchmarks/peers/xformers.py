"""xFormers' memory_efficient_attention, with the backend that it chooses."""

from __future__ import annotations

import functools
from typing import Any

from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared, from_bshd, to_bshd, window_of
from rtk.benchmarks.peers.versions import installed


@functools.cache
def _library() -> Any:
    import xformers.ops

    return xformers.ops


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    if problem.softcap:
        raise CannotRun("no softcap")
    causal, window = window_of(problem)
    if window != (-1, -1):
        raise CannotRun("windows are not compared")
    library = _library()
    bias = library.fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None
    q, k, v = to_bshd(q, k, v)
    group = problem.heads_per_kv
    if group > 1:  # (batch, seqlen, groups, heads in a group, head_dim), without a copy of k and v
        q = q.unflatten(2, (problem.num_heads_kv, group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))

    def canonical(o: Any) -> Any:
        return from_bshd(o.flatten(2, 3) if group > 1 else o)

    scale = problem.softmax_scale
    return Prepared(lambda: library.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale), canonical)


def _version() -> str | None:
    return installed("xformers")


PEERS = [Peer("xformers", _library, _version, {"attention_fwd": _attention_fwd}, "import xformers.ops")]
