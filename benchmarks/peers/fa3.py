"""FlashAttention-3: of an installed flash_attn_interface, or of the shared object that RTK_BENCH_FA3 names."""

from __future__ import annotations

import functools
import os
from typing import Any

from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared, from_bshd, to_bshd, window_of
from rtk.benchmarks.peers.versions import installed


@functools.cache
def _operator() -> Any:
    """The operator itself, which both bring: what flash_attn_func adds to it is Python."""
    import torch

    library = os.environ.get("RTK_BENCH_FA3")
    if library:
        torch.ops.load_library(os.path.expanduser(library))
    else:
        try:
            import flash_attn_interface  # noqa: F401
        except ImportError as error:
            raise CannotRun(f"{error}; or name its shared object in RTK_BENCH_FA3") from None
    return torch.ops.flash_attn_3.fwd


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    causal, (left, right) = window_of(problem)
    q, k, v = to_bshd(q, k, v)
    options: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "is_causal": causal, "num_splits": 1}
    if (left, right) != (-1, -1):
        options |= {"window_size_left": left, "window_size_right": right}
    if problem.softcap:
        options["softcap"] = problem.softcap
    operator = _operator()
    return Prepared(lambda: operator(q, k, v, **options)[0], from_bshd)


def _version() -> str | None:
    library = os.environ.get("RTK_BENCH_FA3")
    return f"of {os.path.basename(library)}" if library else installed("flash_attn_3", "flash-attn-3")


PEERS = [Peer("fa3", _operator, _version, {"attention_fwd": _attention_fwd})]
