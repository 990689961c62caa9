"""Suites, operations and implementations: what is measured, that the truth is true, and how another is added."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtk import shapes
from rtk.benchmarks import floors, measure, operations, peers, records, suites
from rtk.errors import ArgumentError

CELLS = [(name, cell) for name, suite in suites.known().items() for cell in suite.cells]


def problems(name):
    return [cell.problem for cell in suites.find(name).cells]


def test_every_suite_that_was_promised_is_there():
    names = ("paper", "paper-fp16", "small", "long", "gqa", "ragged", "overhead", "coldstart", "accuracy")
    assert set(names) <= set(suites.known())
    with pytest.raises(ArgumentError, match="paper-fp16"):
        suites.find("papers")


@pytest.mark.parametrize(("name", "dtype"), [("paper", "bfloat16"), ("paper-fp16", "float16")])
def test_the_papers_grid(name, dtype):
    found = problems(name)
    assert len(found) == 36 and {p.dtype for p in found} == {dtype}
    assert all(p.batch * p.seqlen_q == 16384 and p.num_heads_q * p.head_dim == 2048 for p in found)
    grid = {(p.head_dim, p.window_right, p.seqlen_q) for p in found}
    assert grid == set(itertools.product((64, 128, 256), (None, 0), (512, 1024, 2048, 4096, 8192, 16384)))


def test_small_and_long_are_as_asked():
    small = {(p.batch, p.num_heads_q, p.seqlen_q, p.head_dim) for p in problems("small")}
    assert small == {(16, h, 512, 64) for h in (8, 16, 32, 64, 96, 128)} | {(1, 8, 512, 64), (16, 96, 4096, 128)}
    assert {(p.seqlen_k, p.head_dim) for p in problems("long")} == set(
        itertools.product((32768, 65536, 131072), (64, 128))
    )
    assert {(p.num_heads_q, p.num_heads_kv) for p in problems("gqa")} == {(64, 8), (32, 8), (128, 1)}
    ragged = problems("ragged")
    assert {777, 1023, 3001} <= {p.seqlen_q for p in ragged} and any(p.seqlen_q != p.seqlen_k for p in ragged)
    assert {(72, 72), (80, 80), (96, 96), (192, 128)} <= {(p.head_dim, p.head_dim_v) for p in ragged}


@pytest.mark.parametrize(("name", "cell"), CELLS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_cells_description_is_a_records_key(name, cell):
    described = measure.describe(cell, name)
    assert described["suite"] == name and records.cell_key(described)
    if described.get("variant") is None and cell.problem.window_left is None:
        exact = floors.visible_flop(described)
        assert exact == cell.problem.flop()
        if described["seqlen_q"] == described["seqlen_k"]:
            assert floors.flop(described) == pytest.approx(exact, rel=0.01)


def test_no_two_cells_of_a_suite_are_one():
    for name, suite in suites.known().items():
        keys = [records.cell_key(measure.describe(cell, name)) for cell in suite.cells]
        assert len(set(keys)) == len(keys) > 0


def test_a_suite_is_added_by_a_module(tmp_path, monkeypatch):
    (tmp_path / "later.py").write_text(
        "from rtk.benchmarks.suites import Cell, Suite\n"
        "from rtk import shapes\n"
        "SUITES = [Suite('later', 'A later kernel', (Cell('attention_fwd', shapes.parse('hq=1,sq=8,d=8')),))]\n"
    )
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
    suites.known.cache_clear()
    try:
        assert "later" in suites.known() and "paper" in suites.known()
    finally:
        suites.known.cache_clear()
        sys.modules.pop("rtk.benchmarks.suites.later", None)


# --- implementations -------------------------------------------------------------------------------------------------


def test_who_takes_part():
    names = ["rtk", "cudnn", "fa2", "fa3", "fa4", "flashinfer", "flex", "sdpa", "xformers"]
    assert sorted(peers.known()) == sorted(names) and next(iter(peers.known())) == "rtk"
    found, absent = peers.present()
    assert {*found, *absent} == {*names} and not {*found} & {*absent}
    assert "rtk" in found and all(absent.values()), "who is not here has a reason"
    with pytest.raises(ArgumentError, match=r"fa5.*accepted: rtk"):
        peers.present(["fa5"])


def test_the_reason_of_a_shared_object_that_is_none(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from rtk.benchmarks.peers import fa3

    fa3._operator.cache_clear()
    monkeypatch.setenv("RTK_BENCH_FA3", str(tmp_path / "fa3.so"))
    assert "fa3.so" in peers.present(["fa3"])[1]["fa3"]
    monkeypatch.delenv("RTK_BENCH_FA3")
    assert "RTK_BENCH_FA3" in peers.present(["fa3"])[1]["fa3"]


@st.composite
def lines(draw):
    group, heads_kv = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    parts = [f"b={draw(st.integers(1, 3))}", f"hq={group * heads_kv}", f"hk={heads_kv}"]
    parts += [f"sq={draw(st.integers(1, 130))}", f"sk={draw(st.integers(1, 130))}"]
    parts += [f"d={8 * draw(st.integers(1, 8))}", f"dv={8 * draw(st.integers(1, 8))}"]
    parts += [draw(st.sampled_from(["dtype=bf16", "dtype=fp16"]))]
    parts += draw(st.sampled_from([[], ["causal"], ["causal", "align=top-left"], ["window=7:3"], ["window=20:"]]))
    parts += draw(st.sampled_from([[], ["softcap=5"], ["scale=0.3"]]))
    return ",".join(parts)


def made(line, variant=None):
    operation, problem = operations.known()["attention_fwd"], shapes.parse(line)
    tensors = operation.inputs(problem, variant, 0, device="cpu")
    return operation, problem, tensors


@settings(max_examples=40)
@given(line=lines(), variant=st.sampled_from([None, "outliers"]), impl=st.sampled_from(["rtk", "sdpa"]))
def test_what_is_right_is_within_the_tolerance_and_nothing_else(line, variant, impl):
    """rtk's CPU path and torch's, against the truth that benchmarks compare with."""
    pytest.importorskip("torch")
    operation, problem, tensors = made(line, variant)
    try:
        prepared = peers.known()[impl].prepare("attention_fwd", problem, tensors)
        result = prepared.canonical(prepared.call())
    except peers.CannotRun:
        return
    truth = operation.truth(problem, tensors, thorough=False)
    right = truth.errors(result)
    assert right.worst <= operation.tolerance(problem)
    assert right.rms <= min(right.worst, right.largest) * (1 + 1e-9), "but for rounding"
    if float(result.abs().max()) == 0:  # nobody sees a key
        return
    assert truth.errors(result * 1.05).worst > operation.tolerance(problem)
    assert truth.errors(0 * result).worst > 0.5
    assert not math.isfinite(truth.errors(result * math.nan).worst)


@pytest.mark.parametrize("line", ["hq=1,sq=20000,d=8,causal", "hq=3,sq=4000,d=16,causal"])
def test_late_rows_that_are_wrong_are_seen(line):
    """They are a hundredth of the first ones under a causal mask, whose sums are over few keys."""
    torch = pytest.importorskip("torch")
    operation, problem, tensors = made(line)
    truth = operation.truth(problem, tensors, thorough=False)
    result = torch.zeros((1, problem.num_heads_q, problem.seqlen_q, problem.head_dim), dtype=torch.float64)
    for place, exact in zip([(*p, r) for p in truth.pairs for r in truth.rows], truth.exact, strict=True):
        result[place] = exact
    assert truth.errors(result).worst == 0
    result[:, :, -32:] = 0
    assert truth.errors(result).worst > 0.9


def test_a_prepared_call_is_made_within_its_context():
    torch = pytest.importorskip("torch")
    from rtk.benchmarks.peers import base

    seen = []

    class Context:
        def __enter__(self):
            seen.append("in")

        def __exit__(self, *exception):
            seen.append("out")

    assert base.Prepared(lambda: seen.append("call"), context=Context).entered()() is None
    assert seen == ["in", "call", "out"] and torch


def test_problems_that_differ_in_scale_or_alignment_are_two_cells():
    lines = ["hq=8,sq=128,d=64", "hq=8,sq=128,d=64,scale=0.5", "hq=8,sq=128,sk=256,d=64,window=4:"]
    lines += [
        lines[2] + ",align=top-left",
        "hq=8,sq=128,sk=256,d=64,causal,align=top-left",
        "hq=8,sq=128,sk=256,d=64,causal",
    ]
    cells = [suites.Cell("attention_fwd", shapes.parse(line)) for line in lines]
    keys = [records.cell_key(measure.describe(cell, "own")) for cell in cells]
    assert len(set(keys)) == len(lines) and len(set(records.labels(keys).values())) == len(lines)
    for cell in cells:
        assert floors.visible_flop(measure.describe(cell, "own")) == cell.problem.flop()


def test_outliers_are_of_the_size_that_the_paper_says():
    torch = pytest.importorskip("torch")
    _, _, (q, _, _) = made("hq=16,sq=4096,d=64,dtype=fp16", "outliers")
    assert float(q.double().var()) == pytest.approx(1 + 100 * 0.001, rel=0.02)
    assert 10 < float(q.abs().max()) and float((q.abs() > 6).double().mean()) == pytest.approx(0.00055, rel=0.3)
    assert torch.equal(q, made("hq=16,sq=4096,d=64,dtype=fp16", "outliers")[2][0]), "the same seed, the same inputs"


def test_sampled_rows_are_at_the_start_in_the_middle_and_at_the_end():
    pytest.importorskip("torch")
    operation, problem, tensors = made("b=2,hq=8,hk=2,sq=1000,d=8")
    truth = operation.truth(problem, tensors, thorough=False)
    places = [(pair, rows) for pair in truth.pairs for rows in truth.rows]
    assert {pair for pair, _ in places} >= {(0, 0), (1, 7)} and len(places) == 8 * 3
    assert truth.rows[0].start == 0 and truth.rows[-1].stop == 1000 and truth.rows[1] == slice(500, 532)
    whole = operation.truth(problem, tensors, thorough=True)
    assert whole.rows == [slice(0, 1000)]


def test_who_does_not_serve_a_problem_says_so():
    pytest.importorskip("torch")
    for impl, line, why in [
        ("sdpa", "hq=1,sq=8,d=8,softcap=5", "softcap"),
        ("sdpa", "hq=1,sq=8,d=8,window=2:2", "window"),
        ("cudnn", "hq=1,sq=8,sk=9,d=8,causal", "bottom right"),
    ]:
        _, problem, tensors = made(line)
        with pytest.raises(peers.CannotRun, match=why):
            peers.known()[impl].prepare("attention_fwd", problem, tensors)
        with pytest.raises(peers.CannotRun, match="no attention_bwd"):
            peers.known()[impl].prepare("attention_bwd", problem, tensors)


@pytest.mark.parametrize(("size", "sets"), [(1, 64), (2 << 20, 60), (120 << 20, 1), (1 << 30, 1)])
def test_inputs_do_not_stay_in_the_cache(size, sets):
    assert measure._sets(size, 60 << 20, 64) == sets


def test_an_operation_has_keys_of_its_own(monkeypatch):
    """Two problems that differ in what only their operation has are two cells, and are called by it."""

    class Decode:
        name = "decode"

        def describe(self, problem):
            return {"op": "decode", "dtype": "bfloat16", "batch": 8, "seqlen_k": 4096, "head_dim": 128, **problem}

    monkeypatch.setattr(operations, "known", lambda: {"decode": Decode()})
    cells = [measure.Cell("decode", {"page_size": size, "pages": [1, 2]}) for size in (16, 64)]
    found = [records.whole({**measure.describe(cell, "decode"), "impl": "rtk", "us": 1.0}) for cell in cells]
    assert found[0]["own"] == {"page_size": 16, "pages": [1, 2]} and "page_size" not in found[0]
    assert len(records.merge(found, found)) == 2
    assert [name.rpartition("seqlen ")[2] for name in records.labels(records.cells(found)).values()] == [
        "None:4096 page_size 16 pages (1, 2)",
        "None:4096 page_size 64 pages (1, 2)",
    ]
