"""`rtk cache`: what it shows, prunes, verifies and clears; in text, in JSON, and in its exit codes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import commands
import pytest

from rtk.cache import Cache
from rtk.cli import cache as command

KEYS = [f"{n:064x}" for n in range(30)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three kernels, one of them last used two hours ago."""
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    for n, age_s in ((0, 7300), (1, 200), (2, 1)):
        cache.put(KEYS[n], bytes(1000), {"name": f"kernel_{n}", "registers": 100 + n, "nvrtc": "12.9.86"})
        os.utime(cache.path / f"{KEYS[n]}.cubin", (time.time() - age_s,) * 2)
    return cache.path


def call(capsys, *arguments):
    return commands.call(capsys, "cache", *arguments)


def as_json(capsys, *arguments):
    code, out, err = call(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def test_path(capsys, folder, tmp_path, monkeypatch):
    assert call(capsys, "path") == (0, f"{folder}\n", "")
    monkeypatch.setenv("RTK_CACHE_DIR", f"{tmp_path / 'ro'}{os.pathsep}{folder}")
    assert call(capsys, "path") == (0, f"{folder}\n", "")  # the one that is written: for scripts
    assert as_json(capsys, "path")[1] == {"path": str(folder), "read_only": [str(tmp_path / "ro")], "troubles": []}


def test_show(capsys, folder):
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert call(capsys, "show")[1] == out
    lines = out.splitlines()
    assert lines[0].startswith(f"{folder}: 3 kernels, 3.") and lines[0].endswith(" of at most 1.0 GiB")
    rows = [line.split() for line in lines[-3:]]
    assert [row[0] for row in rows] == ["kernel_2", "kernel_1", "kernel_0"]  # last used first
    assert "3 min ago" in lines[-2] and "2 h ago" in lines[-1]
    assert [row[-2:] for row in rows] == [["102", "12.9.86"], ["101", "12.9.86"], ["100", "12.9.86"]]
    code, report = as_json(capsys, "--limit", "2")
    assert code == 0
    assert [kernel["name"] for kernel in report["newest"]] == ["kernel_2", "kernel_1"]
    assert report["newest"][1]["age_s"] == pytest.approx(200, abs=30)
    assert (report["entries"], report["path"]) == (3, str(folder))
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.cubin"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    call(capsys)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "looking is not using"


def test_show_where_there_is_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "nothing"))
    assert call(capsys) == (0, f"{tmp_path / 'nothing'}: 0 kernels, 0 B of at most 1.0 GiB\n", "")
    assert not (tmp_path / "nothing").exists()


def test_show_with_read_only_folders_and_a_bad_entry(capsys, folder, tmp_path, monkeypatch):
    Cache(tmp_path / "ro").put(KEYS[9], b"c", {"name": "ready", "registers": 7, "nvrtc": "13.0.88"})
    (folder / f"{KEYS[1]}.cubin").write_bytes(b"short")
    monkeypatch.setenv("RTK_CACHE_DIR", f"{tmp_path / 'ro'}{os.pathsep}{folder}")
    code, out, _ = call(capsys)
    assert code == 0
    assert f"{tmp_path / 'ro'}: 1 kernel, " in out and ", only read\n" in out
    assert "ready" in out and "damaged: too short" in out
    _, report = as_json(capsys)
    assert [(entry["entries"], entry["read_only"]) for entry in report["folders"]] == [(1, True), (3, False)]
    assert (folder / f"{KEYS[1]}.cubin").exists(), "showing deletes nothing"


def test_trouble_with_a_folder_is_said_and_exit_code_1(capsys, folder):
    folder.chmod(0o777)
    code, out, err = call(capsys)
    assert (code, err) == (1, "") and "can be written by others (mode 777)" in out
    for action in ("prune", "verify", "clear"):
        code, report = as_json(capsys, action)
        assert code == 1 and "can be written by others" in report["troubles"][0]
    assert len(list(folder.glob("*.cubin"))) == 3


def test_prune(capsys, folder):
    one = (folder / f"{KEYS[0]}.cubin").stat().st_size
    assert as_json(capsys, "prune")[1]["removed"] == 0  # within the cache's own bound
    code, report = as_json(capsys, "prune", "--max-bytes", str(2 * one))
    assert (code, report["removed"], report["freed_bytes"], report["entries"], report["bytes"]) == (
        0,
        1,
        one,
        2,
        2 * one,
    )
    assert not (folder / f"{KEYS[0]}.cubin").exists(), "the least recently used"
    code, out, _ = call(capsys, "prune", "--max-bytes", "1.5K")
    assert code == 0 and out == f"{folder}: removed 1 kernel, 1.1 KiB; 1 kernel left, 1.1 KiB\n"
    assert as_json(capsys, "prune", "--max-bytes", "0")[1]["entries"] == 0


