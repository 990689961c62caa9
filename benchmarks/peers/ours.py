"""rtk itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rtk
from rtk import toolchain
from rtk.benchmarks.peers.base import Peer, Prepared
from rtk.warmup import warmup


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any, config: Any = None) -> Prepared:
    left, right = problem.window_left, problem.window_right
    causal = left is None and right == 0
    options: dict[str, Any] = {"causal": causal} if causal else {"window_size": (left, right)}
    options |= {} if problem.diagonal == problem.seqlen_k - problem.seqlen_q else {"causal_align": "top-left"}
    options |= {"softcap": problem.softcap} if problem.softcap else {}
    options |= {} if config is None else {"config": config}
    scale = problem.softmax_scale
    return Prepared(lambda: rtk.attention(q, k, v, softmax_scale=scale, **options))


def _ahead(problems: Sequence[Any]) -> None:
    warmup(problems)


_IMPORT = "from rtk import attention"

PEERS = [Peer("rtk", toolchain.nvrtc, lambda: rtk.__version__, {"attention_fwd": _attention_fwd}, _IMPORT, _ahead)]
