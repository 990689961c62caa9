"""The configuration that a call gets: a stored choice of its bucket, else of a neighbour, else the cost model's pick.

Choices come from the store in the cache folder and, behind it, from what ships with rtk. Both are read once, when a
process first asks; from then on an answer is a few lookups in tables. `RTK_AUTOTUNE` says what may steer it:

- `cached` (the default): stored choices, and the model where there are none.
- `off`: neither; the kernel's own pick, the same on every machine.
- `record`: as `cached`, and every new problem of a call is noted (`rtk.autotune.recording`).
- `tune`: as `cached`, and the first call of a bucket that is not stored tunes it (`rtk.autotune.online`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rtk import forks
from rtk.autotune import exchange
from rtk.autotune.keys import Choice, Gpu, digest
from rtk.cache import default_cache
from rtk.errors import ArgumentError
from rtk.spec import KernelSpec, config_fields

Origin = Literal["stored", "shipped", "neighbour", "model", "pick"]
MODES = ("cached", "off", "record", "tune")
DATA = Path(__file__).parent / "data"
# Half-steps, over all sizes together, to a neighbour that is still asked. On an H200 the winners of neighbours that
# near were as good as the model's picks (0.987 and 0.984 of the best), those at 4 half-steps worse (0.975 and 0.986).
_FURTHEST = 2


@dataclass(frozen=True)
class Chosen:
    """A configuration, where it came from, and the stored choice behind it."""

    config: Any
    origin: Origin
    choice: Choice | None = None


@dataclass
class _Table:
    """The choices of one kernel on one model of GPU: {what must agree: {half-steps: choices, and rows that shipped}}.

    Of what ships a process uses little: a row is made a choice when it is asked for.
    """

    buckets: dict[tuple[Any, ...], dict[tuple[int, ...], list[Choice | dict[str, Any]]]] = field(default_factory=dict)

    def add(self, exact: tuple[Any, ...], steps: tuple[int, ...], entry: Choice | dict[str, Any]) -> None:
        """What is added last goes before the others of its bucket."""
        self.buckets.setdefault(exact, {}).setdefault(steps, []).insert(0, entry)

    def nearest(self, exact: tuple[Any, ...], steps: tuple[int, ...]) -> Iterator[tuple[int, Choice, bool]]:
        """(distance in half-steps, choice, whether it shipped), nearest first; of one distance, the smaller size."""
        found = self.buckets.get(exact)
        if not found:
            return
        for entry in found.get(steps, ()):
            yield 0, *_as_choice(entry)
        near = []
        for other in found:
            distance = sum(abs(a - b) for a, b in zip(steps, other, strict=False))
            if len(other) == len(steps) and 0 < distance <= _FURTHEST:
                near.append((distance, other))
        for distance, other in sorted(near):
            for entry in found[other]:
                yield distance, *_as_choice(entry)


def _as_choice(entry: Choice | dict[str, Any]) -> tuple[Choice, bool]:
    """(the choice, whether it shipped)."""
    return (entry, False) if isinstance(entry, Choice) else (exchange.choice_of(entry), True)


_Tables = dict[str, dict[tuple[str, Gpu], _Table]]  # by kernel, then by its sources and the GPU


class _State:
    """What this process has read. Replaced as a whole, so that a reader needs no lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tables: _Tables | None = None
        self.frozen = False
        self.modes: list[list[str]] = []  # of `using`, before RTK_AUTOTUNE: the last one counts
        self.readings = 0  # how often they are to be read again
        self.stamp = object()  # another one whenever a call may get another choice than before


_state = _State()
forks.new_in_child(vars(_state), "lock")


def choose(spec: KernelSpec[Any, Any], problem: Any, gpu: Gpu, *, stored: bool = True) -> Chosen:
    """The configuration for a problem. Never times, and never asks the disk twice.

    stored: False for what another machine would choose, which has only what ships.
    """
    mode = current_mode()
    if mode != "off":
        of_kernel = _tables().get(spec.name)
        table = of_kernel.get((digest(spec), gpu)) if of_kernel else None
        if table is not None:
            bucket = spec.bucket(problem)
            for distance, choice, shipped in table.nearest(bucket.exact, bucket.size_steps):
                config = config_of(spec, problem, choice) if stored or shipped else None
                if config is not None:
                    origin: Origin = "neighbour" if distance else "shipped" if shipped else "stored"
                    return Chosen(config, origin, choice)
        return Chosen(_model_pick(spec, problem, gpu), "model")
    return Chosen(spec.pick(problem), "pick")


