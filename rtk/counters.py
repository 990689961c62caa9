"""What the library did in this process: the numbers behind `rtk.stats()`."""

from __future__ import annotations

import itertools
import threading

from rtk import forks

_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_counts = {
    "calls": 0,  # of public functions
    "launches": 0,  # of GPU kernels
    "cpu_calls": 0,  # answered by the NumPy path
    "inputs_copied": 0,  # arrays that TMA cannot read in place: copied first
    "outputs_copied": 0,  # `out=` arrays written through a temporary
    "plans": 0,  # made: a kernel chosen, loaded and prepared for one shape
}
# Calls that are a launch and nothing else, counted without a lock: next() is one step of the interpreter's.
_repeats = itertools.count()
count_repeat = _repeats.__next__


def add(name: str, amount: int = 1) -> None:
    with _lock:
        _counts[name] += amount


def snapshot() -> dict[str, int]:
    repeats = int(repr(_repeats)[len("count(") : -1])  # what next() would give, without taking it
    with _lock:
        return _counts | {name: _counts[name] + repeats for name in ("calls", "launches")}
