"""Which configuration a call gets: stored choices, their neighbours, modes; and the problems that a program has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_autotune_store import H200, choice_of

import rtk
from rtk import driver, ops, shapes, toolchain, warmup
from rtk.autotune import choice, exchange, keys, model, recording
from rtk.autotune.keys import USUAL_GPU, Gpu, Place
from rtk.autotune.store import Store
from rtk.errors import ArgumentError, CacheWarning
from rtk.kernels.attention_fwd import SPEC
from rtk.spec import half_steps

LINE = "b=2,hq=16,sq=4096,d=128,causal"
PROBLEM = shapes.parse(LINE)


@pytest.fixture(autouse=True)
def own_stores(tmp_path, monkeypatch):
    """No store, no shipped data, nothing read yet."""
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("RTK_AUTOTUNE", raising=False)
    monkeypatch.setattr(choice, "DATA", tmp_path / "data")
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr(recording, "_noted", set())


def store(line=LINE, **config):
    put = choice_of(line, **config)
    assert Store().put(put)
    choice.reload()
    return put


def chosen(line=LINE, gpu=H200):
    return choice.choose(SPEC, shapes.parse(line), gpu)


# --- what is chosen --------------------------------------------------------------------------------------------------


def modelled(problem=PROBLEM, gpu=H200):
    return model.pick(SPEC, problem, model.Machine.of(gpu))


def test_without_a_choice_it_is_the_models_pick():
    assert chosen() == choice.Chosen(modelled(), "model")
    with choice.using("off"):
        assert chosen() == choice.Chosen(SPEC.pick(PROBLEM), "pick")


def test_a_stored_choice_is_taken_by_all_of_its_bucket():
    put = store(BLOCK_N=64)
    found = chosen()
    assert (found.config, found.origin) == (SPEC.config(PROBLEM, BLOCK_N=64), "stored") and found.choice == put
    assert chosen("b=2,hq=16,sq=4000,d=128,causal").config.BLOCK_N == 64, "4000 is the half-step of 4096"


@pytest.mark.parametrize(
    "line",
    [
        "b=2,hq=16,sq=4096,d=128",
        "b=2,hq=16,sq=4096,d=120,causal",
        "b=2,hq=16,sq=4096,d=128,causal,dtype=fp16",
        "b=2,hq=16,hk=4,sq=4096,d=128,causal",
        "b=2,hq=16,sq=4096,d=128,causal,softcap=20",
        "b=2,hq=16,sq=4096,d=128,window=64:0",
        "b=2,hq=16,sq=65536,d=128,causal",
    ],
)
def test_no_other_problem_takes_it(line):
    store(BLOCK_N=64)
    assert chosen(line).origin == "model"
    assert chosen(gpu=Gpu("NVIDIA H100 PCIe", 114, 1593000)).origin == "model"


def test_a_miss_asks_the_nearest_neighbour():
    near, far = (
        store("b=2,hq=16,sq=5793,d=128,causal", BLOCK_N=64),
        store("b=2,hq=16,sq=11585,d=128,causal", BLOCK_N=96),
    )
    found = chosen()
    assert (found.origin, found.choice) == ("neighbour", near)
    assert chosen("b=2,hq=16,sq=16384,d=128,causal").choice == far
    assert chosen("b=1,hq=16,sq=5793,d=128,causal").choice == near
    assert chosen("b=1,hq=16,sq=4096,d=128,causal").origin == "model", "four half-steps"


def test_a_choice_that_cannot_serve_is_passed_over():
    put = store(BLOCK_N=64)
    for wrong in ({"BLOCK_N": 4096}, {"HEAD_DIM": 64}, {"NO_SUCH_FIELD": 1}, {"PINGPONG": 1}):
        Store().put(replace(put, config={**put.config, **wrong}))
        choice.reload()
        assert chosen().origin == "model", wrong


def test_what_was_measured_here_goes_before_what_was_shipped(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "h200.json").write_text(exchange.render([choice_of(LINE, BLOCK_N=96)]))
    assert (chosen().origin, chosen().config.BLOCK_N) == ("shipped", 96)
    store(BLOCK_N=64)
    assert (chosen().origin, chosen().config.BLOCK_N) == ("stored", 64)


def test_a_choice_is_of_the_sources_that_were_timed(monkeypatch, tmp_path):
    put = store(BLOCK_N=64)
    assert put.place.sources == keys.digest(SPEC)
    edited = tmp_path / "edited"
    edited.mkdir()
    for folder, _, files in os.walk(SPEC.include_dirs[0], followlinks=True):
        (edited / os.path.relpath(folder, SPEC.include_dirs[0])).mkdir(exist_ok=True)
        for file in files:
            text = Path(folder, file).read_text()
            (edited / os.path.relpath(folder, SPEC.include_dirs[0]) / file).write_text(text)
    spec = type(SPEC)()
    monkeypatch.setattr(type(spec), "include_dirs", (edited,), raising=False)
    assert choice.choose(spec, PROBLEM, H200).origin == "stored", "the same text elsewhere"
    with (edited / "rtk" / "softmax.cuh").open("a") as file:
        file.write("\n// another\n")
    assert choice.choose(type(SPEC)(), PROBLEM, H200).origin == "model"


@given(st.integers(1, 2**30))
def test_half_steps_are_half_steps(size):
    assert 2 ** ((half_steps(size) - 0.5000001) / 2) <= size <= 2 ** ((half_steps(size) + 0.5000001) / 2)
    assert half_steps(2 * size) == half_steps(size) + 2


def test_a_call_takes_it_and_a_batch_invariant_one_does_not(monkeypatch):
    monkeypatch.setattr(driver, "device_properties", lambda device: H200)
    choices = ops._Choices(None, False, 0)
    library = SimpleNamespace(stream=lambda device: 0)
    assert ops._chosen(PROBLEM, choices, library, 0) == modelled()
    store(BLOCK_N=64)
    assert ops._chosen(PROBLEM, choices, library, 0).BLOCK_N == 64
    assert ops._chosen(PROBLEM, replace(choices, batch_invariant=True), library, 0) == SPEC.pick(
        PROBLEM.without_batch()
    )


@pytest.mark.skipif(not toolchain.find_nvrtc(), reason="no NVRTC")
def test_warmup_compiles_what_calls_will_take(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "available", lambda: False)
    put = choice_of("hq=1,sq=64,d=16", gpu=USUAL_GPU, BLOCK_N=48)
    Store().put(put)
    (found,) = warmup.warmup(["hq=1,sq=64,d=16"])
    assert "n48" in found.binary.name
    (found,) = warmup.warmup(["hq=1,sq=64,d=16"], batch_invariant=True)
    assert "n48" not in found.binary.name
    (found,) = warmup.warmup(["hq=1,sq=64,d=16"], out=tmp_path / "image")
    assert "n48" not in found.binary.name, "another machine has not the choices of this one"


def test_a_lookup_is_quick():
    """What a new problem costs besides: a microsecond each, but for reading the stores, which happens once."""
    for n in range(300):
        place = choice_of(LINE).place
        sizes = tuple((name, step + n % 7) for name, step in place.bucket.sizes)
        Store().put(replace(choice_of(LINE), place=replace(place, bucket=replace(place.bucket, sizes=sizes))))
    chosen()
    table = choice._tables()[SPEC.name][keys.digest(SPEC), H200]
    bucket = SPEC.bucket(PROBLEM)
    spent = []
    for _ in range(20):
        start = time.process_time()
        for _ in range(2000):
            table.nearest(bucket.exact, bucket.size_steps)
        spent.append((time.process_time() - start) / 2000)
    assert min(spent) <= 2e-6, f"{min(spent) * 1e6:.2f} us"


# --- modes -----------------------------------------------------------------------------------------------------------


def test_off_is_the_kernels_pick_whatever_is_stored(monkeypatch):
    store(BLOCK_N=64)
    monkeypatch.setenv("RTK_AUTOTUNE", "off")
    assert chosen().origin == "pick"
    with choice.using("cached"):
        assert chosen().origin == "stored"
    assert chosen().origin == "pick"
    monkeypatch.setenv("RTK_AUTOTUNE", "sometimes")
    with pytest.raises(ArgumentError, match=r"RTK_AUTOTUNE.*sometimes.*cached, off, record"):
        chosen()
    with pytest.raises(ArgumentError, match="mode"), choice.using("sometimes"):
        pass


def test_blocks_of_threads_may_overlap():
    """Each ends its own: no mode stays on, and none is lost."""
    first, second = choice.using("off"), choice.using("tune")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choice.current_mode() == "tune"
    second.__exit__(None, None, None)
    assert choice.current_mode() == "cached" and choice.epoch()[0] is None


def test_what_is_stored_while_another_thread_reads_is_read(monkeypatch):
    read, inside, go = choice._read, threading.Event(), threading.Event()

    def slow():
        found = read()
        inside.set()
        go.wait()
        return found

    monkeypatch.setattr(choice, "_read", slow)
    reader = threading.Thread(target=chosen)
    reader.start()
    inside.wait()
    Store().put(choice_of(LINE, BLOCK_N=64))
    monkeypatch.setattr(choice, "_read", read)
    again = threading.Thread(target=choice.reload)
    again.start()
    go.set()
    reader.join()
    again.join()
    assert chosen().origin == "stored"


def test_a_stored_choice_does_not_hide_what_ships(tmp_path):
    """Neither from who asks for what ships alone, nor where it cannot serve."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "h200.json").write_text(exchange.render([choice_of(LINE, BLOCK_N=96)]))
    put = store(BLOCK_N=64)
    assert choice.choose(SPEC, PROBLEM, H200, stored=False).origin == "shipped"
    Store().put(replace(put, config={"NO_SUCH_FIELD": 1}))
    choice.reload()
    assert (chosen().origin, chosen().config.BLOCK_N) == ("shipped", 96)


