"""Choices tuned, looked at and carried about: what the command `rtk autotune` does, as functions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk import driver, shapes
from rtk.autotune import choice, exchange, model, search, session
from rtk.autotune.choice import Chosen
from rtk.autotune.keys import Choice, Gpu, Place, config_key, gpu_here
from rtk.autotune.store import Store
from rtk.errors import ArgumentError, ToolchainError
from rtk.kernels.attention_fwd import SPEC, AttentionFwdConfig
from rtk.problem import AttentionProblem
from rtk.spec import config_fields

Problem = AttentionProblem | str  # or a line such as "b=2,hq=16,sq=4096,d=128,causal"
_SLOWER = 1.02  # than the model's pick: beyond what the noise of a few rounds can explain


def run(
    problems: Iterable[Problem],
    *,
    devices: Sequence[int] = (0,),
    exhaustive: bool = False,
    again: bool = False,
    minutes: float | None = None,
    watcher: session.Watcher | None = None,
) -> session.Summary:
    """Find the fastest config of each problem and store it; later calls of its bucket use it, in this process too.

    devices: ordinals of GPUs of one model; with several, each has a process of its own. exhaustive: all configs, not
    the cost model's best. again: also what is stored with nothing new to try. minutes: begin nothing after that.
    Raises ArgumentError for a problem or device that is none, and ToolchainError where there is no GPU. A problem that
    cannot be tuned is in the summary's `failed`.
    """
    if isinstance(problems, str):
        raise ArgumentError("problems", problems, "a list of problems")
    found = [_problem(problem) for problem in problems]
    _check_devices(devices)
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0):
        raise ArgumentError("minutes", minutes, "a positive number, or None for no limit")
    try:
        return session.run(
            found,
            devices,
            watcher or session.Watcher(),
            candidates=None if exhaustive else search.CANDIDATES,
            deadline=None if minutes is None else time.monotonic() + 60 * minutes,
            again=again,
        )
    finally:
        choice.reload()


def stored(gpu: str | None = None) -> list[Choice]:
    """The choices in the cache folder; of GPUs with this word in their names."""
    return _of_gpu(Store().choices(), gpu)


@dataclass(frozen=True)
class Candidate:
    """A config, the model's estimate, and its time if it was ever timed."""

    config: AttentionFwdConfig
    estimate_us: float
    us: float | None


@dataclass(frozen=True)
class Explanation:
    """What a call of this problem gets; of all candidates, the timed ones first, the fastest first."""

    problem: AttentionProblem
    gpu: Gpu
    chosen: Chosen
    candidates: tuple[Candidate, ...]


def explain(problem: Problem) -> Explanation:
    """What a call of a problem gets, and what speaks for it: the model's estimates beside what was measured."""
    found, gpu = _problem(problem), gpu_here()
    timed = {config_key(each.config): each.us for each in Store().timings(Place.of(SPEC, found, gpu))}
    space = SPEC.configs(found)
    estimates = model.estimate_us(SPEC, found, space, model.Machine.of(gpu))
    candidates = [
        Candidate(config, round(float(estimate), 3), timed.get(config_key(config_fields(config))))
        for config, estimate in zip(space, estimates, strict=True)
    ]
    candidates.sort(key=lambda each: (each.us is None, each.us or each.estimate_us))
    return Explanation(found, gpu, choice.choose(SPEC, found, gpu), tuple(candidates))


def export(path: str | os.PathLike[str], gpu: str | None = None) -> int:
    """Write stored choices to a JSON file, to be carried to another machine; how many. ArgumentError if it cannot."""
    found = stored(gpu)
    try:
        Path(path).write_text(exchange.render(found), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(str(path), f"what cannot be written: {error}", "a file that can") from None
    return len(found)


def import_(path: str | os.PathLike[str], gpu: str | None = None) -> tuple[list[Choice], int]:
    """(the choices in a file that `export` wrote, how many of them could be stored). ArgumentError for another file."""
    found = _of_gpu(exchange.read(path), gpu)
    store = Store()
    kept = sum(store.put(each) for each in found)
    choice.reload()
    return found, kept


@dataclass(frozen=True)
class Verified:
    """A stored choice, its time now, and that of the model's pick."""

    choice: Choice
    us: float
    pick_us: float

    @property
    def slower(self) -> bool:
        """Whether the choice has become worse than none."""
        return self.us > _SLOWER * self.pick_us


def verify(gpu: str | None = None, device: int = 0) -> list[Verified]:
    """Time the stored choices of this device's model and of today's kernel again."""
    _check_devices([device])
    return [Verified(*found) for found in session.verify(stored(gpu), device)]


def clear(gpu: str | None = None) -> int:
    """Forget stored choices and their timings; how many choices there were."""
    gone = Store().remove(each.place for each in stored(gpu))
    choice.reload()
    return gone


# --- helpers ---------------------------------------------------------------------------------------------------------


def _problem(problem: Any) -> AttentionProblem:
    if isinstance(problem, AttentionProblem):
        return problem
    if isinstance(problem, str):
        return shapes.parse(problem)
    raise ArgumentError("problem", problem, "an AttentionProblem, or a line such as b=2,hq=16,sq=4096,d=128,causal")


def _check_devices(devices: Sequence[int]) -> None:
    if not driver.available():
        raise ToolchainError("tuning needs a GPU", "run it where `rtk doctor` is content")
    count = driver.device_count()
    if not isinstance(devices, Sequence) or len(set(devices)) != len(devices) or not devices:
        raise ArgumentError("devices", devices, "a list of GPUs' numbers, each once")
    for device in devices:
        if type(device) is not int or not 0 <= device < count:
            raise ArgumentError("device", device, f"a GPU's number, 0 to {count - 1}")


def _of_gpu(found: Iterable[Choice], gpu: str | None) -> list[Choice]:
    return [each for each in found if gpu is None or gpu.lower() in each.place.gpu.name.lower()]
