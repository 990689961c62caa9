"""The store of tuned choices: what is put is there, for every process, whatever happens to the file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtk import shapes
from rtk.autotune import exchange, store
from rtk.autotune.keys import Choice, Gpu, Place, Timed
from rtk.autotune.store import NAME, Store
from rtk.errors import ArgumentError, CacheWarning
from rtk.kernels.attention_fwd import SPEC
from rtk.spec import Bucket

ROOT = Path(__file__).resolve().parent.parent
LINE = "b=2,hq=16,sq=4096,d=128,causal"
H200 = Gpu("NVIDIA H200", 132, 3201000)


def choice_of(line="hq=32,sq=4096,d=128", us=100.0, gpu=H200, **config):
    problem = shapes.parse(line)
    fields = vars(SPEC.config(problem, **config))
    return Choice(Place.of(SPEC, problem, gpu), dict(fields), line, us, "580.1", "13.0.88", "0.1.0", "2026-01-01")


def by_place(found):
    return {choice.place.columns(): choice for choice in found}


def timed(us, **config):
    return Timed(dict(config), us, us * 0.9, us * 1.1, 15, "580.1", "13.0.88", "2026-01-01")


@pytest.fixture(params=["sqlite", "files"])
def folder(request, tmp_path, monkeypatch):
    """A folder on a file system of this machine, and one that is (said to be) shared by several."""
    if request.param == "files":
        monkeypatch.setattr(store, "is_shared", lambda path: True)
    return tmp_path / "cache"


def test_what_is_put_is_there(folder):
    choices = [choice_of(), choice_of("hq=32,sq=4096,d=128,causal"), choice_of("hq=8,sq=77,d=64", us=9.0)]
    for each in choices:
        assert Store(folder).put(each, [timed(120.0, BLOCK_M=64), timed(each.us, BLOCK_M=128)])
    assert by_place(Store(folder).choices()) == by_place(choices)
    assert [t.us for t in sorted(Store(folder).timings(choices[2].place), key=lambda t: t.us)] == [9.0, 120.0]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_new_choice_takes_the_place_of_the_old_one_and_timings_are_joined(folder):
    old, new = choice_of(us=100.0, BLOCK_N=128), choice_of(us=90.0, BLOCK_N=96)
    Store(folder).put(old, [timed(100.0, BLOCK_N=128), timed(130.0, BLOCK_N=64)])
    Store(folder).put(new, [timed(90.0, BLOCK_N=96), timed(101.0, BLOCK_N=128)])
    assert Store(folder).choices() == [new]
    assert {t.config["BLOCK_N"]: t.us for t in Store(folder).timings(new.place)} == {128: 101.0, 64: 130.0, 96: 90.0}


def test_what_is_removed_is_gone(folder):
    one, other = choice_of(), choice_of("hq=8,sq=77,d=64")
    for each in (one, other):
        Store(folder).put(each, [timed(each.us, BLOCK_M=64)])
    assert Store(folder).remove([one.place, one.place, choice_of("hq=1,sq=1,d=8").place]) == 1
    assert Store(folder).choices() == [other] and Store(folder).timings(one.place) == []


def test_a_folder_that_is_not_there_holds_nothing_and_is_not_made(folder):
    assert Store(folder).choices() == [] and Store(folder).timings(choice_of().place) == []
    assert Store(folder).remove([choice_of().place]) == 0
    assert not folder.exists()


values = st.one_of(st.booleans(), st.integers(-(2**31), 2**31 - 1))
names = st.text("ABCDEFGHIJ_", min_size=1, max_size=8)
choices = st.builds(
    Choice,
    st.builds(
        Place,
        st.text(max_size=5),
        st.text("0123456789abcdef", max_size=8),
        st.builds(Gpu, st.text(max_size=8), st.integers(1, 200), st.integers(0, 10**7)),
        st.builds(
            Bucket,
            st.dictionaries(names, st.one_of(values, st.text(max_size=5)), max_size=3).map(lambda d: tuple(d.items())),
            st.dictionaries(names, st.integers(0, 60), max_size=3).map(lambda d: tuple(d.items())),
        ),
    ),
    st.dictionaries(names, values, min_size=1, max_size=4),
    st.text(max_size=10),
    st.floats(0.1, 1e7),
)


@given(st.lists(choices, max_size=5, unique_by=lambda choice: choice.place.columns()))
def test_any_choice_survives_the_store_and_the_file(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("any")
    for each in found:
        assert Store(folder).put(each)
    assert by_place(Store(folder).choices()) == by_place(found)
    (folder / "file.json").write_text(exchange.render(found), encoding="utf-8")
    assert by_place(exchange.read(folder / "file.json")) == by_place(found)
    assert exchange.render(reversed(found)) == exchange.render(found), "the order does not show in the file"


# --- many processes --------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_autotune_store as t
if sys.argv[6] == "files":
    t.store.is_shared = lambda path: True
first, count = int(sys.argv[4]), int(sys.argv[5])
for n in range(first, first + count):
    line = f"hq={n + 1},sq=64,d=64"
    assert t.Store(sys.argv[3]).put(t.replace(t.choice_of(line), place=t.place_of(n)), [t.timed(1.0 + n, BLOCK_M=n)])
    print(n, flush=True)
"""


