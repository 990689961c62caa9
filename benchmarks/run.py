"""Runs a suite, cell by cell, and keeps what it has: a run that ended early goes on where it stopped.

What is not whole stands beside the results file, hidden, and is joined only by a run of the same sources, libraries,
card and choices. The results file is replaced when the last cell is done.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rtk import digest, driver, toolchain
from rtk.autotune import choice
from rtk.benchmarks import ceilings, floors, measure, peers, records, schema
from rtk.benchmarks.suites import Cell, Suite
from rtk.benchmarks.telemetry import Telemetry
from rtk.errors import ToolchainError

OWN = "own"  # the suite of a user's own problems
_FEW = 4  # cells that are not worth compiling ahead for
_AHEAD_S = 240.0
_LEAST_S = 20.0  # what a cell may take that nothing is known of


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
        done = [] if fresh else _take_over(kept, meta, suite)
        watcher.started(suite, meta, done)
        bench = measure.Bench(suite.name, found, meta["rounds"], properties.l2_bytes, take=telemetry.take)
        begun = time.monotonic()
        _ahead(suite, found, done, _AHEAD_S if deadline is None else deadline - begun - _LEAST_S)
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
    if outcome.whole and suite.name == OWN:
        earlier = _earlier(path, meta)
        finished = outcome.records = records.merge(earlier.records if earlier else [], finished)
    records.write(path if outcome.whole else kept, meta, finished)
    if outcome.whole:
        kept.unlink(missing_ok=True)
    else:
        outcome.path = kept
    return outcome


def _ahead(suite: Suite, found: dict[str, peers.Peer], done: Iterable[dict[str, Any]], seconds: float) -> None:
    """Has everyone who can compile what is still to do, where that is worth the start of processes and time is left."""
    known = {records.cell_key(record) for record in done}
    todo: dict[str, dict[Any, None]] = {}
    for cell in suite.cells:
        if _key(suite, cell) not in known:
            todo.setdefault(cell.op, {}).setdefault(cell.problem)
    end = time.monotonic() + seconds
    for op, problems in todo.items():
        for peer in found.values():
            left = end - time.monotonic()
            if suite.measure is not measure.coldstart and len(problems) >= _FEW and left > 0 and op in peer.ahead:
                peer.ahead[op](list(problems), left)


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
    longest = _LEAST_S
    earlier_s = meta["duration_s"]
    for number, cell in enumerate(suite.cells, 1):
        if _key(suite, cell) in known:
            continue
        start = time.monotonic()
        if deadline is not None and start + longest > deadline:
            break
        new = _measured(suite, cell, bench)
        done = [*done, *new]
        longest = max(longest, time.monotonic() - start)
        meta["duration_s"] = round(earlier_s + time.monotonic() - begun, 1)
        records.write(kept, meta, done)
        watcher.measured([_with_shares(record, meta) for record in new], number, len(suite.cells))
    meta["duration_s"] = earlier_s
    return done


def _measured(suite: Suite, cell: Cell, bench: measure.Bench) -> list[dict[str, Any]]:
    """The records of a cell. What fails for all of it, as inputs that do not fit into memory, is told in each."""
    try:
        return list(suite.measure(cell, bench))
    except Exception as error:
        measure.raise_if_lost(error)
        said = peers.reason_of(error)
        return [{**measure.describe(cell, suite.name), "impl": name, "error": said} for name in bench.found]


def _count_done(suite: Suite, done: Iterable[dict[str, Any]]) -> int:
    known = {records.cell_key(record) for record in done}
    return sum(_key(suite, cell) in known for cell in suite.cells)


def _take_over(kept: Path, meta: dict[str, Any], suite: Suite) -> list[dict[str, Any]]:
    """What an earlier piece of this very run measured of this suite; `meta` goes on with its counts."""
    earlier = _earlier(kept, meta)
    if earlier is None:
        return []
    meta["pieces"] = earlier.meta["pieces"] + 1
    meta["duration_s"] = earlier.meta["duration_s"]
    meta["ceilings_measured"] = list(earlier.meta["ceilings_measured"])
    keys = {_key(suite, cell) for cell in suite.cells}
    return [record for record in earlier.records if records.cell_key(record) in keys]


def _earlier(path: Path, meta: dict[str, Any]) -> records.Run | None:
    """What stands in a results file, where it is of the same things as this run, so that their cells can be joined."""
    try:
        earlier = records.read(path)
    except Exception:  # none, or one that cannot be read
        return None
    names = ("uuid", "versions", "sources", "harness", "rounds", "absent", "mode")
    return earlier if all(earlier.meta.get(name) == meta.get(name) for name in names) else None


def _key(suite: Suite, cell: Cell) -> records.Cell:
    return records.cell_key(measure.describe(cell, suite.name))


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
        "schema": schema.SCHEMA,
        "suite": suite.name,
        "title": suite.title,
        "gpu": properties.name,
        "uuid": properties.uuid,
        "driver": telemetry.versions().get("driver"),
        "cuda": ".".join(map(str, toolchain.driver_version() or ())) or None,
        "versions": {**versions, **tools, "cupy": ", ".join(wheels) or None},
        "sources": digest.sources_digest(),
        "harness": digest.folder_digest("benchmarks"),
        "mode": choice.current_mode(),
        "date": digest.timestamp(),
        "duration_s": 0.0,
        "pieces": 1,
        "rounds": rounds,
        "method": " ".join(filter(None, [suite.method, telemetry.reason])),
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
    return Suite(OWN, "Your own problems", tuple(Cell(op, problem) for problem in dict.fromkeys(problems)))
