"""A run of a suite: written as it goes, taken up where it ended, and the command around it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest

from rtk import shapes
from rtk.benchmarks import measure, records, timing
from rtk.benchmarks import run as runner
from rtk.benchmarks.suites import Cell, Suite
from rtk.cli import bench

LINES = [f"hq=1,sq={length},d=8" for length in (8, 16, 24, 32)]


class Watcher:
    def __init__(self):
        self.seen = []

    def started(self, suite, meta, done):
        pass

    def measured(self, found, done, total):
        self.seen.append((len(found), done, total))


def meta_of(**more):
    base = {"schema": 1, "suite": "own", "uuid": "GPU-1", "versions": {"rtk": "0"}, "sources": {}, "rounds": 3}
    return base | {"absent": {}, "pieces": 1, "duration_s": 0.0, "ceilings_measured": [], "device": {}} | more


def suite_of(work, count=4):
    return Suite("own", "mine", tuple(Cell("attention_fwd", shapes.parse(line)) for line in LINES[:count]), work)


def timed(cell, bench_):
    yield {**measure.describe(cell, bench_.suite), "impl": "rtk", "us": float(cell.problem.seqlen_q), "error": None}


def piece(suite, kept, *, deadline=None, **more):
    meta, watcher = meta_of(**more), Watcher()
    before = runner._take_over(kept, meta, suite)
    bench_ = measure.Bench("own", {}, 3, 60 << 20)
    done = runner._cells(suite, bench_, meta, before, kept, watcher, time.monotonic(), deadline)
    return meta, before, done, watcher


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    kept, calls = tmp_path / ".own.json.partial", []

    def work(cell, bench_):
        calls.append(cell.problem.seqlen_q)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from timed(cell, bench_)

    with pytest.raises(KeyboardInterrupt):
        piece(suite_of(work), kept)
    assert len(records.read(kept).records) == 2, "each cell was kept as soon as it was measured"
    meta, before, done, watcher = piece(suite_of(work), kept)
    assert (meta["pieces"], len(before), len(done)) == (2, 2, 4)
    assert calls == [8, 16, 24, 24, 32]
    assert watcher.seen == [(1, 3, 4), (1, 4, 4)]
    assert runner._count_done(suite_of(work), done) == 4


@pytest.mark.parametrize(
    "change", [{"uuid": "GPU-2"}, {"versions": {"rtk": "1"}}, {"sources": {"cuda_src": "x"}}, {"rounds": 4}]
)
def test_runs_of_different_things_are_not_joined(tmp_path, change):
    kept = tmp_path / ".own.json.partial"
    piece(suite_of(timed, 2), kept)
    meta, before, done, _ = piece(suite_of(timed), kept, **change)
    assert (meta["pieces"], before, len(done)) == (1, [], 4)


def test_a_cell_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def work(cell, bench_):
        if cell.problem.seqlen_q == 16:
            raise MemoryError("it does not fit")
        yield from timed(cell, bench_)

    monkeypatch.setattr(measure, "raise_if_lost", lambda error: None)
    suite = suite_of(work)
    bench_ = measure.Bench("own", {"rtk": None}, 3, 60 << 20)
    done = runner._cells(suite, bench_, meta_of(), [], tmp_path / "kept", Watcher(), time.monotonic(), None)
    assert len(done) == 4 and "it does not fit" in done[1]["error"] and done[2]["error"] is None


def test_records_of_other_problems_are_not_taken_over(tmp_path):
    kept = tmp_path / "kept"
    piece(suite_of(timed), kept)
    assert len(runner._take_over(kept, meta_of(), suite_of(timed, 1))) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"meta": {}, "records": []}'])
def test_a_damaged_piece_is_no_piece(tmp_path, text):
    kept = tmp_path / ".own.json.partial"
    kept.write_text(text)
    assert len(piece(suite_of(timed), kept)[2]) == 4


def test_no_cell_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_S", 0.0)

    def work(cell, bench_):
        time.sleep(0.05)
        yield from timed(cell, bench_)

    kept = tmp_path / ".own.json.partial"
    done = piece(suite_of(work), kept, deadline=time.monotonic() + 0.12)[2]
    assert 1 <= len(done) < 4
    assert piece(suite_of(work), kept, deadline=time.monotonic() - 1)[2] == done


def test_a_time_is_an_odd_rounds_median_with_its_quartiles():
    assert timing.quartiles([3.0, 1.0, 2.0]) == (1.5, 2.0, 2.5)
    assert timing.quartiles([4.0]) == (4.0, 4.0, 4.0)


def test_a_record_has_every_key_null_where_it_does_not_apply():
    cell = Cell("attention_fwd", shapes.parse("hq=1,sq=8,d=8"))
    found = runner._with_shares({**measure.describe(cell, "coldstart"), "impl": "rtk", "import_ms": 3.0}, meta_of())
    keys = (
        "suite op impl dtype batch heads_q heads_kv seqlen_q seqlen_k head_dim head_dim_v causal us us_q1 us_q3 tflops"
    )
    assert {*keys.split(), "error"} <= set(found) and found["import_ms"] == 3.0
    assert found["us"] is None and found["floor_us"] is None


def test_cold_starts_are_medians_each_with_caches_of_its_own(monkeypatch):
    from rtk.benchmarks import coldstart

    ran, clock = [], [0.0]

    def in_new_process(op, impl, problem, folder):
        ran.append((impl, str(folder)))
        clock[0] += {"slow": 20.0, "quick": 1.0, "broken": 1.0}[impl]
        if impl == "broken" and len(ran) > 5:
            raise coldstart.Failed("no")
        cold = not (folder / "cache").exists()
        (folder / "cache").touch()
        taken = [5.0, 0.2, 9.0, 6.0][len(ran) % 4] if cold else 0.5
        return {"first_call_ms": taken, "build_ms": taken / 2, "problems": []}

    monkeypatch.setattr(coldstart, "in_new_process", in_new_process)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cell = Cell("attention_fwd", shapes.parse("hq=1,sq=8,d=8"))
    bench = measure.Bench("coldstart", dict.fromkeys(("quick", "slow", "broken")), 1, 1 << 20)
    quick, slow, broken = measure.coldstart(cell, bench)
    assert [impl for impl, _ in ran][:6] == ["quick"] * 4 + ["slow"] * 2
    assert len({folder for impl, folder in ran if impl == "quick"}) == 3
    assert (quick["rounds"], quick["first_call_ms"], quick["compile_ms"]) == (3, 5.0, 2.5)
    assert (quick["disk_call_ms"], quick["load_ms"], quick["problems"]) == (0.5, 0.25, [])
    assert slow["rounds"] == 1 and broken["error"] == "no" and "first_call_ms" not in broken


def test_shares_and_floors_are_of_the_runs_own_ceilings():
    meta = meta_of(ceilings={"bf16_tflops": 700.0, "copy_gbps": 4000.0}, device={"sm_count": 132, "max_sm_mhz": 1980})
    cell = Cell("attention_fwd", shapes.parse("b=2,hq=16,sq=8192,d=128"))
    record = {**measure.describe(cell, "paper"), "impl": "rtk", "us": 3141.0, "tflops": 700.0}
    found = runner._with_shares(record, meta)
    assert found["ceiling_share"] == 1.0
    assert found["floor_us"]["wgmma"] == pytest.approx(4 * 2 * 16 * 8192**2 * 128 / 700e6, rel=1e-3)
    assert set(found["floor_us"]) == {"wgmma", "exp", "memory"}


# --- the command -----------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    return commands.call(capsys, "bench", *arguments)


def test_list(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0 and "paper-fp16" in out and "flashinfer" in out
    code, out, _ = call(capsys, "list", "--json")
    listed = json.loads(out)
    assert listed["suites"]["paper"]["cells"] == 36 and "rtk" in listed["present"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 1, "paper-fp16"),
        (["compare", "one"], 2, "OLD NEW"),
        (["compare", "one", "two"], 1, "one"),
        (["report"], 1, "results files"),
        (["report", "not-there.json"], 1, "not-there.json"),
        (["--shape", "hq=3"], 2, "sq"),
        (["--minutes", "0"], 2, "minutes"),
        (["list", "what"], 2, "nothing more"),
        (["--file", "not-there.toml"], 1, "not-there.toml"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_is_wrong_is_said(capsys, arguments, code, said):
    got, _, err = call(capsys, *arguments)
    assert got == code and said in err and "Traceback" not in err


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    pytest.importorskip("torch")
    from rtk import driver

    if driver.available():
        pytest.skip("a GPU is here")
    code, _, err = call(capsys, "paper")
    assert code == 1 and "need a GPU" in err and "rtk doctor" in err


@pytest.mark.parametrize(
    ("card", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200"), ("?", "gpu")],
)
def test_results_of_a_card_have_a_folder(card, folder):
    assert bench.folder_of(card) == folder


def test_the_live_lines_name_the_problem(capsys):
    live = bench.Live(quiet=False)
    record = {**measure.describe(Cell("attention_fwd", shapes.parse(LINES[0])), "own"), "error": None}
    with live:
        live.started(suite_of(timed), meta_of(gpu="NVIDIA H200", absent={"fa3": "not installed"}), [])
        live.measured(
            [
                {**record, "impl": "rtk", "us": 5000.0, "tflops": 612.3},
                {**record, "impl": "cudnn", "us": 12.34, "tflops": 1.0},
                {**record, "impl": "fa2", "error": "no"},
            ],
            1,
            4,
        )
    err = capsys.readouterr().err
    assert "fa3: not installed" in err
    assert "[1/4] d8 full seqlen 8: rtk 612  cudnn 12.3 µs  fa2 –" in err


def test_on_a_terminal_it_draws_a_table_and_a_bar(tmp_path):
    pytest.importorskip("rich")
    code = """