def place_of(n):
    """Far from any other, so that no two writers share a place."""
    place = choice_of("hq=1,sq=64,d=64").place
    return replace(place, bucket=Bucket(place.bucket.exact, (("n", n),)))


def writers(folder, count, each, kind):
    paths = [str(Path(__file__).parent), str(ROOT)]
    command = [sys.executable, "-W", "error", "-c", WRITER, *paths, str(folder)]
    return [
        subprocess.Popen([*command, str(n * each), str(each), kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["sqlite", "files"])
def test_eight_processes_at_once_lose_nothing(tmp_path, monkeypatch, kind):
    """On a store that none of them finds there."""
    for process in writers(tmp_path / "cache", 8, 25, kind):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    if kind == "files":
        monkeypatch.setattr(store, "is_shared", lambda path: True)
    found = Store(tmp_path / "cache").choices()
    assert sorted(dict(c.place.bucket.sizes)["n"] for c in found) == list(range(200))
    assert all(len(Store(tmp_path / "cache").timings(c.place)) == 1 for c in found[::20])


def test_writers_that_are_killed_leave_a_good_store(tmp_path):
    draw, told = random.Random(0), set()
    for turn in range(6):
        running = writers(tmp_path / "cache", 3, 400, "sqlite")
        for process in running:  # all of them are at it
            assert process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.3))
        for process in running:
            process.send_signal(signal.SIGKILL)
            out, _ = process.communicate(timeout=60)
            told |= {int(line) for line in out.split() if line.isdigit()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = {dict(c.place.bucket.sizes)["n"] for c in Store(tmp_path / "cache").choices()}
        # Of a pipe's last line, what was cut off is no number that was told.
        assert len(told - found) <= 3, f"turn {turn}: {sorted(told - found)[:5]} had been put"
    assert not list((tmp_path / "cache").glob("*.damaged*"))
    connection = sqlite3.connect(tmp_path / "cache" / NAME)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_eight_processes_that_find_it_damaged_begin_one_new_store(tmp_path):
    (tmp_path / "cache").mkdir(0o700)
    (tmp_path / "cache" / NAME).write_bytes(b"SQLite format 3\0" + os.urandom(8000))
    paths = [str(Path(__file__).parent), str(ROOT)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *paths, str(tmp_path / "cache"), str(n * 5), "5", "sqlite"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for n in range(8)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    assert len(Store(tmp_path / "cache").choices()) == 40
    assert len(list((tmp_path / "cache").glob("*.damaged*"))) == 1


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a database, but long enough to be taken for one" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: path.write_bytes(path.read_bytes()[:4096] + os.urandom(len(path.read_bytes()) - 4096)),
        lambda path: _sql(path, "DROP TABLE timings"),
        lambda path: _sql(path, "ALTER TABLE choices RENAME COLUMN us TO them"),
    ],
    ids=["empty", "text", "truncated", "garbage", "no table", "other columns"],
)
def test_a_damaged_store_is_set_aside_and_rebuilt(tmp_path, damage):
    folder = tmp_path / "cache"
    for n in range(50):
        Store(folder).put(replace(choice_of(), place=place_of(n)), [timed(1.0, BLOCK_M=64)])
    _sql(folder / NAME, "PRAGMA wal_checkpoint(TRUNCATE)")
    damage(folder / NAME)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Store(folder).choices()
        assert Store(folder).put(choice_of())
    assert choice_of() in Store(folder).choices()
    said = [str(each.message) for each in said if issubclass(each.category, CacheWarning)]
    assert len(said) <= 1 and all("is damaged" in each and "new one is begun" in each for each in said)


