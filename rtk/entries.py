"""An entry of the cubin cache as a file: how it appears, whole or not at all, and what is checked when it is read.

A cubin is code that the GPU will run for whoever loads it. So a file counts only where nobody but a trusted owner could
have written it, and only when its checksum agrees; nothing in it is executed or unpickled to find out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import struct
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from io import FileIO
from typing import Any

from rtk.errors import ArgumentError

try:
    import fcntl
except ImportError:  # not Linux: entries stay correct, several processes may each compile once
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"rtkcubn1"
_HEADER = struct.Struct("<8sIQ32s")  # magic, bytes of meta, bytes of cubin, sha256 of key + lengths + meta + cubin
_KEY = re.compile(r"[0-9a-f]{16,128}")
_NAME = re.compile(rf"({_KEY.pattern})\.cubin")
_TEMP_NAME = re.compile(rf"\.{_NAME.pattern}\.\d+\.[0-9a-f]+\.tmp")
_TEMP_GRACE_S = 10.0  # between making a temp file and locking it, a writer is only asleep this long
_TEMP_LIFE_S = 3600.0  # where there are no locks: no writer takes an hour


class DamagedError(Exception):
    """A file that is not the entry it should be."""


class UntrustedError(Exception):
    """A file that somebody else could have written."""


@dataclass(frozen=True)
class Entry:
    """A verified entry: the `cubin` and the JSON `meta` stored with it."""

    key: str
    cubin: bytes
    meta: dict[str, Any]


def name_of(key: str) -> str:
    """The file name of an entry. ArgumentError for a key that is not hex, and so might be a path."""
    if not _KEY.fullmatch(key):
        raise ArgumentError("key", key, "16 to 128 lower-case hex digits")
    return f"{key}.cubin"


def key_of(name: str) -> str | None:
    """The key of an entry's file name; None for any other file."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


def is_temp(name: str) -> bool:
    return _TEMP_NAME.fullmatch(name) is not None


# ------------------------------------------------------------------------------------------------------------- reading


def folder_trouble(info: os.stat_result, owners: Collection[int]) -> str:
    """Why entries in this folder are not to be trusted; "" where they are."""
    if not stat.S_ISDIR(info.st_mode):
        return "is not a folder"
    if info.st_uid not in owners:
        return f"belongs to user {info.st_uid}"
    if info.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(info.st_mode):o})"
    return ""


def read(path: str | os.PathLike[str], owners: Collection[int], needs: Collection[str] = ()) -> Entry:
    """The entry in a file, which has the names `needs` in its meta.

    Raises DamagedError, UntrustedError, or OSError where it cannot be read.
    """
    key = key_of(os.path.basename(path))
    if key is None:
        raise DamagedError("not the name of an entry")
    if not stat.S_ISREG(os.lstat(path).st_mode):  # a link, or a FIFO, on which open() would wait
        raise DamagedError("not a regular file")
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if info.st_uid not in owners or info.st_mode & 0o022:
            raise UntrustedError(f"user {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}")
        header = file.read(_HEADER.size)
        if len(header) != _HEADER.size:
            raise DamagedError("too short")
        magic, meta_size, cubin_size, digest = _HEADER.unpack(header)
        if magic != _MAGIC or info.st_size != _HEADER.size + meta_size + cubin_size:
            raise DamagedError("bad header or length")
        meta_bytes, cubin = file.read(meta_size), file.read(cubin_size)
    if digest != _digest(key, meta_bytes, cubin):
        raise DamagedError("bad checksum")
    try:
        meta = json.loads(meta_bytes)
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not meta.keys() >= set(needs):
        raise DamagedError("it is not described")
    return Entry(key, cubin, meta)


def _digest(key: str, meta: bytes, cubin: bytes) -> bytes:
    sha = hashlib.sha256(f"{key} {len(meta)} {len(cubin)} ".encode())
    sha.update(meta)
    sha.update(cubin)
    return sha.digest()


# ------------------------------------------------------------------------------------------------------------- writing


def pack(entry: Entry) -> bytes:
    """The contents of the entry's file."""
    meta = json.dumps(entry.meta, sort_keys=True).encode()
    return _HEADER.pack(_MAGIC, len(meta), len(entry.cubin), _digest(entry.key, meta, entry.cubin)) + meta + entry.cubin


def write(path: str, data: bytes, mode: int) -> None:
    """Puts the data there in one step, by a rename. A process killed on the way leaves at most a temp file."""
    folder, name = os.path.split(path)
    temp = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(6).hex()}.tmp")
    try:
        # Within the try, and by open() alone: Ctrl-C may come the moment the file exists, and then loses nothing.
        with open(temp, "xb", buffering=0) as file:
            os.fchmod(file.fileno(), mode)
            try_lock(file.fileno(), 0)  # shows is_abandoned() that the writer lives
            view = memoryview(data)
            while view:
                view = view[os.write(file.fileno(), view) :]
            os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise


def is_abandoned(path: str, info: os.stat_result) -> bool:
    """Whether the writer of a temp file was killed: it holds a lock on the file as long as it lives."""
    age_s = time.time() - info.st_mtime
    if age_s <= _TEMP_GRACE_S or not stat.S_ISREG(info.st_mode):
        return False
    if age_s > _TEMP_LIFE_S:
        return True
    try:
        with open(path, "r+b", buffering=0) as file:
            return try_lock(file.fileno(), 0) is True
    except OSError:
        return False


def try_lock(fd: int, position: int) -> bool | None:
    """Locks one byte of a file until it is closed: True locked, False held elsewhere, None where locks do not work."""
    if fcntl is None or not hasattr(fcntl, "F_OFD_SETLK"):
        return None
    # An open-file lock (OFD), because a plain POSIX lock is lost when any thread closes the file.
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock_request(position, 1))
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


_lock_files: weakref.WeakSet[FileIO] = weakref.WeakSet()


def wait_for_lock(
    file: FileIO, position: int, limit_s: float, pointless: Callable[[], bool] = lambda: False
) -> bool | None:
    """try_lock() until it is not False, or time is up, or there is no point any more. A forked child lets go of it."""
    _lock_files.add(file)
    deadline, pause = time.monotonic() + limit_s, 0.002
    while True:
        locked = try_lock(file.fileno(), position)
        if locked is not False or time.monotonic() >= deadline or pointless():
            return locked
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _after_fork() -> None:
    """Or the parent's locks would last as long as the child."""
    for file in list(_lock_files):
        file.close()


os.register_at_fork(after_in_child=_after_fork)


def lock_request(start: int, length: int) -> bytes:
    """A `struct flock` that asks for a write lock; length 0 is to the end of the file."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
