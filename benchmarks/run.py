"""Runs a suite, cell by cell, and keeps what it has: a run that ended early goes on where it stopped.

What is not whole stands beside the results file, hidden, and is joined only by a run of the same sources, libraries,
card and choices. The results file is replaced when the last cell is done.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rtk import digest, driver, toolchain
from rtk.benchmarks import ceilings, floors, measure, peers, records
from rtk.benchmarks.suites import Cell, Suite
from rtk.benchmarks.telemetry import Telemetry
from rtk.errors import ToolchainError

_METHOD = (
    "Median and quartiles over rounds in which the implementations take turns, in another order each time. A turn is a "
    "replay of a CUDA graph of some calls, or eager calls behind a wait on the GPU where one of the cell cannot be "
    "captured (`timing` says which). Inputs are N(0, 1), rotated through twice the level-2 cache. Each implementation "
    "was compared with float64 before."
)


_FEW = 4  # cells that are not worth compiling ahead for


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def started(self, suite: Suite, meta: dict[str, Any], done: Sequence[dict[str, Any]]) -> None: ...
    def measured(self, found: Sequence[dict[str, Any]], done: int, total: int) -> None: ...


@dataclass
class Outcome:
    """A results file, and how many of the suite's cells are in it; `path` is where they are, whole or not."""

    path: Path
    done: int
    total: int
    meta: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.done == self.total


def run(
    suite: Suite,
    folder: Path,
    watcher: Watcher,
    *,
    impls: Iterable[str] | None = None,
    rounds: int | None = None,
    deadline: float | None = None,
    fresh: bool = False,
) -> Outcome:
    """Measure a suite on torch's current GPU into `folder`/<suite>.json.

    impls: names of implementations, None for all that are here. rounds: None for the suite's own. deadline: of
    time.monotonic(); no cell is begun that would likely end later. fresh: forget what an earlier run began. Raises
    ToolchainError without torch or a GPU, ArgumentError for an implementation that nothing is called.
    """
    index = gpu()
    found, absent = peers.present(impls)
    path = folder / f"{suite.name}.json"
    kept = path.with_name(f".{path.name}.partial")
    properties = driver.device_properties(index)
    with Telemetry(properties.uuid) as telemetry:
        meta = _meta(suite, found, absent, index, rounds or suite.rounds, telemetry)
        done = [] if fresh else _take_over(kept, meta)
        watcher.started(suite, meta, done)
        bench = measure.Bench(suite.name, found, meta["rounds"], properties.l2_bytes, take=telemetry.take)
        begun = time.monotonic()
        _ahead(suite, found, done)
        meta["ceilings_measured"].append(ceilings.measure())
        if suite.cells:
            done = _cells(suite, bench, meta, done, kept, watcher, begun, deadline)
        meta["duration_s"] = round(meta["duration_s"] + time.monotonic() - begun, 1)
        meta["ceilings_measured"].append(ceilings.measure())
    meta["ceilings"] = ceilings.joined(meta["ceilings_measured"])
    finished = [_with_shares(record, meta) for record in done]
    meta["clocks"] = _clocks(finished)
    count = _count_done(suite, done)
    outcome = Outcome(path, count, len(suite.cells), meta, finished)
    records.write(path if outcome.whole else kept, meta, finished)
    if outcome.whole:
        kept.unlink(missing_ok=True)
    else:
        outcome.path = kept
    return outcome


def _ahead(suite: Suite, found: dict[str, peers.Peer], done: Iterable[dict[str, Any]]) -> None:
    """Has everyone who can compile what is still to do, where that is worth the start of processes."""
    known = {records.cell_key(record) for record in done}
    cells = [cell for cell in suite.cells if records.cell_key(measure.describe(cell, suite.name)) not in known]
    problems = list(dict.fromkeys(cell.problem for cell in cells))
    if suite.measure is measure.coldstart or len(problems) < _FEW:
        return
    for peer in found.values():
        if peer.ahead is not None:
            peer.ahead(problems)


def gpu() -> int:
    """The GPU that torch is set to. Raises ToolchainError where there is none, or no torch."""
    try:
        import torch
    except ImportError:
        raise ToolchainError("benchmarks need torch", "pip install torch") from None
    if not (torch.cuda.is_available() and driver.available()):
        raise ToolchainError("benchmarks need a GPU", "run them where `rtk doctor` is content")
    return int(torch.cuda.current_device())


