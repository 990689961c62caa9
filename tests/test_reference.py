"""Properties of rtk.reference.attention_fwd, against the float64 formula and against itself."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yardstick
from hypothesis import example, given
from hypothesis import strategies as st
from yardstick import DTYPES, attention_f64, make_inputs

from rtk.reference import attention_fwd

pytestmark = pytest.mark.filterwarnings("error")

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Case:
    """A call. `window` is in the public form: (left, right), None or -1 for unbounded."""

    batch: int = 1
    heads_kv: int = 1
    group: int = 1
    seqlen_q: int = 5
    seqlen_k: int = 5
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: str = "float32"
    kind: str = "normal"
    causal: bool = False
    causal_align: str = "bottom-right"
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    block_n: int = 256
    seed: int = 0

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return make_inputs(
            self.kind,
            batch=self.batch,
            heads_q=self.heads_kv * self.group,
            heads_kv=self.heads_kv,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            rng=np.random.default_rng(self.seed),
        )

    def public(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "causal_align": self.causal_align,
            "window_size": self.window,
            "softmax_scale": self.scale,
            "softcap": self.softcap,
        }

    def internal(self, **changes: Any) -> dict[str, Any]:
        left, right = (None if w == -1 else w for w in self.window or (None, None))
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return {
            "softmax_scale": 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale,
            "softcap": self.softcap,
            "window_left": left,
            "window_right": right,
            "diagonal": self.seqlen_k - self.seqlen_q if self.causal_align == "bottom-right" else 0,
            "block_n": self.block_n,
        } | changes


def lengths(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, 9) | st.integers(0, most)


windows = st.none() | st.tuples(*2 * [st.none() | st.just(-1) | st.integers(0, 6) | st.integers(0, 80)])
cases = st.builds(
    Case,
    batch=st.integers(0, 2),
    heads_kv=st.integers(1, 3),
    group=st.sampled_from([1, 1, 2, 3, 8]),
    seqlen_q=lengths(70),
    seqlen_k=lengths(150),
    head_dim=st.sampled_from([8, 16, 40, 64]),
    head_dim_v=st.sampled_from([8, 24, 64]),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(yardstick.KINDS),
    causal=st.booleans(),
    causal_align=st.sampled_from(["bottom-right", "top-left"]),
    window=windows,
    scale=st.none() | st.sampled_from([0.0, -0.2, 1.0, -1.0]) | st.floats(-1, 1, width=32),
    softcap=st.sampled_from([0.0, 0.0, 1.0, 30.0]),
    block_n=st.sampled_from([1, 16, 64, 256]),
    seed=st.integers(0, 2**16),
)


def assert_near(case: Case, got: tuple[Any, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """As near to the formula as one rounding of the output and float32 (float64) sums of scores and values allow."""
    o, lse = got
    o64, lse64 = attention_f64(q, k, v, **case.public())
    assert yardstick.dtype_name(o) == case.dtype
    assert lse.dtype == (np.float64 if case.dtype == "float64" else np.float32)
    assert o.shape == o64.shape
    assert lse.shape == lse64.shape
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse64))
    finite = np.isfinite(lse64)
    np.testing.assert_array_equal(o[~finite], np.zeros_like(o[~finite]))
    if not finite.any():
        return
    eps = EPS["float64" if case.dtype == "float64" else "float32"]
    # No score is larger than |scale| |q| |k|, and errors of the sums behind it are some roundings of that.
    largest = [float(np.sqrt((x.astype(np.float64) ** 2).sum(-1)).max()) for x in (q, k)]
    slack = 16 * eps * max(16.0, abs(case.internal()["softmax_scale"]) * largest[0] * largest[1])
    assert np.abs(lse[finite] - lse64[finite]).max() <= slack
    bound = EPS[case.dtype] * np.abs(o64) + 4 * slack * float(np.abs(v.astype(np.float64)).max()) + 2.0**-25
    error = np.abs(o.astype(np.float64) - o64)
    assert (error <= bound).all(), f"{case}: error {error.max()} at {np.unravel_index(error.argmax(), error.shape)}"


@given(cases)
@example(Case(seqlen_q=64, seqlen_k=64, causal=True, block_n=16, dtype="bfloat16"))
@example(Case(seqlen_q=70, seqlen_k=3, causal=True, kind="index", dtype="float16"))
@example(Case(seqlen_q=3, seqlen_k=70, causal=True, causal_align="top-left", window=(1, 5)))
@example(Case(seqlen_q=9, seqlen_k=9, window=(0, 0), kind="index"))
@example(Case(seqlen_q=9, seqlen_k=9, window=(10**30, 10**30)))
@example(Case(seqlen_q=9, seqlen_k=4, window=(None, 0), scale=0.0))
@example(Case(seqlen_k=0))
@example(Case(seqlen_q=0))
@example(Case(batch=0))
def test_is_the_formula(case: Case) -> None:
    q, k, v = case.inputs()
    got = attention_fwd(q, k, v, **case.internal())
    assert_near(case, got, q, k, v)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_is_the_formula_over_several_query_blocks(dtype: str) -> None:
    """More rows than one block holds, whatever their number is."""
    for causal, window in ((False, None), (True, None), (True, (300, 0)), (False, (40, 600))):
        case = Case(heads_kv=1, group=2, seqlen_q=1500, seqlen_k=1300, dtype=dtype, causal=causal, window=window)
        q, k, v = case.inputs()
        assert_near(case, attention_fwd(q, k, v, **case.internal()), q, k, v)


@given(cases)
def test_under_the_rule_for_kernels(case: Case) -> None:
    """It passes what the GPU's kernels must pass, so the same check can judge both."""
    if case.dtype not in ("float16", "bfloat16"):
        return
    q, k, v = case.inputs()
    o, lse = attention_fwd(q, k, v, **case.internal())
    o64, lse64 = attention_f64(q, k, v, **case.public())
    yardstick.check(o, o64, yardstick.plain(q, k, v, **case.public()), case.dtype, label=str(case))
    yardstick.check_lse(lse, lse64, label=str(case))


