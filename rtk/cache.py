"""The cubin cache folder: one file an entry, written atomically, verified on every read; read-only folders before it.

No lock is needed for correctness: an entry appears by rename, whole, under a name that is the hash of what made it, so
two writers can only write the same thing. Trouble with the folder never stops a caller: one CacheWarning, then a miss.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from rtk import entries, forks
from rtk.entries import DamagedError, Entry, UntrustedError
from rtk.errors import CacheWarning

__all__ = ["Cache", "Entry", "Item", "default_cache"]

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """What lies in a cache folder, unread. `used`: when it was last put or got, in seconds since the epoch."""

    path: str
    key: str
    bytes: int
    used: float
    read_only: bool


class Cache:
    """Cubins in the folder `root`, at most `max_bytes` in all (least recently used go first).

    The folders of `read_only` are searched first, in order, and never written; theirs may also belong to root. With
    `for_everyone` what is written can be read by other users, as a folder that fills a container image must be.

    Safe for several threads and processes. `get` and `put` never raise for what the folder does to them.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        max_bytes: int = MAX_BYTES,
        *,
        read_only: Sequence[str | os.PathLike[str]] = (),
        for_everyone: bool = False,
    ) -> None:
        if root is None:
            *read_only, root = _default_folders()
        # absolute, so that it stays the same folder when the process changes directory
        self.path = Path(os.path.abspath(root))
        others = (Path(os.path.abspath(folder)) for folder in read_only)
        self.read_only = tuple(dict.fromkeys(folder for folder in others if folder != self.path))
        self.max_bytes = max_bytes
        self._folder_mode, self._file_mode = (0o755, 0o644) if for_everyone else (0o700, 0o600)
        self._counters = {"hits": 0, "misses": 0, "writes": 0, "corrupt": 0}
        self._warned: set[str] = set()
        self._bytes: int | None = None  # an estimate of what lies in the folder; None until first counted

    # ------------------------------------------------------------------------------------------ reading and writing

    def get(self, key: str, needs: Collection[str] = ()) -> Entry | None:
        """The entry under `key` (hex), or None. A damaged entry is deleted, with a CacheWarning, and is a miss.

        `needs` are names that its meta must have; an entry without them is as good as damaged.
        """
        name = entries.name_of(key)
        for folder in (*self.read_only, self.path):
            if self._usable(folder):
                entry = self._read(folder, name, needs)
                if entry is not None:
                    self._count("hits")
                    return entry
        self._count("misses")
        return None

    def contains(self, key: str) -> bool:
        """Whether there is a file under `key`; get() says whether it is any good. Counts as neither hit nor miss."""
        name = entries.name_of(key)
        return any(os.path.exists(folder / name) for folder in (*self.read_only, self.path))

    def put(self, key: str, cubin: bytes, meta: dict[str, Any]) -> bool:
        """Store an entry, replacing any under that key. False, after one CacheWarning, if the folder refuses it."""
        path = self.path / entries.name_of(key)
        data = entries.pack(Entry(key, cubin, meta))
        if not self._usable(self.path, create=True):
            return False
        try:
            entries.write(str(path), data, self._file_mode)
        except OSError as error:
            self._warn("folder", f"cache folder {self.path} cannot be written: {error}")
            return False
        self._count("writes")
        self._keep_bounded(len(data))
        return True

    def _read(self, folder: Path, name: str, needs: Collection[str]) -> Entry | None:
        path, ours = folder / name, folder == self.path
        try:
            entry = entries.read(path, _owners(ours), needs)
        except DamagedError as damage:
            if ours:
                with contextlib.suppress(OSError):
                    path.unlink()
            self._count("corrupt")
            self._warn(f"entry:{path}", f"cache entry {path} is damaged ({damage}); it is compiled again")
        except UntrustedError:
            self._warn(f"owner:{folder}", f"cache entry {path} is not ours alone to write; it is not used")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self._warn(f"read:{folder}", f"cache entry {path} cannot be read: {error}")
        else:
            if ours:
                with contextlib.suppress(OSError):  # the "recently used" that prune() goes by; atime may be off
                    os.utime(path)
            return entry
        return None

    # ------------------------------------------------------------------------------------------------- the folders

    def _usable(self, folder: Path, create: bool = False) -> bool:
        """Whether a folder may be used: it exists, and nobody untrusted can write to it (cubins are code)."""
        trouble = self._trouble(folder, create)
        if trouble and not (trouble == _MISSING and folder == self.path and not create):
            self._warn_of(folder, trouble)
        return not trouble

    def _trouble(self, folder: Path, create: bool = False) -> str:
        """Why a folder cannot be used, or ""."""
        try:
            return entries.folder_trouble(self._stat_folder(folder, create), _owners(folder == self.path))
        except FileNotFoundError:
            return _MISSING
        except OSError as error:
            return f"cannot be used: {error}"

    def _stat_folder(self, folder: Path, create: bool) -> os.stat_result:
        try:
            return os.stat(folder)
        except FileNotFoundError:
            if not create:
                raise
        os.makedirs(folder.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was first
            os.mkdir(folder, self._folder_mode)
        return os.stat(folder)

    def _warn_of(self, folder: Path, trouble: str) -> None:
        if folder == self.path:
            self._warn("folder", f"cache folder {folder} {trouble}")
        else:
            self._warn(f"folder:{folder}", f"read-only cache folder {folder} {trouble}; it is not searched")

    def _warn(self, kind: str, message: str) -> None:
        with _lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        if kind == "folder":
            message += "; compiled kernels are kept in memory only"
        warnings.warn(f"rtk: {message}", CacheWarning, stacklevel=4)

    def _count(self, event: str) -> None:
        with _lock:
            self._counters[event] += 1

    @contextlib.contextmanager
    def compiling(self, key: str, wait_s: float = 20.0) -> Iterator[None]:
        """Hold `key` among the processes that use this folder, so that only one of them compiles it.

        Best effort and bounded: after `wait_s` seconds, or where locks do not work, the caller goes on without it.
        """
        held = self._lock_key(key, wait_s)
        try:
            yield
        finally:
            if held is not None:
                held.close()  # releases it

    def _lock_key(self, key: str, wait_s: float) -> FileIO | None:
        path = self.path / entries.name_of(key)
        if not self._usable(self.path, create=True):
            return None
        # One byte of one file per key: nothing to clean up, and the kernel lets go when a process dies. A file object,
        # not a bare descriptor: Ctrl-C between two lines must not leave the lock held by nobody.
        try:
            file = open(self.path / ".lock", "a+b", buffering=0)  # noqa: SIM115
            os.fchmod(file.fileno(), self._file_mode)
        except OSError:
            return None
        if entries.wait_for_lock(file, int(key[:15], 16), wait_s, lambda: os.path.exists(path)):
            return file
        file.close()
        return None

    # --------------------------------------------------------------------------------------------------- keeping house

    def items(self) -> list[Item]:
        """Every entry of every folder that can be used, most recently used first; none of them read."""
        found = [item for folder in (*self.read_only, self.path) for item in self._items(folder)]
        return sorted(found, key=lambda item: (-item.used, item.key))

    def check(self, item: Item) -> Entry | str:
        """Reads an item as get() would: the entry, or what is wrong with it. Neither counted nor deleted."""
        try:
            return entries.read(item.path, _owners(not item.read_only))
        except DamagedError as damage:
            return f"damaged: {damage}"
        except UntrustedError as reason:
            return f"can be written by others: {reason}"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def discard(self, item: Item) -> bool:
        """Deletes an item of the written folder; False where that is not possible."""
        return not item.read_only and _unlink(item.path)

    def _items(self, folder: Path) -> list[Item]:
        if not self._usable(folder):
            return []
        found = []
        for entry, info in _listed(folder):
            key = entries.key_of(entry.name)
            if key is not None:
                found.append(Item(entry.path, key, info.st_size, info.st_mtime, folder != self.path))
        return found

    def _keep_bounded(self, added: int) -> None:
        with _lock:
            if self._bytes is not None:
                self._bytes += added
                if self._bytes <= self.max_bytes:
                    return
        # Some slack, so that not every put has to scan; and never the newest, which was just asked for.
        self._evict(self.max_bytes, self.max_bytes * 9 // 10, spared=1)

    def prune(self, max_bytes: int | None = None) -> int:
        """Delete least recently used entries until the folder is within `max_bytes`; returns how many went."""
        limit = self.max_bytes if max_bytes is None else max_bytes
        return self._evict(limit, limit)

    def _evict(self, limit: int, goal: int, spared: int = 0) -> int:
        if not self._usable(self.path):
            return 0
        self.sweep()
        oldest_first = sorted(self._items(self.path), key=lambda item: item.used)
        total = sum(item.bytes for item in oldest_first)
        removed = 0
        if total > limit:
            for item in oldest_first[: len(oldest_first) - spared]:
                if total <= goal:
                    break
                removed += _unlink(item.path)
                total -= item.bytes
        with _lock:
            self._bytes = total
        return removed

    def sweep(self) -> int:
        """Delete what killed writers left behind; returns how many files."""
        if not self._usable(self.path):
            return 0
        listed = [(entry, info) for entry, info in _listed(self.path) if entries.is_temp(entry.name)]
        return sum(_unlink(entry.path) for entry, info in listed if entries.is_abandoned(entry.path, info))

    def clear(self) -> int:
        """Delete every entry of the written folder; returns how many. Nothing else in the folder is touched."""
        self.sweep()
        removed = sum(_unlink(item.path) for item in self._items(self.path))
        with _lock:
            self._bytes = None
        return removed

    def stats(self) -> dict[str, Any]:
        """path, entries, bytes, max_bytes of the written folder; hits, misses, writes, corrupt of this process."""
        items = self._items(self.path)
        return {
            "path": str(self.path),
            "entries": len(items),
            "bytes": sum(item.bytes for item in items),
            "max_bytes": self.max_bytes,
            **self._counters,
        }


_MISSING = "does not exist"


def _owners(ours: bool) -> tuple[int, ...]:
    """The users whose files are trusted: of the written folder us, of read-only ones root too."""
    return (os.geteuid(),) if ours else (os.geteuid(), 0)


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _listed(folder: Path) -> list[tuple[os.DirEntry[str], os.stat_result]]:
    found: list[tuple[os.DirEntry[str], os.stat_result]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        for entry in listing:
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append((entry, entry.stat(follow_symlinks=False)))
    return found


def _default_folders() -> tuple[Path, ...]:
    """What RTK_CACHE_DIR names, separated as in PATH: the last is written, those before it are only read."""
    *read_only, written = os.environ.get("RTK_CACHE_DIR", "").split(os.pathsep)
    return *(_absolute(folder) for folder in read_only if folder), _absolute(written) if written else _usual_folder()


def _absolute(folder: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _usual_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rule: a relative one is ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # a user without a home
        base = os.path.join(tempfile.gettempdir(), f"cache-{os.geteuid()}")
    return Path(base) / "rtk"


_caches: dict[tuple[Path, ...], Cache] = {}
_lock = threading.Lock()  # counters, warnings and the size estimate of every Cache; never held during input or output
forks.new_in_child(globals(), "_lock")


def default_cache() -> Cache:
    """The process's cache: what RTK_CACHE_DIR names, else $XDG_CACHE_HOME/rtk, else ~/.cache/rtk. One per setting."""
    folders = _default_folders()
    if folders not in _caches:
        _caches.setdefault(folders, Cache(folders[-1], read_only=folders[:-1]))
    return _caches[folders]
