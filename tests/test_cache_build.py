"""jit.build on a cache with bad entries or no usable folder: the right kernel, one warning, and a good entry after."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
from test_cache import warned

from rtk import entries, jit, toolchain
from rtk.cache import Cache
from rtk.jit import Binary, CompileReport, Source

SOURCE, OTHER_SOURCE = Source("k", "the text of k"), Source("l", "the text of l")


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of what was compiled; the compiler is made up."""
    names: list[str] = []

    def compile_(source, headers, entry_key, build):
        names.append(source.name)
        report = CompileReport(source.name, 8, 0, 0, 0, 0, (), 1.0, build, False)
        return Binary(source.name, entry_key, f"cubin of {source.text}".encode(), report)

    monkeypatch.setattr(jit, "_compile", compile_)
    monkeypatch.setattr(jit, "_memory", type(jit._memory)())
    monkeypatch.setattr(toolchain, "nvrtc", lambda: toolchain.Nvrtc("/none", "1.2.3", 1, "made up"))
    return names


def build(folder: Path, source: Source = SOURCE, **more) -> Binary:
    """As a new process would."""
    jit._memory.clear()
    return jit.build(source, cache=Cache(folder, **more))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def only_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:52])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def foreign_text(path: Path) -> None:
    path.write_text("#!/bin/sh\necho a file of somebody else's\n")


def foreign_elf(path: Path) -> None:
    path.write_bytes(b"\x7fELF" + os.urandom(5000))


def foreign_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")


def a_link_to_a_good_one(path: Path) -> None:
    good = path.rename(path.with_name("good"))
    path.symlink_to(good)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def the_entry_of_another_kernel(path: Path) -> None:
    build(path.parent, OTHER_SOURCE)
    other = next(item for item in Cache(path.parent).items() if item.path != str(path))
    os.replace(other.path, path)


def without_a_report(path: Path) -> None:
    Cache(path.parent).put(path.stem, b"whole, and signed as it should be", {"name": "k"})


def a_list_for_a_report(path: Path) -> None:
    meta, cubin = json.dumps([1, 2]).encode(), b"cubin"
    header = entries._HEADER.pack(entries._MAGIC, len(meta), len(cubin), entries._digest(path.stem, meta, cubin))
    path.write_bytes(header + meta + cubin)


def no_json_for_a_report(path: Path) -> None:
    meta, cubin = b"\xff not json", b"cubin"
    header = entries._HEADER.pack(entries._MAGIC, len(meta), len(cubin), entries._digest(path.stem, meta, cubin))
    path.write_bytes(header + meta + cubin)


BAD = [
    truncated,
    only_a_header,
    empty,
    grown,
    a_flipped_bit,
    zeros,
    foreign_text,
    foreign_elf,
    foreign_pickle,
    a_link_to_a_good_one,
    a_link_to_nothing,
    a_fifo,
    the_entry_of_another_kernel,
    without_a_report,
    a_list_for_a_report,
    no_json_for_a_report,
]


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_entry_is_rebuilt_with_one_warning(tmp_path, compiled, spoil):
    first = build(tmp_path)
    path = tmp_path / f"{first.key}.cubin"
    spoil(path)
    compiled.clear()
    with warned(1, f"{first.key}.cubin is damaged"):
        again = build(tmp_path)
    assert again.cubin == first.cubin and compiled == ["k"] and not again.report.from_cache
    with warned(0):
        third = build(tmp_path)
    assert third.cubin == first.cubin and compiled == ["k"] and third.report.from_cache
    assert path.is_file() and not path.is_symlink()
    assert all(not isinstance(Cache(tmp_path).check(item), str) for item in Cache(tmp_path).items())


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_entry_in_a_read_only_folder_is_built_into_ours(tmp_path, compiled, spoil):
    first = build(tmp_path / "ready")
    spoil(tmp_path / "ready" / f"{first.key}.cubin")
    compiled.clear()
    with warned(1, "damaged"):
        again = build(tmp_path / "own", read_only=[tmp_path / "ready"])
    assert again.cubin == first.cubin and compiled == ["k"]
    with warned(1, "damaged"):  # of a new process: the folder still has it
        assert build(tmp_path / "own", read_only=[tmp_path / "ready"]).report.from_cache
    assert compiled == ["k"]


def test_a_folder_in_its_place_cannot_be_rebuilt_and_says_so(tmp_path, compiled):
    first = build(tmp_path)
    path = tmp_path / f"{first.key}.cubin"
    path.unlink()
    path.mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert build(tmp_path).cubin == first.cubin
    assert ["damaged" in str(w.message) for w in caught] == [True, False]
    assert "memory only" in str(caught[1].message)


def test_what_lies_ready_in_a_read_only_folder_is_not_compiled(tmp_path, compiled):
    build(tmp_path / "ready")
    compiled.clear()
    with warned(0):
        assert build(tmp_path / "own", read_only=[tmp_path / "ready"]).report.from_cache
        assert build(tmp_path / "own", OTHER_SOURCE, read_only=[tmp_path / "ready"]).cubin
    assert compiled == ["l"]
    assert [item.read_only for item in Cache(tmp_path / "own").items()] == [False]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_in_a_folder_that_others_can_write_nothing_is_kept_and_nothing_found(tmp_path, compiled, mode):
    build(tmp_path / "cache")
    (tmp_path / "cache").chmod(mode)
    compiled.clear()
    before = sorted(os.listdir(tmp_path / "cache"))
    with warned(1, "can be written by others"):
        cache = Cache(tmp_path / "cache")
        jit._memory.clear()
        for _ in range(3):
            assert jit.build(SOURCE, cache=cache).cubin and jit.build(OTHER_SOURCE, cache=cache).cubin
    assert compiled == ["k", "l"], "once a process"
    assert sorted(os.listdir(tmp_path / "cache")) == before
