"""The yardstick itself: its formula against loops over scalars, and its rule against planted defects."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yardstick
from yardstick import attention_f64, check, check_lse, make_inputs, plain, visible_keys

pytestmark = pytest.mark.filterwarnings("error")

SHAPE: dict[str, Any] = {
    "batch": 2,
    "heads_q": 4,
    "heads_kv": 2,
    "seqlen_q": 136,
    "seqlen_k": 250,
    "head_dim": 64,
    "head_dim_v": 48,
}
DTYPES16 = ("float16", "bfloat16")


# --- the formula ----------------------------------------------------------------------------------------------------


def test_masks_by_hand() -> None:
    def drawn(*args: int, **kwargs: Any) -> list[str]:
        return ["".join("x" if seen else "." for seen in row) for row in visible_keys(*args, **kwargs)]

    assert drawn(2, 4) == ["xxxx", "xxxx"]
    assert drawn(2, 4, causal=True) == ["xxx.", "xxxx"]
    assert drawn(2, 4, causal=True, causal_align="top-left") == ["x...", "xx.."]
    assert drawn(4, 2, causal=True) == ["..", "..", "x.", "xx"]
    assert drawn(4, 2, causal=True, causal_align="top-left") == ["x.", "xx", "xx", "xx"]
    assert drawn(3, 5, window_size=(1, 0)) == [".xx..", "..xx.", "...xx"]
    assert drawn(3, 5, window_size=(0, 1)) == ["..xx.", "...xx", "....x"]
    assert drawn(3, 5, window_size=(-1, 0)) == drawn(3, 5, window_size=(None, 0)) == drawn(3, 5, causal=True)
    assert drawn(3, 5, window_size=(0, -1)) == ["..xxx", "...xx", "....x"]
    assert drawn(3, 5, causal=True, window_size=(1, 2)) == drawn(3, 5, window_size=(1, 0))
    assert drawn(3, 5, causal_align="top-left", window_size=(1, 1)) == ["xx...", "xxx..", ".xxx."]
    assert drawn(5, 2, window_size=(0, 0)) == ["..", "..", "..", "x.", ".x"]


def _by_scalars(q: Any, k: Any, v: Any, seen: Any, scale: float, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    o = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -math.inf)
    for b, h, i in np.ndindex(*q.shape[:3]):
        g = h * k.shape[1] // q.shape[1]
        scores = {}
        for j in range(k.shape[2]):
            if seen[i, j]:
                s = scale * sum(float(q[b, h, i, c]) * float(k[b, g, j, c]) for c in range(q.shape[3]))
                scores[j] = softcap * math.tanh(s / softcap) if softcap else s
        total = sum(math.exp(s) for s in scores.values())
        if scores:
            lse[b, h, i] = math.log(total)
            o[b, h, i] = [sum(math.exp(s) * float(v[b, g, j, c]) for j, s in scores.items()) / total for c in range(3)]
    return o, lse


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (1, 2), "causal_align": "top-left"}], ids=str)
def test_formula_is_the_sum_over_scalars(library: str, softcap: float, mask: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s) for s in ((2, 4, 5, 8), (2, 2, 4, 8), (2, 2, 4, 3)))
    expected = _by_scalars(q, k, v, visible_keys(5, 4, **mask), 0.7, softcap)
    if library == "torch":
        torch = pytest.importorskip("torch")
        q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    got = attention_f64(q, k, v, softmax_scale=0.7, softcap=softcap, **mask)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(yardstick.to_f64(a), b, rtol=1e-13, atol=1e-14)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    o, lse = attention_f64(q, k, v, softmax_scale=0.7, softcap=softcap, layout="bshd", **mask)
    np.testing.assert_array_equal(yardstick.to_f64(o.swapaxes(1, 2)), yardstick.to_f64(got[0]))
    np.testing.assert_array_equal(yardstick.to_f64(lse), yardstick.to_f64(got[1]))


def test_default_scale_is_one_over_root_head_dim() -> None:
    q, k, v = make_inputs("normal", **SHAPE, dtype="float64", rng=np.random.default_rng(0))
    np.testing.assert_array_equal(attention_f64(q, k, v)[0], attention_f64(q, k, v, softmax_scale=0.125)[0])


def test_formula_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    arrays = make_inputs("normal", **SHAPE, dtype="float64", rng=np.random.default_rng(2))
    q, k, v = (torch.from_numpy(x) for x in arrays)
    # torch's own mask, whose True means "takes part"; is_causal is top-left.
    sdpa = torch.nn.functional.scaled_dot_product_attention
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    got = attention_f64(q, k, v, causal=True, causal_align="top-left")[0]
    torch.testing.assert_close(got, sdpa(q, *wide, is_causal=True), rtol=1e-12, atol=1e-13)
    keep = torch.ones(136, 250, dtype=torch.bool).tril(250 - 136)
    torch.testing.assert_close(attention_f64(q, k, v, causal=True)[0], sdpa(q, *wide, keep), rtol=1e-12, atol=1e-13)


def test_unseen_keys_do_not_matter_and_seen_ones_do() -> None:
    q, k, v = make_inputs("normal", **SHAPE, dtype="float32", rng=np.random.default_rng(3))
    clean, clean_lse = attention_f64(q, k, v, causal=True)
    for poison in (np.nan, np.inf):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, :, 180], dirty_v[:, :, 180] = poison, poison
        with_v = attention_f64(q, k, dirty_v, causal=True)[0]
        with_k, lse = attention_f64(q, dirty_k, v, causal=True)
        np.testing.assert_allclose(with_v[:, :, :66], clean[:, :, :66], rtol=0, atol=1e-14)
        np.testing.assert_array_equal(with_k[:, :, :66], clean[:, :, :66])
        np.testing.assert_array_equal(lse[:, :, :66], clean_lse[:, :, :66])
        assert not np.isfinite(with_v[:, :, 66:]).any()
        assert np.isnan(attention_f64(q, k * np.float32("nan"), v)[0]).all()


def test_plain_rounds_but_not_much() -> None:
    for dtype, at_least, at_most in (("float16", 1e-5, 3e-3), ("bfloat16", 1e-4, 3e-2), ("float32", 1e-9, 1e-5)):
        q, k, v = make_inputs("normal", **SHAPE, dtype=dtype, rng=np.random.default_rng(4))
        got = plain(q, k, v, causal=True)
        assert yardstick.dtype_name(got) == dtype
        assert at_least < np.abs(got.astype(np.float64) - attention_f64(q, k, v, causal=True)[0]).max() < at_most


def test_index_values_tell_keys_heads_and_batches_apart() -> None:
    _, _, v = make_inputs("index", **(SHAPE | {"head_dim_v": 8}), dtype="bfloat16", rng=np.random.default_rng(0))
    assert len({row.tobytes() for row in v[1, 1]}) == SHAPE["seqlen_k"]
    assert (v[:, 0] != v[:, 1]).all()
    assert (v[0] != v[1]).all()


def test_peaked_rows_take_one_key_and_half_of_them_at_an_edge() -> None:
    for head_dim in (8, 64, 256):
        rng = np.random.default_rng(5)
        q, k, _ = make_inputs("peaked", **(SHAPE | {"head_dim": head_dim}), dtype="float32", rng=rng)
        scores = q[:, ::2] @ k.swapaxes(-1, -2) / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        assert np.quantile(1 / weights.sum(-1), 0.1) > 0.9
        offsets = scores.argmax(-1) - np.arange(SHAPE["seqlen_q"])
        assert 0.4 < np.isin(offsets, (114, 115, 0, 1)).mean() < 0.6


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = shape
    q, k, v = np.ones((batch, 2, seqlen_q, 8)), np.ones((batch, 1, seqlen_k, 8)), np.ones((batch, 1, seqlen_k, 16))
    o, lse = attention_f64(q, k, v)
    assert o.shape == plain(q, k, v).shape == (batch, 2, seqlen_q, 16)
    assert lse.shape == (batch, 2, seqlen_q)
    assert (o == 0).all()
    assert (lse == -np.inf).all()
    check(o, o, o, "float64")


# --- the rule: an honest kernel passes, each planted defect is caught -------------------------------------------------

BLOCK = 64
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window_size": (70, 9)},
}


def fused(q: np.ndarray, k: np.ndarray, v: np.ndarray, defect: str = "", softcap: float = 0.0, **mask: Any) -> Any:
    """What a fused kernel does, in its precisions (P in 16 bits, sums in float32, base 2), with a defect on demand."""
    dtype, f32 = q.dtype, np.float32
    batch, heads_q, seqlen_q, head_dim = q.shape
    group, seqlen_k = heads_q // k.shape[1], k.shape[2]
    head_of = [h // group for h in range(heads_q)]
    if defect == "key head h % heads_kv":
        head_of = [h % k.shape[1] for h in range(heads_q)]
    if defect == "neighbour's value head":
        v = v[:, ::-1]
    qf, kf, vf = q.astype(f32), k.astype(f32)[:, head_of], v.astype(f32)[:, head_of]
    seen = visible_keys(seqlen_q, seqlen_k, **mask)
    for name, step in (("mask one key too far", 1), ("mask one key short", -1)):
        if defect == name:
            seen = np.stack([np.roll(row, step) if 0 < row.sum() < seqlen_k else row for row in seen])
    pad = -seqlen_k % BLOCK
    if defect == "tail not masked":
        kf, vf = (np.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (kf, vf))
        seen = np.pad(seen, ((0, 0), (0, pad)), constant_values=True)
    scale = f32(math.log2(math.e) / math.sqrt(head_dim))
    if defect == "scale of the next head_dim":
        scale = f32(math.log2(math.e) / math.sqrt(head_dim + 8))
    m = np.full((batch, heads_q, seqlen_q, 1), -np.inf, f32)
    total, acc = np.zeros_like(m), np.zeros((batch, heads_q, seqlen_q, v.shape[3]), f32)
    blocks = list(range(0, kf.shape[2], BLOCK))[::-1]
    for n, j in enumerate(blocks):
        cols = slice(j, j + BLOCK)
        kb, vb, see = kf[:, :, cols], vf[:, :, cols], seen[:, cols]
        if defect == "one wrong key" and n == 2:
            vb = vb.copy()
            vb[:, :, 7] = vb[:, :, 8]
        if defect == "value block of the stage before" and n == 2:
            vb = vf[:, :, j + BLOCK : j + 2 * BLOCK][:, :, : vb.shape[2]]
        if defect == "block skipped" and n == 3:
            continue
        if defect == "block taken twice" and n == 3:
            vb, total = 2 * vb, total + f32(1e-3)
        s = qf @ kb.swapaxes(-1, -2)
        if softcap and defect != "softcap forgotten":
            s = f32(softcap * math.sqrt(head_dim)) * np.tanh(s * f32(1 / math.sqrt(head_dim) / softcap))
        s = np.where(see, s * scale, f32(-np.inf))
        m_new = np.maximum(m, s.max(-1, keepdims=True))
        shift = np.where(np.isneginf(m_new), f32(0), m_new)
        p, rescale = np.exp2(s - shift), np.exp2(m - shift)
        if not (defect == "rescale of the sum dropped" and n in (1, 2, 3)):
            total = total * rescale
        if not (defect == "rescale of o dropped" and n in (1, 2, 3)):
            acc = acc * rescale
        total = total + p.sum(-1, keepdims=True)
        p16 = p.astype(dtype)
        if defect == "p swapped between two rows":
            p16 = p16[:, :, np.r_[1, 0, 2:seqlen_q]]
        acc, m = acc + p16.astype(f32) @ vb, m_new
    with np.errstate(divide="ignore"):
        lse = (m * f32(math.log(2)) + np.log(total))[..., 0]
        if defect == "lse in base 2":
            lse = lse / f32(math.log(2))
        if defect == "lse without the maximum":
            lse = np.log(total)[..., 0]
    if defect == "not divided by the sum":
        total = np.ones_like(total)
    o = acc / np.where(total == 0, f32(np.nan) if defect == "empty row not zeroed" else f32(1), total)
    if defect == "lse of an empty row is 0":
        lse = np.where(np.isneginf(lse), f32(0), lse)
    if defect == "lse one row late":
        lse = np.roll(lse, 1, axis=-1)
    if defect == "last row not written":
        o[:, :, -1] = np.nan
    if defect == "last channels not written":
        o[..., -8:] = 0
    if defect == "two heads exchanged":
        o = o[:, [1, 0, *range(2, heads_q)]]
    if defect == "tile of another batch":
        o[0, 0, 64:128] = o[1, 0, 64:128]
    return o.astype(dtype), lse


def judge(kind: str, dtype: str, defect: str, mask: dict[str, Any], softcap: float = 0.0, **shape: int) -> None:
    rng = np.random.default_rng(6)
    q, k, v = make_inputs(kind, **(SHAPE | shape), dtype=dtype, rng=rng, edges=_edges(mask, **shape))
    o, lse = fused(q, k, v, defect, softcap, **mask)
    o64, lse64 = attention_f64(q, k, v, softcap=softcap, **mask)
    check(o, o64, plain(q, k, v, softcap=softcap, **mask), dtype)
    check_lse(lse, lse64)


def _edges(mask: dict[str, Any], **shape: int) -> tuple[int, ...] | None:
    offset = (SHAPE | shape)["seqlen_k"] - (SHAPE | shape)["seqlen_q"]
    if "window_size" not in mask:
        return None
    left, right = mask["window_size"]
    return (offset - left - 1, offset - left, offset + right, offset + right + 1)


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("kind", yardstick.KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_honest_kernel_passes(kind: str, dtype: str, mask: str) -> None:
    judge(kind, dtype, "", MASKS[mask])
    judge(kind, dtype, "", MASKS[mask], softcap=20.0)
    judge(kind, dtype, "", MASKS[mask], seqlen_q=300, seqlen_k=130, head_dim=8, head_dim_v=8)
    judge(kind, dtype, "", MASKS[mask], seqlen_q=1, seqlen_k=777, head_dim=24, head_dim_v=16)
    judge(kind, dtype, "", MASKS[mask], seqlen_q=65, seqlen_k=1, head_dim=256, head_dim_v=8)


# Which kinds of input show a defect. `index` is made to show them all, where the mask allows it at all.
DEFECTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("one wrong key", "full", ("index", "peaked")),
    ("mask one key too far", "causal", ("index", "peaked")),
    ("mask one key short", "causal", ("index", "peaked")),
    ("mask one key too far", "top-left", ("index", "peaked")),
    ("mask one key short", "top-left", ("index", "peaked")),
    ("mask one key too far", "window", ("index", "peaked")),
    ("mask one key short", "window", ("index", "peaked")),
    ("tail not masked", "full", ("normal",)),
    ("rescale of o dropped", "full", yardstick.KINDS),
    ("rescale of the sum dropped", "full", yardstick.KINDS),
    ("key head h % heads_kv", "full", yardstick.KINDS),
    ("neighbour's value head", "full", yardstick.KINDS),
    ("value block of the stage before", "full", yardstick.KINDS),
    ("block skipped", "full", yardstick.KINDS),
    ("block taken twice", "full", yardstick.KINDS),
    ("p swapped between two rows", "full", yardstick.KINDS),
    ("not divided by the sum", "full", ("normal", "outliers")),
    ("two heads exchanged", "full", yardstick.KINDS),
    ("tile of another batch", "full", yardstick.KINDS),
    ("last row not written", "full", yardstick.KINDS),
    ("last channels not written", "full", yardstick.KINDS),
    ("scale of the next head_dim", "full", ("normal", "outliers")),
    ("lse in base 2", "full", yardstick.KINDS),
    ("lse without the maximum", "full", yardstick.KINDS),
    ("lse one row late", "full", ("normal", "outliers")),
]


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize(
    ("defect", "mask", "kind"),
    [(defect, mask, kind) for defect, mask, kinds in DEFECTS for kind in kinds],
    ids=lambda x: x.replace(" ", "-"),
)
def test_defect_is_caught(defect: str, mask: str, kind: str, dtype: str) -> None:
    with pytest.raises(AssertionError, match=r"wrong|NaN or Inf in the wrong place"):
        judge(kind, dtype, defect, MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES16)
def test_defects_of_features_are_caught(dtype: str) -> None:
    with pytest.raises(AssertionError, match="tiles are wrong"):
        judge("normal", dtype, "softcap forgotten", {}, softcap=1.0)
    for defect in ("empty row not zeroed", "lse of an empty row is 0"):
        with pytest.raises(AssertionError, match="wrong"), np.errstate(all="ignore"):
            judge("normal", dtype, defect, {"causal": True}, seqlen_q=100, seqlen_k=40)


def test_each_single_wrong_key_is_caught() -> None:
    """With `index` inputs, one key in 300 misplaced for one head of one batch shows, whichever it is."""
    shape = SHAPE | {"batch": 1, "heads_q": 1, "heads_kv": 1, "seqlen_q": 300, "seqlen_k": 300}
    rng = np.random.default_rng(8)
    q, k, v = make_inputs("index", **shape, dtype="bfloat16", rng=rng)
    # Every key must be some row's peak, else no output depends on it: row i peaks at key 299 - i.
    q = (k[:, :, ::-1].astype(np.float32) * 4).astype(k.dtype)
    o64, p = attention_f64(q, k, v)[0], plain(q, k, v)
    check(fused(q, k, v)[0], o64, p, "bfloat16")
    for j in range(0, 300, 7):
        moved = v.copy()
        moved[0, 0, j] = v[0, 0, (j + 1) % 300]
        with pytest.raises(AssertionError, match="tiles are wrong"):
            check(fused(q, k, moved)[0], o64, p, "bfloat16")


def test_message_names_the_tile() -> None:
    q, k, v = make_inputs("normal", **SHAPE, dtype="bfloat16", rng=np.random.default_rng(9))
    o64, p = attention_f64(q, k, v)[0], plain(q, k, v)
    out = p.copy()
    out[1, 3, 130, 17] += np.float32(0.5)
    named = r"here: 1 of 24 tiles .* batch 1, head 3, rows 128 to 135.* row 130, channel 17"
    with pytest.raises(AssertionError, match=named):
        check(out, o64, p, "bfloat16", label="here")
    out = p.copy()
    out[0, 1, 2, 3] = np.inf
    with pytest.raises(AssertionError, match=r"1 of .* batch 0, head 1, row 2, channel 3: out inf"):
        check(out, o64, p, "bfloat16")
    with pytest.raises(AssertionError, match="is float64, not bfloat16"):
        check(o64, o64, p, "bfloat16")
    with pytest.raises(AssertionError, match="shape"):
        check(p[:, :, 1:], o64, p, "bfloat16")


def test_infinities_agree_by_sign_and_nan_by_place() -> None:
    ref = np.zeros((1, 1, 3, 8))
    ref[0, 0, 0, 0], ref[0, 0, 1, 1] = np.inf, np.nan
    good = ref.astype(np.float16)
    check(good, ref, good, "float16")
    check(good, ref, np.zeros_like(good), "float16")
    for place, value in (((0, 0, 0, 0), -np.inf), ((0, 0, 0, 0), np.nan), ((0, 0, 1, 1), np.inf), ((0, 0, 1, 1), 0)):
        bad = good.copy()
        bad[place] = value
        with pytest.raises(AssertionError, match="NaN or Inf"):
            check(bad, ref, good, "float16")
    big = np.full((1, 1, 1, 8), 1e6)  # beyond float16: inf is the right answer
    check(np.full(big.shape, np.inf, np.float16), big, np.zeros_like(big), "float16")


def test_check_lse() -> None:
    ref = np.array([[[1.0, -np.inf, np.nan, 300.0]]])
    check_lse(ref.astype(np.float32), ref)
    check_lse((ref + np.array([1e-4, 0, 0, 2e-3])).astype(np.float32), ref)
    for i, value in ((0, 1.001), (0, np.nan), (1, 0.0), (1, np.nan), (1, np.inf), (2, 0.0), (3, 300.01)):
        bad = ref.astype(np.float32)
        bad[0, 0, i] = value
        with pytest.raises(AssertionError, match=f"row {i}"):
            check_lse(bad, ref)
    with pytest.raises(AssertionError, match="float16"):
        check_lse(ref.astype(np.float16), ref)


def test_a_short_tile_may_round_either_way_but_no_further() -> None:
    ref = np.full((1, 1, 1, 8), 2.0)
    plain = ref.astype(ml_dtypes.bfloat16)
    yardstick.check((ref + 2**-6).astype(ml_dtypes.bfloat16), ref, plain, "bfloat16")
    with pytest.raises(AssertionError, match="wrong"):
        yardstick.check((ref + 2**-5).astype(ml_dtypes.bfloat16), ref, plain, "bfloat16")


def test_a_tile_whose_rows_are_all_alike_may_round_either_way_but_no_further() -> None:
    ref = np.full((1, 1, 64, 8), 2.0)
    plain = ref.astype(ml_dtypes.bfloat16)
    yardstick.check((ref + 2**-6).astype(ml_dtypes.bfloat16), ref, plain, "bfloat16")
    with pytest.raises(AssertionError, match="wrong"):
        yardstick.check((ref + 2**-5).astype(ml_dtypes.bfloat16), ref, plain, "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_tensors_are_judged_where_they_are_by_the_same_rule(dtype: str, layout: str) -> None:
    torch = pytest.importorskip("torch")

    def verdict(rule: Any, *arrays: Any) -> str:
        try:
            rule(*arrays)
        except AssertionError as error:
            return str(error)
        return ""

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(x.astype(np.float64)).to(getattr(torch, dtype))

    verdicts = set()
    for seed, kind in enumerate(yardstick.KINDS * 3):
        rng = np.random.default_rng(seed)
        arrays = make_inputs(kind, **(SHAPE | {"seqlen_q": (1, 40, 64, 130)[seed % 4]}), dtype=dtype, rng=rng)
        o, lse = fused(*arrays, causal=True)
        o64, lse64 = attention_f64(*arrays, causal=True)
        p = plain(*arrays, causal=True)
        o[:, 1, :, 2] += rng.choice([0, 2**-9, 2**-7, 0.1], o[:, 1, :, 2].shape).astype(o.dtype)
        if seed % 5 == 4:
            o[1, 0, 0, 0] = np.nan
        if layout == "bshd":
            o, o64, p = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (o, o64, p))
        on_numpy = verdict(lambda *x: check(*x, dtype, layout=layout), o, o64, p)
        on_torch = verdict(lambda *x: check(*x, dtype, layout=layout), tensor(o), torch.from_numpy(o64), tensor(p))
        assert on_torch == on_numpy
        verdicts.add(on_numpy.partition(":")[0])
        np.testing.assert_array_equal(
            yardstick.to_f64(yardstick.allowance(torch.from_numpy(o64), tensor(p), dtype, layout=layout)),
            yardstick.allowance(o64, p, dtype, layout=layout),
        )
        lse[0, 0, 0] += rng.choice([0.0, 1e-4, 1e-3])
        assert verdict(check_lse, torch.from_numpy(lse), torch.from_numpy(lse64)) == verdict(check_lse, lse, lse64)
    assert len(verdicts) > 2, "too few defects to tell"


def test_a_short_tile_of_zeros_allows_no_more_than_rounding() -> None:
    zeros = np.zeros((1, 1, 3, 8), np.float16)
    check(zeros, zeros.astype(np.float64), zeros, "float16")
    with pytest.raises(AssertionError, match="wrong"):
        check(zeros + np.float16(1e-3), zeros.astype(np.float64), zeros, "float16")
