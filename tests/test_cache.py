"""rtk/cache.py: nothing but what was put comes out, whatever happens to the folder or to the writers."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtk.cache import Cache, default_cache
from rtk.errors import ArgumentError, CacheWarning

REPOSITORY = Path(__file__).resolve().parents[1]
KEY, OTHER = "ab" * 32, "cd" * 32
CUBIN, META = b"\x7fELF" + bytes(range(256)), {"name": "k", "registers": 168}


def path_of(cache: Cache, key: str = KEY) -> Path:
    return cache.path / f"{key}.cubin"


@contextlib.contextmanager
def warned(times: int, match: str = "") -> Iterator[None]:
    """Exactly `times` CacheWarnings are given, each with `match` in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught if issubclass(w.category, CacheWarning)]
    assert len(texts) == times and all(match in text for text in texts), texts


# --- put and get -----------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(tmp_path):
    cache = Cache(tmp_path / "not" / "yet" / "there")
    with warned(0):
        assert cache.get(KEY) is None
        assert not cache.path.exists()  # looking makes nothing
        assert cache.put(KEY, CUBIN, META)
        entry = cache.get(KEY)
        assert entry is not None and (entry.key, entry.cubin, entry.meta) == (KEY, CUBIN, META)
        assert Cache(cache.path).get(KEY) == entry
        assert cache.get(OTHER) is None
    assert cache.path.stat().st_mode & 0o777 == 0o700
    assert path_of(cache).stat().st_mode & 0o777 == 0o600
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["writes"], stats["corrupt"]) == (1, 2, 1, 0)
    assert (stats["entries"], stats["bytes"]) == (1, path_of(cache).stat().st_size)
    assert os.listdir(cache.path) == [path_of(cache).name]  # no temp file stays


@given(st.binary(max_size=300), st.dictionaries(st.text(max_size=8), st.integers() | st.text() | st.none()))
def test_any_bytes_and_any_meta_come_back(tmp_path_factory, cubin, meta):
    cache = Cache(tmp_path_factory.mktemp("c"))
    cache.put(KEY, b"older", {})
    cache.put(KEY, cubin, meta)
    entry = cache.get(KEY)
    assert entry is not None and entry.cubin == cubin and entry.meta == meta


@pytest.mark.parametrize("key", ["", "x" * 64, "../" + "ab" * 32, "AB" * 32, "ab" * 100, "ab/cd" * 8, KEY + "\n"])
def test_a_key_is_hex_and_never_a_path(tmp_path, key):
    with pytest.raises(ArgumentError):
        Cache(tmp_path).get(key)
    with pytest.raises(ArgumentError):
        Cache(tmp_path).put(key, CUBIN, META)


def test_clear_and_contains(tmp_path):
    cache = Cache(tmp_path / "c")
    assert cache.clear() == 0 and not cache.contains(KEY)
    cache.put(KEY, CUBIN, META)
    cache.put(OTHER, CUBIN, META)
    (cache.path / "mine.txt").write_text("a user's own")
    assert cache.contains(KEY)
    assert cache.clear() == 2
    assert not cache.contains(KEY) and cache.stats()["entries"] == 0
    assert (cache.path / "mine.txt").exists()


# --- damage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_any_flipped_byte_any_truncation_any_growth_is_detected(tmp_path_factory, data):
    cache = Cache(tmp_path_factory.mktemp("c"))
    cache.put(KEY, CUBIN, META)
    whole = path_of(cache).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = data.draw(
        st.sampled_from(
            [
                whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :],
                whole[:at],
                whole + bytes([flip]),
                whole[:at] + bytes(len(whole) - at),  # blocks that never reached the disk
                whole[at:],
            ][: 5 if at else 4]
        )
    )
    if damaged == whole:
        return
    path_of(cache).write_bytes(damaged)
    with warned(1, "damaged"):
        assert cache.get(KEY) is None
        assert not path_of(cache).exists()
        assert cache.get(KEY) is None  # plainly missing now
    assert cache.stats()["corrupt"] == 1
    assert cache.put(KEY, CUBIN, META) and cache.get(KEY) is not None


