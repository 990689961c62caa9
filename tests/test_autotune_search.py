"""The search, with a driver that is pretended: kernels take the time that a table says, and what is made is counted.

Kernels are compiled for real. That what is timed on a GPU is the time, test_autotune_gpu.py shows.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import pytest

from rtk import driver, shapes, toolchain
from rtk.autotune import choice, locks, model, online, ranks, recording, search
from rtk.autotune.keys import Gpu, Place
from rtk.autotune.store import Store
from rtk.errors import ArgumentError, DriverError, RtkError
from rtk.kernels.attention_fwd import DYNAMIC, AttentionFwd
from rtk.spec import config_fields

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the pretended driver needs gcc"),
    pytest.mark.skipif(not toolchain.find_nvrtc(), reason="no NVRTC"),
]
LINE = "hq=4,sq=700,d=64"
PROBLEM = shapes.parse(LINE)


class Trusting(AttentionFwd):
    """The real spec; a pretended kernel computes nothing, so its results are taken as they are."""

    wrong: tuple[int, ...] = ()  # BLOCK_Ns whose results are not

    def verify(self, problem, arrays, results):
        assert (
            arrays["q"]((0, 0, slice(0, 4))).shape == (4, 64) and abs(arrays["k"]((0, 3, slice(9, 700))).mean()) < 0.1
        )
        assert results["o"]((0, 3, slice(690, 700))).shape == (10, 64)
        return "it is planted" if self.current in self.wrong else ""

    def render(self, config):
        self.current = config.BLOCK_N
        return super().render(config)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretended") / "libpretended.so"
    source = Path(__file__).with_name("pretended_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", path, source], check=True)
    return path


@pytest.fixture(scope="session")
def cubins(tmp_path_factory):
    """Kernels that an earlier test compiled."""
    folder = tmp_path_factory.mktemp("cubins")
    folder.chmod(0o700)
    return folder


@pytest.fixture
def card(compiled, cubins, tmp_path, monkeypatch):
    """Sets how long kernels take, by a part of their names; at the end everything must have been given back."""
    library = ctypes.CDLL(str(compiled))
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setenv("RTK_CACHE_DIR", f"{cubins}{os.pathsep}{tmp_path / 'cache'}")
    monkeypatch.setenv("PRETENDED_TIMES", str(tmp_path / "times"))
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr("rtk.launch._loaded", {})
    driver.device_properties.cache_clear()

    def set_times(**us):
        (tmp_path / "times").write_text("".join(f"{part} {time}\n" for part, time in us.items()))

    set_times()
    yield set_times
    for cubin in (tmp_path / "cache").glob("*.cubin"):
        cubin.replace(cubins / cubin.name)
    driver.device_properties.cache_clear()
    assert library.pretended_live() == 0


@pytest.fixture
def spec():
    return Trusting()


def test_the_fastest_is_found_and_taken_by_the_next_call(card, spec):
    pick = model.pick(spec, PROBLEM, model.Machine.of(Gpu.of(0)))
    assert pick.BLOCK_N != 176
    card(n176=40, **{f"n{pick.BLOCK_N}": 60})
    found = search.tune(spec, PROBLEM, 0, candidates=12)
    assert found.choice.config["BLOCK_N"] == 176 and found.choice.us == pytest.approx(40, rel=0.02)
    assert found.pick_us == pytest.approx(60, rel=0.02) and found.gain == pytest.approx(1.5, rel=0.05)
    assert found.stored and 2 <= len(found.timings) <= 14
    choice.reload()
    taken = choice.choose(spec, PROBLEM, Gpu.of(0))
    assert taken.origin == "stored" and taken.config.BLOCK_N == 176
    assert len(Store().timings(Place.of(spec, PROBLEM, Gpu.of(0)))) == len(found.timings)


def test_a_winner_that_is_wrong_is_passed_over(card, spec):
    card(n176=40, n144=44)
    spec.wrong = (176,)
    with pytest.warns(RuntimeWarning, match="BLOCK_N': 176.*it is planted"):
        found = search.tune(spec, PROBLEM, 0, candidates=12)
    assert found.choice.config["BLOCK_N"] == 144
    assert {timed.config["BLOCK_N"] for timed in found.timings if timed.failed} == {176}


def test_where_all_are_wrong_nothing_is_stored(card, spec):
    spec.wrong = tuple(range(32, 193, 16))
    with pytest.raises(RtkError, match=r"no candidate gives the right answer.*it is planted"):
        search.tune(spec, PROBLEM, 0, candidates=4)
    assert Store().choices() == []


def test_what_cannot_be_launched_is_left_out(card, spec):
    card(n176=-1, n144=44)
    found = search.tune(spec, PROBLEM, 0, candidates=12)
    assert found.choice.config["BLOCK_N"] == 144
    assert {timed.failed for timed in found.timings if timed.config["BLOCK_N"] == 176} == {True}
    assert search.untried(spec, PROBLEM, Gpu.of(0), Store(), 12) == [], "it is not tried again and again"
    card(attention=-1)
    with pytest.raises(DriverError):
        search.tune(Trusting(), shapes.parse("hq=4,sq=900,d=56"), 0, candidates=2)


def test_what_was_best_before_is_tried_again(card, spec):
    space = spec.configs(PROBLEM)
    ranked = [space[index] for index in model.ranked(spec, PROBLEM, space, model.Machine.of(Gpu.of(0)))]
    late = [config for config in ranked[:16] if config.SCHEDULER == DYNAMIC][-1]  # whose label begins no other's
    card(**{spec.label(late): 30})
    assert search.tune(spec, PROBLEM, 0, candidates=16).choice.config == config_fields(late)
    again = search.tune(spec, PROBLEM, 0, candidates=1, again=True)
    assert again.choice.config == config_fields(late) and len(again.timings) <= 5


def test_only_what_is_new_is_tried(card, spec, monkeypatch):
    first = search.tune(spec, PROBLEM, 0, candidates=4)
    gpu = Gpu.of(0)
    assert search.untried(spec, PROBLEM, gpu, Store(), 4) == []
    new = search.untried(spec, PROBLEM, gpu, Store(), 6)
    assert len(new) == 2
    second = search.tune(spec, PROBLEM, 0, candidates=6)
    assert len(second.timings) <= 2 + 1 + 2, "the new, the first pick, and the two best of before"
    assert len(Store().timings(Place.of(spec, PROBLEM, gpu))) == len(first.timings) + 2
    again = search.tune(spec, PROBLEM, 0, candidates=6, again=True)
    assert len(again.timings) == len(first.timings) + 2


def test_ctrl_c_gives_everything_back_and_stores_nothing(card, spec, monkeypatch):
    from rtk.autotune import trial

    measure, calls = trial.Trial.measure, []

    def interrupted(self, candidates, rounds):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, candidates, rounds)

    monkeypatch.setattr(trial.Trial, "measure", interrupted)
    card(n176=40, n144=44)
    with pytest.raises(KeyboardInterrupt):
        search.tune(spec, PROBLEM, 0, candidates=6)
    assert Store().choices() == []


# --- amid calls -----------------------------------------------------------------------------------------------------


def test_the_first_call_of_a_bucket_tunes_it(card, spec, monkeypatch, caplog):
    monkeypatch.setattr(online, "_settled", set())
    card(n176=40)
    assert choice.for_call(spec, PROBLEM, 0, 0).origin == "model", "not unless it is asked for"
    caplog.set_level("INFO", "rtk")
    with choice.using("tune"):
        found = choice.for_call(spec, PROBLEM, 0, 0)
        assert (found.origin, found.config.BLOCK_N) == ("stored", 176) and "tuned b=1,hq=4" in caplog.text
        card(n176=90, n144=20)
        assert choice.for_call(spec, PROBLEM, 0, 0).config.BLOCK_N == 176, "once"
        monkeypatch.setattr(driver, "is_capturing", lambda stream: True)
        other = shapes.parse(f"{LINE},causal")
        assert choice.for_call(spec, other, 0, 0).origin == "model", "nothing is timed while a graph is captured"


def test_a_call_does_not_fail_for_its_tuning(card, spec, monkeypatch):
    monkeypatch.setattr(online, "_settled", set())
    spec.wrong = tuple(range(32, 193, 16))
    with choice.using("tune"), pytest.warns(RuntimeWarning, match="is not tuned.*no candidate gives the right answer"):
        assert choice.for_call(spec, PROBLEM, 0, 0).origin == "model"
    with choice.using("tune"):
        assert choice.for_call(spec, PROBLEM, 0, 0).origin == "model", "nor is it tried again"


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("of a verify"), OSError("gone")])
def test_whatever_goes_wrong_the_call_runs(card, spec, monkeypatch, error):
    monkeypatch.setattr(online, "_settled", set())

    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(search, "tune", broken)
    with choice.using("tune"), pytest.warns(RuntimeWarning, match=f"is not tuned: {error}"):
        assert choice.for_call(spec, PROBLEM, 0, 0).origin == "model"


def test_a_second_thread_waits_for_the_first(card, spec, monkeypatch):
    monkeypatch.setattr(online, "_settled", set())
    card(n176=40)
    begun, tune, found = threading.Event(), search.tune, []

    def slow(*arguments, **options):
        begun.set()
        time.sleep(0.3)
        return tune(*arguments, **options)

    monkeypatch.setattr(search, "tune", slow)
    with choice.using("tune"):
        first = threading.Thread(target=lambda: found.append(choice.for_call(spec, PROBLEM, 0, 0).origin))
        first.start()
        begun.wait()
        assert choice.for_call(spec, PROBLEM, 0, 0).origin == "stored"
        first.join()
    assert found == ["stored"]


def test_a_typing_error_in_what_ranks_do_is_told_every_time(card, spec, monkeypatch):
    monkeypatch.setenv("RTK_AUTOTUNE_RANKS", "Wait")
    with choice.using("tune"):
        for _ in range(2):
            with pytest.raises(ArgumentError, match="RTK_AUTOTUNE_RANKS"):
                choice.for_call(spec, PROBLEM, 0, 0)


def test_a_child_does_not_keep_a_lock(tmp_path):
    with locks.held(tmp_path / "lock", "a place", 1.0) as mine:
        assert mine
        child = os.fork()
        if child == 0:
            time.sleep(2)
            os._exit(0)
    with locks.held(tmp_path / "lock", "a place", 0.5) as mine:
        assert mine, "though the child is alive"
    with locks.held(tmp_path / "lock", "a place", 0.5), locks.held(tmp_path / "lock", "another", 0.1) as mine:
        assert mine
        with locks.held(tmp_path / "lock", "a place", 0.05) as again:
            assert not again
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("environment", "may"),
    [
        ({}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, False),
        ({"SLURM_LOCALID": "3", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, False),
        ({"LOCAL_RANK": "one", "WORLD_SIZE": "8"}, True),
    ],
)
def test_one_process_of_a_machine_tunes(environment, may):
    assert ranks.may_tune(environment) is may


def test_what_the_others_do_is_checked():
    assert (ranks.policy({}), ranks.policy({"RTK_AUTOTUNE_RANKS": "wait"})) == ("pick", "wait")
    with pytest.raises(ArgumentError, match=r"RTK_AUTOTUNE_RANKS.*later.*pick, wait"):
        ranks.policy({"RTK_AUTOTUNE_RANKS": "later"})


_RANK = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
import ctypes
from rtk import driver, shapes
from rtk.autotune import choice
from rtk.kernels.attention_fwd import AttentionFwd
library = ctypes.CDLL(sys.argv[2])
driver.library = lambda: library
AttentionFwd.verify = lambda self, problem, arrays, results: ""
spec = AttentionFwd()
found = choice.for_call(spec, shapes.parse(sys.argv[3]), 0, 0)
print(found.origin, found.config.BLOCK_N)
"""


