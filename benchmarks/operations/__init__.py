"""What can be measured: a module for each operation, with its inputs, its truth and its description in a record.

A module of this package with a list `OPERATIONS` takes part; nothing else has to be told.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any, Protocol

__all__ = ["Operation", "Truth", "known"]


class Truth(Protocol):
    """The float64 result of an operation, or of a sample of it."""

    def errors(self, result: Any) -> tuple[float, float]:
        """(RMS, largest) error of a result in the operation's own form, as shares of the truth's RMS."""


class Operation(Protocol):
    """One operation on torch tensors."""

    name: str

    def describe(self, problem: Any) -> dict[str, Any]:
        """The keys of a record that name the problem."""

    def inputs(self, problem: Any, variant: str | None, seed: int) -> tuple[Any, ...]:
        """Random tensors on the current GPU. The variant is of what they are drawn from; None is N(0, 1)."""

    def input_bytes(self, problem: Any) -> int: ...
    def truth(self, problem: Any, tensors: tuple[Any, ...], *, thorough: bool) -> Truth:
        """Of a sample of the rows, or of every row of some heads where it is to be thorough."""

    def tolerance(self, problem: Any) -> float:
        """The RMS error beyond which a result is of something else, and its time is none of this problem's."""


@functools.cache
def known() -> dict[str, Operation]:
    """Every operation by name."""
    found: list[Operation] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "OPERATIONS", [])
    return {operation.name: operation for operation in found}
