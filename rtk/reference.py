"""Attention forward in NumPy: the same function as the Hopper kernel, in the same order of work, meant to be read.

It is rtk's CPU path and the plainest statement of the algorithm. Softmax over a row needs the row's maximum and its
sum, which seem to ask for the whole row of scores at once. The online softmax (Milakov & Gimelshein, "Online
normalizer calculation for softmax", 2018) gets by with one block of keys at a time. With

    m    the largest score seen so far,
    l    the sum of exp(score - m) over the keys seen so far,
    acc  the sum of exp(score - m) * v over the keys seen so far,

a new block of keys can only raise m, to m', and what was gathered under the old m is brought to the new one by the
factor exp(m - m') before the block's own terms are added. In the end o = acc / l, and m + log(l) is the row's
log-sum-exp. Nothing of size seqlen_q x seqlen_k is ever stored. The division is left to the end, and a block of
queries stays put while blocks of keys pass by, as in FlashAttention-2 (Dao, 2023). The masks here are bands along
the diagonal (causal, sliding windows), so the keys that any row of a block can see are one interval: blocks outside
are never visited, and only blocks on the interval's edges are masked element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# A block of scores is heads_q x rows x block_n; about this many elements stay in a core's cache between the passes.
_SCORES_PER_BLOCK = 1 << 20
_MIN_ROWS, _MAX_ROWS = 64, 1024


@dataclass(frozen=True)
class _Band:
    """Which keys a query sees: query i sees key j iff i + first <= j <= i + last, and j is one of `keys`."""

    first: int
    last: int
    keys: range

    @classmethod
    def of(cls, left: int | None, right: int | None, diagonal: int, seqlen_q: int, seqlen_k: int, keys: range) -> _Band:
        # A bound that reaches past every key is no bound; clipped, it also fits whatever integer NumPy computes in.
        first = -seqlen_q if left is None else min(max(diagonal - left, -seqlen_q), seqlen_k)
        last = seqlen_k if right is None else min(max(diagonal + right, -seqlen_q), seqlen_k)
        return cls(first, last, keys)

    def blocks(self, rows: slice, block_n: int) -> Iterator[tuple[slice, Array | None]]:
        """The blocks of keys that some row of `rows` sees, each with its mask (rows, keys), or None if all see all."""
        begin = max(rows.start + self.first, self.keys.start)
        end = min(rows.stop + self.last, self.keys.stop)
        for start in range(begin, end, block_n):
            stop = min(start + block_n, end)
            if rows.stop - 1 + self.first <= start and stop - 1 <= rows.start + self.last:
                yield slice(start, stop), None
            else:
                offset = np.arange(start, stop) - np.arange(rows.start, rows.stop)[:, None]
                yield slice(start, stop), (self.first <= offset) & (offset <= self.last)


def attention_fwd(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    window_left: int | None = None,
    window_right: int | None = None,
    diagonal: int = 0,
    kv_range: tuple[Array | None, Array | None] = (None, None),
    block_n: int = 256,
) -> tuple[Array, Array]:
    """o = softmax(q k^T * softmax_scale) v, and the log-sum-exp of every row of scores.

    Args:
        q: (batch, heads_q, seqlen_q, head_dim), float16, bfloat16 (of ml_dtypes), float32 or float64; any strides.
        k: (batch, heads_kv, seqlen_k, head_dim), of q's dtype. heads_q must be a multiple of heads_kv: query head h
            reads key/value head h // (heads_q // heads_kv).
        v: (batch, heads_kv, seqlen_k, head_dim_v), of q's dtype.
        softmax_scale: factor on the scores; any finite number.
        softcap: if c > 0, a score s becomes c * tanh(s / c).
        window_left, window_right, diagonal: query i sees key j iff
            i + diagonal - window_left <= j <= i + diagonal + window_right; None is unbounded.
        kv_range: (batch,) integers each, or None: the first key of each sequence, and the end of its keys.
        block_n: keys in a block. It changes the rounding and the speed, nothing else.

    Returns:
        o: (batch, heads_q, seqlen_q, head_dim_v) in q's dtype, C-contiguous.
        lse: (batch, heads_q, seqlen_q), natural logarithm, float32 (float64 for float64 inputs).
        A row that sees no key has o = 0 and lse = -inf. NaN and Inf in a key that a row sees reach that row, and keys
        that it does not see never do.

    The arguments are trusted here; `rtk.attention` checks them. Sums are kept in float32, or in float64 for float64.
    """
    compute = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    batch, heads_q, seqlen_q, _ = q.shape
    heads_kv, seqlen_k, head_dim_v = v.shape[1:]
    bounds = (window_left, window_right, diagonal, seqlen_q, seqlen_k)
    bands = [_Band.of(*bounds, keys) for keys in _keys_of(kv_range, batch, seqlen_k)]
    group = heads_q // heads_kv
    # As many heads together as fit with the fewest rows, then as many rows as fit with these heads.
    heads_m = min(max(_SCORES_PER_BLOCK // (group * _MIN_ROWS * block_n), 1), heads_kv)
    block_m = min(max(_SCORES_PER_BLOCK // (heads_m * group * block_n), _MIN_ROWS), _MAX_ROWS)
    o = np.empty((batch, heads_q, seqlen_q, head_dim_v), q.dtype)
    lse = np.empty((batch, heads_q, seqlen_q), compute)
    # inf - inf, exp(-inf) and log(0) mean what they say here; overflow in a cast to 16 bits gives inf, as on the GPU.
    with np.errstate(all="ignore"):
        for b, first, start in itertools.product(
            range(batch), range(0, heads_kv, heads_m), range(0, seqlen_q, block_m)
        ):
            rows = slice(start, min(start + block_m, seqlen_q))
            kv_heads = slice(first, min(first + heads_m, heads_kv))
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            # The query heads that share a key/value head stand behind one another, as rows of one matrix.
            grouped = (kv_heads.stop - kv_heads.start, group, rows.stop - rows.start)
            q_block = q[b, heads, rows].astype(compute, order="C").reshape(grouped[0], -1, q.shape[3])
            o_block, lse_block = _attend(
                q_block,
                k[b, kv_heads],
                v[b, kv_heads],
                bands[b],
                rows,
                grouped,
                softmax_scale,
                softcap,
                block_n,
                compute,
            )
            o[b, heads, rows] = o_block.reshape(-1, grouped[2], head_dim_v)
            lse[b, heads, rows] = lse_block.reshape(-1, grouped[2])
    return o, lse


def _keys_of(kv_range: tuple[Array | None, Array | None], batch: int, seqlen_k: int) -> list[range]:
    """The keys of each sequence: what lies outside the array is none of them whatever the numbers say."""
    first, end = kv_range
    firsts = np.zeros(batch, int) if first is None else np.clip(first, 0, seqlen_k)
    ends = np.full(batch, seqlen_k) if end is None else np.clip(end, 0, seqlen_k)
    return [range(int(a), int(b)) for a, b in zip(firsts, ends, strict=True)]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    band: _Band,
    rows: slice,
    grouped: tuple[int, int, int],
    softmax_scale: float,
    softcap: float,
    block_n: int,
    compute: np.dtype[Any],
) -> tuple[Array, Array]:
    """One block of queries, (heads_kv, group * rows, head_dim), against all the keys that it sees."""
    q *= float(softmax_scale / softcap if softcap > 0 else softmax_scale)
    m = np.full((*q.shape[:2], 1), -np.inf, compute)
    l = np.zeros_like(m)  # noqa: E741  (the papers' name)
    acc = np.zeros((*q.shape[:2], v.shape[2]), compute)
    for keys, visible in band.blocks(rows, block_n):
        scores = q @ _block(k, keys, compute).swapaxes(-1, -2)
        if softcap > 0:
            np.tanh(scores, out=scores)
            scores *= softcap
        if visible is not None:
            np.copyto(scores.reshape(*grouped, -1), -np.inf, where=~visible)
        m_new = np.maximum(m, scores.max(-1, keepdims=True))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number: it subtracts 0 instead.
        shift = np.where(m_new == -np.inf, 0, m_new)
        scores -= shift
        p = np.exp(scores, out=scores)
        rescale = np.exp(m - shift)
        l = l * rescale + p.sum(-1, keepdims=True)  # noqa: E741
        acc *= rescale
        _add_weighted_values(acc, p, _block(v, keys, compute), visible, grouped)
        m = m_new
    return np.where(l == 0, 0, acc / l), m + np.log(l)


def _block(x: Array, keys: slice, compute: np.dtype[Any]) -> Array:
    """Some keys of all heads, in the dtype that is computed in and in an order that BLAS takes."""
    return np.ascontiguousarray(x[:, keys], dtype=compute)


def _add_weighted_values(acc: Array, p: Array, v: Array, visible: Array | None, grouped: tuple[int, int, int]) -> None:
    """acc += p @ v, where a key that a row does not see adds nothing to it even if its value is NaN or Inf."""
    if visible is not None:
        # A masked key has p = 0, and 0 * NaN is NaN: such keys are taken out of the product and added one by one.
        strange: Array = np.logical_not(np.isfinite(v).all(axis=(0, 2)))
        for j in np.flatnonzero(strange):
            p_j = p[..., j].reshape(*grouped, 1)
            acc += np.where(visible[:, j, None], p_j * v[:, None, None, j], 0).reshape(acc.shape)
        if strange.any():
            v = np.where(strange[:, None], 0, v)
    acc += p @ v
