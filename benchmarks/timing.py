"""One way of timing for everything in a cell, the candidates taking turns.

A round times every candidate once, so that clock and power drift hit all alike, and the rounds of a cell are paired.
Each round has an order of its own: who always came after a slow candidate, in which the card cools and raises its
clock, would seem faster (by up to 6% on an H200). Where all of them can be captured, a turn is one replay of a CUDA
graph of some calls; otherwise all of them are called eagerly, behind a wait on the GPU that hides the CPU's part. A
turn lasts milliseconds, so that events are precise. A candidate is a list of calls on different inputs, taken in turn,
so that none finds its own in the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]

TURN_MS = 4.0  # what one turn should last
_MAX_CALLS = 512  # in a turn
_WARM_UP_ROUNDS = 2
_ORDER_SEED = 0
# Calls wait on the GPU until the CPU has enqueued them all: a graph at once, eager ones in twice what that took, at the
# highest clock.
_CYCLES_PER_S, _MARGIN, _LEAST_CYCLES = 2.0e9, 2.0, 1_000_000


@dataclass(frozen=True)
class Timing:
    """Microseconds for one call: median and quartiles over the rounds, and every round."""

    us: float
    us_q1: float
    us_q3: float
    us_rounds: tuple[float, ...]
    method: str  # "graph" or "eager"


@dataclass(frozen=True)
class Turns:
    """A candidate made ready: `run` does `count` calls, behind a wait of so many cycles on the GPU."""

    run: Callable[[], Any]
    count: int
    hidden_cycles: int = 0


def interleaved(
    candidates: Mapping[str, Sequence[Call]], rounds: int = 15, before_rounds: Callable[[], Any] = lambda: None
) -> dict[str, Timing]:
    """Times each candidate on the current torch device, in the current stream.

    before_rounds: called when all are ready, so that who watches the clocks begins there.
    """
    method, ready = "graph", {}
    try:
        for name, calls in candidates.items():
            ready[name] = _captured(calls)
    except Exception:  # libraries refuse capture in ways of their own; the eager turns show what else is wrong
        method = "eager"
        ready = {name: _eager(calls) for name, calls in candidates.items()}
    spans: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(_ORDER_SEED)
    before_rounds()
    for _ in range(rounds + _WARM_UP_ROUNDS):
        for name, turns in order.sample(list(ready.items()), len(ready)):
            spans[name].append(_elapsed_ms(turns.run, turns.hidden_cycles) * 1e3 / turns.count)
    return {name: _summary(times[_WARM_UP_ROUNDS:], method) for name, times in spans.items()}


def _count(calls: Sequence[Call]) -> int:
    """How many calls make a turn: enough to last, and each input as often as any other."""
    for call in calls[:2]:  # the first call compiles, and leaves its launch attributes behind
        call()
    wanted = max(1, min(_MAX_CALLS, round(TURN_MS / max(_elapsed_ms(calls[0]), 1e-3))))
    return -(-wanted // len(calls)) * len(calls) if wanted >= len(calls) else wanted


def _captured(calls: Sequence[Call]) -> Turns:
    import torch

    count = _count(calls)
    for call in calls[:count]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), count):
            call()
    return Turns(graph.replay, count, _LEAST_CYCLES)


def _eager(calls: Sequence[Call]) -> Turns:
    import torch

    count = _count(calls)

    def run() -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call()

    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    enqueued_s = time.perf_counter() - start
    return Turns(run, count, max(_LEAST_CYCLES, int(_MARGIN * enqueued_s * _CYCLES_PER_S)))


def _elapsed_ms(work: Callable[[], Any], hidden_cycles: int = 0) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if hidden_cycles:
        torch.cuda._sleep(hidden_cycles)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_us(
    candidates: Mapping[str, tuple[Call, Callable[[], contextlib.AbstractContextManager[Any]]]],
    rounds: int,
    calls: int = 200,
) -> dict[str, list[float]]:
    """Microseconds of CPU that one eager call costs, per round: what a loop of calls takes until all are enqueued."""
    import torch

    spans: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(_ORDER_SEED)
    for number in range(rounds + 1):
        for name, (call, context) in order.sample(list(candidates.items()), len(candidates)):
            with context():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                if number:  # the first round warms up
                    spans[name].append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return spans


def _summary(times: list[float], method: str) -> Timing:
    q1, median, q3 = quartiles(times)
    return Timing(median, q1, q3, tuple(times), method)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, median, q3