def _cells(
    suite: Suite,
    bench: measure.Bench,
    meta: dict[str, Any],
    done: list[dict[str, Any]],
    kept: Path,
    watcher: Watcher,
    begun: float,
    deadline: float | None,
) -> list[dict[str, Any]]:
    known = {records.cell_key(record) for record in done}
    longest = 0.0
    earlier_s = meta["duration_s"]
    for number, cell in enumerate(suite.cells, 1):
        if records.cell_key(measure.describe(cell, suite.name)) in known:
            continue
        start = time.monotonic()
        if deadline is not None and start + longest > deadline:
            break
        new = list(suite.measure(cell, bench))
        done = [*done, *new]
        longest = max(longest, time.monotonic() - start)
        meta["duration_s"] = round(earlier_s + time.monotonic() - begun, 1)
        records.write(kept, meta, done)
        watcher.measured([_with_shares(record, meta) for record in new], number, len(suite.cells))
    meta["duration_s"] = earlier_s
    return done


def _count_done(suite: Suite, done: Iterable[dict[str, Any]]) -> int:
    known = {records.cell_key(record) for record in done}
    return sum(records.cell_key(measure.describe(cell, suite.name)) in known for cell in suite.cells)


def _take_over(kept: Path, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier piece of this very run measured; `meta` goes on with its counts."""
    try:
        earlier = records.read(kept)
    except Exception:  # none, or one that cannot be read: a run from the start
        return []
    same = ("uuid", "versions", "sources", "rounds", "absent")
    if any(earlier.meta.get(name) != meta[name] for name in same):
        return []
    meta["pieces"] = earlier.meta["pieces"] + 1
    meta["duration_s"] = earlier.meta["duration_s"]
    meta["ceilings_measured"] = list(earlier.meta["ceilings_measured"])
    return earlier.records


def _with_shares(record: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """The record with its floors and its share of the ceiling, as far as the ceilings are known."""
    known = meta.get("ceilings") or ceilings.joined(meta["ceilings_measured"])
    found = records.whole(record)
    bounds = floors.floors(record, known, meta["device"])
    found["floor_us"] = {name: round(value, 3) for name, value in bounds.items()} or None
    if record.get("tflops") and known.get("bf16_tflops"):
        found["ceiling_share"] = round(record["tflops"] / known["bf16_tflops"], 4)
    return found


def _clocks(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    clocks = {}
    for name in ("sm_mhz", "power_w", "temperature_c"):
        values = [record[name] for record in found if record.get(name)]
        if values:
            clocks[name] = measure.median_of(values)
    return clocks


def _meta(
    suite: Suite,
    found: dict[str, peers.Peer],
    absent: dict[str, str],
    index: int,
    rounds: int,
    telemetry: Telemetry,
) -> dict[str, Any]:
    import torch

    properties = driver.device_properties(index)
    versions = {name: peer.version() for name, peer in found.items()}
    tools = {"torch": torch.__version__, "nvrtc": toolchain.nvrtc().build, "python": platform.python_version()}
    wheels = toolchain.cupy_wheels()
    return {
        "schema": records.SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "gpu": properties.name,
        "uuid": properties.uuid,
        "driver": telemetry.versions().get("driver"),
        "cuda": ".".join(map(str, toolchain.driver_version() or ())) or None,
        "versions": {**versions, **tools, "cupy": ", ".join(wheels) or None},
        "sources": digest.sources_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "duration_s": 0.0,
        "pieces": 1,
        "rounds": rounds,
        "method": " ".join(filter(None, [_METHOD, telemetry.reason])),
        "absent": absent,
        "ceilings_measured": [],
        "device": {
            "sm_count": properties.sm_count,
            "max_sm_mhz": telemetry.max_sm_mhz() or torch.cuda.get_device_properties(index).clock_rate / 1e3,
            "l2_bytes": properties.l2_bytes,
            "memory_bytes": properties.memory_bytes,
        },
    }


def own_suite(problems: Iterable[Any], op: str = "attention_fwd") -> Suite:
    """A suite of a user's own problems."""
    unique = dict.fromkeys(itertools.chain(problems))
    return Suite("own", "Your own problems", tuple(Cell(op, problem) for problem in unique))