def test_every_single_byte_matters(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, b"cubin", {"a": 1})
    whole = path_of(cache).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(len(whole)):
            path_of(cache).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert cache.get(KEY) is None, at
            path_of(cache).write_bytes(whole[:at])
            assert cache.get(KEY) is None, at
    path_of(cache).write_bytes(whole)
    assert cache.get(KEY) is not None


def test_an_entry_under_another_key_is_not_taken(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, CUBIN, META)
    os.rename(path_of(cache), path_of(cache, OTHER))
    with warned(1, "damaged"):
        assert cache.get(OTHER) is None


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_an_entry_that_is_no_plain_file(tmp_path, kind):
    cache = Cache(tmp_path / "c")
    cache.put(OTHER, CUBIN, META)
    path = path_of(cache)
    if kind == "link":
        good = Cache(tmp_path / "good")
        good.put(KEY, CUBIN, META)
        path.symlink_to(path_of(good))
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with warned(1):
        assert cache.get(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = cache.put(KEY, CUBIN, META)
        assert (cache.get(KEY) is not None) == stored == (kind != "folder")
    assert cache.get(OTHER) is not None


# --- trouble with the folder: one warning, no exception, memory only -------------------------------------------------


def refuse_new_files(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def open_(path, flags, *rest, **named):
        if flags & os.O_CREAT:
            raise OSError(error, os.strerror(error), str(path))
        return really_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_)


def a_file_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")


def a_file_above_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")


def cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path, *rest, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)


def link_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.name)


def group_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def world_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o707)


def somebody_elses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    refuse_new_files(errno.EROFS, monkeypatch)


def no_files_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    refuse_new_files(errno.EMFILE, monkeypatch)


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    really_write = os.write
    written: list[int] = []

    def write(fd, data):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        return really_write(fd, bytes(data)[:10])  # a short write first, as a disk that fills up gives

    monkeypatch.setattr(os, "write", write)


def cannot_be_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    "trouble",
    [
        a_file_in_its_place,
        a_file_above_it,
        cannot_be_made,
        link_loop,
        group_writable,
        world_writable,
        somebody_elses,
        read_only,
        no_files_left,
        full,
        cannot_be_renamed,
    ],
)
def test_folder_trouble_is_one_warning_and_a_miss(tmp_path, monkeypatch, trouble):
    folder = tmp_path / "parent" / "cache"
    folder.parent.mkdir()
    trouble(folder, monkeypatch)
    cache = Cache(folder)
    with warned(1, str(folder)):
        for _ in range(3):
            assert cache.get(KEY) is None
            assert cache.put(KEY, CUBIN, META) is False
            with cache.compiling(KEY, wait_s=0.1):
                pass
        assert cache.prune() == cache.clear() == cache.stats()["entries"] == 0
    monkeypatch.undo()
    if folder.is_dir():
        assert [name for name in os.listdir(folder) if name != ".lock"] == []  # no temp file is left either


def test_a_folder_that_goes_away_is_made_again(tmp_path):
    cache = Cache(tmp_path / "c")
    cache.put(KEY, CUBIN, META)
    shutil.rmtree(cache.path)
    with warned(0):
        assert cache.get(KEY) is None
        assert cache.put(KEY, CUBIN, META) and cache.get(KEY) is not None