@pytest.mark.parametrize(("policy", "expected"), [("pick", "model"), ("wait", "stored 176")])
def test_a_job_of_four(card, compiled, tmp_path, policy, expected):
    """As torchrun starts it: one tunes, the others take the model's pick or wait for the result."""
    card(n176=40)
    job = {**os.environ, "RTK_AUTOTUNE": "tune", "RTK_AUTOTUNE_RANKS": policy, "WORLD_SIZE": "4"}
    arguments = ["-c", _RANK, str(Path(__file__).parent), str(compiled), LINE]
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert said[0].strip() == "stored 176" and all(each.startswith(expected) for each in said[1:]), said
    assert len(Store().choices()) == 1


def test_eight_that_tune_at_once_lose_nothing(card, compiled, tmp_path):
    """Of their own accord: each bucket is tuned by one of them, and all of them take what it found."""
    card(n176=40)
    lines = [LINE, f"{LINE},causal"]
    arguments = ["-c", _RANK, str(Path(__file__).parent), str(compiled)]
    started = [
        subprocess.Popen(
            [sys.executable, *arguments, lines[number % 2]],
            env={**os.environ, "RTK_AUTOTUNE": "tune"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    said = [process.communicate(timeout=240)[0].strip() for process in started]
    assert said == ["stored 176"] * 8
    assert len(Store().choices()) == 2


# --- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    return commands.call(capsys, "autotune", *arguments)


@pytest.fixture
def trusting(monkeypatch):
    """The command's own spec takes what a pretended kernel leaves."""
    monkeypatch.setattr(AttentionFwd, "verify", lambda self, problem, arrays, results: "")


def test_run_list_explain_verify(card, trusting, capsys):
    card(n176=40, n144=44)
    code, out, err = command(capsys, "run", "--shape", LINE, "--shape", f"{LINE},causal")
    assert code == 0, err
    assert "2 choices stored, 0 known before" in out and "[2/2" in err
    code, out, _ = command(capsys, "run", "--shape", LINE, "--json")
    assert code == 0 and json.loads(out)["known"] == 1 and json.loads(out)["tuned"] == []
    code, out, _ = command(capsys, "run", "--shape", LINE, "--again", "--json")
    assert json.loads(out)["tuned"][0]["config"]["BLOCK_N"] == 176
    assert "BLOCK_N=176" in command(capsys, "list")[1]
    code, out, _ = command(capsys, "explain", "--shape", LINE, "--limit", "5")
    assert code == 0 and "estimate" in out and "configs were timed" in out
    explained = json.loads(command(capsys, "explain", "--shape", LINE, "--json")[1])
    assert explained["origin"] == "stored" and explained["configs"][0]["us"] == pytest.approx(40, rel=0.02)
    assert any(config["us"] is None and config["estimate_us"] > 0 for config in explained["configs"])
    code, out, _ = command(capsys, "verify")
    assert code == 0 and "2 choices, 0 of them slower" in out
    card(n176=90)
    monkey = pytest.MonkeyPatch()
    monkey.setattr("rtk.launch._loaded", {})
    code, out, _ = command(capsys, "verify", "--json")
    monkey.undo()
    assert code == 1 and json.loads(out)["slower"] >= 1


def test_a_run_that_ends_goes_on(card, trusting, capsys):
    shapes_of = ["--shape", LINE, "--shape", f"{LINE},causal"]
    code, out, err = command(capsys, "run", *shapes_of, "--minutes", "1e-9", "--json")
    assert code == 1 and len(json.loads(out)["left"]) == 2 and "goes on" in err
    code, out, _ = command(capsys, "run", *shapes_of, "--json")
    assert code == 0 and len(json.loads(out)["tuned"]) == 2


_PRETEND = """
import ctypes, os, sys
from rtk import driver
from rtk.autotune import search
from rtk.kernels.attention_fwd import AttentionFwd

library = ctypes.CDLL({library!r})
driver.library = lambda: library
AttentionFwd.verify = lambda self, problem, arrays, results: ""
tune = search.tune


def mortal(spec, problem, device, **options):
    if problem.seqlen_q == 13:
        os._exit(9)
    return tune(spec, problem, device, **options)


search.tune = mortal
"""


@pytest.fixture
def pretended_elsewhere(card, compiled, monkeypatch, tmp_path):
    """Processes that tests start have the pretended driver too."""
    (tmp_path / "sitecustomize.py").write_text(_PRETEND.format(library=str(compiled)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))


@pytest.fixture
def two_cards(card, pretended_elsewhere, monkeypatch):
    """Runs `rtk autotune run` on two pretended cards as a user does; its workers are processes of their own."""
    card(n176=40)
    monkeypatch.setenv("PRETENDED_GPUS", "2")

    def run(*lines):
        shapes_of = [part for line in lines for part in ("--shape", line)]
        return subprocess.run(
            [sys.executable, "-m", "rtk.cli", "autotune", "run", *shapes_of, "--gpus", "all", "--json"],
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run


def test_several_gpus_have_a_process_each(two_cards, trusting, capsys):
    done = two_cards(LINE, f"{LINE},causal", "hq=4,sq=300,d=64")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(each["config"]["BLOCK_N"] for each in json.loads(done.stdout)["tuned"]) == [176] * 3
    assert len(Store().choices()) == 3
    code, _, err = command(capsys, "run", "--shape", LINE, "--gpus", "0,7")
    assert code == 1 and "device: received 7; accepted: a GPU's number, 0 to 1" in err
    code, _, err = command(capsys, "run", "--shape", LINE, "--gpus", "some")
    assert code == 1 and "--gpus" in err


def test_a_process_that_dies_costs_what_it_was_at(two_cards):
    done = two_cards(LINE, "hq=4,sq=13,d=64")
    assert done.returncode == 1 and "has ended unexpectedly" in done.stderr and "Traceback" not in done.stderr
    assert two_cards(LINE).returncode == 0


def test_one_that_cannot_be_tuned_does_not_stop_the_others(card, capsys):
    card(n176=40)
    code, out, err = command(capsys, "run", "--shape", LINE, "--json")
    failed = json.loads(out)["failed"]
    assert code == 1 and "no candidate gives the right answer" in failed[0]["error"] and "not tuned: b=1,hq=4" in err


def test_shapes_that_a_program_used_are_tuned(card, trusting, capsys, monkeypatch):
    monkeypatch.setattr(recording, "_noted", set())
    recording.note(PROBLEM)
    code, out, _ = command(capsys, "run", "--recorded", "--json")
    assert code == 0 and [shapes.parse(t["shape"]) for t in json.loads(out)["tuned"]] == [PROBLEM]


# --- every config is right -------------------------------------------------------------------------------------------


def test_the_check_of_every_config_goes_on_and_tells_the_wrong_ones(card, monkeypatch, tmp_path, capsys):
    from rtk.benchmarks import tuning

    lines = ["hq=4,sq=4000,d=256,causal", "hq=8,sq=500,d=256,causal", "hq=4,sq=8000,d=64,window=4095:0"]
    monkeypatch.setattr(tuning, "judged", lambda: [shapes.parse(line) for line in lines])
    monkeypatch.setattr(tuning, "fitted", list)
    monkeypatch.setattr(AttentionFwd, "configs", _two)
    monkeypatch.setattr(AttentionFwd, "verify", lambda self, problem, *rest: "planted" * (problem.head_dim == 64))
    out = tmp_path / "checked.json"
    assert tuning.check(out, 0.0) == 2 and not out.exists(), "no time"
    assert tuning.check(out, 5.0) == 0
    found = json.loads(out.read_text())["kinds"]
    assert [(kind["configs"], len(kind["wrong"])) for kind in found.values()] == [(2, 0), (2, 2)]
    assert "window=200:0" in "".join(found)
    said = capsys.readouterr().out
    assert tuning.check(out, 5.0) == 0 and said.count("configs") == 2 and capsys.readouterr().out == ""


def test_the_judgement_of_the_tuner(card, trusting, pretended_elsewhere, monkeypatch, tmp_path):
    """Each way's config is named, timed again in another process, and compared."""
    from rtk.benchmarks import tuning

    problem, other = shapes.parse(LINE), shapes.parse("hq=4,sq=300,d=64")
    monkeypatch.setattr(tuning, "judged", lambda: [problem, other])
    monkeypatch.setattr(tuning, "swept", lambda: [problem])
    monkeypatch.setattr(tuning, "_FIRST", LINE)
    names = {tuning._name(config): 50.0 for config in AttentionFwd().configs(problem)}
    fastest = next(name for name in names if name.startswith("m128n64s4"))
    card(n176=40, **{fastest: 36})
    out = tmp_path / "autotune.json"
    tuning.judge([(problem, names | {fastest: 36.0})], out)
    found = json.loads(out.read_text())
    (shape,) = found["shapes"]
    assert shape["labels"]["exhaustive"] == fastest and "n176" in shape["labels"]["tuned"]
    assert shape["us"] == pytest.approx({"exhaustive": 36, "tuned": 40, "model": 50, "default": 50}, rel=0.02)
    assert found["tuned_over_exhaustive"]["worst"] == pytest.approx(0.9, rel=0.02)
    assert found["model_over_exhaustive"]["geomean"] == pytest.approx(0.72, rel=0.02)
    assert found["tuned_over_default"]["geomean"] == pytest.approx(1.25, rel=0.02)
    assert found["space"] == {shape["problem"]: len(names)}
    assert 0 < found["seconds_warm"] < found["seconds_cold"] and found["seconds_sweep"] > 0


def _two(spec, problem):
    return [spec.make(spec._specialization(problem), consumers, 64, False, 0) for consumers in (1, 2)]