def for_call(spec: KernelSpec[Any, Any], problem: Any, device: int, stream: int) -> Chosen:
    """choose() for a call on a device and stream; with RTK_AUTOTUNE=tune a bucket that is not stored is tuned first."""
    gpu = Gpu.of(device)
    found = choose(spec, problem, gpu)
    if current_mode() == "tune" and not _state.frozen and found.origin not in ("stored", "shipped"):
        from rtk.autotune import online

        if online.settle(spec, problem, device, stream):
            found = choose(spec, problem, gpu)
    return found


def _model_pick(spec: KernelSpec[Any, Any], problem: Any, gpu: Gpu) -> Any:
    from rtk.autotune import model  # here: it needs NumPy

    return model.pick(spec, problem, model.Machine.of(gpu))


def config_of(spec: KernelSpec[Any, Any], problem: Any, choice: Choice) -> Any | None:
    """The choice's configuration for this problem; None where it cannot serve it."""
    try:
        config = type(spec.pick(problem))(**choice.config)
        config_fields(config)
    except (TypeError, ArgumentError):  # the fields of another version, or a 1 for True, which is another constant
        return None
    return config if spec.refusal(problem, config) is None else None


# --- modes -----------------------------------------------------------------------------------------------------------


def current_mode() -> str:
    """Of `using`, else of RTK_AUTOTUNE, else "cached". ArgumentError for what is none."""
    modes = _state.modes
    mode = (modes[-1][0] if modes else None) or os.environ.get("RTK_AUTOTUNE") or "cached"
    if mode not in MODES:
        raise ArgumentError("RTK_AUTOTUNE", mode, ", ".join(MODES))
    return mode


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """Calls within get their configurations in this mode, in every thread of the process; the block begun last counts.

    (RTK_AUTOTUNE is for a process from its start on: calls that are prepared already do not look at it again.)
    """
    if mode not in MODES:
        raise ArgumentError("mode", mode, ", ".join(MODES))
    state, ours = _state, [mode]  # a list of its own: blocks of other threads may end before this one
    with state.lock:
        state.modes, state.stamp = [*state.modes, ours], object()
    try:
        yield
    finally:
        with state.lock:
            state.modes, state.stamp = [each for each in state.modes if each is not ours], object()


def epoch() -> tuple[str | None, int]:
    """What a prepared call depends on besides its problem: it is prepared anew when this is another."""
    modes = _state.modes
    return modes[-1][0] if modes else None, _state.readings


def stamp() -> object:
    """The same object as long as epoch() is the same: cheaper to compare."""
    return _state.stamp


def freeze() -> None:
    """From now on this process chooses as it would have just now: what others store does not reach it any more."""
    _tables()
    _state.frozen = True


def reload() -> None:
    """Reads the stores again, for what was put there since; not in a frozen process."""
    if not _state.frozen:
        with _state.lock:  # a reading under way began before: it must not be what is kept
            _state.tables = None
            _state.readings += 1
            _state.stamp = object()


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables() -> _Tables:
    tables = _state.tables
    if tables is None:
        with _state.lock:
            tables = _state.tables
            if tables is None:
                tables = _state.tables = _read()
    return tables


def _read() -> _Tables:
    from rtk.autotune.store import Store

    tables: _Tables = {}

    def table(kernel: str, sources: str, gpu: Gpu) -> _Table:
        return tables.setdefault(kernel, {}).setdefault((sources, gpu), _Table())

    for path in sorted(DATA.glob("*.json")) if DATA.is_dir() else ():
        for row in exchange.rows(json.loads(path.read_text(encoding="utf-8")), str(path)):
            steps = tuple(row["sizes"].values())
            table(row["kernel"], row["sources"], Gpu(**row["gpu"])).add(tuple(row["exact"].items()), steps, row)
    cache = default_cache()
    for folder in (*reversed(cache.read_only), cache.path):  # what was measured here goes before what ships
        for choice in Store(folder).choices():
            place = choice.place
            table(place.kernel, place.sources, place.gpu).add(place.bucket.exact, place.bucket.size_steps, choice)
    return tables
