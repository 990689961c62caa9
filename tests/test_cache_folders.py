"""Trouble with a cache folder, case by case: memory only with one warning, refused, or kept; and read-only folders."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cache import CUBIN, KEY, META, OTHER, path_of, warned

from rtk import entries
from rtk.cache import Cache, default_cache

# --- the written folder -----------------------------------------------------------------------------------------------


def refuse_new_files(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = open

    def open_(path, mode="r", *rest, **named):
        if mode[0] in "axw":
            raise OSError(error, os.strerror(error), str(path))
        return really_open(path, mode, *rest, **named)

    monkeypatch.setattr(builtins, "open", open_)


def a_file_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")


def a_file_above_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")


def cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path, *rest, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)


def cannot_be_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_stat = os.stat

    def stat_(path, **named):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_stat(path, **named)

    monkeypatch.setattr(os, "stat", stat_)


def link_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.name)


def link_to_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.symlink_to("nowhere")


def group_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def world_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o707)


def sticky_and_world_writable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o1777)


def somebody_elses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o755)
    uid = os.geteuid()
    if uid == 0:
        os.chown(folder, 12345, 12345)
    else:
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


def input_output_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    refuse_new_files(errno.EIO, monkeypatch)


def missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def missing_far_above(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.rmdir()


def without_locks(error: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def trouble(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fcntl_(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(entries.fcntl, "fcntl", fcntl_)

    trouble.__name__ = f"locks_raise_{errno.errorcode[error]}"
    return trouble


def no_fcntl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "fcntl", None)


def no_lock_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o700)
    (folder / ".lock").mkdir()


MEMORY, REFUSED, KEPT = "memory only, one warning", "refused as unsafe, one warning", "kept on disk, no warning"
TROUBLES = [
    (a_file_in_its_place, MEMORY),
    (a_file_above_it, MEMORY),
    (cannot_be_made, MEMORY),
    (cannot_be_entered, MEMORY),
    (link_loop, MEMORY),
    (link_to_nowhere, MEMORY),
    (read_only, MEMORY),
    (no_files_left, MEMORY),
    (full, MEMORY),
    (cannot_be_renamed, MEMORY),
    (input_output_error, MEMORY),
    (group_writable, REFUSED),
    (world_writable, REFUSED),
    (sticky_and_world_writable, REFUSED),
    (somebody_elses, REFUSED),
    (missing, KEPT),
    (missing_far_above, KEPT),
    # Without locks nothing is lost but that one process waits for another's compile.
    (without_locks(errno.ENOLCK), KEPT),
    (without_locks(errno.EOPNOTSUPP), KEPT),
    (without_locks(errno.ENOSYS), KEPT),
    (without_locks(errno.EINVAL), KEPT),
    (no_fcntl, KEPT),
    (no_lock_file, KEPT),
]


@pytest.mark.parametrize(("trouble", "outcome"), TROUBLES, ids=lambda x: getattr(x, "__name__", None))
def test_trouble_with_the_folder(tmp_path, monkeypatch, trouble, outcome):
    folder = tmp_path / "parent" / "cache"
    folder.parent.mkdir()
    trouble(folder, monkeypatch)
    cache = Cache(folder)
    kept = outcome == KEPT
    with warned(0 if kept else 1, str(folder)):
        for turn in range(3):
            assert (cache.get(KEY) is not None) == (kept and turn > 0)
            with cache.compiling(KEY, wait_s=0.1):
                pass
            assert cache.put(KEY, CUBIN, META) is kept
        assert cache.prune() == cache.sweep() == 0
        assert cache.clear() == cache.stats()["writes"] // 3 == int(kept)
    monkeypatch.undo()
    if folder.is_dir():
        assert [name for name in os.listdir(folder) if name != ".lock"] == []  # no temp file is left either


@pytest.mark.parametrize("trouble", [trouble for trouble, outcome in TROUBLES if outcome == REFUSED])
def test_nothing_is_taken_from_a_folder_that_is_refused(tmp_path, monkeypatch, trouble):
    """Good entries lie in it, and are not looked at: whoever can write there can make good entries too."""
    folder = tmp_path / "cache"
    trouble(folder, monkeypatch)
    good = Cache(tmp_path / "good")
    good.put(KEY, CUBIN, META)
    shutil.copy(path_of(good), folder)
    cache = Cache(folder)
    with warned(1, str(folder)):
        assert cache.get(KEY) is None
        assert cache.items() == []
        assert cache.clear() == 0
    assert path_of(cache).exists()


def test_what_is_made_is_ours_alone(tmp_path):
    old = os.umask(0)
    try:
        cache = Cache(tmp_path / "cache")
        with cache.compiling(KEY):
            cache.put(KEY, CUBIN, META)
    finally:
        os.umask(old)
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.path.iterdir()} == {0o600}


def test_a_folder_that_goes_away_is_made_again(tmp_path):
    cache = Cache(tmp_path / "c")
    cache.put(KEY, CUBIN, META)
    shutil.rmtree(cache.path)
    with warned(0):
        assert cache.get(KEY) is None
        assert cache.put(KEY, CUBIN, META) and cache.get(KEY) is not None


@pytest.mark.parametrize("how", ["owner", "group", "world"])
def test_an_entry_that_others_could_have_written_is_not_used(tmp_path, how):
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


def test_a_folder_that_is_truly_closed_to_us():
    """Another user's, mode 0700: even to ask whether a file is there is an error."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        Cache(place / "closed").put(KEY, CUBIN, META)
        os.seteuid(65534)
        with warned(1, "belongs to user 0"):
            cache = Cache(place / "closed")
            assert cache.get(KEY) is None and not cache.contains(KEY) and not cache.put(KEY, CUBIN, META)
        with warned(1, "cannot be read"):  # root's is trusted, where it is only read
            assert Cache(place / "none", read_only=[place / "closed"]).get(KEY) is None
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


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


