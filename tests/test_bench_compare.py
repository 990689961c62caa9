"""Two runs side by side: what counts as slower, what drift takes out, and the exit codes."""

from __future__ import annotations

import json

import pytest
from bench_cases import fill, problem, run, slower
from hypothesis import given
from hypothesis import strategies as st

from rtk.benchmarks import records
from rtk.benchmarks.records import Run
from rtk.benchmarks.report.compare import compare
from rtk.cli import bench_report
from rtk.errors import ArgumentError

PEERS = ("fa3", "fa4", "cudnn", "fa2")


def paper(change=lambda found: found, **meta):
    facts, found = run("paper")
    return Run(facts | meta, change(found))


def cell(suite="paper", versions=None, **times):
    """A run of one cell; quartiles 0.2 % from the median."""
    found = [problem(suite, impl=impl, us=us, us_q1=us * 0.998, us_q3=us * 1.002) for impl, us in times.items()]
    return Run({"schema": 1, "suite": suite, "versions": versions or {}}, found)


def test_a_run_is_the_same_as_itself():
    found = compare(paper(), paper())
    assert {change.verdict for change in found.changes} == {"tie"}
    assert (found.only_old, found.only_new, found.regressions) == ([], [], [])
    assert found.winners_same == found.winners == 36
    assert "same winner, or tied: 36 of 36 cells (100%)" in found.text()


@given(st.floats(1.05, 3))
def test_a_slower_rtk_is_a_regression_and_the_other_way_round_is_none(factor):
    before, after = paper(), paper(lambda found: slower(found, factor))
    found, back = compare(before, after), compare(after, before)
    assert len(found.regressions) == 36 == len(back.by_verdict("faster"))
    assert not back.regressions and not found.by_verdict("faster")
    assert all(change.impl == "rtk" and change.drift == 1 for change in found.regressions)
    assert found.regressions[0].ratio.value == pytest.approx(1 / factor)


@given(st.floats(0.5, 2))
def test_a_slower_card_is_drift_and_no_regression(factor):
    found = compare(paper(), paper(lambda records: slower(records, factor, ("rtk", *PEERS))))
    assert all(change.drift == pytest.approx(1 / factor) for change in found.changes)
    assert {change.verdict for change in found.changes} == {"tie"}


def test_one_unchanged_peer_is_not_enough_and_a_new_version_does_not_count():
    old = cell(rtk=100, fa3=100, cudnn=200, versions={"fa3": "1", "cudnn": "1"})
    new = cell(rtk=110, fa3=110, cudnn=220, versions={"fa3": "1", "cudnn": "1"})
    assert not compare(old, new).regressions
    newer = Run(new.meta | {"versions": {"fa3": "2", "cudnn": "1"}}, new.records)
    (change,) = compare(old, newer).regressions
    assert change.drift is None and change.corrected.value == pytest.approx(100 / 110)
    unknown = Run(new.meta | {"versions": {}}, new.records)
    assert compare(old, unknown).changes[0].drift == pytest.approx(100 / 110)


def test_sdpa_changes_with_torch():
    old = cell(rtk=100, sdpa=100, flex=100, versions={"torch": "2.10"})
    new = cell(rtk=110, sdpa=110, flex=110, versions={"torch": "2.11"})
    assert compare(old, new).changes[0].drift is None


def test_what_noise_explains_is_no_regression():
    wide = {"us_q1": 90.0, "us_q3": 115.0}
    old = Run({"schema": 1, "suite": "paper"}, [problem("paper", us=100.0, **wide)])
    new = Run(old.meta, [problem("paper", us=105.0, **wide)])
    assert compare(old, new).changes[0].verdict == "tie"
    assert compare(cell(rtk=100), cell(rtk=100.9)).changes[0].verdict == "tie"  # below RESOLUTION
    assert compare(cell(rtk=100), cell(rtk=105)).regressions


def test_winners_of_two_cards():
    same = compare(cell(rtk=100, fa3=110), cell(rtk=150, fa3=160))
    assert (same.winners_same, same.winners) == (1, 1)
    tied = compare(cell(rtk=100, fa3=100.1), cell(rtk=160, fa3=150))
    assert (tied.winners_same, tied.winners) == (1, 1)
    other = compare(cell(rtk=100, fa3=110), cell(rtk=160, fa3=150))
    assert (other.winners_same, other.winners) == (0, 1)
    assert other.winners_differ == ["paper, d128 full seqlen 8192: rtk before, FlashAttention-3 now"]
    assert compare(cell(rtk=100), cell(rtk=100)).winners == 0


def test_what_is_in_one_run_only_is_listed():
    before, after = cell(rtk=1, fa3=2), cell(rtk=1, cudnn=2)
    found = compare([before, cell("small", rtk=1)], after)
    assert found.only_old == ["paper, d128 full seqlen 8192: FlashAttention-3", "small, b2 h16 s8192 d128: rtk"]
    assert found.only_new == ["paper, d128 full seqlen 8192: cuDNN"]
    assert "only in the old run: 2" in found.text()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two folders of results, the same; and one where rtk takes 1.1 times as long in `paper`."""
    old, new, worse = (fill(tmp_path / name) for name in ("old", "new", "worse"))
    meta, found = run("paper")
    records.write(worse / "paper.json", meta, slower(found, 1.1))
    return old, new, worse


def test_exit_codes(folders, capsys):
    old, new, worse = folders
    assert bench_report.compare(old, new) == 0
    assert "regressions of rtk: 0" in capsys.readouterr().out
    assert bench_report.compare(old, worse) == 1
    out = capsys.readouterr().out
    assert "slower beyond noise: 36" in out and "regressions of rtk: 36" in out
    assert bench_report.compare(worse, old) == 0
    assert bench_report.compare(old / "paper.json", worse / "paper.json") == 1
    assert bench_report.compare(old / "small.json", worse / "small.json") == 0


def test_json(folders, capsys):
    old, _, worse = folders
    assert bench_report.compare(old, worse, json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["regressions"] == 36
    winners = found["winners"]
    assert winners["cells"] == 36 + 4 + 4 + 2  # paper, small, long, overhead
    assert winners["share"] == winners["same_or_tied"] / 46 == 1 - len(winners["differ"]) / 46
    first = next(change for change in found["changes"] if change["verdict"] == "slower")
    assert first["impl"] == "rtk" and first["ratio"]["value"] == pytest.approx(1 / 1.1)


def test_errors(folders, tmp_path):
    old, _, _ = folders
    with pytest.raises(ArgumentError, match="no file"):
        bench_report.compare(old, tmp_path / "none.json")
    with pytest.raises(ArgumentError, match="no time of the same problem"):
        bench_report.compare(old / "paper.json", old / "small.json")
