"""From results files to what people read: tables, Markdown, plots, one HTML page, and the comparison of two runs.

Everything here works on a machine without a GPU. rich, matplotlib and jinja2 come with the extra `bench` and are
imported when they are first needed.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rtk.benchmarks import floors, records
from rtk.benchmarks.records import Record, Run
from rtk.errors import ToolchainError

__all__ = ["NAMES", "Standing", "floor", "in_order", "milliseconds", "name", "need", "ordered", "standing", "warnings"]

# How people call the implementations, in the order of every table and plot.
NAMES = {
    "rtk": "rtk",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "sdpa": "torch SDPA",
    "flex": "FlexAttention",
    "flashinfer": "FlashInfer",
    "xformers": "xFormers",
}
_ORDER = tuple(NAMES)
_SHOWN = 3  # problems named where many lack a time for the same reason
_SUITES = ("paper", "small", "long", "coldstart", "overhead", "accuracy")


def need(module: str) -> Any:
    """The module of that name, which the extra `bench` brings. ToolchainError with the command where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ToolchainError(
            f"reports of benchmarks need {package}, which cannot be imported: {error}",
            'pip install "rtk-kernels[bench]"',
        ) from None


def name(impl: str) -> str:
    """The name of an implementation for people."""
    return NAMES.get(impl, impl)


def ordered(impls: Iterable[str]) -> list[str]:
    """Each implementation once: rtk, its peers as in NAMES, then what has no name, by the alphabet."""
    return sorted(set(impls), key=lambda impl: (_ORDER.index(impl) if impl in _ORDER else len(_ORDER), impl))


def in_order(runs: Iterable[Run]) -> list[Run]:
    """The runs in the order in which people want to read their suites."""
    return sorted(runs, key=lambda run: _SUITES.index(run.suite) if run.suite in _SUITES else len(_SUITES))


def milliseconds(value: float) -> str:
    """ms with as many digits as say something, from 0.031 to 4,320."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 1 else 3}f}"


@dataclass(frozen=True)
class Standing:
    """Where rtk stands against the best peer of each cell. `geomean`: of its ratios, > 1 where rtk is faster."""

    wins: int
    ties: int
    losses: int
    geomean: float

    @property
    def cells(self) -> int:
        return self.wins + self.ties + self.losses

    def __str__(self) -> str:
        return f"{self.wins} faster, {self.ties} tied, {self.losses} slower; {self.geomean:.3f}× the best peer's speed"


def standing(found: Iterable[Record]) -> Standing | None:
    """rtk against the best peer over all cells where both have a time; None where there is none."""
    verdicts: list[str] = []
    logs: list[float] = []
    for cell in records.cells(found).values():
        peer, ours = records.best_peer(cell), cell.get(records.RTK)
        ratio = records.ratio(ours, peer) if ours and peer else None
        if ratio:
            verdicts.append(ratio.verdict)
            logs.append(math.log(ratio.value))
    if not verdicts:
        return None
    wins, ties, losses = (verdicts.count(verdict) for verdict in ("faster", "tie", "slower"))
    return Standing(wins, ties, losses, math.exp(statistics.fmean(logs)))


def floor(record: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[str, float] | None:
    """The floor that binds a record, name and µs: the recorded one, otherwise computed from the run's ceilings."""
    found = record.get("floor_us") or floors.floors(record, meta.get("ceilings") or {}, meta.get("device") or {})
    return floors.largest({key: us for key, us in found.items() if us})


def warnings(run: Run) -> list[str]:
    """What a reader must know of single records: times that cannot be, and why others are missing."""
    names = records.labels(records.cells(run.records))
    lines: list[str] = []
    missing: dict[str, list[str]] = {}
    for record in run.records:
        where = names[records.cell_key(record)]
        if record.get("error"):
            missing.setdefault(f"{name(record['impl'])}: {record['error']}", []).append(where)
        elif why := floors.impossible(record, run.meta):
            lines.append(f"IMPOSSIBLE: {where}, {name(record['impl'])}: {why}")
    return lines + [f"{why} ({_some(where)})" for why, where in missing.items()]


def _some(words: list[str]) -> str:
    """The first of them, and how many there are."""
    return ", ".join(words) if len(words) <= _SHOWN else f"{', '.join(words[:_SHOWN])} and {len(words) - _SHOWN} more"
