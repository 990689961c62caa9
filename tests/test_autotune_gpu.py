"""Tuning on the GPU: what is timed is the time, what is stored is right and taken, and what is wrong is not stored."""

from __future__ import annotations

import json
import os
import time

import pytest

import rtk
from rtk import driver, shapes
from rtk.autotune import choice, online, search, trial
from rtk.autotune.keys import Gpu
from rtk.autotune.store import Store
from rtk.benchmarks import timing
from rtk.cache import default_cache
from rtk.cli import main
from rtk.errors import RtkError
from rtk.kernels.attention_fwd import SPEC, AttentionFwd

pytestmark = pytest.mark.gpu
LINE = "b=2,hq=8,sq=1111,d=64,causal"
PROBLEM = shapes.parse(LINE)


@pytest.fixture
def torch(gpu):
    if gpu.torch is None:
        pytest.skip("needs torch")
    return gpu.torch


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A store of the test's own, and nothing shipped; kernels are also found where other tests compiled them."""
    monkeypatch.setenv("RTK_CACHE_DIR", f"{default_cache().path}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(online, "_settled", set())
    monkeypatch.setattr(choice, "DATA", tmp_path / "nothing")
    choice.reload()
    yield tmp_path
    monkeypatch.undo()
    choice.reload()


def inputs(torch, problem=PROBLEM, seed=0):
    """q, k, v of a problem with as many heads of each, in rtk.attention's own layout."""
    torch.manual_seed(seed)
    shape = (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim)
    return [torch.randn(shape, dtype=getattr(torch, problem.dtype), device="cuda") for _ in range(3)]


def exact(torch, q, k, v):
    """Causal attention in float64, by torch alone."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def test_a_tuned_choice_is_taken_and_right(torch, gpu, folder):
    q, k, v = inputs(torch)
    before = rtk.autotune.explain(LINE)
    assert before.chosen.origin == "model" and all(each.us is None for each in before.candidates)
    (tuned,) = rtk.autotune.run([LINE], devices=[gpu.index]).tuned
    assert tuned.stored and len(tuned.timings) >= search.CANDIDATES and tuned.gain > 0.9
    after = rtk.autotune.explain(LINE)
    assert after.chosen.origin == "stored" and dict(tuned.choice.config) == dict(vars(after.chosen.config))
    assert sum(each.us is not None for each in after.candidates) == len(tuned.timings)
    with rtk.record_shapes() as recorded:
        got = rtk.attention(q, k, v, causal=True)
    assert recorded.problems == [PROBLEM]
    pinned = rtk.attention(q, k, v, causal=True, config=after.chosen.config)
    assert torch.equal(got, pinned), "the stored choice is what runs"
    truth = exact(torch, q, k, v)
    assert float((got.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 0.01
    (verified,) = rtk.autotune.verify(device=gpu.index)
    assert verified.choice == tuned.choice and verified.us > 0 and verified.pick_us > 0


def test_what_is_timed_is_the_time(torch, gpu, folder):
    """Beside the benchmarks' own clock, which is torch's. Other tests use the GPU too: the quickest rounds count."""
    problem = shapes.parse("b=4,hq=16,sq=2048,d=128,causal")
    config = SPEC.pick(problem)
    sets = [inputs(torch, problem, seed) for seed in range(3)]
    calls = [lambda x=x: rtk.attention(*x, causal=True, config=config) for x in sets]
    ours, theirs = [], []
    with trial.entered(gpu.index, SPEC, problem) as trying:
        trying.add(0, config)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            ours += trying.measure([0], 9)[0]
            theirs += timing.interleaved({"rtk": calls}, 9)["rtk"].us_rounds
            if min(ours) == pytest.approx(min(theirs), rel=0.1):
                break
    assert min(ours) == pytest.approx(min(theirs), rel=0.1)


def test_inputs_are_what_the_check_takes_them_for(gpu, folder):
    """Every config of a small space is right, by the spec's own check; the check itself sees a planted error."""
    problem = shapes.parse("b=2,hq=4,hk=2,sq=300,sk=500,d=256,causal")
    with trial.entered(gpu.index, SPEC, problem) as trying:
        configs = [c for c in SPEC.first_picks(problem) if c.SCHEDULER == 1]
        assert len(configs) > 2 and [trying.verify(config) for config in configs] == [""] * len(configs)

        class Other(AttentionFwd):
            def verify(self, problem, arrays, results):
                shifted = dict(results, o=lambda index: results["o"](index) + 0.01)
                return super().verify(problem, arrays, shifted)

        trying._spec = Other()
        assert "are wrong" in trying.verify(configs[0])


def test_a_kernel_that_is_wrong_is_not_stored(gpu, folder):
    class Wrong(AttentionFwd):
        """Says of itself a scale that is not the one it computes with."""

        def bind(self, problem, config, views):
            bound = super().bind(problem, config, views)
            bound.parameters.scale_log2 *= 1.1
            return bound

    with pytest.raises(RtkError, match=r"no candidate gives the right answer.*are wrong"):
        search.tune(Wrong(), PROBLEM, gpu.index, candidates=2)
    assert Store().choices() == []


def test_the_first_call_tunes_where_that_is_asked_for(torch, gpu, folder):
    q, k, v = inputs(torch)
    with choice.using("tune"):
        got = rtk.attention(q, k, v, causal=True)
    assert choice.choose(SPEC, PROBLEM, Gpu.of(gpu.index)).origin == "stored"
    truth = exact(torch, q, k, v)
    assert float((got.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()) < 0.01


def test_nothing_is_tuned_while_a_graph_is_captured(torch, gpu, folder):
    q, k, v = inputs(torch)
    rtk.attention(q, k, v, causal=True)  # compiled and loaded
    graph = torch.cuda.CUDAGraph()
    with choice.using("tune"):
        with torch.cuda.graph(graph):
            got = rtk.attention(q, k, v, causal=True)
        assert Store().choices() == []
    graph.replay()
    assert torch.equal(got, rtk.attention(q, k, v, causal=True))


def test_the_walk_through_of_the_readme(gpu, folder, tmp_path_factory, monkeypatch, capsys):
    """run, list, export, import on another cache folder, and the choice is taken."""

    def command(*arguments):
        assert main(["autotune", *arguments]) == 0
        return capsys.readouterr().out

    shape = ["--shape", "b=2,hq=16,hk=4,sq=1000,d=128,causal"]
    assert "1 choice stored" in command("run", *shape)
    listed = json.loads(command("list", "--json"))["choices"]
    assert len(listed) == 1 and listed[0]["state"] == "current"
    file = str(folder / "tuned.json")
    command("export", file)
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path_factory.mktemp("another")))
    choice.reload()
    assert json.loads(command("show", *shape, "--json"))["shapes"][0]["origin"] == "model"
    command("import", file)
    shown = json.loads(command("show", *shape, "--json"))["shapes"][0]
    assert shown["origin"] == "stored"


def test_two_gpus_share_the_problems(gpu, folder):
    if driver.device_count() < 2:
        pytest.skip("one GPU only")
    lines = [LINE, "b=2,hq=8,sq=300,d=64", "b=1,hq=8,sq=3000,d=64"]
    summary = rtk.autotune.run(lines, devices=[0, 1])
    assert len(summary.tuned) == 3 and len(Store().choices()) == 3
