"""A lock that processes of a machine share: a byte of a file, held until its block ends."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from rtk import entries


@contextlib.contextmanager
def held(path: Path, what: str, limit_s: float) -> Iterator[bool]:
    """True where the lock of `what` is held within, or locks do not work here; False after waiting in vain.

    OSError where the file cannot be opened.
    """
    with open(path, "ab", buffering=0) as file:
        yield entries.wait_for_lock(file, zlib.crc32(what.encode()), limit_s) is not False
