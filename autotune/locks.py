"""A lock that processes of a machine share: a byte of a file, held until its block ends."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from rtk import entries

_LOOK_EVERY_S = 0.02
_open: set[FileIO] = set()


@contextlib.contextmanager
def held(path: Path, what: str, limit_s: float) -> Iterator[bool]:
    """True where the lock of `what` is held within, or locks do not work here; False after waiting in vain.

    OSError where the file cannot be opened.
    """
    with open(path, "ab", buffering=0) as file:
        _open.add(file)
        try:
            deadline = time.monotonic() + limit_s
            position = zlib.crc32(what.encode())
            while (got := entries.try_lock(file.fileno(), position)) is False and time.monotonic() < deadline:
                time.sleep(_LOOK_EVERY_S)
            yield got is not False
        finally:
            _open.discard(file)


def _after_fork() -> None:
    """Or the parent's lock would last as long as the child."""
    for file in list(_open):
        file.close()


os.register_at_fork(after_in_child=_after_fork)
