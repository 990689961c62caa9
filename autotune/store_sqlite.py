"""Choices and timings in one SQLite file, whose write-ahead log lets others read while one writes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from rtk.autotune.backend import (
    BUSY_S,
    CHOICE,
    KEY,
    NO_ROW,
    RETRY_S,
    SCHEMA,
    TIMING,
    DamagedError,
    StoreError,
    choice_of,
    readable,
    text_of,
)
from rtk.autotune.keys import Choice, Place, Timed

_TABLES = f"""
    CREATE TABLE IF NOT EXISTS choices ({", ".join((*KEY, *CHOICE))}, PRIMARY KEY ({", ".join(KEY)})) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS timings ({", ".join((*KEY, *TIMING))}, PRIMARY KEY ({", ".join((*KEY, "config"))}))
        WITHOUT ROWID;
    PRAGMA user_version = {SCHEMA};
"""


class SqliteBackend:
    """One connection an operation: there is one when something was tuned, and one when a process first asks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, choice: Choice, timings: Sequence[Timed]) -> None:
        key = choice.place.columns()
        chosen = (text_of(choice.config), *(getattr(choice, name) for name in CHOICE[1:]))
        rows = [(*key, text_of(timed.config), *(getattr(timed, name) for name in TIMING[1:])) for timed in timings]
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"INSERT OR REPLACE INTO choices VALUES ({_marks(KEY, CHOICE)})", (*key, *chosen))
            connection.executemany(f"INSERT OR REPLACE INTO timings VALUES ({_marks(KEY, TIMING)})", rows)
            connection.execute("COMMIT")

    def choices(self) -> Iterator[Choice]:
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {', '.join((*KEY, *CHOICE))} FROM choices").fetchall()
        for row in rows:
            with contextlib.suppress(*NO_ROW):
                yield choice_of(row[: len(KEY)], dict(zip(CHOICE, row[len(KEY) :], strict=True)))

    def timings(self, place: Place) -> list[Timed]:
        where = " AND ".join(f"{name} = ?" for name in KEY)
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {', '.join(TIMING)} FROM timings WHERE {where}", place.columns())
            return readable(dict(zip(TIMING, row, strict=True)) for row in rows.fetchall())

    def remove(self, place: Place) -> None:
        where = " AND ".join(f"{name} = ?" for name in KEY)
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for table in ("choices", "timings"):
                connection.execute(f"DELETE FROM {table} WHERE {where}", place.columns())
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        # A folder that cannot be written, as of a container image, holds a file that nobody changes.
        changes = os.access(self._path.parent, os.W_OK, effective_ids=True)
        name = self._path if changes else f"file:{quote(str(self._path))}?mode=ro&immutable=1"
        try:
            opened = sqlite3.connect(name, timeout=BUSY_S, isolation_level=None, uri=not changes)
            with contextlib.closing(opened) as connection:
                connection.text_factory = lambda data: data.decode(errors="replace")  # a bad row costs that row only
                _retried(lambda: _prepare(connection, changes))
                yield connection
        except sqlite3.OperationalError as error:  # a full disk, a lock: not the file's fault
            raise StoreError(str(error)) from error
        except sqlite3.DatabaseError as error:
            raise DamagedError(str(error)) from error
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error


def _prepare(connection: sqlite3.Connection, changes: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA:
        raise sqlite3.OperationalError(f"a later version of rtk made it (schema {version})")
    if version < SCHEMA and changes:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_TABLES)
    connection.execute("PRAGMA synchronous = NORMAL")
    for table, names in (("choices", CHOICE), ("timings", TIMING)):
        found = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        if found != [*KEY, *names]:
            raise sqlite3.DatabaseError(f"its table {table} has the columns {found}")


def _retried(work: Callable[[], None]) -> None:
    """SQLite does not wait for others in every case, as when two processes turn to the write-ahead log at once."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if not any(word in str(error) for word in ("locked", "busy")) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def is_damaged(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with SqliteBackend(path)._connected() as connection:
            return bool(connection.execute("PRAGMA quick_check").fetchone() != ("ok",))
    except DamagedError:
        return True


def _marks(*names: Sequence[str]) -> str:
    return ", ".join("?" * sum(map(len, names)))