@pytest.mark.parametrize("how", ["owner", "group", "world"])
def test_an_entry_that_others_could_have_written_is_not_used(tmp_path, monkeypatch, how):
    cache = Cache(tmp_path)
    cache.put(KEY, CUBIN, META)
    if how != "owner":
        path_of(cache).chmod(0o660 if how == "group" else 0o606)
    elif os.geteuid() == 0:
        os.chown(path_of(cache), 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    with warned(1, "not ours alone"):
        assert cache.get(KEY) is None
        assert cache.get(KEY) is None
    assert path_of(cache).exists()  # not ours to delete


def test_a_truly_read_only_folder_still_serves_what_is_in_it():
    """As an ordinary user, with real permissions (root may write anywhere, so it steps down for this)."""
    root, user = os.geteuid() == 0, 65534
    folder = Path(tempfile.mkdtemp())
    try:
        cache = Cache(folder / "cache")
        cache.put(KEY, CUBIN, META)
        if root:
            for path in (folder, cache.path, path_of(cache)):
                os.chown(path, user, user)
        cache.path.chmod(0o500)
        if root:
            os.seteuid(user)
        with warned(1, "cannot be written"):
            assert cache.get(KEY) is not None
            assert not cache.put(OTHER, CUBIN, META)
            assert not cache.put(OTHER, CUBIN, META)
            with cache.compiling(OTHER, wait_s=0.1):
                pass
            assert cache.get(KEY) is not None
    finally:
        if root:
            os.seteuid(0)
        (folder / "cache").chmod(0o700)
        shutil.rmtree(folder)


def test_a_truly_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here; `full` above covers it in part")
    try:
        cache = Cache(tmp_path / "c")
        assert cache.put(KEY, b"x" * 20_000, META)
        with warned(1, "cannot be written"):
            assert not cache.put(OTHER, b"y" * 100_000, META)
            assert not cache.put(OTHER, b"y" * 100_000, META)
            assert cache.get(OTHER) is None and cache.get(KEY) is not None
        assert sorted(os.listdir(cache.path)) == [path_of(cache).name]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- bounds ----------------------------------------------------------------------------------------------------------


def fill(cache: Cache, count: int, size: int = 1000) -> list[str]:
    keys = [f"{n:064x}" for n in range(count)]
    for age, key in enumerate(keys):
        cache.put(key, b"c" * size, {})
        if path_of(cache, key).exists():
            os.utime(path_of(cache, key), (time.time() - 1000 + age,) * 2)
    return keys


def test_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path)
    keys = fill(cache, 10)
    assert cache.get(keys[0]) is not None  # the oldest, but used just now
    small = Cache(tmp_path, max_bytes=5000)
    assert small.prune() > 0
    assert small.stats()["bytes"] <= 5000
    left = [key for key in keys if small.contains(key)]
    assert left == [keys[0], *keys[-len(left) + 1 :]] and len(left) >= 3


def test_it_stays_bounded_by_itself(tmp_path):
    cache = Cache(tmp_path, max_bytes=10_000)
    keys = fill(cache, 50)
    assert cache.stats()["bytes"] <= 10_000
    assert cache.get(keys[-1]) is not None
    again = Cache(tmp_path, max_bytes=3000)  # a new process counts what it finds
    again.put(KEY, b"c", {})
    assert again.stats()["bytes"] <= 3000 and again.get(KEY) is not None


def test_one_entry_over_the_bound_is_still_kept_while_it_is_the_newest(tmp_path):
    cache = Cache(tmp_path, max_bytes=100)
    assert cache.put(KEY, b"c" * 1000, {}) and cache.get(KEY) is not None
    os.utime(path_of(cache), (1, 1))
    assert cache.put(OTHER, b"c" * 1000, {})
    assert cache.get(KEY) is None and cache.get(OTHER) is not None


