"""Two runs, OLD and NEW, cell by cell: what became slower or faster beyond noise, and whether the winners are the same.

Records are matched by cell and implementation. Their rounds are not paired, so the noise of a ratio comes from both
records' quartiles, and nothing below RESOLUTION counts. Where at least two peers that did not change stand in a cell in
both runs, the median of their ratios is the drift of card, clock and method; the verdict is on the ratio without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rtk.benchmarks import records
from rtk.benchmarks.records import Ratio, Record, Run, Verdict
from rtk.benchmarks.report import name

__all__ = ["Change", "Comparison", "compare"]

_LEAST_PEERS = 2  # one peer alone may have had a bad moment
# Whose version an implementation has, where it is not its own.
_VERSION_OF = {"sdpa": "torch", "flex": "torch"}


@dataclass(frozen=True)
class Change:
    """One record in both runs. Ratios are OLD's time over NEW's: > 1 where NEW is faster."""

    suite: str
    problem: str
    impl: str
    old_us: float
    new_us: float
    ratio: Ratio
    drift: float | None  # None: too few unchanged peers in this cell
    corrected: Ratio  # the ratio without the drift; the ratio itself where there is none

    @property
    def verdict(self) -> Verdict:
        """Whether NEW is faster than OLD here."""
        return self.corrected.verdict

    def __str__(self) -> str:
        drift = "" if self.drift is None else f", drift of its peers {self.drift:.3f}"
        times = f"{self.old_us:,.2f} → {self.new_us:,.2f} µs"
        r = self.corrected
        return (
            f"{self.suite}, {self.problem}, {name(self.impl)}: {times}, {r.value:.3f} ({r.low:.3f}–{r.high:.3f}){drift}"
        )


@dataclass(frozen=True)
class Comparison:
    """What compare() found. `winners_same` of `winners` cells have the same fastest implementation, or a tie for it."""

    changes: list[Change]
    old: str = ""  # which card, when
    new: str = ""
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    winners_same: int = 0
    winners: int = 0
    winners_differ: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[Change]:
        """rtk's cells that are slower beyond noise."""
        return [change for change in self.changes if change.impl == records.RTK and change.verdict == "slower"]

    def by_verdict(self, verdict: Verdict) -> list[Change]:
        """The changes of this verdict, the largest first."""
        found = [change for change in self.changes if change.verdict == verdict]
        return sorted(found, key=lambda change: change.corrected.value, reverse=verdict == "faster")

    def text(self) -> str:
        """The comparison for people."""
        lines = [f"old: {self.old}", f"new: {self.new}", ""]
        lines += [f"{len(self.changes)} times in both runs; ratio: old time / new time, above 1 is faster now"]
        verdicts: tuple[Verdict, ...] = ("slower", "faster")
        for verdict in verdicts:
            found = self.by_verdict(verdict)
            lines += ["", f"{verdict} beyond noise: {len(found)}", *(f"  {change}" for change in found)]
        for where, missing in (("old", self.only_old), ("new", self.only_new)):
            if missing:
                lines += ["", f"only in the {where} run: {len(missing)}", *(f"  {line}" for line in missing)]
        if self.winners:
            share = self.winners_same / self.winners
            lines += ["", f"same winner, or tied: {self.winners_same} of {self.winners} cells ({share:.0%})"]
            lines += [f"  {line}" for line in self.winners_differ]
        lines += ["", f"regressions of rtk: {len(self.regressions)}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The comparison for programs."""
        share = self.winners_same / self.winners if self.winners else None
        return {
            "old": self.old,
            "new": self.new,
            "regressions": len(self.regressions),
            "changes": [{**asdict(change), "verdict": change.verdict} for change in self.changes],
            "only_old": self.only_old,
            "only_new": self.only_new,
            "winners": {
                "cells": self.winners,
                "same_or_tied": self.winners_same,
                "share": share,
                "differ": self.winners_differ,
            },
        }


def compare(old: Run | Sequence[Run], new: Run | Sequence[Run]) -> Comparison:
    """Compare two runs, or two lists of runs whose suites are matched; what is in one of them only is listed."""
    olds, news = _by_suite(old), _by_suite(new)
    changes: list[Change] = []
    only_old: list[str] = []
    only_new: list[str] = []
    same, differ = 0, list[str]()
    for suite in dict.fromkeys([*olds, *news]):
        before, after = olds.get(suite), news.get(suite)
        old_cells = records.cells(records.measured(before.records if before else ()))
        new_cells = records.cells(records.measured(after.records if after else ()))
        names = records.labels(dict.fromkeys([*old_cells, *new_cells]))
        only_old += _only(old_cells, new_cells, names)
        only_new += _only(new_cells, old_cells, names)
        for key in (key for key in old_cells if key in new_cells):
            assert before and after  # both have the cell
            pair = {impl: (r, new_cells[key][impl]) for impl, r in old_cells[key].items() if impl in new_cells[key]}
            changes += _changes(suite, names[key], pair, _unchanged(pair, before, after))
            winner = _winners(pair)
            if winner and (winner[0] == winner[1] or _tied(pair, *winner)):
                same += 1
            elif winner:
                differ.append(f"{suite}, {names[key]}: {name(winner[0])} before, {name(winner[1])} now")
    return Comparison(changes, _described(olds), _described(news), only_old, only_new, same, same + len(differ), differ)


def _by_suite(runs: Run | Sequence[Run]) -> dict[str, Run]:
    return {run.suite: run for run in ([runs] if isinstance(runs, Run) else runs)}


def _described(runs: Mapping[str, Run]) -> str:
    """The card and the date of these runs, each pair once."""
    return "; ".join(dict.fromkeys(f"{run.gpu}, {run.meta.get('date') or 'no date'}" for run in runs.values()))


def _only(
    ours: Mapping[records.Cell, Mapping[str, Record]],
    theirs: Mapping[records.Cell, Mapping[str, Record]],
    names: Mapping[records.Cell, str],
) -> list[str]:
    found = []
    for key, cell in ours.items():
        missing = [name(impl) for impl in cell if impl not in theirs.get(key, {})]
        if missing:
            found.append(f"{next(iter(cell.values()))['suite']}, {names[key]}: {', '.join(missing)}")
    return found


Pair = Mapping[str, tuple[Record, Record]]  # {impl: (old, new)} of a cell


def _changes(suite: str, problem: str, pair: Pair, unchanged: Iterable[str]) -> list[Change]:
    ratios = {impl: records.ratio_of_medians(new, old) for impl, (old, new) in pair.items()}
    steady = [impl for impl in unchanged if ratios[impl]]
    found = []
    for impl, (old, new) in pair.items():
        ratio, old_us, new_us = ratios[impl], records.cost(old), records.cost(new)
        if ratio is None or old_us is None or new_us is None:
            continue
        others = [other.value for key in steady if key != impl and (other := ratios[key])]
        drift = statistics.median(others) if len(others) >= _LEAST_PEERS else None
        corrected = ratio if drift is None else ratio.over(drift)
        found.append(Change(suite, problem, impl, old_us, new_us, ratio, drift, corrected))
    return found


def _unchanged(pair: Pair, before: Run, after: Run) -> list[str]:
    """The peers that are the same in both runs as far as is known: of one version, or of an unknown one."""
    old, new = before.meta.get("versions") or {}, after.meta.get("versions") or {}

    def same(impl: str) -> bool:
        versions = {run.get(_VERSION_OF.get(impl, impl)) for run in (old, new)}
        return None in versions or len(versions) == 1

    return [impl for impl in pair if impl != records.RTK and same(impl)]


def _winners(pair: Pair) -> tuple[str, str] | None:
    """The fastest implementation in the old run and in the new one, of those in both; None of fewer than two."""
    if len(pair) < 2:
        return None
    old, new = (min(pair, key=lambda impl: records.cost(pair[impl][side]) or 0.0) for side in (0, 1))
    return old, new


def _tied(pair: Pair, first: str, second: str) -> bool:
    """Whether two implementations are tied in either run."""
    return any(records.verdict(pair[first][side], pair[second][side]) == "tie" for side in (0, 1))
