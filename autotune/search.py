"""Tuning: the model's best candidates, compiled in parallel, timed by successive halving; the winner is checked."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import rtk
from rtk import driver, jit, toolchain
from rtk.autotune import halving, model, trial
from rtk.autotune.keys import Choice, Gpu, Place, Timed
from rtk.autotune.store import Store
from rtk.errors import CompileError, DriverError, RtkError
from rtk.spec import KernelSpec, config_fields

CANDIDATES = 16
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning one problem came to. `pick_us` is the time of the kernel's own first pick, in the same rounds."""

    problem: Any
    choice: Choice
    timings: tuple[Timed, ...]
    pick_us: float
    seconds: float
    stored: bool

    @property
    def gain(self) -> float:
        """How many times as fast as the first pick."""
        return self.pick_us / self.choice.us


def tune(
    spec: KernelSpec[Any, Any],
    problem: Any,
    device: int,
    *,
    text: str = "",
    candidates: int | None = CANDIDATES,
    store: Store | None = None,
    progress: Progress = lambda said: None,
) -> Tuned:
    """Finds the fastest config of a problem on a device and stores it.

    text: how the problem is written down. candidates: how many of the model's best are tried, None for the whole space;
    the first pick and what is stored already are tried as well. Raises RtkError where none of them gives the right
    answer, and what compiling and the driver raise.
    """
    start = time.monotonic()
    place = Place.of(spec, problem, Gpu.of(device))
    store = store or Store()
    configs = _candidates(spec, problem, place, store, candidates)
    progress(f"compiling {len(configs)} candidates")
    configs = _compiled(spec, configs)
    with trial.entered(device, spec, problem) as trying:
        ready = _ready(trying, configs)
        progress(f"timing {len(ready)} candidates")
        outcome = halving.best(len(ready), lambda left, rounds: trying.measure(left, rounds))
        timings = tuple(_timed(ready[index], rounds) for index, rounds in outcome.rounds.items())
        winner = _right(trying, ready, timings, outcome.winner)
    by_config = {id(config): timed for config, timed in zip(ready, timings, strict=True)}
    pick_us = by_config[id(ready[0])].us
    versions = {"driver": _driver(), "nvrtc": toolchain.nvrtc().build, "rtk": rtk.__version__, "date": _now()}
    choice = Choice(place, config_fields(ready[winner]), text or str(problem), timings[winner].us, **versions)
    kept = store.put(choice, timings)
    return Tuned(problem, choice, timings, pick_us, time.monotonic() - start, kept)


def _candidates(spec: KernelSpec[Any, Any], problem: Any, place: Place, store: Store, count: int | None) -> list[Any]:
    """The first pick, then the model's best, then what an earlier run found best; each once."""
    space = spec.configs(problem)
    machine = model.Machine(sm_count=place.gpu.sm_count)
    order = [space[index] for index in model.ranked(spec, problem, space, machine)]
    found = [spec.pick(problem), *(order if count is None else order[:count])]
    known = {tuple(sorted(config_fields(config).items())): config for config in space}
    for timed in sorted(store.timings(place), key=lambda timed: timed.us)[:2]:
        found.append(known.get(tuple(sorted(timed.config.items())), found[0]))
    return list(dict.fromkeys(found))


def _compiled(spec: KernelSpec[Any, Any], configs: Sequence[Any]) -> list[Any]:
    """Those that compile; the first pick must."""
    try:
        jit.build_many([spec.render(config) for config in configs])
        return list(configs)
    except CompileError:
        kept = []
        for config in configs:
            try:
                jit.build(spec.render(config))
                kept.append(config)
            except CompileError:
                if config is configs[0]:
                    raise
        return kept


def _ready(trying: trial.Trial, configs: Sequence[Any]) -> list[Any]:
    """Those that can be launched here, numbered in the trial by their place in the list; the first must be one."""
    ready: list[Any] = []
    for config in configs:
        try:
            trying.add(len(ready), config)
        except DriverError:
            if not ready:
                raise
        else:
            ready.append(config)
    return ready


def _right(trying: trial.Trial, ready: Sequence[Any], timings: Sequence[Timed], winner: int) -> int:
    """The winner, or the fastest of the others where its answer is wrong. RtkError where all are wrong."""
    others = sorted((i for i in range(len(ready)) if i != winner), key=lambda i: timings[i].us)
    wrong = []
    for index in (winner, *others):
        said = trying.verify(ready[index])
        if not said:
            return index
        wrong.append(f"{config_fields(ready[index])}: {said}")
    raise RtkError("no candidate gives the right answer: " + "; ".join(wrong[:3]))


def _timed(config: Any, rounds: Sequence[float]) -> Timed:
    ordered = sorted(rounds)
    q1, median, q3 = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return Timed(config_fields(config), median, q1, q3, len(rounds), _driver(), toolchain.nvrtc().build, _now())


def _driver() -> str:
    return ".".join(map(str, toolchain.driver_version() or ())) if driver.available() else ""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