def test_verify(capsys, folder):
    assert call(capsys, "verify") == (0, "3 kernels whole, 0 not\n", "")
    flipped, empty = folder / f"{KEYS[0]}.cubin", folder / f"{KEYS[1]}.cubin"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    empty.write_bytes(b"")
    loose = folder / f"{KEYS[3]}.cubin"
    loose.write_bytes((folder / f"{KEYS[2]}.cubin").read_bytes())
    loose.chmod(0o666)
    (folder / f"{KEYS[4]}.cubin").mkdir()
    (folder / "notes.txt").write_text("not ours")
    code, out, err = call(capsys, "verify")
    assert (code, err) == (1, "")
    for text in (f"{flipped}: damaged: bad checksum", f"{empty}: damaged: too short", f"{loose}: can be written by"):
        assert text in out
    assert "1 kernel whole, 4 not; `rtk cache verify --fix` removes those" in out
    assert len(list(folder.iterdir())) == 6, "nothing was removed"
    code, report = as_json(capsys, "verify", "--fix")
    assert code == 1 and report["good"] == 1  # a folder under an entry's name is not ours to remove
    assert sorted(Path(entry["path"]).name[:64] for entry in report["bad"] if entry["removed"]) == [
        KEYS[0],
        KEYS[1],
        KEYS[3],
    ]
    (folder / f"{KEYS[4]}.cubin").rmdir()
    assert as_json(capsys, "verify")[0] == 0
    empty.write_bytes(b"")
    code, out, _ = call(capsys, "verify", "--fix")
    assert code == 0 and out == f"{empty}: damaged: too short; removed\n1 kernel whole, 1 not\n"
    assert sorted(os.listdir(folder)) == sorted([f"{KEYS[2]}.cubin", "notes.txt"])


def test_verify_does_not_touch_read_only_folders(capsys, folder, tmp_path, monkeypatch):
    ready = Cache(tmp_path / "ro")
    ready.put(KEYS[9], b"c", {})
    (ready.path / f"{KEYS[9]}.cubin").write_bytes(b"")
    monkeypatch.setenv("RTK_CACHE_DIR", f"{ready.path}{os.pathsep}{folder}")
    code, report = as_json(capsys, "verify", "--fix")
    assert code == 1 and [entry["removed"] for entry in report["bad"]] == [False]
    assert (ready.path / f"{KEYS[9]}.cubin").exists()


def test_verify_fix_sweeps_what_killed_writers_left(capsys, folder):
    temp = folder / f".{KEYS[0]}.cubin.1.ab.tmp"
    temp.write_bytes(b"part")
    os.utime(temp, (1, 1))
    assert as_json(capsys, "verify")[0] == 0 and temp.exists()
    assert as_json(capsys, "verify", "--fix")[1]["swept"] == 1 and not temp.exists()


def test_clear(capsys, folder, tmp_path, monkeypatch):
    Cache(tmp_path / "ro").put(KEYS[9], b"c", {})
    monkeypatch.setenv("RTK_CACHE_DIR", f"{tmp_path / 'ro'}{os.pathsep}{folder}")
    (folder / "notes.txt").write_text("not ours")
    assert call(capsys, "clear") == (0, f"{folder}: removed 3 kernels\n", "")
    assert os.listdir(folder) == ["notes.txt"] and len(Cache(tmp_path / "ro").items()) == 1
    assert as_json(capsys, "clear")[1]["removed"] == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["bake"], "bake"),
        (["--fix"], "--fix goes with `rtk cache verify`"),
        (["clear", "--max-bytes", "1"], "--max-bytes goes with `rtk cache prune`"),
        (["verify", "--max-bytes", "0"], "--max-bytes goes with `rtk cache prune`"),
        (["prune", "--max-bytes", "much"], "'much' is not a size such as 500M"),
        (["prune", "--max-bytes", "-1"], "-1"),
        (["--limit", "-1"], "-1 is not at least 0"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys, folder, arguments, complaint):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and complaint in err
    assert len(list(folder.glob("*.cubin"))) == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1k", 1024),
        ("500M", 500 << 20),
        ("2GiB", 2 << 30),
        ("1.5 gb", 3 << 29),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text, count):
    assert command.size(text) == count


@pytest.mark.parametrize("text", ["", "K", "1X", "nan", "inf", "-1", "1 2", "1e999"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError):
        command.size(text)
