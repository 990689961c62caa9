"""What a peer is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class CannotRun(Exception):
    """This implementation is not here, or does not serve this problem; the text says why."""


def _same(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Prepared:
    """A call without arguments, all that it needs made beforehand: copies in its own layout, plans, masks.

    `canonical` turns what it returns into the operation's form, as (batch, heads, seqlen, head_dim) for attention.
    `context` is entered around a series of calls, for switches that would cost time in each.
    """

    call: Callable[[], Any]
    canonical: Callable[[Any], Any] = _same
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    notes: Mapping[str, Any] = field(default_factory=dict)  # for the record

    def entered(self) -> Callable[[], Any]:
        """The call within its context: in a graph, and behind a wait, that costs nothing that is measured."""
        if self.context is contextlib.nullcontext:
            return self.call

        def call() -> Any:
            with self.context():
                return self.call()

        return call


@dataclass(frozen=True)
class Peer:
    """One implementation. `operations` maps an operation's name to what prepares a call: f(problem, *tensors).

    `load` raises where it cannot be used here; `version` is told of what is loaded, None where nothing says. `imports`
    is the statement by which a user brings it in. `ahead` maps an operation's name to what compiles for problems at
    once, in so many seconds at most, so that a suite does not wait for each in turn; what it cannot compile it leaves.
    """

    name: str
    load: Callable[[], Any]
    version: Callable[[], str | None]
    operations: Mapping[str, Callable[..., Prepared]] = field(default_factory=dict)
    imports: str = ""
    ahead: Mapping[str, Callable[[Sequence[Any], float], None]] = field(default_factory=dict)

    def prepare(self, operation: str, problem: Any, tensors: tuple[Any, ...], **options: Any) -> Prepared:
        """Raises CannotRun, or whatever the library raises, where it does not serve the problem."""
        make = self.operations.get(operation)
        if make is None:
            raise CannotRun(f"no {operation}")
        return make(problem, *tensors, **options)


def to_bshd(*tensors: Any) -> list[Any]:
    """Copies in (batch, seqlen, heads, head_dim), the layout of FlashAttention's family."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def from_bshd(o: Any) -> Any:
    """As (batch, heads, seqlen, head_dim), a view."""
    return o.transpose(1, 2)


def window_of(problem: Any, unbounded: int | None = -1) -> tuple[bool, tuple[int | None, int | None]]:
    """(causal, (left, right)) as FlashAttention's family takes them. Its diagonal is at the bottom right, only."""
    if problem.diagonal != problem.seqlen_k - problem.seqlen_q and problem.window_right is not None:
        raise CannotRun("no mask aligned at the top left")
    left, right = problem.window_left, problem.window_right
    if left is None and right == 0:
        return True, (unbounded, unbounded)
    return False, (unbounded if left is None else left, unbounded if right is None else right)
