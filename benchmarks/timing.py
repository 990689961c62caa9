"""One way of timing for everything in a cell: CUDA graph replays, the candidates taking turns.

A round replays every candidate once (A B C A B C …), so that clock and power drift hit all alike; a replay holds enough
calls to last milliseconds, so that events are precise. Median and quartiles are over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_REPLAY_MS = 4.0  # what one replay of a graph should last
_MAX_CALLS = 64  # in a graph
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Microseconds for one call: median and quartiles over the rounds."""

    us: float
    us_q1: float
    us_q3: float
    rounds: int


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, Timing]:
    """Times each call on the current torch device. A call must be capturable in a CUDA graph."""
    graphs = {name: _captured(call) for name, call in calls.items()}
    spans: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + _WARM_UP_ROUNDS):
        for name, (graph, count) in graphs.items():
            spans[name].append(_elapsed_ms(graph.replay) * 1e3 / count)
    return {name: _summary(times[_WARM_UP_ROUNDS:]) for name, times in spans.items()}


def _captured(call: Callable[[], Any]) -> tuple[Any, int]:
    """A graph of some calls, and how many."""
    import torch

    for _ in range(2):  # the first call compiles, and leaves its launch attributes behind
        call()
    count = max(1, min(_MAX_CALLS, round(_REPLAY_MS / max(_elapsed_ms(call), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph, count


def _elapsed_ms(work: Callable[[], Any]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _summary(times: list[float]) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4)
    return Timing(median, q1, q3, len(times))
