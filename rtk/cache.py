"""The cubin cache folder: one file an entry, written atomically, verified on every read.

No lock is needed for correctness: an entry appears by rename, whole, under a name that is the hash of what made it, so
two writers can only write the same thing. Trouble with the folder never stops a caller: one CacheWarning, then a miss.
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
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk.errors import ArgumentError, CacheWarning

try:
    import fcntl
except ImportError:  # not Linux: entries stay correct, several processes may each compile once
    fcntl = None  # type: ignore[assignment]

__all__ = ["Cache", "Entry", "default_cache"]

_MAGIC = b"rtkcubn1"
_HEADER = struct.Struct("<8sIQ32s")  # magic, bytes of meta, bytes of cubin, sha256 of key + lengths + meta + cubin
_SUFFIX = ".cubin"
_TEMP_SUFFIX = ".tmp"
_STALE_TEMP_SECONDS = 3600.0  # a writer that was killed leaves its temp file; no writer takes an hour
_KEY = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True)
class Entry:
    """A verified entry: the `cubin` and the JSON `meta` stored with it."""

    key: str
    cubin: bytes
    meta: dict[str, Any]


class Cache:
    """Cubins in the folder `root`, at most `max_bytes` in all (least recently used go first).

    Safe for several threads and processes. `get` and `put` never raise for what the folder does to them.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, max_bytes: int = 1 << 30) -> None:
        # absolute, so that it stays the same folder when the process changes directory
        self.path = Path(os.path.abspath(root)) if root is not None else _default_root()
        self.max_bytes = max_bytes
        self._counters = {"hits": 0, "misses": 0, "writes": 0, "corrupt": 0}
        self._warned: set[str] = set()
        self._bytes: int | None = None  # an estimate of what lies in the folder; None until first counted

    # ------------------------------------------------------------------------------------------ reading and writing

    def get(self, key: str) -> Entry | None:
        """The entry under `key` (hex), or None. A damaged entry is deleted, with a CacheWarning, and is a miss."""
        path = self._entry_path(key)
        entry = None
        if self._folder_is_ours(create=False):
            try:
                entry = self._read(path, key)
            except _DamagedError as damage:
                with contextlib.suppress(OSError):
                    path.unlink()
                self._count("corrupt")
                self._warn(f"entry:{key}", f"cache entry {path} is damaged ({damage}); it is compiled again")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    self._warn("read", f"cache entry {path} cannot be read: {error}")
        if entry is None:
            self._count("misses")
            return None
        self._count("hits")
        with contextlib.suppress(OSError):  # this is the "recently used" that prune() goes by; atime may be off
            os.utime(path)
        return entry

    def contains(self, key: str) -> bool:
        """Whether there is a file under `key`; get() says whether it is any good. Counts as neither hit nor miss."""
        return self._entry_path(key).exists()

    def put(self, key: str, cubin: bytes, meta: dict[str, Any]) -> bool:
        """Store an entry, replacing any under that key. False, after one CacheWarning, if the folder refuses it."""
        path = self._entry_path(key)
        meta_bytes = json.dumps(meta, sort_keys=True).encode()
        digest = _digest(key, meta_bytes, cubin)
        data = _HEADER.pack(_MAGIC, len(meta_bytes), len(cubin), digest) + meta_bytes + cubin
        if not self._folder_is_ours(create=True):
            return False
        try:
            self._write(path, data)
        except OSError as error:
            self._warn("folder", f"cache folder {self.path} cannot be written: {error}")
            return False
        self._count("writes")
        self._keep_bounded(len(data))
        return True

    def _read(self, path: Path, key: str) -> Entry | None:
        # O_NOFOLLOW and O_NONBLOCK: what lies there may be anything, a link or a FIFO too.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _DamagedError("not a regular file")
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                self._warn("owner", f"cache entry {path} is not ours alone to write; it is not used")
                return None
            with open(fd, "rb", closefd=False) as file:
                header = file.read(_HEADER.size)
                if len(header) != _HEADER.size:
                    raise _DamagedError("too short")
                magic, meta_size, cubin_size, digest = _HEADER.unpack(header)
                if magic != _MAGIC or info.st_size != _HEADER.size + meta_size + cubin_size:
                    raise _DamagedError("bad header or length")
                meta_bytes, cubin = file.read(meta_size), file.read(cubin_size)
        finally:
            os.close(fd)
        if digest != _digest(key, meta_bytes, cubin):
            raise _DamagedError("bad checksum")
        return Entry(key, cubin, json.loads(meta_bytes))

    def _write(self, path: Path, data: bytes) -> None:
        temp = self.path / f".{path.name}.{os.getpid()}.{os.urandom(6).hex()}{_TEMP_SUFFIX}"
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.replace(temp, path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                temp.unlink()
            raise

    def _entry_path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ArgumentError("key", key, "16 to 128 lower-case hex digits")
        return self.path / (key + _SUFFIX)

    # -------------------------------------------------------------------------------------------------- the folder

    def _folder_is_ours(self, create: bool) -> bool:
        """Whether the folder may be used: it exists, is ours, and nobody else can write to it (cubins are code)."""
        try:
            info = self._stat_folder(create)
        except OSError as error:
            if create or error.errno != errno.ENOENT:
                self._warn("folder", f"cache folder {self.path} cannot be used: {error}")
            return False
        if not stat.S_ISDIR(info.st_mode):
            trouble = "is not a folder"
        elif info.st_uid != os.geteuid():
            trouble = f"belongs to user {info.st_uid}"
        elif info.st_mode & 0o022:
            trouble = f"can be written by others (mode {stat.S_IMODE(info.st_mode):o})"
        else:
            return True
        self._warn("folder", f"cache folder {self.path} {trouble}")
        return False

    def _stat_folder(self, create: bool) -> os.stat_result:
        try:
            return os.stat(self.path)
        except FileNotFoundError:
            if not create:
                raise
        os.makedirs(self.path.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.mkdir(self.path, 0o700)
        return os.stat(self.path)

    def _count(self, event: str) -> None:
        with _lock:
            self._counters[event] += 1

    def _warn(self, kind: str, message: str) -> None:
        with _lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        if kind == "folder":
            message += "; compiled kernels are kept in memory only"
        warnings.warn(f"rtk: {message}", CacheWarning, stacklevel=4)

    @contextlib.contextmanager
    def compiling(self, key: str, wait_s: float = 20.0) -> Iterator[None]:
        """Hold `key` among the processes that use this folder, so that only one of them compiles it.

        Best effort and bounded: after `wait_s` seconds, or where locks do not work, the caller goes on without it.
        """
        fd = self._lock_key(key, wait_s)
        try:
            yield
        finally:
            if fd is not None:
                os.close(fd)  # releases it

    def _lock_key(self, key: str, wait_s: float) -> int | None:
        path = self._entry_path(key)
        if fcntl is None or not hasattr(fcntl, "F_OFD_SETLK") or not self._folder_is_ours(create=True):
            return None
        # One byte of one file per key: nothing to clean up, and the kernel lets go when a process dies. An open-file
        # lock (OFD), because a plain POSIX lock is lost when any thread closes the file.
        try:
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int(key[:15], 16), 1, 0)
        deadline, pause = time.monotonic() + wait_s, 0.002
        try:
            while True:
                try:
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
                    return fd
                except OSError as error:
                    busy = error.errno in (errno.EAGAIN, errno.EACCES)
                    if not busy or time.monotonic() >= deadline or path.exists():
                        os.close(fd)
                        return None
                time.sleep(pause)
                pause = min(pause * 1.5, 0.05)
        except BaseException:
            os.close(fd)
            raise

    # --------------------------------------------------------------------------------------------------- keeping house

    def _files(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of each entry; deletes what killed writers left behind an hour ago or more."""
        entries: list[tuple[float, int, str]] = []
        now = time.time()
        try:
            with os.scandir(self.path) as found:
                for item in found:
                    with contextlib.suppress(OSError):
                        info = item.stat(follow_symlinks=False)
                        if item.name.endswith(_SUFFIX):
                            entries.append((info.st_mtime, info.st_size, item.path))
                        elif item.name.endswith(_TEMP_SUFFIX) and now - info.st_mtime > _STALE_TEMP_SECONDS:
                            os.unlink(item.path)
        except OSError:
            pass
        return entries

    def _keep_bounded(self, added: int) -> None:
        with _lock:
            if self._bytes is not None:
                self._bytes += added
                if self._bytes <= self.max_bytes:
                    return
        self.prune()

    def prune(self) -> int:
        """Delete least recently used entries until the folder is within `max_bytes`; returns how many went."""
        if not self._folder_is_ours(create=False):
            return 0
        entries = sorted(self._files())
        total = sum(size for _, size, _ in entries)
        removed = 0
        if total > self.max_bytes:
            goal = self.max_bytes * 9 // 10  # some slack, so that not every put has to scan the folder
            for _, size, path in entries[:-1]:  # the newest stays: it was just asked for
                if total <= goal:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed += 1
                total -= size
        with _lock:
            self._bytes = total
        return removed

    def clear(self) -> int:
        """Delete every entry; returns how many there were. Nothing else in the folder is touched."""
        removed = 0
        if self._folder_is_ours(create=False):
            for _, _, path in self._files():
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed += 1
        with _lock:
            self._bytes = None
        return removed

    def stats(self) -> dict[str, Any]:
        """path, entries, bytes, max_bytes of the folder; hits, misses, writes, corrupt of this process."""
        entries = self._files() if self._folder_is_ours(create=False) else []
        return {
            "path": str(self.path),
            "entries": len(entries),
            "bytes": sum(size for _, size, _ in entries),
            "max_bytes": self.max_bytes,
            **self._counters,
        }


class _DamagedError(Exception):
    pass


def _digest(key: str, meta: bytes, cubin: bytes) -> bytes:
    sha = hashlib.sha256(f"{key} {len(meta)} {len(cubin)} ".encode())
    sha.update(meta)
    sha.update(cubin)
    return sha.digest()


def _default_root() -> Path:
    named = os.environ.get("RTK_CACHE_DIR")
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rule: a relative one is ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # a user without a home
        base = os.path.join(tempfile.gettempdir(), f"cache-{os.geteuid()}")
    return Path(base) / "rtk"


_caches: dict[Path, Cache] = {}
_lock = threading.Lock()  # counters, warnings and the size estimate of every Cache; never held during input or output


def default_cache() -> Cache:
    """The process's cache: RTK_CACHE_DIR, else $XDG_CACHE_HOME/rtk, else ~/.cache/rtk. One Cache per folder."""
    root = _default_root()
    return _caches[root] if root in _caches else _caches.setdefault(root, Cache(root))


def _after_fork() -> None:
    """The thread that held the lock does not exist in the child."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
