"""What attention is, in float64 and straight from the definition, and the rule by which a result is judged.

Nothing here is shared with rtk: no blocks, no online softmax, no code. Every function takes NumPy arrays or torch
tensors (on any device) and the public arguments of `rtk.attention`.

    attention_f64   the definition, in float64
    plain           an unfused implementation in the input dtype: the error that is held to be ordinary
    check           the rule; raises AssertionError with the worst tile
    check_lse       the same for the log-sum-exp
    make_inputs     inputs of a kind: normal, peaked, index, outliers
"""

from __future__ import annotations

import math
import sys
from typing import Any

import ml_dtypes
import numpy as np

KINDS = ("normal", "peaked", "index", "outliers")
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
TILE = 64  # rows that are judged together: few enough for one wrong key to show


# --- arrays ---------------------------------------------------------------------------------------------------------


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def to_f64(x: Any) -> np.ndarray:
    """Any array (NumPy, torch, CuPy, JAX), as NumPy float64. Exact: every dtype here fits in float64."""
    if is_torch(x):
        return np.asarray(x.detach().double().cpu().numpy())
    if hasattr(x, "get") and not isinstance(x, np.ndarray):
        x = x.get()
    return np.asarray(x).astype(np.float64)


def _cast(x: Any, name: str) -> Any:
    if is_torch(x):
        return x.to(getattr(sys.modules["torch"], name))
    with np.errstate(all="ignore"):
        return x.astype(DTYPES[name])


def _bhsd(x: Any, layout: str) -> Any:
    assert layout in ("bhsd", "bshd"), layout
    return x if layout == "bhsd" else x.swapaxes(1, 2)


# --- the definition -------------------------------------------------------------------------------------------------


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window_size: Any = None,
    kv_range: Any = None,
) -> np.ndarray:
    """(seqlen_q, seqlen_k) bool: may query i see key j? The query stands at position i + offset among the keys.

    With kv_range, (batch, 1, seqlen_q, seqlen_k).
    """
    assert causal_align in ("bottom-right", "top-left"), causal_align
    offset = seqlen_k - seqlen_q if causal_align == "bottom-right" else 0
    position = np.arange(seqlen_q)[:, None] + offset
    key = np.arange(seqlen_k)[None, :]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if causal:
        seen &= key <= position
    left, right = (None, None) if window_size is None else window_size
    if left is not None and left != -1:
        seen &= position - key <= left
    if right is not None and right != -1:
        seen &= key - position <= right
    for bound, inside in zip(kv_range or (), (np.greater_equal, np.less), strict=False):
        if bound is not None:
            seen = seen & inside(key, np.asarray(to_f64(bound)).reshape(-1, 1, 1, 1))
    return seen


def _prepare(q: Any, k: Any, v: Any, name: str, layout: str, mask: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """The array library; q, k, v as (batch, heads_q, seqlen, dim) of dtype `name`, key heads repeated; the mask."""
    q, k, v = (_cast(_bhsd(x, layout), name) for x in (q, k, v))
    kv_head_of = [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])]
    seen: Any = visible_keys(q.shape[2], k.shape[2], **mask)
    xp: Any = np
    if is_torch(q):
        xp = sys.modules["torch"]
        seen = xp.from_numpy(seen).to(q.device)
    return xp, q, k[:, kv_head_of], v[:, kv_head_of], seen


def _softmax_terms(xp: Any, scores: Any, seen: Any) -> tuple[Any, Any]:
    """exp(score - shift) at the keys that are seen, 0 elsewhere; and the shift, each row's greatest seen score."""
    scores = xp.where(seen, scores, -math.inf)
    top = xp.amax(scores, -1)[..., None]
    shift = xp.where(xp.isneginf(top), xp.zeros_like(top), top)
    return xp.where(seen, xp.exp(scores - shift), xp.zeros_like(scores)), shift


def _weighted_sum(xp: Any, weights: Any, v: Any, seen: Any) -> Any:
    """For every row the sum over the keys THAT IT SEES of weight * value."""
    if bool(xp.isfinite(v).all()):
        return weights @ v
    # 0 * NaN would let an unseen key in through the matrix product: sum term by term, a few rows at a time.
    rows = []
    for i in range(weights.shape[2]):
        terms = weights[:, :, i, :, None] * v
        rows.append(xp.where(seen[..., i, :, None], terms, xp.zeros_like(terms)).sum(-2))
    return xp.stack(rows, 2)