def test_an_interrupted_put_leaves_nothing(tmp_path, monkeypatch):
    cache = Cache(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    for call in ("write", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.put(KEY, CUBIN, META)
        assert os.listdir(tmp_path) == []


def test_what_killed_writers_left_goes_after_an_hour(tmp_path):
    cache = Cache(tmp_path)
    old, new = tmp_path / ".a.cubin.1.ff.tmp", tmp_path / ".b.cubin.2.ff.tmp"
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (time.time() - 4000,) * 2)
    cache.put(KEY, CUBIN, META)  # the first put of a process looks
    assert not old.exists() and new.exists()  # the other one may still be written to


# --- which folder ----------------------------------------------------------------------------------------------------


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RTK_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache().path == tmp_path / "home" / ".cache" / "rtk"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG rule
    assert default_cache().path == tmp_path / "home" / ".cache" / "rtk"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache().path == tmp_path / "xdg" / "rtk"
    monkeypatch.setenv("RTK_CACHE_DIR", "~/mine")
    assert default_cache().path == tmp_path / "home" / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RTK_CACHE_DIR", "here")
    assert default_cache().path == tmp_path / "here"
    assert default_cache() is default_cache()  # one a process: its counters and its warnings
    assert not (tmp_path / "home").exists() and not (tmp_path / "here").exists()


# --- several processes -----------------------------------------------------------------------------------------------


CHURN = """
import random, sys, warnings
sys.path.insert(0, sys.argv[1])
from rtk.cache import Cache
warnings.simplefilter("error")
cache, rng = Cache(sys.argv[2], max_bytes=200_000), random.Random(int(sys.argv[3]))
for _ in range(250):
    key = f"{rng.randrange(12):064x}"
    expected = random.Random(key).randbytes(40_000)
    if rng.random() < 0.5:
        assert cache.put(key, expected, {"key": key})
    else:
        entry = cache.get(key)
        assert entry is None or (entry.cubin, entry.meta) == (expected, {"key": key})
print(cache.stats()["hits"])
"""


def test_processes_that_put_get_and_evict_at_once_only_ever_see_whole_entries(tmp_path):
    command = [sys.executable, "-c", CHURN, str(REPOSITORY), str(tmp_path / "c")]
    workers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    hits = 0
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        hits += int(out)
    assert hits > 0
    assert Cache(tmp_path / "c").stats()["entries"] > 0
    assert not [name for name in os.listdir(tmp_path / "c") if name.endswith(".tmp")]


KILLS = """
import os, random, signal, sys, time, warnings
sys.path.insert(0, sys.argv[1])
from rtk.cache import Cache
warnings.simplefilter("error")
folder, rng = sys.argv[2], random.Random(7)
keys = [f"{n:064x}" for n in range(3)]
cubins = {key: random.Random(key).randbytes(1_500_000) for key in keys}
seen = 0
for kill in range(60):
    child = os.fork()
    if child == 0:
        while True:
            for key in keys:
                with Cache(folder).compiling(key):
                    Cache(folder).put(key, cubins[key], {"key": key})
    time.sleep(rng.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for key in keys:
        entry = Cache(folder).get(key)
        assert entry is None or entry.cubin == cubins[key]
        seen += entry is not None
    started = time.monotonic()
    with Cache(folder).compiling(keys[0]):  # the dead hold no lock
        pass
    assert time.monotonic() - started < 5
print(seen)
"""


def test_killed_writers_leave_no_bad_entry_and_no_lock(tmp_path):
    folder = tmp_path / "c"
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(REPOSITORY), str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    torn = [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert torn, "no kill hit a write: the test would show nothing"
    for path in torn:
        os.utime(path, (1, 1))
    Cache(folder).prune()
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from rtk.cache import Cache
with Cache(sys.argv[2]).compiling(sys.argv[3]):
    print("held", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def test_a_held_key_is_waited_for_but_not_for_ever(tmp_path):
    cache = Cache(tmp_path / "c")

    def seconds_to_get(key: str, wait_s: float) -> float:
        started = time.monotonic()
        with cache.compiling(key, wait_s):
            return time.monotonic() - started

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(REPOSITORY), str(cache.path), KEY, "60"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert seconds_to_get(OTHER, 30) < 5  # another key is free
        assert 0.3 <= seconds_to_get(KEY, 0.3) < 5  # bounded
        cache.put(KEY, CUBIN, META)
        assert seconds_to_get(KEY, 30) < 5  # what was waited for is there
        cache.clear()
        holder.kill()
        assert seconds_to_get(KEY, 30) < 10  # a dead holder holds nothing
    finally:
        holder.kill()
        holder.communicate()