def test_choices_in_read_only_folders_count(tmp_path, monkeypatch):
    """A container's image may bring them; the folder that is written goes first."""
    for name, block_n in (("one", 64), ("two", 80)):
        Store(tmp_path / name).put(choice_of(LINE, BLOCK_N=block_n))
    Store(tmp_path / "two").put(choice_of("b=2,hq=16,sq=16384,d=128,causal", BLOCK_N=48))
    folders = [str(tmp_path / name) for name in ("one", "two", "own")]
    monkeypatch.setenv("RTK_CACHE_DIR", os.pathsep.join(folders))
    choice.reload()
    assert chosen().config.BLOCK_N == 64
    assert chosen("b=2,hq=16,sq=16384,d=128,causal").config.BLOCK_N == 48
    Store(tmp_path / "own").put(choice_of(LINE, BLOCK_N=96))
    choice.reload()
    assert chosen().config.BLOCK_N == 96


def test_a_frozen_process_stays_as_it_is():
    store(BLOCK_N=64)
    assert chosen().config.BLOCK_N == 64
    rtk.freeze()
    store(BLOCK_N=96)
    assert chosen().config.BLOCK_N == 64
    choice.reload()
    assert chosen().config.BLOCK_N == 64


def test_a_call_is_prepared_anew_when_what_steers_it_changes():
    before = choice.epoch()
    with choice.using("off"):
        assert choice.epoch() != before
    assert choice.epoch() == before
    chosen()
    choice.reload()
    chosen()
    assert choice.epoch() == (None, before[1] + 1), "and not when the stores are first read"


