"""What can be measured: a module for each operation, with its inputs, its truth and its description in a record.

A module of this package with a list `OPERATIONS` takes part; nothing else has to be told.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Errors", "Operation", "Truth", "known"]


@dataclass(frozen=True)
class Errors:
    """Of a result, as shares of the truth's RMS. `worst`: the RMS error of its worst part, of that part's RMS."""

    rms: float
    largest: float
    worst: float


class Truth(Protocol):
    """The float64 result of an operation, or of a sample of it."""

    def errors(self, result: Any) -> Errors:
        """Of a result in the operation's own form."""


class Operation(Protocol):
    """One operation on torch tensors."""

    name: str

    def describe(self, problem: Any) -> dict[str, Any]:
        """The keys of a record that name the problem: those of records.CELL_KEYS that apply, and any of its own."""

    def inputs(self, problem: Any, variant: str | None, seed: int) -> tuple[Any, ...]:
        """Random tensors on the current GPU. The variant is of what they are drawn from; None is N(0, 1)."""

    def input_bytes(self, problem: Any) -> int: ...
    def truth(self, problem: Any, tensors: tuple[Any, ...], *, thorough: bool) -> Truth:
        """Of a sample of the rows, or of every row of some heads where it is to be thorough."""

    def tolerance(self, problem: Any) -> float:
        """The RMS error of a part beyond which a result is of something else, and its time none of this problem's."""

    def flop(self, problem: Any) -> float:
        """What TFLOP/s are counted by."""

    def line(self, problem: Any) -> str:
        """The problem as a line of text, which `parse` reads."""

    def parse(self, line: str) -> Any: ...


@functools.cache
def known() -> dict[str, Operation]:
    """Every operation by name."""
    found: list[Operation] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "OPERATIONS", [])
    return {operation.name: operation for operation in found}
