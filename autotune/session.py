"""Many problems tuned, on one GPU or several: what is stored already is left, each result is kept at once.

Ctrl-C, a deadline or a lost process cost at most the problems under way; the same command goes on with the rest.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from rtk import shapes
from rtk.autotune import model, search, trial
from rtk.autotune.choice import config_of
from rtk.autotune.keys import Choice, Gpu, Place, digest
from rtk.autotune.search import Tuned
from rtk.autotune.store import Store
from rtk.errors import ArgumentError, RtkError
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import AttentionProblem
from rtk.spec import KernelSpec


class Watcher:
    """Who is told how a session goes on: nobody, but for what a subclass does. Numbers count from 1."""

    def begun(self, problem: AttentionProblem, number: int, total: int) -> None: ...
    def step(self, said: str) -> None: ...
    def tuned(self, found: Tuned, number: int, total: int) -> None: ...
    def failed(self, found: Failed, number: int, total: int) -> None: ...


@dataclass(frozen=True)
class Failed:
    """A problem that could not be tuned, and why."""

    problem: AttentionProblem
    error: RtkError


@dataclass(frozen=True)
class Summary:
    """What a session did. `left` are the problems that time did not suffice for."""

    tuned: tuple[Tuned, ...]
    failed: tuple[Failed, ...]
    known: int
    left: tuple[AttentionProblem, ...]


def run(
    problems: Sequence[AttentionProblem],
    devices: Sequence[int],
    watcher: Watcher,
    *,
    candidates: int | None = search.CANDIDATES,
    deadline: float | None = None,
    again: bool = False,
    spec: KernelSpec[Any, Any] = SPEC,
) -> Summary:
    """Tune these problems, those of one bucket once. `deadline` is of time.monotonic().

    With several devices, all of one model, each has a process of its own. ArgumentError where the models differ.
    """
    models = {Gpu.of(device) for device in devices}
    if len(models) != 1:
        names = ", ".join(sorted(found.name for found in models)) or "none"
        raise ArgumentError(
            "gpus", names, "GPUs of one model: stored choices are of a model", "name some by --gpus 0,1"
        )
    todo, known = waiting(problems, models.pop(), Store(), candidates, again=again, spec=spec)
    tune = functools.partial(_tuned, spec, candidates=candidates, again=again)
    if len(devices) > 1:
        done = _on_several(todo, devices, watcher, tune, deadline)
    else:
        done = _on_one(todo, devices[0], watcher, tune, deadline)
    finished = {found.problem for found in done}
    return Summary(
        tuple(found for found in done if isinstance(found, Tuned)),
        tuple(found for found in done if isinstance(found, Failed)),
        known,
        tuple(problem for problem in todo if problem not in finished),
    )


def waiting(
    problems: Iterable[AttentionProblem],
    gpu: Gpu,
    store: Store,
    candidates: int | None = search.CANDIDATES,
    *,
    again: bool = False,
    spec: KernelSpec[Any, Any] = SPEC,
) -> tuple[list[AttentionProblem], int]:
    """(the first problem of each bucket that is to be tuned, how many buckets have nothing new to try)."""
    stored = {choice.place for choice in store.choices()}
    found: dict[Place, AttentionProblem] = {}
    known = set()
    for problem in problems:
        place = Place.of(spec, problem, gpu)
        if place in found or place in known:
            continue
        if not again and place in stored and not search.untried(spec, problem, gpu, store, candidates):
            known.add(place)
        else:
            found[place] = problem
    return list(found.values()), len(known)


def verify(
    choices: Iterable[Choice], device: int, *, spec: KernelSpec[Any, Any] = SPEC, rounds: int = 15
) -> Iterator[tuple[Choice, float, float]]:
    """(choice, µs now, µs of the model's pick now) of each stored choice of this GPU and these sources.

    The new time is stored with today's versions, and the choice is no longer marked as another version's.
    """
    gpu, store = Gpu.of(device), Store()
    for stored in choices:
        if (stored.place.kernel, stored.place.sources, stored.place.gpu) != (spec.name, digest(spec), gpu):
            continue
        try:
            problem = shapes.parse(stored.problem)
        except ArgumentError:  # imported, of what this version cannot read
            continue
        config = config_of(spec, problem, stored)
        if config is None or stored.place != Place.of(spec, problem, gpu):
            continue
        now, pick = retimed(spec, problem, [config, model.pick(spec, problem, model.Machine.of(gpu))], device, rounds)
        here = search.versions_here()
        store.put(replace(stored, us=now, driver=here["driver"], nvrtc=here["nvrtc"], date=here["date"]))
        yield stored, now, pick


def retimed(
    spec: KernelSpec[Any, Any], problem: Any, configs: Sequence[Any], device: int, rounds: int
) -> tuple[float, ...]:
    """The median µs of each of these configs, timed in turns."""
    with trial.entered(device, spec, problem) as trying:
        for index, config in enumerate(configs):
            trying.add(index, config)
        measured = trying.measure(range(len(configs)), rounds)
    return tuple(statistics.median(measured[index]) for index in range(len(configs)))


# --- one GPU, several GPUs -------------------------------------------------------------------------------------------

Done = Tuned | Failed
Tune = Callable[..., Done]  # _tuned, but for the problem and the device


def _tuned(spec: KernelSpec[Any, Any], problem: AttentionProblem, device: int, **options: Any) -> Done:
    """One that fails costs the others nothing."""
    try:
        return search.tune(spec, problem, device, **options)
    except RtkError as error:
        return Failed(problem, error)


def _tell(watcher: Watcher, found: Done, number: int, total: int) -> None:
    if isinstance(found, Tuned):
        watcher.tuned(found, number, total)
    else:
        watcher.failed(found, number, total)


def _on_one(
    todo: Sequence[AttentionProblem], device: int, watcher: Watcher, tune: Tune, deadline: float | None
) -> list[Done]:
    done: list[Done] = []
    longest = 0.0
    for number, problem in enumerate(todo, 1):
        start = time.monotonic()
        if deadline is not None and start + longest > deadline:
            break
        watcher.begun(problem, number, len(todo))
        done.append(tune(problem, device, progress=watcher.step))
        longest = max(longest, time.monotonic() - start)
        _tell(watcher, done[-1], number, len(todo))
    return done


def _on_several(
    todo: Sequence[AttentionProblem], devices: Sequence[int], watcher: Watcher, tune: Tune, deadline: float | None
) -> list[Done]:
    """A process a GPU. Where this one is interrupted or one of them fails, the others end what they are at."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    free = context.Queue()
    for device in devices:
        free.put(device)
    rest = list(enumerate(todo, 1))[::-1]
    done: list[Done] = []
    longest = 0.0
    with ProcessPoolExecutor(len(devices), context, _enter, (free,)) as pool:
        running: dict[Future[Done], tuple[int, float]] = {}
        while rest or running:
            in_time = deadline is None or time.monotonic() + longest < deadline
            try:
                while in_time and rest and len(running) < len(devices):
                    number, problem = rest.pop()
                    watcher.begun(problem, number, len(todo))
                    with _no_interrupts():  # a process that starts inherits that
                        running[pool.submit(_work, tune, problem)] = number, time.monotonic()
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, start = running.pop(future)
                    longest = max(longest, time.monotonic() - start)
                    done.append(future.result())
                    _tell(watcher, done[-1], number, len(todo))
            except BrokenProcessPool:
                raise RtkError(_LOST) from None
            except KeyboardInterrupt:  # what is under way ends in seconds, and is stored
                for future in wait(running).done:
                    _tell(watcher, future.result(), running[future][0], len(todo))
                raise
    return done


_LOST = (
    "rtk: a process that tuned has ended unexpectedly; what was done is stored, and the same command goes on. "
    "(A script that tunes on several GPUs must do so below `if __name__ == '__main__':`.)"
)
_device = 0  # of this process, where it works for another


def _enter(free: Any) -> None:
    global _device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _device = free.get()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(tune: Tune, problem: AttentionProblem) -> Done:
    return tune(problem, _device)