def test_the_stores_are_read_once_by_many_threads(monkeypatch):
    store(BLOCK_N=64)
    readings = []
    read = choice._read
    monkeypatch.setattr(choice, "_read", lambda: (readings.append(1), time.sleep(0.05), read())[-1])
    found = []
    threads = [threading.Thread(target=lambda: found.append(chosen().config.BLOCK_N)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [64] * 8 and len(readings) == 1


def test_a_damaged_store_does_not_stop_a_call(tmp_path):
    (tmp_path / "cache").mkdir(0o700)
    (tmp_path / "cache" / "autotune.sqlite3").write_bytes(b"x" * 5000)
    with pytest.warns(CacheWarning, match="is damaged"):
        assert chosen().origin == "model"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen().origin == "model"


# --- recording -------------------------------------------------------------------------------------------------------


def test_problems_are_recorded_and_used_again(tmp_path):
    with rtk.record_shapes() as recorded:
        for _ in range(3):
            recording.seen(PROBLEM)
        recording.seen(shapes.parse("hq=1,sq=64,d=16"))
    recording.seen(shapes.parse("hq=9,sq=9,d=8"))
    assert recorded.problems == [PROBLEM, shapes.parse("hq=1,sq=64,d=16")]
    recorded.save(tmp_path / "shapes.json")
    assert shapes.load(tmp_path / "shapes.json") == recorded.problems


def test_record_notes_each_problem_once_for_every_process(monkeypatch, tmp_path):
    monkeypatch.setenv("RTK_AUTOTUNE", "record")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rtk import shapes\nfrom rtk.autotune import recording\n"
        "for n in range(40): recording.note(shapes.parse(f'hq=1,sq={n % 20 + 1},d=16'))\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    running = [subprocess.Popen([sys.executable, "-c", code, root]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    text = (tmp_path / "cache" / recording.NAME).read_text()
    assert len(text.splitlines()) == 4 * 20
    assert len(shapes.load(tmp_path / "cache" / recording.NAME)) == 20
    assert all(shapes.parse(line).num_heads_q == 1 for line in text.splitlines()), "no line is mixed with another"


def test_a_folder_that_takes_no_notes_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("RTK_AUTOTUNE", "record")
    with pytest.warns(CacheWarning, match="cannot be noted"):
        recording.note(PROBLEM)


# --- the command -----------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    return commands.call(capsys, "autotune", *arguments)


def test_export_import_on_another_folder_and_the_choice_is_taken(capsys, monkeypatch, tmp_path):
    store(BLOCK_N=64)
    file = str(tmp_path / "choices.json")
    assert call(capsys, "export", file)[:2] == (0, f"{file}: 1 choice\n")
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "another"))
    choice.reload()
    assert chosen().origin == "model"
    code, out, _ = call(capsys, "import", file)
    assert code == 0 and "1 choice" in out and "1 of them of this version's kernels" in out
    choice.reload()
    assert (chosen().origin, chosen().config.BLOCK_N) == ("stored", 64)
    code, out, _ = call(capsys, "list")
    assert code == 0 and "BLOCK_N=64" in out and LINE in out and "NVIDIA H200" in out
    listed = json.loads(call(capsys, "list", "--json")[1])["choices"]
    assert listed[0]["config"]["BLOCK_N"] == 64
    assert json.loads(call(capsys, "clear", "--gpu", "h100", "--json")[1])["removed"] == 0
    assert json.loads(call(capsys, "clear", "--json")[1])["removed"] == 1
    assert "no stored choices" in call(capsys, "list")[1]


