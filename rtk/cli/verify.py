"""How the demo knows that a result is right: attention of a few rows, from its definition, in float64.

The tolerance is FlashAttention's own test rule, per tile of rows: with ref the float64 result rounded to the dtype and
plain an unfused implementation in the dtype, max|o − ref| ≤ 2·max|plain − ref| + 2·max|(ref + 0.3 − 0.3) − ref|
(and FLOAT32_FLOOR, for tiles in which both terms happen to be nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TILE = 64
FLOAT32_FLOOR = 2.0**-21  # what is left of values of order one that cancel in a float32 sum


@dataclass(frozen=True)
class Verdict:
    """What was compared: rows looked at, the largest and the RMS error, and the largest share of the tolerance used."""

    rows: int
    max_error: float
    rms_error: float
    used: float  # 1.0: the worst tile's error is just what the rule allows

    @property
    def right(self) -> bool:
        return self.used <= 1.0


def tiles(seqlen: int, count: int) -> list[slice]:
    """`count` tiles of 64 rows spread over the sequence, first and last among them; all where there are fewer."""
    starts = range(0, seqlen, TILE)
    picked = {round(i * (len(starts) - 1) / max(count - 1, 1)) for i in range(count)}
    return [slice(starts[i], min(starts[i] + TILE, seqlen)) for i in sorted(picked)]


def judge(heads: Iterable[tuple[Array, Array, Array, Array]], *, causal: bool, tiles_each: int) -> Verdict:
    """heads: (q, k, v, o) of one head each, (seqlen, head_dim), all in one dtype, seqlen_q = seqlen_k."""
    rows, worst, used, squares, count = 0, 0.0, 0.0, 0.0, 0
    for q, k, v, o in heads:
        k64, v64 = k.astype(np.float64), v.astype(np.float64)
        for tile in tiles(len(q), tiles_each):
            exact = _attention(q[tile].astype(np.float64), k64, v64, tile.start, causal, None)
            ref = exact.astype(o.dtype).astype(np.float64)
            plain = _attention(q[tile].astype(np.float32), k, v, tile.start, causal, o.dtype).astype(np.float64)
            third = o.dtype.type(0.3)
            grain = ((exact.astype(o.dtype) + third) - third).astype(np.float64) - ref
            error = o[tile].astype(np.float64) - ref
            allowed = 2 * np.abs(plain - ref).max() + 2 * np.abs(grain).max() + FLOAT32_FLOOR
            largest = np.abs(error).max()
            # A NaN compares as neither larger nor smaller: it must count as wrong.
            used = max(used, largest / allowed) if np.isfinite(largest) else math.inf
            worst = max(worst, largest) if np.isfinite(largest) else math.inf
            squares, count = squares + float((error**2).sum()), count + error.size
            rows += len(error)
    return Verdict(rows, float(worst), math.sqrt(squares / count), float(used))


def _attention(q: Array, k: Array, v: Array, first_row: int, causal: bool, rounded: np.dtype[Any] | None) -> Array:
    """softmax(q kᵀ / √head_dim) v for the rows of q; each step rounded to `rounded`, or in q's dtype throughout."""

    def step(x: Array) -> Array:
        return x if rounded is None else x.astype(rounded).astype(q.dtype)

    scores = step(step(q @ k.astype(q.dtype).T) / math.sqrt(q.shape[1]))
    if causal:
        rows = first_row + np.arange(len(q))
        scores = np.where(np.arange(len(k)) <= rows[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return step(step(weights / weights.sum(axis=1, keepdims=True)) @ v.astype(q.dtype))
