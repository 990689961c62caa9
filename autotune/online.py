"""Tuning amid calls, where `RTK_AUTOTUNE=tune` asks for it: the first call of a bucket waits until it is tuned.

Each bucket is tuned by one process, whoever comes first; others on this machine that call it meanwhile wait for the
result. In a job of many processes one of each machine tunes (`rtk.autotune.ranks`). A call never fails for its tuning:
what goes wrong is one warning, and the call runs with the cost model's pick.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from typing import Any

from rtk import driver, forks
from rtk.autotune import choice, locks, ranks
from rtk.autotune.backend import LOCK
from rtk.autotune.keys import Gpu, Place
from rtk.autotune.store import Store
from rtk.cache import default_cache
from rtk.errors import CacheWarning
from rtk.spec import KernelSpec

_WAIT_S = 120.0  # for another process that tunes the place
_RANK_WAIT_S = 30.0  # for one that may never come to it
_LOOK_EVERY_S = 0.05

_log = logging.getLogger("rtk")
_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_settled: set[Place] = set()  # tuned, or tried in vain, by this process


def settle(spec: KernelSpec[Any, Any], problem: Any, device: int, stream: int) -> bool:
    """Sees to it that the problem's bucket is tuned, if that can be done now; True where there may be a new choice."""
    place, policy = Place.of(spec, problem, Gpu.of(device)), ranks.policy()
    if place in _settled or driver.is_capturing(stream):
        return False
    with _lock:  # one at a time in this process: two that time would disturb each other
        if place in _settled:  # meanwhile
            return True
        try:
            if ranks.may_tune():
                _tune_in_turn(spec, problem, device, stream, place)
            elif policy != "wait" or not _appeared(place, _RANK_WAIT_S):
                return False
        finally:  # in vain or not, once
            _settled.add(place)
    choice.reload()
    return True


def _tune_in_turn(spec: KernelSpec[Any, Any], problem: Any, device: int, stream: int, place: Place) -> None:
    """By one process of the machine; this one waits while another does it."""
    folder = default_cache().path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locks.held(folder / LOCK, "\0".join(place.columns()), _WAIT_S) as mine:
            if mine and not _is_stored(place):
                _tune(spec, problem, device, stream)
    except OSError as error:
        warnings.warn(f"rtk: {folder} takes no tuned choices: {error}", CacheWarning, stacklevel=2)


def _tune(spec: KernelSpec[Any, Any], problem: Any, device: int, stream: int) -> None:
    from rtk.autotune import search  # here: what it imports is needed by who tunes only

    try:
        driver.synchronize(stream)  # what the program has enqueued would be timed too
        found = search.tune(spec, problem, device)
    except Exception as error:  # whatever it is, the call can run without
        text = str(error).removeprefix("rtk: ")
        warnings.warn(f"rtk: {spec.describe(problem)} is not tuned: {text}", RuntimeWarning, stacklevel=2)
    else:
        took = f"{found.choice.us:.1f} us, {found.gain:.3f} times the first pick's speed, in {found.seconds:.1f} s"
        _log.info("tuned %s: %s", found.choice.problem, took)


def _is_stored(place: Place) -> bool:
    return any(found.place == place for found in Store().choices())


def _appeared(place: Place, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not _is_stored(place):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True