def test_show_says_what_a_call_gets_and_why(capsys, monkeypatch):
    monkeypatch.setattr(driver, "available", lambda: False)
    code, out, _ = call(capsys, "show", "--shape", LINE)
    assert code == 0 and "cost model's pick" in out and SPEC.label(modelled()) in out
    Store().put(choice_of(LINE, gpu=USUAL_GPU, BLOCK_N=64), [keys.Timed({"BLOCK_N": 64}, 99.0, 98.0, 100.0, 15)])
    choice.reload()
    code, out, _ = call(capsys, "show", "--shape", LINE)
    assert code == 0 and "stored here" in out and "n64" in out and "99.0 us" in out
    shown = json.loads(call(capsys, "show", "--shape", LINE, "--json")[1])["shapes"][0]
    assert (shown["origin"], shown["timings"][0]["us"]) == ("stored", 99.0)


def test_choices_of_other_sources_are_kept_but_marked(capsys, tmp_path):
    other = choice_of(LINE)
    other = replace(other, place=replace(other.place, sources="0" * 64))
    (tmp_path / "file.json").write_text(exchange.render([other]))
    code, out, _ = call(capsys, "import", str(tmp_path / "file.json"))
    assert code == 0 and "0 of them of this version's kernels" in out
    assert "other sources" in call(capsys, "list")[1]
    assert chosen().origin == "model"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export"], 2, "needs a FILE"),
        (["import", "not-there.json"], 1, "not-there.json"),
        (["show"], 2, "--shape"),
        (["run"], 2, "name problems"),
        (["clear", "--shape", LINE], 2, "clear takes no --shape; it takes --gpu"),
        (["run", "--shape", LINE, "--gpu", "1"], 2, "run takes no --gpu"),
        (["list", "file.json"], 2, "list takes no 'file.json'"),
        (["verify", "--gpus", "1"], 2, "verify takes no --gpus"),
        (["export", "/not/there/file.json"], 1, "cannot be written"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_is_wrong_is_said(capsys, arguments, code, said):
    got, _, err = call(capsys, *arguments)
    assert got == code and said in err and "Traceback" not in err


def test_places_are_told_apart_by_all_that_matters():
    place = Place.of(SPEC, PROBLEM, H200)
    assert place == Place.from_columns(*place.columns())
    others = [
        replace(place, kernel="other"),
        replace(place, gpu=replace(H200, sm_count=114)),
        replace(place, sources=""),
        Place.of(SPEC, shapes.parse("b=2,hq=16,sq=8192,d=128,causal"), H200),
    ]
    assert len({place.columns(), *(other.columns() for other in others)}) == 5