# --- read-only folders, searched first --------------------------------------------------------------------------------


def filled(folder: Path, key: str = KEY, cubin: bytes = CUBIN) -> Path:
    Cache(folder, for_everyone=True).put(key, cubin, META)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (info.st_mtime_ns, info.st_size) for name in os.listdir(folder) if (info := os.stat(folder / name))}


def test_read_only_folders_are_searched_in_order_and_never_written(tmp_path):
    first, second = filled(tmp_path / "1", KEY, b"of 1"), filled(tmp_path / "2", KEY, b"of 2")
    filled(second, OTHER, b"only in 2")
    before = state(first), state(second)
    cache = Cache(tmp_path / "own", read_only=[first, second])
    with warned(0):
        cache.put(KEY, b"of ours", META)
        assert cache.get(KEY).cubin == b"of 1"
        assert cache.get(OTHER).cubin == b"only in 2"
        assert cache.get("ef" * 32) is None
        assert cache.contains(OTHER) and not cache.contains("ef" * 32)
        assert cache.put("ef" * 32, b"new", META) and cache.get("ef" * 32).cubin == b"new"
        assert [(item.read_only, Path(item.path).parent) for item in cache.items() if item.key == KEY] == [
            (False, cache.path), (True, second), (True, first)]  # fmt: skip
        assert cache.stats()["entries"] == 2
        assert cache.clear() == 2
        assert cache.prune(0) == 0
    assert (state(first), state(second)) == before
    assert cache.get(KEY).cubin == b"of 1"


def test_a_damaged_entry_in_a_read_only_folder_is_passed_over_with_one_warning(tmp_path):
    first, second = filled(tmp_path / "1"), filled(tmp_path / "2")
    path = path_of(Cache(first))
    path.write_bytes(path.read_bytes()[:-1])
    cache = Cache(tmp_path / "own", read_only=[first, second])
    with warned(1, "damaged"):
        assert cache.get(KEY) is not None
        assert cache.get(KEY) is not None
    assert path.exists() and cache.stats()["corrupt"] == 2


def roots(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make files that are root's")


def nobodys(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    for path in (folder, *folder.iterdir()):
        os.chown(path, 12345, 12345)


def entries_of_another(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    for path in folder.iterdir():
        os.chown(path, 12345, 12345)


def one_for_the_group(folder: Path) -> None:
    folder.chmod(0o775)


def entries_for_the_group(folder: Path) -> None:
    path_of(Cache(folder)).chmod(0o664)


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def ours(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "served", "said"),
    [
        (ours, True, ""),
        (roots, True, ""),
        (nobodys, False, "belongs to user 12345"),
        (entries_of_another, False, "not ours alone to write"),
        (one_for_the_group, False, "can be written by others"),
        (entries_for_the_group, False, "not ours alone to write"),
        (gone, False, "does not exist"),
        (a_file, False, "is not a folder"),
    ],
)
def test_which_read_only_folders_are_trusted(make, served, said):
    """Ours and root's, where nobody else can write. Looked at as an ordinary user where we are root."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    folder, root, user = filled(place / "ready"), os.geteuid() == 0, 65534
    (place / "own").mkdir(0o700)
    make(folder)
    try:
        if root:
            os.chown(place / "own", user, user)
            if make is ours:
                for path in (folder, *folder.iterdir()):
                    os.chown(path, user, user)
            os.seteuid(user)
        cache = Cache(place / "own", read_only=[folder])
        with warned(0 if served else 1, said):
            for _ in range(2):
                assert (cache.get(KEY) is not None) == served
            assert cache.put(OTHER, CUBIN, META) and cache.get(OTHER) is not None  # its own folder serves all the same
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(place)


def test_a_folder_for_everyone_can_be_read_by_another_user():
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        for name, for_everyone in (("private", False), ("shared", True)):
            Cache(place / name, for_everyone=for_everyone).put(KEY, CUBIN, META)
        os.seteuid(65534)
        assert Cache(place / "own", read_only=[place / "shared"]).get(KEY) is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert Cache(place / "own", read_only=[place / "private"]).get(KEY) is None
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("setting", "read_only", "written"),
    [
        ("{0}/a", [], "a"),
        ("{0}/ro:{0}/a", ["ro"], "a"),
        ("{0}/ro1:{0}/ro2:{0}/a", ["ro1", "ro2"], "a"),
        ("{0}/ro:", ["ro"], "usual/rtk"),  # the last is empty: the usual folder is written
        ("", [], "usual/rtk"),
        (":", [], "usual/rtk"),
        ("::{0}/a", [], "a"),
        ("{0}/ro:{0}/ro:{0}/a:{0}/a", ["ro"], "a"),  # each once, and what is written is not also read-only
        ("~/ro:~/a", ["home/ro"], "home/a"),
    ],
)
def test_rtk_cache_dir_names_several_folders(tmp_path, monkeypatch, setting, read_only, written):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RTK_CACHE_DIR", setting.format(tmp_path))
    for cache in (default_cache(), Cache()):
        assert cache.read_only == tuple(tmp_path / name for name in read_only)
        assert cache.path == tmp_path / written
    assert default_cache() is default_cache()