@given(cases)
def test_values_of_one_give_one(case: Case) -> None:
    q, k, v = case.inputs()
    o, lse = attention_fwd(q, k, np.ones_like(v), **case.internal())
    expected = np.broadcast_to(np.where(np.isneginf(lse), 0.0, 1.0)[..., None], o.shape)
    np.testing.assert_allclose(o.astype(np.float64), expected, rtol=0, atol=1e-5)


@given(cases, st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter(case: Case, random: Any) -> None:
    """Without a mask, that is."""
    case = Case(**(vars(case) | {"causal": False, "window": None}))
    q, k, v = case.inputs()
    order = list(range(case.seqlen_k))
    random.shuffle(order)
    got = attention_fwd(q, k[:, :, order], v[:, :, order], **case.internal())
    assert_near(case, got, q, k, v)


@given(cases)
def test_shared_heads_are_repeated_heads(case: Case) -> None:
    q, k, v = case.inputs()
    got = attention_fwd(q, k, v, **case.internal())
    wide = attention_fwd(q, k.repeat(case.group, 1), v.repeat(case.group, 1), **case.internal())
    tolerance = 2.5 * EPS[case.dtype]
    for a, b in zip(got, wide, strict=True):
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=1e-4)


@given(cases, st.floats(0, 1))
def test_parts_merge_by_lse(case: Case, at: float) -> None:
    """Attention to two halves of the keys, weighted by exp(lse), is attention to all of them."""
    case = Case(**(vars(case) | {"dtype": "float64"}))
    q, k, v = case.inputs()
    cut = round(at * case.seqlen_k)
    arguments = case.internal()
    whole, whole_lse = attention_fwd(q, k, v, **arguments)
    first, first_lse = attention_fwd(q, k[:, :, :cut], v[:, :, :cut], **arguments)
    # Key j of the second part is key cut + j of the whole: the band moves by cut.
    arguments["diagonal"] -= cut
    second, second_lse = attention_fwd(q, k[:, :, cut:], v[:, :, cut:], **arguments)
    lse = np.logaddexp(first_lse, second_lse)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-12, atol=1e-12)
    shift = np.where(np.isneginf(lse), 0, lse)
    merged = first * np.exp(first_lse - shift)[..., None] + second * np.exp(second_lse - shift)[..., None]
    np.testing.assert_allclose(merged, whole, rtol=1e-9, atol=1e-9)


