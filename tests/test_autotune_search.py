"""The search, with a driver that is pretended: kernels take the time that a table says, and what is made is counted.

Kernels are compiled for real. That what is timed on a GPU is the time, test_autotune_gpu.py shows.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rtk import driver, shapes, toolchain
from rtk.autotune import choice, recording, search
from rtk.autotune.keys import Gpu, Place
from rtk.autotune.store import Store
from rtk.cli import main
from rtk.errors import DriverError, RtkError
from rtk.kernels.attention_fwd import AttentionFwd

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


@pytest.fixture
def card(compiled, tmp_path, monkeypatch):
    """Sets how long kernels take, by a part of their names; at the end everything must have been given back."""
    library = ctypes.CDLL(str(compiled))
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PRETENDED_TIMES", str(tmp_path / "times"))
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr("rtk.launch._loaded", {})
    driver.device_properties.cache_clear()

    def set_times(**us):
        (tmp_path / "times").write_text("".join(f"{part} {time}\n" for part, time in us.items()))

    set_times()
    yield set_times
    driver.device_properties.cache_clear()
    assert library.pretended_live() == 0


@pytest.fixture
def spec():
    return Trusting()


def test_the_fastest_is_found_and_taken_by_the_next_call(card, spec):
    card(n176=40, m192=60, n144=44)
    found = search.tune(spec, PROBLEM, 0, text=LINE, candidates=12)
    assert found.choice.config["BLOCK_N"] == 176 and found.choice.us == pytest.approx(40, rel=0.02)
    assert found.pick_us == pytest.approx(60, rel=0.02) and found.gain == pytest.approx(1.5, rel=0.05)
    assert found.stored and 2 <= len(found.timings) <= 13
    choice.reload()
    taken = choice.choose(spec, PROBLEM, Gpu.of(0))
    assert taken.origin == "stored" and taken.config.BLOCK_N == 176
    assert len(Store().timings(Place.of(spec, PROBLEM, Gpu.of(0)))) == len(found.timings)


def test_a_winner_that_is_wrong_is_passed_over(card, spec):
    card(n176=40, n144=44)
    spec.wrong = (176,)
    assert search.tune(spec, PROBLEM, 0, candidates=12).choice.config["BLOCK_N"] == 144


def test_where_all_are_wrong_nothing_is_stored(card, spec):
    spec.wrong = tuple(range(32, 193, 16))
    with pytest.raises(RtkError, match=r"no candidate gives the right answer.*it is planted"):
        search.tune(spec, PROBLEM, 0, candidates=4)
    assert Store().choices() == []


def test_what_cannot_be_launched_is_left_out(card, spec):
    card(n176=-1, n144=44)
    found = search.tune(spec, PROBLEM, 0, candidates=12)
    assert found.choice.config["BLOCK_N"] == 144
    assert all(timed.config["BLOCK_N"] != 176 for timed in found.timings)
    card(m192=-1)
    with pytest.raises(DriverError):
        search.tune(Trusting(), shapes.parse("hq=4,sq=900,d=56"), 0, candidates=2)


def test_what_was_best_before_is_tried_again(card, spec):
    card(n80=30)
    assert search.tune(spec, PROBLEM, 0, candidates=60).choice.config["BLOCK_N"] == 80
    again = search.tune(spec, PROBLEM, 0, candidates=1)
    assert again.choice.config["BLOCK_N"] == 80


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


# --- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    try:
        code = main(["autotune", *arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


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


def test_shapes_that_a_program_used_are_tuned(card, trusting, capsys, monkeypatch):
    monkeypatch.setattr(recording, "_noted", set())
    recording.note(PROBLEM)
    code, out, _ = command(capsys, "run", "--recorded", "--json")
    assert code == 0 and [shapes.parse(t["shape"]) for t in json.loads(out)["tuned"]] == [PROBLEM]