def _sql(path, statement):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_row_that_is_no_choice_is_left_out(tmp_path):
    folder = tmp_path / "cache"
    Store(folder).put(choice_of())
    Store(folder).put(choice_of("hq=8,sq=77,d=64"))
    Store(folder).put(choice_of("hq=9,sq=77,d=64"), [timed(1.0, BLOCK_M=64), timed(2.0, BLOCK_M=128)])
    _sql(folder / NAME, "UPDATE choices SET config = '[1]' WHERE problem = 'hq=8,sq=77,d=64'")
    _sql(folder / NAME, """UPDATE choices SET exact = '{"head_dim":["x"]}' WHERE problem = 'hq=9,sq=77,d=64'""")
    assert Store(folder).choices() == [choice_of()]
    _sql(folder / NAME, "UPDATE timings SET us = NULL, exact = '' WHERE us = 1.0")
    place = choice_of("hq=9,sq=77,d=64").place
    _sql(folder / NAME, f"UPDATE timings SET us = NULL WHERE us = 2.0 AND kernel = '{place.kernel}'")
    assert Store(folder).timings(place) == []


def test_a_store_of_a_later_version_is_left_alone(tmp_path):
    folder = tmp_path / "cache"
    Store(folder).put(choice_of())
    _sql(folder / NAME, "PRAGMA user_version = 99")
    before = (folder / NAME).read_bytes()
    with pytest.warns(CacheWarning, match="later version of rtk"):
        assert Store(folder).choices() == []
    with pytest.warns(CacheWarning, match="later version of rtk"):
        assert Store(folder).put(choice_of()) is False
    assert (folder / NAME).read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_store_of_somebody_else_is_not_used(tmp_path):
    folder = tmp_path / "cache"
    Store(folder).put(choice_of())
    os.chown(folder / NAME, 12345, 12345)
    with pytest.warns(CacheWarning, match="belongs to somebody else"):
        assert Store(folder).choices() == []


def test_a_folder_that_cannot_be_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    here = Store(tmp_path / "file" / "cache")
    with pytest.warns(CacheWarning, match="cannot be used") as said:
        assert here.put(choice_of()) is False and here.put(choice_of()) is False
    assert len(said) == 1


def test_file_systems_are_told_apart(tmp_path, monkeypatch):
    assert store.is_shared(tmp_path) is False
    lines = f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp_path} rw - nfs4 server:/home rw\n"
    real_open = open

    def fake(path, *args, **kwargs):
        if path == "/proc/self/mountinfo":
            (tmp_path / "mounts").write_text(lines)
            return real_open(tmp_path / "mounts", *args, **kwargs)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", fake)
    assert store.is_shared(tmp_path / "below") is True
    assert store.is_shared(Path("/usr")) is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("[]", "no list `choices`"),
        ('{"schema": 9, "choices": []}', "schema 9"),
        ('{"schema": 1, "choices": [{}]}', "choice 1"),
        ('{"schema": 1, "choices": [7]}', "choice 1"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, text, said):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ArgumentError, match=said):
        exchange.read(tmp_path / "file.json")


def test_every_key_of_an_export_is_checked(tmp_path):
    contents = json.loads(exchange.render([choice_of()]))
    wrongs = [
        *(("config", {"A": "x"}), ("config", {}), ("config", [1]), ("sizes", {"n": 1.5}), ("sizes", [1]), ("gpu", {})),
        *(("us", "fast"), ("us", float("nan")), ("us", 0), ("us", 10**400), ("us", None), ("problem", "\ud800")),
        *(("exact", {"head_dim": ["x"]}), ("exact", 7)),
    ]
    for key, wrong in wrongs:
        broken = {**contents, "choices": [{**contents["choices"][0], key: wrong}]}
        with pytest.raises(ArgumentError, match="choice 1"):
            exchange.parse(broken, "it")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_store_that_may_only_be_read_is_read():
    """As in a container whose image was filled by root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        Store(folder).put(choice_of(LINE), [Timed({"BLOCK_N": 64}, 5.0, 4.0, 6.0, 3)])
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                warnings.simplefilter("error")
                reader = Store(folder)
                code = 0 if len(reader.choices()) == 1 and reader.timings(choice_of(LINE).place) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_files_keep_every_timing_of_writers_at_one_place(monkeypatch, tmp_path):
    """Where there is no SQLite: reading what is there and writing it with more is one step."""
    monkeypatch.setattr(store, "is_shared", lambda path: True)
    choice = choice_of(LINE)
    threads = [
        threading.Thread(
            target=lambda n=n: [
                Store(tmp_path).put(choice, [Timed({"BLOCK_N": 100 * n + i}, 5.0, 4.0, 6.0, 3)]) for i in range(20)
            ]
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Store(tmp_path).timings(choice.place)) == 160
