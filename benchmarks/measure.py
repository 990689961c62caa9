"""What is measured of one cell: a function each, which yields a record for every implementation.

Every implementation is compared with float64 before it is timed; one that computes something else, or that fails, has
its reason in `error` and no time.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk.benchmarks import operations, peers, timing
from rtk.benchmarks.peers import Peer, Prepared
from rtk.benchmarks.records import CELL_KEYS, OWN

_COLD_STARTS, _COLD_SECONDS = 3, 12.0
_MOST_SETS = 64  # of inputs: as many as a turn has calls


@dataclass(frozen=True)
class Cell:
    """One problem of one operation. `impls` limits who takes part, None for all."""

    op: str
    problem: Any
    variant: str | None = None
    impls: tuple[str, ...] | None = None


@dataclass
class Bench:
    """Where cells are measured: who takes part, on what, and who looks at the clocks meanwhile."""

    suite: str
    found: Mapping[str, Peer]
    rounds: int
    l2_bytes: int
    seed: int = 0
    take: Callable[[], dict[str, float]] = dict  # what telemetry saw since the last time


Records = Iterator[dict[str, Any]]


def describe(cell: Cell, suite: str) -> dict[str, Any]:
    """The keys of a record that say which cell it is of; what only this operation has stands under OWN."""
    described = operations.known()[cell.op].describe(cell.problem)
    own = {key: value for key, value in described.items() if key not in CELL_KEYS}
    found = {"suite": suite, **{key: value for key, value in described.items() if key not in own}}
    if own:
        found[OWN] = own
    if cell.variant is not None:
        found["variant"] = cell.variant
    return found


def times(cell: Cell, bench: Bench) -> Records:
    """Microseconds of a call, the implementations taking turns."""
    with _checked(cell, bench) as (found, ready):
        yield from _timed(cell, found, ready, bench)


def times_and_memory(cell: Cell, bench: Bench) -> Records:
    """And the most memory that a call holds beyond its inputs, its output among it."""
    with _checked(cell, bench) as (found, ready):
        for name, calls in ready.items():
            found[name]["peak_extra_bytes"] = _peak_extra_bytes(calls[0])
        yield from _timed(cell, found, ready, bench)


def accuracy(cell: Cell, bench: Bench) -> Records:
    """Errors only."""
    with _checked(cell, bench, thorough=True, judge=False, most_sets=1) as (found, _):
        yield from found.values()


def overhead(cell: Cell, bench: Bench) -> Records:
    """Microseconds of CPU of an eager call (cpu_us), and of the GPU in a CUDA graph (us)."""
    with _checked(cell, bench, most_sets=1) as (found, ready):
        spans = timing.host_us({name: (made[0].call, made[0].context) for name, made in ready.items()}, bench.rounds)
        for name, values in spans.items():
            q1, median, q3 = timing.quartiles(values)
            found[name] |= {"cpu_us": _us(median), "cpu_us_q1": _us(q1), "cpu_us_q3": _us(q3)}
            found[name]["cpu_us_rounds"] = [_us(value) for value in values]
        yield from _timed(cell, found, ready, bench)


def coldstart(cell: Cell, bench: Bench) -> Records:
    """Milliseconds of importing an implementation and of its first calls, each time in a process of its own.

    Cold starts are the medians of three, each with caches of its own; of one where a process takes long.
    """
    from rtk.benchmarks import coldstart as child

    for name in _taking_part(cell, bench):
        record = {**describe(cell, bench.suite), "impl": name, "error": None}
        colds: list[dict[str, Any]] = []
        start = time.monotonic()
        try:
            while len(colds) < _COLD_STARTS and (not colds or time.monotonic() - start < _COLD_SECONDS):
                with tempfile.TemporaryDirectory(prefix="rtk-bench-") as folder:
                    colds.append(child.in_new_process(cell.op, name, cell.problem, Path(folder)))
                    if len(colds) == 1:
                        warm = child.in_new_process(cell.op, name, cell.problem, Path(folder))
        except child.Failed as error:
            record["error"] = str(error)
        else:
            record |= _medians(colds) | {"rounds": len(colds), "disk_call_ms": warm["first_call_ms"]}
            record |= {"choose_ms": warm.get("choose_ms"), "load_ms": warm.get("build_ms")}
            record["compile_ms"] = record.pop("build_ms", None)
        yield record


def _medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each number the median; what is no number is as in the first."""
    return {
        name: round(statistics.median(each[name] for each in found), 3) if isinstance(value, float) else value
        for name, value in found[0].items()
    }


