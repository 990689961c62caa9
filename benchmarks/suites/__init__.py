"""What is measured together: a suite is a list of cells and what to measure of each.

A module of this package with a list `SUITES` takes part; nothing else has to be told.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rtk.benchmarks import measure
from rtk.errors import ArgumentError

__all__ = ["Cell", "Suite", "find", "known"]

Cell = measure.Cell
TURNS = (
    "Median and quartiles over rounds in which the implementations take turns, in another order each time. A turn is "
    "a replay of a CUDA graph of some calls, or eager calls where one of the cell cannot be captured (`timing` says "
    "which), behind a wait on the GPU until all is enqueued. Inputs are N(0, 1), rotated through twice the level-2 "
    "cache. Each implementation was compared with float64 before."
)


@dataclass(frozen=True)
class Suite:
    """`measure` yields the records of one cell. Rounds are how often each implementation of a cell takes its turn."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    measure: Callable[[Cell, measure.Bench], Iterator[dict[str, Any]]] = measure.times
    rounds: int = 15
    method: str = TURNS


@functools.cache
def known() -> dict[str, Suite]:
    """Every suite by name, in the order of the modules and of their lists."""
    found: list[Suite] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "SUITES", [])
    return {suite.name: suite for suite in found}


def find(name: str) -> Suite:
    """The suite of this name; ArgumentError where there is none."""
    if name not in known():
        raise ArgumentError("suite", name, ", ".join(known()))
    return known()[name]
