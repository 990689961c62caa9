"""Choices and timings on disk: SQLite in the cache folder, or a file an entry where SQLite's locks cannot be trusted.

Any number of processes may read and write at once; nothing that one of them has put is lost. A store that is damaged is
set aside with one warning, and a new one begun: what it held can be measured again, and a call never fails for it.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from rtk.autotune import locks
from rtk.autotune.backend import BUSY_S, LOCK, Backend, DamagedError, check_owner
from rtk.autotune.keys import Choice, Place, Timed
from rtk.cache import default_cache
from rtk.errors import CacheWarning

NAME = "autotune.sqlite3"
FOLDER = "autotune"  # of entries, where there is no SQLite
# File systems of several machines: SQLite's write-ahead log needs memory that they do not share.
_SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "fuse", "glusterfs")

Result = TypeVar("Result")


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

        def work(backend: Backend) -> bool:
            backend.put(choice, timed)
            return True

        return self._attempt(work, False, create=True)

    def choices(self) -> list[Choice]:
        """Every choice. What cannot be read as one, as of a later version, is left out."""
        return self._attempt(lambda backend: list(backend.choices()), [])

    def timings(self, place: Place) -> list[Timed]:
        """Of every config that was ever timed at a place."""
        return [timed for timed in self.tried(place) if not timed.failed]

    def tried(self, place: Place) -> list[Timed]:
        """And of those that could not be used."""
        return self._attempt(lambda backend: backend.timings(place), [])

    def remove(self, places: Iterable[Place]) -> int:
        """Forget choices, and their timings; how many there were."""
        unwanted = set(places) & {choice.place for choice in self.choices()}

        def work(backend: Backend) -> int:
            for place in unwanted:
                backend.remove(place)
            return len(unwanted)

        return self._attempt(work, 0)

    # ----------------------------------------------------------------------------------------------------------- within

    def _attempt(self, work: Callable[[Backend], Result], otherwise: Result, *, create: bool = False) -> Result:
        try:
            if create:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            elif not self.folder.is_dir():
                return otherwise
            if is_shared(self.folder):
                from rtk.autotune.store_files import FilesBackend

                return work(FilesBackend(self.folder / FOLDER))
            path = self.folder / NAME
            if not create and not path.exists():
                return otherwise
            check_owner(path)
            from rtk.autotune.store_sqlite import SqliteBackend  # here: loading SQLite takes 5 ms, and many need none

            try:
                return work(SqliteBackend(path))
            except DamagedError as damage:
                self._set_aside(path, damage)
                return work(SqliteBackend(path))
        except (OSError, DamagedError, UnicodeError) as error:
            self._warn(f"cannot be used: {error}")
        return otherwise

    def _set_aside(self, path: Path, damage: DamagedError) -> None:
        """Moves the damaged file away, unless another process has done so by now."""
        from rtk.autotune.store_sqlite import is_damaged

        with locks.held(self.folder / LOCK, NAME, BUSY_S):
            if not is_damaged(path):
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
