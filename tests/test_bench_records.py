"""Results files and the comparison within a cell."""

from __future__ import annotations

import json
import math

import pytest
from bench_cases import fill, problem, run
from hypothesis import given
from hypothesis import strategies as st

from rtk.benchmarks import records
from rtk.benchmarks.schema import META_OBJECTS
from rtk.errors import ArgumentError

META = {"schema": 1, "suite": "paper"}
TIMES = st.floats(0.1, 1e6)
ROUNDS = st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(TIMES, min_size=n, max_size=n)] * 2))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)

NO_META_KEY = st.text().filter(lambda key: key not in META_OBJECTS)  # those have a form to keep


@st.composite
def results(draw):
    """A record of a small pool of cells and implementations, with a time and a key that nobody knows."""
    shape = {"seqlen_q": draw(st.sampled_from([512, 1024])), "causal": draw(st.booleans())}
    window = draw(st.sampled_from([None, [128, 0], [None, None]]))
    us = draw(st.none() | TIMES)
    impl = draw(st.sampled_from(["rtk", "fa3"]))
    return problem("paper", impl=impl, window=window, us=us, unknown=draw(JSON), **shape)


def rounds_record(times, **changes):
    return problem("paper", us=sorted(times)[len(times) // 2], us_rounds=times, **changes)


# --- files -----------------------------------------------------------------------------------------------------------


@given(st.lists(results(), max_size=8), st.dictionaries(NO_META_KEY, JSON, max_size=3))
def test_what_is_written_is_read(tmp_path_factory, found, extra):
    path = tmp_path_factory.mktemp("records") / "new" / "paper.json"
    records.write(path, extra | META, found)
    back = records.read(path)
    assert (back.meta, back.records, back.suite) == (extra | META, found, "paper")
    assert [file.name for file in path.parent.iterdir()] == ["paper.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no file"),
        ("{", "not JSON"),
        ('{"meta": {"schema": 1, "suite": "x"}, "records": [NaN]}', "NaN"),
        ("[]", "no object `meta`"),
        ('{"meta": {}, "records": []}', "no `schema`"),
        ('{"meta": {"schema": true}, "records": []}', "no `schema`"),
        ('{"meta": {"schema": 1}, "records": []}', "no `suite`"),
        ('{"meta": {"schema": 1, "suite": "x"}}', "no list `records`"),
        ('{"meta": {"schema": 1, "suite": "x"}, "records": [{"suite": "x"}]}', "record 1 names no"),
        (
            '{"meta": {"schema": 1, "suite": "x"}, "records": [{"suite": "x", "impl": "a", "us": "3"}]}',
            "`us` of record 1",
        ),
        ('{"meta": {"schema": 2}}', "schemas up to 1"),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "odd.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError) as error:
        records.read(path)
    assert str(path) in str(error.value) and words in str(error.value)


def test_a_folder_gives_its_results_and_nothing_else(tmp_path):
    fill(tmp_path)
    (tmp_path / "other.json").write_text('{"meta": {"gpu": "x"}, "records": []}')
    found = records.read_all([tmp_path])
    assert [one.suite for one in found] == ["accuracy", "coldstart", "long", "overhead", "paper", "small"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ArgumentError, match="broken"):
        records.read_all([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="without results"):
        records.read_all([tmp_path / "empty"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "paper.json"
    records.write(path, META, [problem("paper", us=1.0)])
    before = path.read_bytes()
    for meta, record in ((META, {"us": math.nan}), (META, {"us": object()}), ({}, {}), (META, {"batch": 1.5})):
        with pytest.raises(ArgumentError):
            records.write(path, meta, [problem("paper", **record)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["paper.json"]


# --- merging and cells -----------------------------------------------------------------------------------------------


@given(st.lists(results(), max_size=12), st.lists(results(), max_size=12))
def test_merging_keeps_the_last_and_is_idempotent(first, second):
    merged = records.merge(first, second)
    assert records.merge(merged, merged) == records.merge(merged, second) == merged
    assert records.merge(first + second) == merged
    keys = [(records.cell_key(record), record["impl"]) for record in first + second]
    assert [(records.cell_key(record), record["impl"]) for record in merged] == list(dict.fromkeys(keys))
    for record in merged:
        last = max(i for i, key in enumerate(keys) if key == (records.cell_key(record), record["impl"]))
        assert record is (first + second)[last]


@given(st.lists(results(), max_size=12))
def test_cells_partition_and_each_has_its_own_label(found):
    cells = records.cells(found)
    assert [record for cell in cells.values() for record in cell.values()] == [
        record for key in cells for record in records.merge(found) if records.cell_key(record) == key
    ]
    names = records.labels(cells)
    assert list(names) == list(cells)
    assert len(set(names.values())) == len(cells)


def test_labels_are_for_people():
    def label(*found):
        return list(records.labels(map(records.cell_key, found)).values())

    assert label(problem("paper", causal=True)) == ["d128 causal seqlen 8192"]
    assert label(problem("small", batch=16, heads_q=96, heads_kv=96, seqlen_q=4096, seqlen_k=4096)) == [
        "b16 h96 s4096 d128"
    ]
    assert label(problem("paper", window=[1024, 0])) == ["d128 window 1024:0 seqlen 8192"]
    assert label(problem("paper", seqlen_q=1, variant="paged")) == ["d128 full seqlen 1:8192 paged"]
    assert label(problem("paper"), problem("paper", dtype="float16")) == [
        "d128 full seqlen 8192 bf16",
        "d128 full seqlen 8192 fp16",
    ]
    assert label(problem("paper"), problem("paper", heads_kv=4)) == [
        "d128 full seqlen 8192 b2 h16",
        "d128 full seqlen 8192 b2 h16:4",
    ]
    assert label(problem("paper"), problem("paper", softcap=30.0)) == [
        "d128 full seqlen 8192",
        "d128 full seqlen 8192 softcap 30",
    ]


def test_no_window_and_no_softcap_have_one_key():
    plain = records.cell_key(problem("paper"))
    assert records.cell_key(problem("paper", window=[None, None], softcap=0.0)) == plain
    assert records.cell_key(problem("paper", window=[-1, -1], unknown=3)) == plain
    assert records.cell_key(problem("paper", variant="x")) != plain


# --- comparing -------------------------------------------------------------------------------------------------------


@given(ROUNDS)
def test_the_ratio_is_antisymmetric_and_ties_are_symmetric(times):
    a, b = (rounds_record(list(one)) for one in times)
    for function in (records.ratio, records.ratio_of_medians):
        there, back = function(a, b), function(b, a)
        assert there.value * back.value == pytest.approx(1)
        assert there.low * back.high == pytest.approx(1)
        assert there.low <= there.value * (1 + 1e-12) and there.value <= there.high * (1 + 1e-12)
    there, back = records.ratio(a, b), records.ratio(b, a)
    edge = 1 + there.resolution
    if (
        all(abs(math.log(x)) > 1e-9 for x in (there.low, there.high))
        and abs(max(there.value, back.value) - edge) > 1e-9
    ):
        assert {there.verdict, back.verdict} in ({"tie"}, {"faster", "slower"})


@given(TIMES)
def test_without_rounds_the_spreads_of_both_count(us):
    a = problem("paper", us=us, us_q1=us * 0.9, us_q3=us * 1.2)
    exact = problem("paper", us=us * 2)
    ratio = records.ratio(a, exact)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2 / 1.2, 2 / 0.9))
    ratio = records.ratio(a, a | {"impl": "fa3"})  # each side: the root of the sum of squares of both logarithms
    both = math.exp(math.hypot(math.log(0.9), math.log(1.2)))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1, 1 / both, both))


def test_rounds_are_paired():
    """Both slow down together in some rounds: unpaired one could say nothing, paired the difference is clear."""
    drift = [1.0, 1.5, 1.0, 1.4, 1.2]
    a, b = rounds_record([100 * d for d in drift]), rounds_record([103 * d for d in drift])
    ratio = records.ratio(a, b)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.03, 1.03, 1.03))
    assert records.verdict(a, b) == "faster" and records.verdict(b, a) == "slower"
    wide = [a | {"us_rounds": None, "us_q1": 100, "us_q3": 140}, b | {"us_rounds": None, "us_q1": 103, "us_q3": 144}]
    assert records.verdict(*wide) == "tie"


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (1.02, 1.03, 1.04, "faster"),
        (0.96, 0.97, 0.98, "slower"),
        (1.001, 1.009, 1.01, "tie"),
        (0.99, 1.05, 1.1, "tie"),
        (1.0, 1.05, 1.1, "tie"),
    ],
)
def test_verdicts(low, value, high, expected):
    assert records.Ratio(value, low, high).verdict == expected


def test_each_suite_has_its_own_time():
    assert records.cost(problem("overhead", us=5.0, cpu_us=7.0)) == 7.0
    assert records.cost(problem("coldstart", us=5.0)) is None
    assert records.cost(problem("paper", us=5.0, error="wrong result")) is None
    assert records.verdict(problem("overhead", cpu_us=7.0), problem("overhead", cpu_us=7.5)) == "tie"
    assert records.verdict(problem("paper", us=7.0), problem("paper", us=7.5)) == "faster"
    assert records.verdict(problem("paper", us=7.0), problem("paper", us=None)) is None


def test_the_best_peer_is_never_rtk():
    cell = {impl: problem("paper", impl=impl, us=us) for impl, us in (("rtk", 1.0), ("fa3", 3.0), ("fa2", 2.0))}
    assert records.best_peer(cell)["impl"] == "fa2"
    assert records.best_peer({"rtk": cell["rtk"]}) is None


def test_the_generated_results_are_results():
    _, found = run("paper")
    assert len(records.cells(found)) == 36
    assert json.loads(json.dumps(found)) == found == run("paper")[1]
