"""Choices and timings on disk: SQLite in the cache folder, or a file an entry where SQLite's locks cannot be trusted.

Any number of processes may read and write at once; nothing that one of them has put is lost. A store that is damaged is
set aside with one warning, and a new one begun: what it held can be measured again, and a call never fails for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rtk import entries
from rtk.autotune.keys import Choice, Config, Place, Timed, config_of_json, time_of_json
from rtk.cache import default_cache
from rtk.errors import ArgumentError, CacheWarning

NAME = "autotune.sqlite3"
FOLDER = "autotune"  # of entries, where there is no SQLite
_LOCK = ".autotune.lock"
_SCHEMA = 1
_BUSY_S = 60.0  # how long a process waits for the others
_RETRY_S = 0.01
# File systems of several machines: SQLite's write-ahead log needs memory that they do not share.
_SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "fuse", "glusterfs")

_NO_ROW = (ValueError, TypeError, KeyError, AttributeError, OverflowError, ArgumentError)  # of what is no choice

Result = TypeVar("Result")


class DamagedError(Exception):
    """The store's file is not what it should be."""


class _Backend(Protocol):
    def put(self, choice: Choice, timings: Sequence[Timed]) -> None: ...
    def choices(self) -> Iterator[Choice]: ...
    def timings(self, place: Place) -> list[Timed]: ...
    def remove(self, place: Place) -> None: ...


class Store:
    """The choices in a folder (None: the cache folder). What the folder does to it is a warning, never an error."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_cache().path if folder is None else Path(os.path.abspath(folder))
        self._warned: set[str] = set()

    def put(self, choice: Choice, timings: Iterable[Timed] = ()) -> bool:
        """Keep a choice, in place of an older one there, and timings; of a config's timings the last one put counts.

        False where the folder refuses it.
        """
        timed = list(timings)

        def work(backend: _Backend) -> bool:
            backend.put(choice, timed)
            return True

        return self._attempt(work, False, create=True)

    def choices(self) -> list[Choice]:
        """Every choice. What cannot be read as one, as of a later version, is left out."""
        return self._attempt(lambda backend: list(backend.choices()), [])

    def timings(self, place: Place) -> list[Timed]:
        """Of every config that was ever timed at a place."""
        return self._attempt(lambda backend: backend.timings(place), [])

    def remove(self, places: Iterable[Place]) -> int:
        """Forget choices, and their timings; how many there were."""
        unwanted = set(places) & {choice.place for choice in self.choices()}

        def work(backend: _Backend) -> int:
            for place in unwanted:
                backend.remove(place)
            return len(unwanted)

        return self._attempt(work, 0)

    # ----------------------------------------------------------------------------------------------------------- within

    def _attempt(self, work: Callable[[_Backend], Result], otherwise: Result, *, create: bool = False) -> Result:
        try:
            if create:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not self.folder.is_dir():
                return otherwise
            if is_shared(self.folder):
                return work(_Files(self.folder / FOLDER))
            path = self.folder / NAME
            if not create and not path.exists():
                return otherwise
            _check_owner(path)
            try:
                return work(_Sqlite(path))
            except DamagedError as damage:
                self._set_aside(path, damage)
                return work(_Sqlite(path))
        except (OSError, sqlite3.Error, DamagedError, UnicodeError) as error:
            self._warn(f"cannot be used: {error}")
        return otherwise

    def _set_aside(self, path: Path, damage: DamagedError) -> None:
        """Moves the damaged file away, unless another process has done so by now."""
        with open(self.folder / _LOCK, "ab", buffering=0) as lock:
            deadline = time.monotonic() + _BUSY_S
            while entries.try_lock(lock.fileno(), 0) is False and time.monotonic() < deadline:
                time.sleep(_RETRY_S)
            if not _is_damaged(path):
                return
            aside = path.with_name(f"{NAME}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            os.replace(path, aside)
            for tail in ("-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{path}{tail}")
        self._warn(f"is damaged ({damage}); it was moved to {aside.name} and a new one is begun")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"the store of tuned choices in {self.folder} {what}", CacheWarning, stacklevel=4)


def is_shared(folder: Path) -> bool:
    """Whether the folder lies on a file system that other machines may write to, as far as the kernel tells."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                point = left.split()[4].encode().decode("unicode_escape")
                if len(point) >= len(best) and (path == point or path.startswith(point.rstrip("/") + "/")):
                    best, kind = point, right.split()[0]
    except (OSError, IndexError):
        return False
    return kind.startswith(_SHARED_FILE_SYSTEMS)


def _check_owner(path: Path) -> None:
    """OSError for a store that somebody else could have written."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{path} belongs to somebody else")


# --- SQLite ----------------------------------------------------------------------------------------------------------

_KEY = ("kernel", "sources", "gpu", "exact", "sizes")
_CHOICE = ("config", "problem", "us", "driver", "nvrtc", "rtk", "date")
_TIMING = ("config", "us", "us_q1", "us_q3", "rounds", "driver", "nvrtc", "date")
_TABLES = f"""
    CREATE TABLE IF NOT EXISTS choices ({", ".join((*_KEY, *_CHOICE))}, PRIMARY KEY ({", ".join(_KEY)})) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS timings ({", ".join((*_KEY, *_TIMING))}, PRIMARY KEY ({", ".join((*_KEY, "config"))}))
        WITHOUT ROWID;
    PRAGMA user_version = {_SCHEMA};