def attention_f64(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window_size: Any = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    kv_range: Any = None,
    layout: str = "bhsd",
) -> tuple[Any, Any]:
    """(o in `layout`, lse (batch, heads, seqlen_q)), both float64, in the inputs' library and on their device."""
    mask = {"causal": causal, "causal_align": causal_align, "window_size": window_size, "kv_range": kv_range}
    xp, q, k, v, seen = _prepare(q, k, v, "float64", layout, mask)
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        # Nothing to attend to, or nobody to attend: a product over no keys is the zeros of the right shape.
        return _bhsd(q @ k.swapaxes(-1, -2) @ v, layout), xp.zeros_like(q[..., 0]) - math.inf
    with np.errstate(all="ignore"):
        scores = (q @ k.swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * xp.tanh(scores / softcap)
        weights, shift = _softmax_terms(xp, scores, seen)
        total = weights.sum(-1)[..., None]
        o = _weighted_sum(xp, weights, v, seen) / xp.where(total == 0, xp.ones_like(total), total)
        lse = (shift + xp.log(total))[..., 0]
    return _bhsd(o, layout), lse


def plain(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window_size: Any = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    kv_range: Any = None,
    layout: str = "bhsd",
) -> Any:
    """o in the inputs' dtype, as a chain of separate operations in that dtype gives it (sums inside one in float32).

    Scores, scaled scores, capped scores, probabilities and o are each rounded to the inputs' dtype.
    """
    name = dtype_name(q)
    wide = "float64" if name == "float64" else "float32"
    mask = {"causal": causal, "causal_align": causal_align, "window_size": window_size, "kv_range": kv_range}
    xp, q, k, v, seen = _prepare(q, k, v, wide, layout, mask)
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return _bhsd(_cast(q @ k.swapaxes(-1, -2) @ v, name), layout)

    def rounded(x: Any) -> Any:
        return _cast(_cast(x, name), wide)

    with np.errstate(all="ignore"):
        scores = rounded(q @ k.swapaxes(-1, -2))
        scores = rounded(scores * (1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale))
        if softcap:
            scores = rounded(softcap * rounded(xp.tanh(rounded(scores / softcap))))
        weights, _ = _softmax_terms(xp, scores, seen)
        total = weights.sum(-1)[..., None]
        weights = rounded(weights / xp.where(total == 0, xp.ones_like(total), total))
        return _bhsd(_cast(_weighted_sum(xp, weights, v, seen), name), layout)


# --- the rule -------------------------------------------------------------------------------------------------------


def _together(*arrays: Any) -> tuple[Any, list[Any]]:
    """The arrays in float64, and their library: torch, on the device where all of them are, otherwise NumPy."""
    if all(map(is_torch, arrays)) and len({x.device for x in arrays}) == 1:
        return sys.modules["torch"], [x.detach().double() for x in arrays]
    return np, [to_f64(x) for x in arrays]


def _finite(xp: Any, x: Any) -> Any:
    return xp.where(xp.isfinite(x), x, xp.zeros_like(x))


def worst_of_tiles(error: Any) -> Any:
    """(batch, heads, rows, channels) -> (batch, heads, tiles): the largest error in each tile of TILE rows."""
    batch, heads, rows, channels = error.shape
    tiles = -(-rows // TILE)
    room = (batch, heads, tiles * TILE, channels)
    padded = error.new_zeros(room) if is_torch(error) else np.zeros(room)
    padded[:, :, :rows] = error
    xp: Any = sys.modules["torch"] if is_torch(error) else np
    return xp.amax(padded.reshape(batch, heads, tiles, TILE * channels), -1)


def _ulps(xp: Any, ref: Any, dtype: str) -> Any:
    """One unit in the last place of the largest |ref| of each tile, 0 where all are 0."""
    digits = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}[dtype]
    largest = worst_of_tiles(abs(ref))
    _, exponent = xp.frexp(largest)
    return xp.where(largest > 0, xp.ldexp(xp.ones_like(largest), exponent - digits), largest)


# What is left of values of order one that cancel in a float32 sum: `plain` may happen to hit 0 where another order of
# the same sum does not.
FLOAT32_FLOOR = 2.0**-21


def _rounded_and_allowed(xp: Any, exact: Any, ordinary: Any, dtype: str) -> tuple[Any, Any]:
    """`exact` as `dtype` holds it, in float64 again; and the error that each tile may show."""
    rounded = _cast(exact, dtype)
    third = xp.full_like(rounded[:1, :1, :1, :1], 0.3)
    ref, grain = (_cast(x, "float64") for x in (rounded, (rounded + third) - third))
    errors = [worst_of_tiles(_finite(xp, abs(x - ref))) for x in (ordinary, grain)]
    allowed = 2 * errors[0] + 2 * errors[1] + (0.0 if dtype == "float64" else FLOAT32_FLOOR)
    # All values of a tile can happen to round exactly in `plain` and in the 0.3 term where they are few, or where its
    # rows are nearly the same (two keys in all; weights that are all alike). A value next to a tie may still round
    # either way. (8 values were seen to allow no error at all, and 64 rows of 8 channels half a unit.)
    ulps = _ulps(xp, _finite(xp, ref), dtype)
    allowed[:, :, ref.shape[2] // TILE :] += ulps[:, :, ref.shape[2] // TILE :]
    return ref, xp.maximum(allowed, ulps)


def allowance(ref64: Any, plain: Any, dtype: str, *, layout: str = "bhsd") -> Any:
    """(batch, heads, tiles), float64: what `check` allows each tile of 64 rows."""
    xp, (exact, ordinary) = _together(ref64, plain)
    with np.errstate(all="ignore"):
        return _rounded_and_allowed(xp, _bhsd(exact, layout), _bhsd(ordinary, layout), dtype)[1]


def check(out: Any, ref64: Any, plain: Any, dtype: str, *, layout: str = "bhsd", label: str = "") -> None:
    """Assert that `out` is attention in `dtype`. In every tile of 64 rows of every head:

        max|out - ref| <= 2 max|plain - ref| + 2 max|(ref + 0.3 - 0.3) - ref|

    with ref the float64 result rounded to `dtype`, and the last term computed in `dtype`. NaNs and infinities must
    stand in the same places as in ref (infinities with their sign). Every tile is allowed FLOAT32_FLOOR more, and at
    least one unit in the last place of its largest |ref|; a last tile of fewer rows is allowed one such unit more. All
    three arrays are in `layout`. Tensors of one device are judged there.
    """
    where = f"{label}: " if label else ""
    assert dtype_name(out) == dtype, f"{where}out is {dtype_name(out)}, not {dtype}"
    assert tuple(out.shape) == tuple(ref64.shape), f"{where}out has shape {tuple(out.shape)}, not {tuple(ref64.shape)}"
    if 0 in out.shape:
        return
    xp, arrays = _together(out, ref64, plain)
    got, exact, ordinary = (_bhsd(x, layout) for x in arrays)
    with np.errstate(all="ignore"):
        ref, allowed = _rounded_and_allowed(xp, exact, ordinary, dtype)
        same_kind = xp.where(xp.isfinite(ref), xp.isfinite(got), (got == ref) | (xp.isnan(got) & xp.isnan(ref)))
        error = _finite(xp, abs(got - ref))
        worst = worst_of_tiles(error)
        bad = worst > allowed
        if bool(same_kind.all()) and not bool(bad.any()):
            return
    got, ref, ordinary, error, worst, allowed = map(to_f64, (got, ref, ordinary, error, worst, allowed))
    same_kind, bad = to_f64(same_kind) != 0, to_f64(bad) != 0
    if not same_kind.all():
        b, h, i, c = np.argwhere(~same_kind)[0]
        raise AssertionError(
            f"{where}NaN or Inf in the wrong place: {np.count_nonzero(~same_kind)} of {got.size} values, first at "
            f"batch {b}, head {h}, row {i}, channel {c}: out {got[b, h, i, c]:.9g}, ref {ref[b, h, i, c]:.9g}"
        )
    b, h, t = np.unravel_index(np.argmax(np.where(bad, worst / np.maximum(allowed, 1e-300), 0)), bad.shape)
    rows = slice(t * TILE, min((t + 1) * TILE, got.shape[2]))
    i, c = np.unravel_index(np.argmax(error[b, h, rows]), error[b, h, rows].shape)
    i += rows.start
    raise AssertionError(
        f"{where}{np.count_nonzero(bad)} of {bad.size} tiles are wrong. Worst: batch {b}, head {h}, rows {rows.start} "
        f"to {rows.stop - 1}: |out - ref| {worst[b, h, t]:.4g} > {allowed[b, h, t]:.4g} allowed; at row {i}, channel "
        f"{c}: out {got[b, h, i, c]:.9g}, ref {ref[b, h, i, c]:.9g}, plain {ordinary[b, h, i, c]:.9g}"
    )


def check_lse(lse: Any, ref64: Any, *, atol: float = 2e-4, rtol: float = 1e-5, label: str = "") -> None:
    """Assert that `lse` (float32, or float64) is the float64 log-sum-exp, -inf and NaN in the same places.

    2e-4 is what a kernel may lose in its exponentials; rtol covers scores of some hundreds, summed in float32.
    """
    where = f"{label}: " if label else ""
    assert dtype_name(lse) in ("float32", "float64"), f"{where}lse is {dtype_name(lse)}"
    assert tuple(lse.shape) == tuple(ref64.shape), f"{where}lse has shape {tuple(lse.shape)}, not {tuple(ref64.shape)}"
    xp, (got, ref) = _together(lse, ref64)
    with np.errstate(all="ignore"):
        error = abs(got - ref)
        near = xp.isfinite(ref) & (error <= atol + rtol * abs(ref))
    right = near | (got == ref) | (xp.isnan(got) & xp.isnan(ref))
    if not bool(right.all()):
        got, ref, error, right = to_f64(got), to_f64(ref), to_f64(error), to_f64(right) != 0
        b, h, i = np.unravel_index(np.argmax(np.where(right, -1, np.nan_to_num(error, nan=np.inf))), error.shape)
        raise AssertionError(
            f"{where}{np.count_nonzero(~right)} of {right.size} log-sum-exps are wrong. Worst: batch {b}, head {h}, "
            f"row {i}: lse {got[b, h, i]:.9g}, ref {ref[b, h, i]:.9g}"
        )


# --- inputs ---------------------------------------------------------------------------------------------------------


def make_inputs(
    kind: str,
    *,
    batch: int,
    heads_q: int,
    heads_kv: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    dtype: str,
    rng: np.random.Generator,
    edges: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in NumPy, layout bhsd.

    normal: N(0, 1). outliers: N(0, 1) + N(0, 100) * Bernoulli(0.001). peaked: in each row one key, drawn at random,
    takes nearly all the weight (with the default softmax_scale). index: peaked, and the value of a key spells its
    index in base 4, so that a row tells which key it took. Where `peaked` draws, every second row's key is at i + one
    of `edges` instead: where masks begin and end, so that an edge that is off by one moves the peak in or out.
    """
    assert kind in KINDS, kind

    def normal(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape, dtype=np.float32)
        if kind == "outliers":
            x += 10 * rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < 0.001)
        return x

    q = normal(batch, heads_q, seqlen_q, head_dim)
    k = normal(batch, heads_kv, seqlen_k, head_dim)
    v = normal(batch, heads_kv, seqlen_k, head_dim_v)
    if kind in ("peaked", "index") and seqlen_k:
        # Keys on a sphere; a query is its key's direction, so that no other key scores as high.
        k *= math.sqrt(head_dim) / np.linalg.norm(k, axis=-1, keepdims=True)
        q = _take_keys(k, _peaks(batch, heads_q, seqlen_q, seqlen_k, rng, edges), heads_q // heads_kv)
        q *= 32 * max(1.0, math.sqrt(64 / head_dim)) / math.sqrt(head_dim)
    if kind == "index":
        v = _index_values(batch, heads_kv, seqlen_k, head_dim_v)
    q16, k16, v16 = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    return q16, k16, v16


def _peaks(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, rng: np.random.Generator, edges: tuple[int, ...] | None
) -> np.ndarray:
    """(batch, heads, seqlen_q): the key that each row peaks at."""
    offset = seqlen_k - seqlen_q
    steps = np.array(edges or (offset, offset + 1, 0, 1))
    peaks = rng.integers(0, seqlen_k, (batch, heads, seqlen_q))
    i = np.arange(seqlen_q)
    at_edge = i + steps[rng.integers(0, len(steps), (batch, heads, seqlen_q))]
    use = (rng.random((batch, heads, seqlen_q)) < 0.5) & (at_edge >= 0) & (at_edge < seqlen_k)
    return np.asarray(np.where(use, at_edge, peaks))


def _take_keys(k: np.ndarray, peaks: np.ndarray, group: int) -> np.ndarray:
    batch, heads, _ = peaks.shape
    return np.asarray(k[np.arange(batch)[:, None, None], np.arange(heads)[None, :, None] // group, peaks])


def _index_values(batch: int, heads: int, seqlen: int, channels: int) -> np.ndarray:
    """Channel c holds digit c mod n of the key's index in base 4, moved on by head and batch; exact in 16 bits."""
    digits = max(1, math.ceil(math.log(max(seqlen, 2), 4)))
    b, h, j, c = np.ogrid[:batch, :heads, :seqlen, :channels]
    digit = (j // 4 ** (c % digits) + h + 2 * b) % 4
    return np.asarray((digit - 1.5) * (1 + (c // digits) % 4 / 4), np.float32)