@given(cases, st.integers(1, 200))
def test_size_of_blocks_does_not_matter(case: Case, block_n: int) -> None:
    q, k, v = case.inputs()
    got = attention_fwd(q, k, v, **case.internal(block_n=block_n))
    assert_near(case, got, q, k, v)


@given(cases)
def test_queries_do_not_know_each_other(case: Case) -> None:
    """Row i alone, with the band moved by i, gives what it gives among the others."""
    case = Case(**(vars(case) | {"dtype": "float64"}))
    q, k, v = case.inputs()
    o, lse = attention_fwd(q, k, v, **case.internal())
    arguments = case.internal()
    diagonal = arguments.pop("diagonal")
    for i in range(0, case.seqlen_q, 7):
        o_i, lse_i = attention_fwd(q[:, :, i : i + 1], k, v, diagonal=diagonal + i, **arguments)
        np.testing.assert_allclose(o_i, o[:, :, i : i + 1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(lse_i, lse[:, :, i : i + 1], rtol=1e-12, atol=1e-12)


@given(cases)
def test_strides_do_not_matter(case: Case) -> None:
    q, k, v = case.inputs()
    expected = attention_fwd(q, k, v, **case.internal())

    def scattered(x: np.ndarray) -> np.ndarray:
        """The same values in another order in memory: dimensions exchanged, every second element, backwards."""
        room = np.zeros((x.shape[1], x.shape[3] * 2, x.shape[0], x.shape[2]), x.dtype)
        view = room.transpose(2, 0, 3, 1)[:, :, ::-1, ::2][:, ::-1]
        view[...] = x
        return view

    for a, b in zip(attention_fwd(scattered(q), scattered(k), scattered(v), **case.internal()), expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_strides_of_zero(dtype: str) -> None:
    case = Case(batch=2, heads_kv=2, group=2, seqlen_q=7, seqlen_k=9, dtype=dtype, causal=True)
    q, k, v = case.inputs()
    for axis in range(3):
        views = [np.broadcast_to(x.take([0], axis), x.shape) for x in (q, k, v)]
        assert all(x.strides[axis] == 0 for x in views)
        for a, b in zip(
            attention_fwd(*views, **case.internal()),
            attention_fwd(*(x.copy() for x in views), **case.internal()),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


@given(cases)
def test_inputs_are_left_alone(case: Case) -> None:
    arrays = case.inputs()
    if case.seqlen_k:
        arrays[2][:, :, -1] = np.nan
    before = [x.tobytes() for x in arrays]
    for x in arrays:
        x.setflags(write=False)
    attention_fwd(*arrays, **case.internal())
    assert [x.tobytes() for x in arrays] == before


@given(cases, st.sampled_from([np.nan, np.inf, -np.inf]), st.sampled_from(["k", "v"]), st.integers(0, 10**6))
def test_nan_and_inf_reach_the_rows_that_see_them_and_no_others(case: Case, bad: float, where: str, at: int) -> None:
    if not case.seqlen_k:
        return
    case = Case(**(vars(case) | {"kind": "normal", "scale": None}))
    q, k, v = case.inputs()
    clean = attention_fwd(q, k, v, **case.internal())
    j = at % case.seqlen_k
    (k if where == "k" else v)[:, :, j] = bad
    o, lse = attention_fwd(q, k, v, **case.internal())
    public = case.public()
    seen = yardstick.visible_keys(
        case.seqlen_q, case.seqlen_k, **{name: public[name] for name in ("causal", "causal_align", "window_size")}
    )[:, j]
    np.testing.assert_allclose(o[:, :, ~seen].astype(float), clean[0][:, :, ~seen].astype(float), atol=1e-2)
    np.testing.assert_allclose(lse[:, :, ~seen], clean[1][:, :, ~seen], atol=1e-5)
    if where == "v":
        np.testing.assert_allclose(lse, clean[1], atol=1e-5)
        reached = o[:, :, seen].astype(float)
        np.testing.assert_array_equal(reached, np.full_like(reached, bad))
    elif np.isnan(bad):
        assert np.isnan(o[:, :, seen].astype(float)).all()
        assert np.isnan(lse[:, :, seen]).all()


def test_nan_in_a_query_stays_in_its_row() -> None:
    q, k, v = Case(batch=2, heads_kv=2, group=2).inputs()
    q[1, 2, 3, 0] = np.nan
    o, lse = attention_fwd(q, k, v, softmax_scale=0.3)
    expected = np.zeros(lse.shape, bool)
    expected[1, 2, 3] = True
    np.testing.assert_array_equal(np.isnan(lse), expected)
    np.testing.assert_array_equal(np.isnan(o), np.broadcast_to(expected[..., None], o.shape))


def test_rows_without_keys() -> None:
    q, k, v = Case(seqlen_q=6, seqlen_k=4).inputs()
    o, lse = attention_fwd(q, k, v, softmax_scale=1.0, window_right=0, diagonal=-2)
    assert (o[:, :, :2] == 0).all()
    assert np.isneginf(lse[:, :, :2]).all()
    assert np.isfinite(lse[:, :, 2:]).all()
    o, lse = attention_fwd(q, k, v, softmax_scale=1.0, window_left=0, diagonal=4)
    assert (o == 0).all()
    assert np.isneginf(lse).all()


def test_overflow_of_the_output_dtype_is_inf() -> None:
    q, k, v = Case(dtype="float16").inputs()
    v[...] = 65504
    v[0, 0, 0] = np.inf
    o, _ = attention_fwd(q, k, v, softmax_scale=1.0)
    assert np.isposinf(o).all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = Case(seqlen_k=300, dtype="float32").inputs()
    o, lse = attention_fwd(1e4 * q, k, v, softmax_scale=1.0)
    winner = (q.astype(np.float64) @ k.swapaxes(-1, -2)).argmax(-1)
    np.testing.assert_allclose(o, np.take_along_axis(v, winner[..., None], 2), atol=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_stays_small(dtype: str, causal: bool) -> None:
    """All scores in float32 would be 1.1 GB, and K and V upcast as a whole 18 MB each."""
    case = Case(seqlen_q=2000, seqlen_k=18000, head_dim=32, head_dim_v=32, dtype=dtype, causal=causal)
    q, k, v = (np.ascontiguousarray(np.broadcast_to(x, (1, 8, *x.shape[2:]))) for x in case.inputs())
    tracemalloc.start()
    try:
        attention_fwd(q, k[:, :, ::-1], v, **case.internal())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    out = 8 * 2000 * (32 * q.itemsize + 4)
    assert peak < out + 14 * 2**20, f"{peak / 2**20:.1f} MiB at the peak, of which the results are {out / 2**20:.1f}"


def test_masked_blocks_are_skipped() -> None:
    """A narrow window over many keys must not read the keys far from the diagonal: those are NaN here, and unmapped
    would do as well. Counted by time it would be flaky, so counted by what is touched."""

    class Counting(np.ndarray):
        touched = 0

        def __getitem__(self, item: Any) -> Any:
            part = super().__getitem__(item)
            if isinstance(part, np.ndarray) and part.ndim == 3 and part.shape[1] < 4096:
                Counting.touched += part.shape[1]
            return part

    q = np.ones((1, 1, 4096, 8), np.float32)
    k = np.ones((1, 1, 4096, 8), np.float32).view(Counting)
    attention_fwd(q, k, np.asarray(k), softmax_scale=1.0, window_left=10, window_right=0, block_n=64)
    assert 0 < Counting.touched < 4096 * 2
