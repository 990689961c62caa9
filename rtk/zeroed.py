"""Words of device memory that are zero whenever no kernel uses them: counters that need no clearing before a launch.

A kernel finds its word at zero and leaves it at zero (<rtk/scheduler.cuh> says how). No two launches that may run at
the same time share one. A launch takes the next word of a ring, so long that as many launches cannot be under way: the
driver lets a thousand wait on a stream (on an H200 the 1022nd behind a busy kernel waited, on each stream for itself),
and this is that of 256 streams. A launch that goes into a CUDA graph may run again at any time, and keeps its word for
good.
"""

from __future__ import annotations

import itertools
import os
import threading

from rtk import driver, forks

_RING_WORDS = 1 << 18
_KEPT_WORDS = 1 << 12  # allocated at a time
_WORD_BYTES = 4


class _Words:
    """Those of one device."""

    def __init__(self, device: int) -> None:
        self._device = device
        self.ring = driver.allocate_zeroed(_RING_WORDS * _WORD_BYTES, device)
        addresses = range(self.ring, self.ring + _RING_WORDS * _WORD_BYTES, _WORD_BYTES)
        # Round and round; one step of the interpreter's, so that threads need no lock.
        self.passing = itertools.chain.from_iterable(itertools.repeat(addresses)).__next__
        self._kept: list[int] = []
        self._lock = threading.Lock()

    def kept(self) -> int:
        with self._lock:
            if not self._kept:
                start = driver.allocate_zeroed(_KEPT_WORDS * _WORD_BYTES, self._device)
                self._kept = [start + _WORD_BYTES * n for n in range(_KEPT_WORDS)]
            return self._kept.pop()


_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_words: dict[int, _Words] = {}
os.register_at_fork(after_in_child=_words.clear)  # the child has not the memory


def word(device: int, capturing: bool) -> int:
    """The address of a word for one launch, or, while a graph is captured, for one node of the graph."""
    words = _words.get(device) or _make(device)
    return words.kept() if capturing else words.passing()


def _make(device: int) -> _Words:
    with _lock:
        if device not in _words:
            _words[device] = _Words(device)
        return _words[device]
