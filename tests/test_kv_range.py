"""kv_range on the CPU: each sequence's own range of keys, against the definition; and what is no range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yardstick import attention_f64

import rtk
from rtk import shapes
from rtk.errors import ArgumentError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC

MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "causal_align": "top-left"},
    {"window_size": (9, 3)},
    {"causal": True, "window_size": (5, None), "softcap": 3.0},
]


def inputs(batch: int, seqlen_q: int, seqlen_k: int, dtype: str = "float64") -> list[np.ndarray]:
    rng = np.random.default_rng(seqlen_q * 1000 + seqlen_k)
    shapes_ = ((batch, 4, seqlen_q, 16), (batch, 2, seqlen_k, 16), (batch, 2, seqlen_k, 8))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes_]


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[np.ndarray], tuple[Any, Any], dict[str, Any]]:
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 4)), draw(st.integers(1, 90)), draw(st.integers(1, 600))
    bound = st.integers(-3, seqlen_k + 3) | st.sampled_from([0, seqlen_k, 256, -(2**31), 2**31 - 1])
    array = st.lists(bound, min_size=batch, max_size=batch).map(lambda x: np.array(x, np.int32))
    kv_range = draw(st.tuples(st.none() | array, st.none() | array))
    return inputs(batch, seqlen_q, seqlen_k), kv_range, draw(st.sampled_from(MASKS))


@given(calls())
def test_as_defined(call: Any) -> None:
    arrays, kv_range, options = call
    o, lse = rtk.attention(*arrays, kv_range=kv_range, **options, return_lse=True)
    o64, lse64 = attention_f64(*arrays, kv_range=kv_range, **options)
    np.testing.assert_allclose(o, o64, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lse, lse64, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", MASKS)
def test_a_range_is_the_keys_alone(options: dict[str, Any]) -> None:
    """With no mask, the result is that of the keys in the range; what is outside may be anything."""
    arrays = inputs(2, 30, 50)
    first, end = np.array([7, 0], np.int32), np.array([50, 13], np.int32)
    got = rtk.attention(*arrays, kv_range=(first, end), **options)
    spoilt = [x.copy() for x in arrays]
    for b in range(2):
        for x in spoilt[1:]:
            x[b, :, : first[b]] = x[b, :, end[b] :] = np.nan
    assert np.array_equal(rtk.attention(*spoilt, kv_range=(first, end), **options), got)
    if not options:
        for b in range(2):
            q, k, v = (x[b : b + 1] for x in arrays)
            keys = slice(int(first[b]), int(end[b]))
            np.testing.assert_allclose(got[b], rtk.attention(q, k[:, :, keys], v[:, :, keys])[0], rtol=1e-12)


def test_no_key_at_all() -> None:
    arrays = inputs(3, 5, 9)
    o, lse = rtk.attention(*arrays, kv_range=(None, np.array([0, 9, -4], np.int32)), return_lse=True)
    for b in (0, 2):
        assert not o[b].any() and np.isneginf(lse[b]).all()
    assert np.isfinite(lse[1]).all()


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(2, 5, 9, "float32")
    end = np.array([4, 9], np.int32)
    got = rtk.attention(*map(torch.from_numpy, arrays), kv_range=(None, torch.from_numpy(end)))
    assert np.array_equal(got.numpy(), rtk.attention(*arrays, kv_range=(None, end)))
    assert np.array_equal(got.numpy(), rtk.attention(*arrays, kv_range=[None, end]))


@pytest.mark.parametrize(
    ("kv_range", "error", "said"),
    [
        (3, ArgumentError, "kv_range"),
        (np.zeros(2, np.int32), ArgumentError, "kv_range"),
        ((None,), ArgumentError, "kv_range"),
        (([0, 0], None), ArgumentError, r"kv_range\[0\]"),
        ((None, np.zeros(2, np.int64)), ArgumentError, r"kv_range\[1\].*int64"),
        ((None, np.zeros(3, np.int32)), ArgumentError, r"kv_range\[1\].*\(2,\)"),
        ((np.zeros((2, 1), np.int32), None), ArgumentError, r"kv_range\[0\]"),
        ((np.zeros(4, np.int32)[::2], None), UnsupportedError, "contiguous"),
    ],
)
def test_what_is_no_range(kv_range: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        rtk.attention(*inputs(2, 5, 9), kv_range=kv_range)


def test_a_range_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match=r"kv_range\[0\].*Tensor"):
        rtk.attention(*inputs(2, 5, 9), kv_range=(torch.zeros(2, dtype=torch.int32), None))


def test_no_bounds_is_no_range() -> None:
    arrays = inputs(2, 5, 9)
    assert np.array_equal(rtk.attention(*arrays, kv_range=(None, None)), rtk.attention(*arrays))


def test_in_a_shape() -> None:
    problem = shapes.parse("b=4,hq=8,sq=300,d=64,causal,ranges")
    assert problem.kv_ranges and shapes.parse(shapes.describe(problem)) == problem
    assert not shapes.parse("hq=8,sq=300,d=64,ranges=false").kv_ranges
    assert all(config.KV_RANGES for config in SPEC.configs(problem))
    assert SPEC.bucket(problem) != SPEC.bucket(shapes.parse("b=4,hq=8,sq=300,d=64,causal"))
    assert "_ranges" in SPEC.label(SPEC.pick(problem))