"""


class _Sqlite:
    """One connection an operation: there is one when something was tuned, and one when a process first asks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, choice: Choice, timings: Sequence[Timed]) -> None:
        key = choice.place.columns()
        chosen = (_text(choice.config), *(getattr(choice, name) for name in _CHOICE[1:]))
        rows = [(*key, _text(timed.config), *(getattr(timed, name) for name in _TIMING[1:])) for timed in timings]
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"INSERT OR REPLACE INTO choices VALUES ({_marks(_KEY, _CHOICE)})", (*key, *chosen))
            connection.executemany(f"INSERT OR REPLACE INTO timings VALUES ({_marks(_KEY, _TIMING)})", rows)
            connection.execute("COMMIT")

    def choices(self) -> Iterator[Choice]:
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {', '.join((*_KEY, *_CHOICE))} FROM choices").fetchall()
        for row in rows:
            with contextlib.suppress(*_NO_ROW):
                yield _choice(row[: len(_KEY)], dict(zip(_CHOICE, row[len(_KEY) :], strict=True)))

    def timings(self, place: Place) -> list[Timed]:
        where = " AND ".join(f"{name} = ?" for name in _KEY)
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {', '.join(_TIMING)} FROM timings WHERE {where}", place.columns())
            return _readable(dict(zip(_TIMING, row, strict=True)) for row in rows.fetchall())

    def remove(self, place: Place) -> None:
        where = " AND ".join(f"{name} = ?" for name in _KEY)
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for table in ("choices", "timings"):
                connection.execute(f"DELETE FROM {table} WHERE {where}", place.columns())
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
        try:
            _retried(lambda: _prepare(connection))
            yield connection
        except sqlite3.OperationalError:
            raise  # a full disk, a lock: not the file's fault
        except sqlite3.DatabaseError as error:
            raise DamagedError(str(error)) from error
        finally:
            connection.close()


def _prepare(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _SCHEMA:
        raise sqlite3.OperationalError(f"a later version of rtk made it (schema {version})")
    if version < _SCHEMA:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_TABLES)
    connection.execute("PRAGMA synchronous = NORMAL")
    for table, names in (("choices", _CHOICE), ("timings", _TIMING)):
        found = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        if found != [*_KEY, *names]:
            raise sqlite3.DatabaseError(f"its table {table} has the columns {found}")


def _retried(work: Callable[[], None]) -> None:
    """SQLite does not wait for others in every case, as when two processes turn to the write-ahead log at once."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if not any(word in str(error) for word in ("locked", "busy")) or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


def _is_damaged(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with _Sqlite(path)._connected() as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() != ("ok",))
    except DamagedError:
        return True


def _marks(*names: Sequence[str]) -> str:
    return ", ".join("?" * sum(map(len, names)))


# --- files -----------------------------------------------------------------------------------------------------------


class _Files:
    """A file a place, replaced whole. Two that tune one place at once: the last one's choice stays, as in SQLite."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, choice: Choice, timings: Sequence[Timed]) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        newer = {_text(timed.config): timed for timed in (*self.timings(choice.place), *timings)}
        contents = {
            "schema": _SCHEMA,
            "place": choice.place.columns(),
            **{name: getattr(choice, name) for name in _CHOICE},
            "timings": [asdict(timed) for timed in newer.values()],
        }
        entries.write(str(self._path(choice.place)), json.dumps(contents).encode(), 0o600)

    def choices(self) -> Iterator[Choice]:
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.json")):
            found = self._read(path)
            if found is not None:
                with contextlib.suppress(*_NO_ROW):
                    yield _choice(found["place"], found)

    def timings(self, place: Place) -> list[Timed]:
        found = self._read(self._path(place)) or {}
        return _readable(found.get("timings", []))

    def remove(self, place: Place) -> None:
        self._path(place).unlink(missing_ok=True)

    def _path(self, place: Place) -> Path:
        name = hashlib.sha256("\0".join(place.columns()).encode()).hexdigest()
        return self._folder / f"{name[:32]}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            _check_owner(path)
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and found.get("schema") == _SCHEMA else None


# --- rows ------------------------------------------------------------------------------------------------------------


def _choice(columns: Sequence[Any], values: Mapping[str, Any]) -> Choice:
    """Raises ValueError, TypeError or KeyError for what is none."""
    words = {name: str(values[name]) for name in ("problem", "driver", "nvrtc", "rtk", "date")}
    return Choice(Place.from_columns(*columns), _config(values["config"]), us=time_of_json(values["us"]), **words)


def _readable(rows: Iterable[Mapping[str, Any]]) -> list[Timed]:
    """The timings among these rows; what is none is left out."""
    found = []
    for row in rows:
        with contextlib.suppress(*_NO_ROW):
            found.append(_timed(row))
    return found


def _timed(values: Mapping[str, Any]) -> Timed:
    us, us_q1, us_q3 = (time_of_json(values[name]) for name in ("us", "us_q1", "us_q3"))
    words = {name: str(values[name]) for name in ("driver", "nvrtc", "date")}
    return Timed(_config(values["config"]), us, us_q1, us_q3, int(values["rounds"]), **words)


def _config(value: Any) -> Config:
    return config_of_json(json.loads(value) if isinstance(value, str) else value)


def _text(config: Config) -> str:
    return json.dumps(config, separators=(",", ":"), sort_keys=True)
