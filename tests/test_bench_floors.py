"""Physical floors: counted against brute force, monotone, and the figures that docs/limits.md shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench_cases import CEILINGS, DEVICE, problem
from hypothesis import given
from hypothesis import strategies as st

from rtk.benchmarks import floors

PAGE = Path(__file__).resolve().parent.parent / "docs" / "limits.md"
SIDES = st.none() | st.integers(-1, 40)
WINDOWS = st.none() | st.tuples(SIDES, SIDES)
LENGTHS = st.integers(1, 1 << 20)
DIMS = st.sampled_from([8, 64, 128, 256])
IMPOSSIBLE = {"batch": 16, "heads_q": 96, "heads_kv": 96, "seqlen_q": 512, "seqlen_k": 512}


def brute_force(seqlen_q, seqlen_k, causal, window):
    """Visible scores one by one, by FlashAttention's words: query i stands at key i + seqlen_k - seqlen_q."""
    left, right = window or (None, None)
    count = 0
    for query in range(seqlen_q):
        for key in range(seqlen_k):
            ahead = key - (query + seqlen_k - seqlen_q)
            seen = not (causal and ahead > 0)
            seen &= left is None or left < 0 or -ahead <= left
            seen &= right is None or right < 0 or ahead <= right
            count += seen
    return count


@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), WINDOWS)
def test_visible_scores_are_exact(seqlen_q, seqlen_k, causal, window):
    assert floors.visible_scores(seqlen_q, seqlen_k, causal, window) == brute_force(seqlen_q, seqlen_k, causal, window)


@given(LENGTHS, LENGTHS, st.booleans(), WINDOWS)
def test_a_mask_only_hides(seqlen_q, seqlen_k, causal, window):
    seen = floors.visible_scores(seqlen_q, seqlen_k, causal, window)
    assert 0 <= seen <= floors.visible_scores(seqlen_q, seqlen_k, causal) <= seqlen_q * seqlen_k or not causal
    assert 0 <= seen <= seqlen_q * seqlen_k


@given(st.integers(1, 1 << 20))
def test_causal_counts_half_by_convention_and_the_diagonal_in_fact(seqlen):
    record = problem("paper", seqlen_q=seqlen, seqlen_k=seqlen, causal=True)
    assert floors.visible_scores(seqlen, seqlen, True) == seqlen * (seqlen + 1) // 2
    assert floors.visible_flop(record) / floors.flop(record) == pytest.approx((seqlen + 1) / seqlen)
    assert floors.flop(record | {"causal": False}) == 2 * floors.flop(record)


@given(
    st.sampled_from(["batch", "heads_q", "seqlen_q", "head_dim"]),
    st.integers(1, 64),
    st.integers(1, 4096),
    st.integers(1, 4096),
    DIMS,
    st.booleans(),
)
def test_more_work_never_lowers_a_floor(key, batch, seqlen_q, seqlen_k, head_dim, causal):
    shape = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": head_dim, "head_dim_v": None}
    record = problem("paper", causal=causal, **shape)
    if causal and key == "seqlen_q":  # the diagonal moves with seqlen_q: new rows are added above the old ones
        record["seqlen_k"] = max(seqlen_k, seqlen_q)
    less = floors.floors(record, CEILINGS, DEVICE)
    more = floors.floors(record | {key: 2 * record[key]}, CEILINGS, DEVICE)
    assert set(less) == {"wgmma", "exp", "memory"}
    assert all(more[unit] >= us for unit, us in less.items())


@given(st.floats(1.01, 10), DIMS, st.booleans())
def test_a_faster_card_never_raises_a_floor(factor, head_dim, causal):
    record = problem("paper", head_dim=head_dim, head_dim_v=head_dim, causal=causal)
    slow = floors.floors(record, CEILINGS, DEVICE)
    ceilings = {key: value * factor for key, value in CEILINGS.items()}
    fast = floors.floors(record, ceilings, DEVICE | {"max_sm_mhz": DEVICE["max_sm_mhz"] * factor})
    assert all(fast[unit] == pytest.approx(us / factor) for unit, us in slow.items())


def test_what_is_not_known_is_left_out():
    record = problem("paper")
    assert set(floors.floors(record, {}, DEVICE)) == {"exp"}
    assert floors.floors(record, {}, {}) == {}
    assert floors.floors(record | {"op": "bsr_matmul"}, CEILINGS, DEVICE) == {}
    assert floors.floors({"op": "attention_fwd", "head_dim": None}, CEILINGS, DEVICE) == {}
    assert floors.largest({}) is None
    assert floors.impossible(record | {"us": 1.0}, {}) is None


def test_the_case_that_cannot_be():
    record = problem("small", head_dim=64, head_dim_v=64, us=0.49 * 96, **IMPOSSIBLE)
    why = floors.impossible(record, {"device": DEVICE, "ceilings": CEILINGS})
    assert "2,191 TFLOP/s" in why and "1,071" in why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 16, "head_dim_v": 16, "us": 4000.0}, None),
        ({"head_dim": 16, "head_dim_v": 16, "us": 400.0}, "special-function"),
        ({"seqlen_q": 1, "seqlen_k": 1 << 20, "us": 800.0, "batch": 1}, "GB/s"),
        ({"seqlen_q": 1, "seqlen_k": 1 << 20, "us": 2000.0, "batch": 1}, None),
        ({"seqlen_q": 1, "seqlen_k": 4096, "us": 4.0, "batch": 1}, None),  # fits into the level-2 cache
        ({"us": 1.0, "error": "a wrong result"}, None),
        ({"us": None}, None),
    ],
)
def test_each_bound_flags_what_is_under_it(changes, words):
    why = floors.impossible(problem("paper", **changes), {"device": DEVICE, "ceilings": CEILINGS})
    assert why is None if words is None else words in why


@given(DIMS, st.booleans(), st.floats(1.0, 100))
def test_nothing_at_or_above_every_floor_is_impossible(head_dim, causal, factor):
    """The bounds of impossible() are never above the floors of a card whose ceiling is below its peak."""
    record = problem("paper", head_dim=head_dim, head_dim_v=head_dim, causal=causal)
    _, us = floors.largest(floors.floors(record, CEILINGS, DEVICE))
    assert floors.impossible(record | {"us": us * factor}, {"device": DEVICE, "ceilings": CEILINGS}) is None


def test_the_page_runs_and_its_sentence_is_the_one_that_is_printed(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "limits"})
    printed = capsys.readouterr().out.strip()
    shown = re.search(r"^# (47\.0 µs.*?) \.\.\.$", PAGE.read_text(), re.MULTILINE)[1]
    assert printed.startswith(shown)
