"""Benchmarks on the GPU: the whole way of one problem, and who is wrong, fails or cannot be captured."""

from __future__ import annotations

import json

import pytest

from rtk import shapes
from rtk.benchmarks import ceilings, coldstart, measure, peers, records, timing
from rtk.benchmarks import run as runner
from rtk.benchmarks.peers import Peer, Prepared
from rtk.benchmarks.suites import Cell
from rtk.benchmarks.telemetry import Telemetry
from rtk.cli import main

pytestmark = pytest.mark.gpu
CELL = Cell("attention_fwd", shapes.parse("b=2,hq=4,sq=1024,d=64,causal"))


@pytest.fixture
def torch(gpu):
    if gpu.torch is None:
        pytest.skip("benchmarks need torch")
    return gpu.torch


def planted(call, **more):
    """A peer that prepares what `call` makes of (problem, q, k, v)."""
    return Peer("planted", lambda: None, lambda: "1", {"attention_fwd": call}, **more)


def measured(work, *others, rounds=3):
    found = {"rtk": peers.known()["rtk"], **{f"planted{i}": other for i, other in enumerate(others)}}
    return {record["impl"]: record for record in work(CELL, measure.Bench("own", found, rounds, 60 << 20))}


def right(problem, q, k, v):
    return peers.known()["sdpa"].prepare("attention_fwd", problem, (q, k, v))


def test_the_command(torch, tmp_path, capsys):
    """One problem: JSON, tables, plots and a page; the second run replaces the first."""
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    line = shapes.describe(CELL.problem)
    for _ in range(2):
        options = ["--impl", "rtk,cudnn,fa2", "--rounds", "3", "--out", str(tmp_path)]
        code = main(["bench", "--shape", line, *options])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "d64 causal" in said.out and "[1/1]" in said.err
    (folder,) = tmp_path.iterdir()
    assert {"own.json", "report.html", "report.md"} <= {path.name for path in folder.iterdir()}
    run = records.read(folder / "own.json")
    found = {record["impl"]: record for record in run.records}
    assert set(found) == {"rtk", "cudnn", "fa2"}
    for record in found.values():
        assert record["error"] is None and record["timing"] == "graph" and len(record["us_rounds"]) == 3
        assert record["us_q1"] <= record["us"] <= record["us_q3"]
        assert 0 < record["rms_error"] < 0.01 and record["tflops"] > 10
    assert 400 < run.meta["ceilings"]["bf16_tflops"] < 1071
    assert run.meta["ceilings"]["fp8_tflops"] > run.meta["ceilings"]["bf16_tflops"]
    assert run.meta["uuid"].startswith("GPU-") and run.meta["device"]["sm_count"] >= 100
    assert not list(folder.glob(".*")), "nothing is left of the pieces"


def test_a_run_ends_in_time_and_goes_on(torch, tmp_path, capsys):
    command = ["bench", "--out", str(tmp_path), "--impl", "rtk", "--rounds", "2", "--json"]
    command += ["--shape", "hq=2,sq=256,d=64", "--shape", "hq=2,sq=512,d=64"]
    assert main([*command, "--minutes", "1e-6"]) == 1
    first = capsys.readouterr()
    assert json.loads(first.out)["whole"] is False and "goes on" in first.err
    assert main(command) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["whole"] is True and len(whole["results"]["own.json"]["records"]) == 2
    assert whole["results"]["own.json"]["meta"]["pieces"] == 2


def test_who_is_wrong_is_not_timed(torch):
    def wrong(problem, q, k, v):
        return Prepared(lambda: right(problem, q, k, v).call() * 1.05)

    def nothing(problem, q, k, v):
        out = torch.zeros_like(q)
        return Prepared(lambda: out)

    def not_finite(problem, q, k, v):
        out = torch.full_like(q, float("nan"))
        return Prepared(lambda: out)

    def fails(problem, q, k, v):
        raise peers.CannotRun("only on Sundays")

    for work in (measure.times, measure.times_and_memory, measure.overhead):
        found = measured(work, *map(planted, (wrong, nothing, not_finite, fails)))
        assert found["rtk"]["us"] > 0 and found["rtk"]["error"] is None
        others = [found[f"planted{i}"] for i in range(4)]
        assert all(record.get("us") is None for record in others)
        assert [record["error"].partition(":")[0] for record in others] == [
            "the answer is wrong",
            "the answer is wrong",
            "the answer is wrong",
            "only on Sundays",
        ]
    judged = measured(measure.accuracy, planted(wrong))
    assert judged["planted0"]["rms_error"] == pytest.approx(0.05, rel=0.1) and judged["planted0"]["error"] is None


def test_where_one_cannot_be_captured_all_are_called(torch):
    def synchronizes(problem, q, k, v):
        made = right(problem, q, k, v)

        def call():
            torch.cuda.current_stream().synchronize()
            return made.call()

        return Prepared(call)

    found = measured(measure.times, planted(synchronizes), planted(right))
    assert {record["timing"] for record in found.values()} == {"eager"}
    assert all(record["us"] > 0 for record in found.values())
    eager = found["rtk"]["us"]
    captured = measured(measure.times, planted(right))["rtk"]
    assert captured["timing"] == "graph" and eager == pytest.approx(captured["us"], rel=0.5)


def test_who_fails_later_is_left_out(torch):
    calls = []

    def breaks(problem, q, k, v):
        made = right(problem, q, k, v)

        def call():
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("worn out")
            return made.call()

        return Prepared(call)

    found = measured(measure.times, planted(breaks), planted(right))
    assert "worn out" in found["planted0"]["error"] and "us" not in found["planted0"]
    assert found["rtk"]["us"] > 0 and found["planted1"]["us"] > 0


def test_who_does_twice_the_work_takes_twice_the_time(torch):
    """In both ways of timing, on inputs that do not stay in the cache."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def once():
        torch.matmul(a, a, out=out)

    def twice():
        once()
        once()

    for method in ("graph", "eager"):
        calls = {"once": [once], "twice": [twice]}
        if method == "eager":
            calls["watch"] = [lambda: torch.cuda.current_stream().synchronize()]
        found = timing.interleaved(calls, 7)
        assert {each.method for each in found.values()} == {method}
        if method == "graph":
            assert found["twice"].us == pytest.approx(2 * found["once"].us, rel=0.15)


def test_ceilings_and_clocks(torch):
    with Telemetry(runner.driver.device_properties(torch.cuda.current_device()).uuid) as telemetry:
        found = ceilings.measure(3)
        seen = telemetry.take()
    assert set(found) == {"bf16_tflops", "fp8_tflops", "copy_gbps"} and 1000 < found["copy_gbps"] < 6000
    if telemetry.reason is None:
        assert 300 <= seen["sm_mhz"] <= telemetry.max_sm_mhz() and 50 < seen["power_w"] < 1200
        assert 10 < seen["temperature_c"] < 110


def test_a_cold_start(torch, tmp_path):
    cold = coldstart.in_new_process("attention_fwd", "rtk", CELL.problem, tmp_path)
    warm = coldstart.in_new_process("attention_fwd", "rtk", CELL.problem, tmp_path)
    assert cold["problems"] == [] and warm["build_ms"] < cold["build_ms"] < cold["first_call_ms"]
    assert warm["first_call_ms"] < cold["first_call_ms"] and cold["second_call_ms"] < cold["first_call_ms"] / 10
    with pytest.raises(coldstart.Failed, match="softcap"):
        coldstart.in_new_process("attention_fwd", "sdpa", shapes.parse("hq=1,sq=8,d=8,softcap=5"), tmp_path)