import sys
sys.path[:0] = sys.argv[1:]
import test_bench_run as t
live = t.bench.Live(quiet=False)
suite, record = t.suite_of(t.timed), t.measure.describe(t.Cell("attention_fwd", t.shapes.parse(t.LINES[0])), "own")
with live:
    live.started(suite, t.meta_of(gpu="NVIDIA H200"), [])
    live.measured([{**record, "impl": "rtk", "us": 5000.0, "tflops": 612.3, "error": None}], 1, 4)
"""
    (tmp_path / "watch.py").write_text(code)
    paths = [Path(__file__).parent, Path(__file__).parent.parent]
    primary, secondary = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    done = subprocess.run(
        [sys.executable, tmp_path / "watch.py", *paths], stderr=secondary, env=environment, timeout=120
    )
    os.close(secondary)
    seen = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while chunk := os.read(primary, 65536):
            seen += chunk
    os.close(primary)
    text = seen.decode()
    assert done.returncode == 0, text
    assert "d8 full seqlen 8" in text and "612" in text and "1/4" in text and "mine" in text


def test_the_recorded_results_are_read(capsys, tmp_path):
    """What is in the repository can be redrawn by whoever has no GPU."""
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    folder = Path(__file__).parent.parent / "benchmarks" / "results" / "h200"
    code, out, _ = call(capsys, "report", str(folder), "--out", str(tmp_path))
    assert code == 0 and "rtk" in out
    assert (tmp_path / "report.html").stat().st_size > 10_000
