"""What the two ways of keeping choices on disk share: what they offer, their rows, and what they raise."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rtk.autotune.keys import WORDS, Choice, Config, Place, Timed, config_of_json, time_of_json
from rtk.errors import ArgumentError

SCHEMA = 1
BUSY_S = 60.0  # how long a process waits for the others
RETRY_S = 0.01
LOCK = ".autotune.lock"  # in the cache folder: a byte of it for each thing that one process does at a time
KEY = ("kernel", "sources", "gpu", "exact", "sizes")
CHOICE = ("config", "problem", "us", "driver", "nvrtc", "rtk", "date")
TIMING = ("config", "us", "us_q1", "us_q3", "rounds", "driver", "nvrtc", "date")
NO_ROW = (ValueError, TypeError, KeyError, AttributeError, OverflowError, ArgumentError)  # of what is no choice


class DamagedError(Exception):
    """The store's file is not what it should be."""


class StoreError(OSError):
    """The store cannot be used now, as on a full disk, though its file is whole."""


class Backend(Protocol):
    def put(self, choice: Choice, timings: Sequence[Timed]) -> None: ...
    def choices(self) -> Iterator[Choice]: ...
    def timings(self, place: Place) -> list[Timed]: ...
    def remove(self, place: Place) -> None: ...


def check_owner(path: Path) -> None:
    """OSError for a store that somebody else could have written."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{path} belongs to somebody else")


def choice_of(columns: Sequence[Any], values: Mapping[str, Any]) -> Choice:
    """Raises ValueError, TypeError or KeyError for what is none."""
    words = {name: str(values[name]) for name in WORDS}
    return Choice(Place.from_columns(*columns), _config(values["config"]), us=time_of_json(values["us"]), **words)


def readable(rows: Iterable[Mapping[str, Any]]) -> list[Timed]:
    """The timings among these rows; what is none is left out."""
    found = []
    for row in rows:
        with contextlib.suppress(*NO_ROW):
            found.append(_timed(row))
    return found


def _timed(values: Mapping[str, Any]) -> Timed:
    us, us_q1, us_q3 = (time_of_json(values[name]) for name in ("us", "us_q1", "us_q3"))
    words = {name: str(values[name]) for name in ("driver", "nvrtc", "date")}
    return Timed(_config(values["config"]), us, us_q1, us_q3, int(values["rounds"]), **words)


def _config(value: Any) -> Config:
    return config_of_json(json.loads(value) if isinstance(value, str) else value)


def text_of(config: Config) -> str:
    return json.dumps(config, separators=(",", ":"), sort_keys=True)
