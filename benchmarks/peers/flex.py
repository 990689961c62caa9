"""torch's FlexAttention, compiled."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rtk import shapes
from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared

_MOST_PAIRS = 1 << 28
_MOST_PROCESSES = 12
_AHEAD_TIMEOUT_S = 240


def _load() -> None:
    import torch
    from torch.nn.attention.flex_attention import flex_attention  # noqa: F401

    if not torch.cuda.is_available():
        raise CannotRun("torch has no GPU here")


@functools.lru_cache(maxsize=1)
def _compiled(problem: Any) -> Callable[..., Any]:
    """For one problem at a time: past a handful of them, torch would run what it has not compiled, without a word."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    function: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return function


def _block_mask(problem: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    left, right, diagonal = problem.window_left, problem.window_right, problem.diagonal
    if left is None and right is None:
        return None

    def visible(b: Any, h: Any, row: Any, column: Any) -> Any:
        offset = column - row - diagonal
        if left is None:
            return offset <= right
        return (offset >= -left) & (offset <= right) if right is not None else offset >= -left

    lengths = problem.seqlen_q, problem.seqlen_k
    # Compiled, the mask is never in memory as a whole; where it has room there, that takes a second less.
    compiled = lengths[0] * lengths[1] > _MOST_PAIRS
    return create_block_mask(visible, None, None, *lengths, device="cuda", _compile=compiled)


def _softcap(cap: float) -> Callable[..., Any] | None:
    import torch

    if not cap:
        return None
    return lambda score, b, h, row, column: cap * torch.tanh(score / cap)


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    function = _compiled(problem)
    options: dict[str, Any] = {
        "block_mask": _block_mask(problem),
        "score_mod": _softcap(problem.softcap),
        "scale": problem.softmax_scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    return Prepared(lambda: function(q, k, v, **options))


def _ahead(problems: Sequence[Any], seconds: float) -> None:
    """Fills torch's compile cache on disk: here a kernel of this size takes seconds, one after the other."""
    lines = [shapes.describe(problem) for problem in problems]
    count = max(1, min(len(lines), (os.cpu_count() or 1) - 1, _MOST_PROCESSES))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, *lines[first::count]],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for first in range(count)
    ]
    try:
        deadline = time.monotonic() + min(seconds, _AHEAD_TIMEOUT_S)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in running:
            process.kill()
            process.wait()


def _compile_these(lines: Sequence[str]) -> None:
    import torch

    from rtk.benchmarks import operations

    for line in lines:
        problem = shapes.parse(line)
        with contextlib.suppress(Exception):  # whoever times it will meet it again, and says so
            _attention_fwd(problem, *operations.known()["attention_fwd"].inputs(problem, None, 0)).call()
            torch.cuda.synchronize()


def _version() -> str:
    import torch

    return f"torch {torch.__version__}"


_IMPORT = "from torch.nn.attention.flex_attention import flex_attention"

PEERS = [Peer("flex", _load, _version, {"attention_fwd": _attention_fwd}, _IMPORT, {"attention_fwd": _ahead})]

if __name__ == "__main__":
    _compile_these(sys.argv[1:])
