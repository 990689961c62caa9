"""rtk itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rtk
from rtk import toolchain
from rtk.autotune import choice
from rtk.autotune.keys import Gpu
from rtk.benchmarks.peers.base import Peer, Prepared
from rtk.kernels.attention_fwd import SPEC
from rtk.warmup import warmup


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any, config: Any = None) -> Prepared:
    left, right = problem.window_left, problem.window_right
    causal = left is None and right == 0
    options: dict[str, Any] = {"causal": causal} if causal else {"window_size": (left, right)}
    options |= {} if problem.diagonal == problem.seqlen_k - problem.seqlen_q else {"causal_align": "top-left"}
    options |= {"softcap": problem.softcap} if problem.softcap else {}
    options |= {} if config is None else {"config": config}
    scale = problem.softmax_scale
    return Prepared(lambda: rtk.attention(q, k, v, softmax_scale=scale, **options), notes=_config(problem, q, config))


def _config(problem: Any, q: Any, config: Any) -> dict[str, Any]:
    """Which configuration runs, and where it was chosen."""
    if config is not None or not q.is_cuda:
        return {}
    chosen = choice.choose(SPEC, problem, Gpu.of(q.device.index))
    return {"config": SPEC.label(chosen.config), "config_origin": chosen.origin}


def _ahead(problems: Sequence[Any], seconds: float) -> None:
    warmup(problems)


_IMPORT = "from rtk import attention"

PEERS = [
    Peer(
        "rtk",
        toolchain.nvrtc,
        lambda: rtk.__version__,
        {"attention_fwd": _attention_fwd},
        _IMPORT,
        {"attention_fwd": _ahead},
    )
]