# --- the parts -------------------------------------------------------------------------------------------------------


def _taking_part(cell: Cell, bench: Bench) -> list[str]:
    return [name for name in bench.found if cell.impls is None or name in cell.impls]


@contextlib.contextmanager
def _checked(
    cell: Cell, bench: Bench, *, thorough: bool = False, judge: bool = True, most_sets: int = _MOST_SETS
) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, list[Prepared]]]]:
    """({impl: record}, {impl: calls, one for each set of inputs}): those that gave the right answer are ready."""
    import torch

    operation = operations.known()[cell.op]
    sets = _sets(operation.input_bytes(cell.problem), bench.l2_bytes, most_sets)
    inputs = [operation.inputs(cell.problem, cell.variant, bench.seed + number) for number in range(sets)]
    truth = operation.truth(cell.problem, inputs[0], thorough=thorough)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, list[Prepared]] = {}
    for name in _taking_part(cell, bench):
        record = found[name] = {**describe(cell, bench.suite), "impl": name, "error": None}
        try:
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch: why a backend does not serve
                made = [bench.found[name].prepare(cell.op, cell.problem, tensors) for tensors in inputs]
                with made[0].context():
                    result = made[0].canonical(made[0].call())
                torch.cuda.synchronize()
            record["prepared_s"] = round(time.perf_counter() - start, 3)
            errors = truth.errors(result)
            record |= made[0].notes
        except Exception as error:  # each library fails in its own way
            record["error"] = peers.reason_of(error)
            raise_if_lost(error)
            continue
        finite = math.isfinite(errors.rms) and math.isfinite(errors.largest)
        record |= {"rms_error": errors.rms, "max_error": errors.largest} if finite else {}
        if judge and not errors.worst <= operation.tolerance(cell.problem):
            record["error"] = f"the answer is wrong: in some rows the error is {errors.worst:.3g} of float64's RMS"
        elif not finite:
            record["error"] = "the answer is not finite"
        else:
            ready[name] = made
    try:
        yield found, ready
    finally:
        del inputs, truth
        ready.clear()
        gc.collect()
        torch.cuda.empty_cache()


def raise_if_lost(error: Exception) -> None:
    """After some errors nothing runs in this process any more: better said at once than by every later cell."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        raise error from None


def _sets(size: int, l2_bytes: int, most: int) -> int:
    """How many sets of inputs, so that they do not stay in the cache from one turn to the next: twice what it holds."""
    return max(1, min(most, math.ceil(2 * l2_bytes / max(size, 1))))


def _timed(
    cell: Cell, found: dict[str, dict[str, Any]], ready: Mapping[str, Sequence[Prepared]], bench: Bench
) -> Records:
    operation = operations.known()[cell.op]
    calls = {name: [each.entered() for each in made] for name, made in ready.items()}
    measured: dict[str, timing.Timing] = {}
    while calls:
        try:
            measured = timing.interleaved(calls, bench.rounds, before_rounds=bench.take)
            break
        except Exception as error:
            raise_if_lost(error)
            culprit = _failing(calls)
            if culprit is None:
                raise
            name, reason = culprit
            found[name]["error"] = reason
            del calls[name]
    state = bench.take()
    for name, record in found.items():
        if name in measured:
            record |= _of(measured[name], operation.flop(cell.problem)) | state
        yield record


def _failing(calls: Mapping[str, Sequence[timing.Call]]) -> tuple[str, str] | None:
    """Who fails when called again, and how."""
    import torch

    for name, each in calls.items():
        try:
            for call in each:
                call()
            torch.cuda.synchronize()
        except Exception as error:
            return name, peers.reason_of(error)
    return None


def _of(measured: timing.Timing, flop: float) -> dict[str, Any]:
    """What a record says of a timing. Its share of the ceiling is added when all ceilings are known."""
    return {
        "us": _us(measured.us),
        "us_q1": _us(measured.us_q1),
        "us_q3": _us(measured.us_q3),
        "us_rounds": [_us(value) for value in measured.us_rounds],
        "rounds": len(measured.us_rounds),
        "timing": measured.method,
        "tflops": round(flop / measured.us / 1e6, 1),
    }


def _us(value: float) -> float:
    return round(value, 3 if value < 100 else 2)


def _peak_extra_bytes(made: Prepared) -> int:
    """What torch's allocator held at most during a call, beyond what it held before."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with made.context():
        result = made.call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return int(peak)


def median_of(values: Sequence[float]) -> dict[str, float]:
    """{"min", "median", "max"} of some values."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
