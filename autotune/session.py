"""Many problems tuned one after the other: what is stored already is left, each result is kept at once, time is short.

Ctrl-C, a deadline or a lost process cost at most the problem under way; the same command goes on with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rtk import shapes, toolchain
from rtk.autotune import search
from rtk.autotune.keys import Choice, Gpu, Place
from rtk.autotune.search import Tuned
from rtk.autotune.store import Store
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import AttentionProblem
from rtk.spec import KernelSpec


class Watcher(Protocol):
    """Who is told how a session goes on."""

    def begun(self, problem: AttentionProblem, number: int, total: int) -> None: ...
    def step(self, said: str) -> None: ...
    def tuned(self, found: Tuned, number: int, total: int) -> None: ...


@dataclass(frozen=True)
class Summary:
    """What a session did. `left` are the problems that time did not suffice for."""

    tuned: tuple[Tuned, ...]
    known: int
    left: tuple[AttentionProblem, ...]


def waiting(
    problems: Iterable[AttentionProblem],
    gpu: Gpu,
    store: Store,
    *,
    again: bool = False,
    spec: KernelSpec[Any, Any] = SPEC,
) -> tuple[list[AttentionProblem], int]:
    """(the first problem of each bucket that is to be tuned, how many buckets are stored already)."""
    stored: dict[Place, Choice] = {choice.place: choice for choice in store.choices()}
    here = toolchain.nvrtc().build
    found: dict[Place, AttentionProblem] = {}
    known = set()
    for problem in problems:
        place = Place.of(spec, problem, gpu)
        if not again and place in stored and stored[place].nvrtc == here:
            known.add(place)
        else:
            found.setdefault(place, problem)
    return list(found.values()), len(known)


def run(
    problems: Sequence[AttentionProblem],
    device: int,
    watcher: Watcher,
    *,
    candidates: int | None = search.CANDIDATES,
    deadline: float | None = None,
    again: bool = False,
    spec: KernelSpec[Any, Any] = SPEC,
) -> Summary:
    """Tune these problems on a device, those of one bucket once. `deadline` is of time.monotonic()."""
    store = Store()
    todo, known = waiting(problems, Gpu.of(device), store, again=again, spec=spec)
    done: list[Tuned] = []
    longest = 0.0
    for number, problem in enumerate(todo, 1):
        start = time.monotonic()
        if deadline is not None and start + longest > deadline:
            break
        watcher.begun(problem, number, len(todo))
        found = search.tune(
            spec,
            problem,
            device,
            text=shapes.describe(problem),
            candidates=candidates,
            store=store,
            progress=watcher.step,
        )
        done.append(found)
        longest = max(longest, time.monotonic() - start)
        watcher.tuned(found, number, len(todo))
    return Summary(tuple(done), known, tuple(todo[len(done) :]))


def verify(
    choices: Iterable[Choice], device: int, *, spec: KernelSpec[Any, Any] = SPEC, rounds: int = 15
) -> Iterator[tuple[Choice, float, float]]:
    """(choice, µs now, µs of the first pick now) of each stored choice of this GPU and these sources, timed again."""
    from rtk.autotune import choice as choosing
    from rtk.autotune import trial

    gpu = Gpu.of(device)
    for stored in choices:
        problem = shapes.parse(stored.problem)
        if stored.place != Place.of(spec, problem, gpu):
            continue
        config = choosing.config_of(spec, problem, stored)
        if config is None:
            continue
        with trial.entered(device, spec, problem) as trying:
            for index, each in enumerate((config, spec.pick(problem))):
                trying.add(index, each)
            measured = trying.measure([0, 1], rounds)
        now, pick = (sorted(measured[index])[rounds // 2] for index in (0, 1))
        yield stored, now, pick
