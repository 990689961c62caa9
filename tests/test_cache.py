"""rtk/cache.py: nothing but what was put comes out, whatever happens to the folder or to the writers."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtk import entries
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
    assert small.prune() == 0
    assert small.prune(2500) == len(left) - 2 and small.contains(keys[0])  # to a bound of the moment, exactly


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


def left_behind(folder: Path, name: str, age_s: float) -> Path:
    path = folder / f".{KEY}.cubin.1.{name}.tmp"
    path.write_bytes(b"part")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_writers_left_goes(tmp_path, monkeypatch, locks):
    """At once where locks show that the writer is dead, else after an hour; never what a live one is writing."""
    cache = Cache(tmp_path)
    just_made, dead, alive, old = (
        left_behind(tmp_path, name, age) for name, age in [("a0", 1), ("a1", 60), ("a2", 60), ("a3", 4000)]
    )
    with alive.open("r+b") as writer:
        assert entries.try_lock(writer.fileno(), 0)
        if not locks:
            monkeypatch.setattr(entries, "fcntl", None)
        cache.put(KEY, CUBIN, META)  # the first put of a process looks
        assert [path.exists() for path in (just_made, dead, alive, old)] == [True, not locks, True, False]
    assert cache.sweep() == (1 if locks else 0)
    assert alive.exists() != locks


def test_files_of_other_people_are_never_touched(tmp_path):
    cache = Cache(tmp_path)
    names = ["model.cubin", ".tmp", "x.tmp", f".{KEY}.cubin.tmp", f"{KEY}.cubin.bak", f"{KEY}.CUBIN", "ab.cubin"]
    for name in names:
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (1, 1))
    cache.put(KEY, CUBIN, META)
    assert cache.stats()["entries"] == 1
    assert (cache.sweep(), cache.prune(0)) == (0, 1)
    cache.put(KEY, CUBIN, META)
    assert cache.clear() == 1
    assert sorted(os.listdir(tmp_path)) == sorted(names)


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
