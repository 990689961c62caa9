"""Tuning: the model's best candidates, compiled in parallel, timed by successive halving; the winner is checked."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rtk
from rtk import driver, jit, toolchain
from rtk.autotune import halving, model, trial
from rtk.autotune.keys import Choice, Gpu, Place, Timed, config_key
from rtk.autotune.store import Store
from rtk.digest import timestamp
from rtk.errors import CompileError, DriverError, RtkError
from rtk.spec import KernelSpec, config_fields

CANDIDATES = 16
_BEST_BEFORE = 2  # configs of an earlier run that are timed again
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning one problem came to. `pick_us` is the time of what a call got before: the model's first pick."""

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
    candidates: int | None = CANDIDATES,
    again: bool = False,
    store: Store | None = None,
    progress: Progress = lambda said: None,
) -> Tuned:
    """Finds the fastest config of a problem on a device and stores it.

    candidates: how many of the model's best are tried, None for the whole space; beside them the first pick and what
    was best before. again: also those whose times are stored. Raises RtkError where none of them gives the right
    answer, and what compiling and the driver raise.
    """
    start = time.monotonic()
    place = Place.of(spec, problem, Gpu.of(device))
    store = store or Store()
    configs = _candidates(spec, problem, place, store, candidates, again)
    progress(f"compiling {len(configs)} candidates")
    compiled = _compiled(spec, configs)
    with trial.entered(device, spec, problem) as trying:
        ready = _ready(trying, compiled)
        progress(f"timing {len(ready)} candidates")
        outcome = halving.best(len(ready), lambda left, rounds: trying.measure(left, rounds))
        versions = versions_here()
        times = [_timed(config, rounds, versions) for config, rounds in zip(ready, outcome.paired(), strict=True)]
        winner, wrong = _right(trying, ready, times, outcome.winner)
    pick_us = times[0].us
    timings = [timed for config, timed in zip(ready, times, strict=True) if config not in wrong]
    timings += [_timed(config, (), versions) for config in configs if config not in ready or config in wrong]
    chosen = config_fields(ready[winner])
    choice = Choice(place, chosen, spec.describe(problem), times[winner].us, rtk=rtk.__version__, **versions)
    kept = store.put(choice, timings)
    return Tuned(problem, choice, tuple(timings), pick_us, time.monotonic() - start, kept)


def untried(
    spec: KernelSpec[Any, Any], problem: Any, gpu: Gpu, store: Store, candidates: int | None = CANDIDATES
) -> list[Any]:
    """Those of the candidates that were never tried with today's NVRTC and driver: of a changed space, what is new."""
    here, tried = versions_here(), store.tried(Place.of(spec, problem, gpu))
    known = {config_key(each.config) for each in tried if (each.nvrtc, each.driver) == (here["nvrtc"], here["driver"])}
    proposed = _proposed(spec, problem, gpu, candidates)
    return [config for config in proposed if config_key(config_fields(config)) not in known]


def _candidates(
    spec: KernelSpec[Any, Any], problem: Any, place: Place, store: Store, count: int | None, again: bool
) -> list[Any]:
    """The model's first pick; all that is proposed, or what of it is new; and what was best before. Each once."""
    proposed = _proposed(spec, problem, place.gpu, count)
    known = {config_key(config_fields(config)): config for config in spec.configs(problem)}
    before = sorted(store.timings(place), key=lambda timed: timed.us)[:_BEST_BEFORE]
    new = proposed if again else untried(spec, problem, place.gpu, store, count)
    best_before = [known[key] for timed in before if (key := config_key(timed.config)) in known]
    return list(dict.fromkeys([proposed[0], *new, *best_before]))


def _proposed(spec: KernelSpec[Any, Any], problem: Any, gpu: Gpu, count: int | None) -> list[Any]:
    """The model's first pick, the kernel's own, and the model's best; None counts the whole space."""
    space, machine = spec.configs(problem), model.Machine.of(gpu)
    order = [space[index] for index in model.ranked(spec, problem, space, machine)][:count]
    return list(dict.fromkeys([model.pick(spec, problem, machine), spec.pick(problem), *order]))


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


def _right(trying: trial.Trial, ready: Sequence[Any], timings: Sequence[Timed], winner: int) -> tuple[int, list[Any]]:
    """(the winner, or the fastest of the others where its answer is wrong; who was wrong). RtkError if all are."""
    others = sorted((i for i in range(len(ready)) if i != winner), key=lambda i: timings[i].us)
    wrong: dict[int, str] = {}
    for index in (winner, *others):
        said = trying.verify(ready[index])
        if not said:
            if wrong:
                left_out = "; ".join(f"{config_fields(ready[each])}: {what}" for each, what in wrong.items())
                warnings.warn(f"rtk: left out, for a wrong answer: {left_out}", RuntimeWarning, stacklevel=3)
            return index, [ready[each] for each in wrong]
        wrong[index] = said
    first = next(iter(wrong))
    raise RtkError(f"no candidate gives the right answer: {config_fields(ready[first])}: {wrong[first]}")


_NEVER_US = 1e9  # stands for the time of what cannot be used


def _timed(config: Any, rounds: Sequence[float], versions: Mapping[str, str]) -> Timed:
    """Of the rounds' µs; of none for a config that cannot be used."""
    ordered = sorted(rounds) or [_NEVER_US]
    q1, median, q3 = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return Timed(config_fields(config), median, q1, q3, len(rounds), **versions)


def versions_here() -> dict[str, str]:
    """What a time measured now was built and run with, and when."""
    return {"driver": driver_here(), "nvrtc": toolchain.nvrtc().build, "date": timestamp()}


def driver_here() -> str:
    """The version of CUDA that the driver serves; "" where there is none."""
    return ".".join(map(str, toolchain.driver_version() or ())) if driver.available() else ""
