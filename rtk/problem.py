"""What an attention call asks for, checked: the same checks whether it then runs on a GPU or on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rtk.errors import ArgumentError, UnsupportedError

MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8  # 16 bytes of a 16-bit type: what TMA asks of a row
LAYOUTS = ("bhsd", "bshd")
ALIGNMENTS = ("bottom-right", "top-left")
_MAX_DIMENSION = 1 << 30  # positions on the device are 32-bit, and their sums must be too
_MAX_ROW_BLOCKS = 1 << 30  # output tiles of 64 rows, counted in 32 bits

_FLOAT32_MAX, _FLOAT32_MIN = 3.4028234e38, 1.1754944e-38  # the least is that of normal numbers
_LOG2_E = 1.4426950408889634

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AttentionProblem:
    """One attention call without its data. Lengths in elements; windows as in the call, None for unbounded.

    Query i sees key j when i + diagonal - window_left <= j <= i + diagonal + window_right. `dtype` is a NumPy name.
    """

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    softmax_scale: float
    softcap: float = 0.0
    window_left: int | None = None
    window_right: int | None = None
    diagonal: int = 0
    kv_ranges: bool = False  # each sequence of the batch has a range of keys of its own, known to the device

    @property
    def o_shape(self) -> Shape:
        """(batch, heads, seqlen, head_dim_v), whatever the layout of the call."""
        return (self.batch, self.num_heads_q, self.seqlen_q, self.head_dim_v)

    @property
    def lse_shape(self) -> Shape:
        return (self.batch, self.num_heads_q, self.seqlen_q)

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads_q // self.num_heads_kv

    @property
    def is_empty(self) -> bool:
        """No output, or no key to attend to: the answer is known without a computation."""
        return self.batch == 0 or self.seqlen_q == 0 or self.seqlen_k == 0

    def without_batch(self) -> AttentionProblem:
        """The problem as each sequence sees it: what a batch-invariant choice may look at."""
        return replace(self, batch=1)

    def flop(self) -> float:
        """Floating-point operations of the two products over visible scores (a multiply-add counts two)."""
        return 2.0 * self.batch * self.num_heads_q * self.visible_scores() * (self.head_dim + self.head_dim_v)

    def visible_scores(self) -> int:
        """(query, key) pairs of one head that the mask lets through."""
        if self.window_left is None and self.window_right is None:
            return self.seqlen_q * self.seqlen_k
        total = 0
        for row in range(self.diagonal, self.diagonal + self.seqlen_q):
            first = 0 if self.window_left is None else max(0, row - self.window_left)
            end = self.seqlen_k if self.window_right is None else min(self.seqlen_k, row + self.window_right + 1)
            total += max(0, end - first)
        return total


def attention_problem(
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    dtype: str,
    *,
    causal: bool,
    causal_align: str,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    layout: str,
) -> AttentionProblem:
    """Checks the arguments of an attention call against each other. Raises ArgumentError or UnsupportedError."""
    check_words(causal, causal_align, layout)
    order = "(batch, heads, seqlen, head_dim)" if layout == "bhsd" else "(batch, seqlen, heads, head_dim)"
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise ArgumentError(name, f"{len(shape)} dimensions, shape {shape}", f"4 dimensions: {order}")
        if max(shape) >= _MAX_DIMENSION:
            raise UnsupportedError(name, f"shape {shape}", "dimensions below 2**30")
    batch, heads_q, seqlen_q, head_dim = to_bhsd(q_shape, layout)
    k_batch, heads_kv, seqlen_k, k_head_dim = to_bhsd(k_shape, layout)
    v_batch, v_heads, v_seqlen, head_dim_v = to_bhsd(v_shape, layout)
    for name, shape, got, wanted in (
        ("k", k_shape, (k_batch, k_head_dim), (batch, head_dim)),
        ("v", v_shape, (v_batch, v_heads, v_seqlen), (batch, heads_kv, seqlen_k)),
    ):
        if got != wanted:
            agree = "batch and head_dim as q's" if name == "k" else "batch as q's, heads and seqlen as k's"
            raise ArgumentError(name, f"shape {shape}", f"{agree} {wanted} in layout {order}")
    if heads_q == 0:
        raise ArgumentError("q", f"0 heads, shape {q_shape}", f"at least one head in {order}")
    if heads_kv == 0:
        raise ArgumentError("k", f"0 heads, shape {k_shape}", f"at least one head in {order}")
    if heads_q % heads_kv:
        raise ArgumentError("q", f"{heads_q} heads with {heads_kv} heads of k and v", "a multiple of k's heads")
    if batch * heads_q * -(-seqlen_q // 64) >= _MAX_ROW_BLOCKS:
        raise UnsupportedError("q", f"shape {q_shape}", "batch * heads * seqlen below 2**36")
    _check_head_dim("q", "head_dim", head_dim)
    _check_head_dim("v", "head_dim_v", head_dim_v)
    left, right = window_bounds(window_size)
    scale = _scale(softmax_scale, head_dim)
    if causal:
        right = 0 if right is None else min(right, 0)
    return AttentionProblem(
        batch=batch,
        num_heads_q=heads_q,
        num_heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        softmax_scale=scale,
        softcap=_softcap(softcap, scale),
        # A bound that no pair can pass is no bound: the kernel without it is the faster one.
        window_left=None if left is not None and left >= seqlen_q + seqlen_k else left,
        window_right=None if right is not None and right >= seqlen_q + seqlen_k else right,
        diagonal=seqlen_k - seqlen_q if causal_align == "bottom-right" else 0,
    )


def check_words(causal: Any, causal_align: Any, layout: Any) -> None:
    """Checks what is one of a few words."""
    if not isinstance(layout, str) or layout not in LAYOUTS:  # an array may equal a string, element by element
        raise ArgumentError("layout", layout, " or ".join(map(repr, LAYOUTS)))
    if not isinstance(causal_align, str) or causal_align not in ALIGNMENTS:
        raise ArgumentError("causal_align", causal_align, " or ".join(map(repr, ALIGNMENTS)))
    if not is_bool(causal):
        raise ArgumentError("causal", causal, "True or False")


def check_numbers(softmax_scale: Any, softcap: Any) -> None:
    """Checks what is a number, by itself."""
    _softcap(softcap, _scale(softmax_scale, 1))


def to_bhsd(values: Any, layout: str) -> Any:
    """Reorders a 4-tuple given in `layout` to (batch, heads, seqlen, head_dim); its own inverse."""
    return values if layout == "bhsd" else (values[0], values[2], values[1], values[3])


def is_bool(value: object) -> bool:
    """A bool of Python or NumPy."""
    return isinstance(value, (bool, np.bool_))


def is_integer(value: object) -> bool:
    """An int or a NumPy integer, but not a bool."""
    return isinstance(value, (int, np.integer)) and not is_bool(value)


def is_real(value: object) -> bool:
    """A Python or NumPy real number, but not a bool, a string or an array."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not is_bool(value)


def _fits_float32(value: Any, times: float = 1.0) -> bool:
    """Finite on the device, where it is a float32, also when multiplied. (NaN compares as not in range.)"""
    # Not as NumPy compares: the bound overflows in float16, and the greatest int has no absolute value.
    return abs(value if isinstance(value, int) else float(value)) <= _FLOAT32_MAX / times


def _check_head_dim(argument: str, name: str, value: int) -> None:
    if value == 0:
        raise ArgumentError(argument, f"{name} 0", f"a multiple of {HEAD_DIM_MULTIPLE} from 8 to {MAX_HEAD_DIM}")
    if value > MAX_HEAD_DIM or value % HEAD_DIM_MULTIPLE:
        padded = -(-value // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
        hint = f"Pad the last dimension with zeros to {padded}." if padded <= MAX_HEAD_DIM else ""
        raise UnsupportedError(
            argument, f"{name} {value}", f"a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}", hint
        )


def window_bounds(window_size: Any) -> tuple[int | None, int | None]:
    """(left, right), None for unbounded. Given its own result, it returns it."""
    if window_size is None:
        return None, None
    accepted = "None or a pair (left, right) of integers, each None or -1 for unbounded, otherwise at least 0"
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ArgumentError("window_size", window_size, accepted)
    sides: list[int | None] = []
    for side in window_size:
        if side is not None and not is_integer(side):
            raise ArgumentError("window_size", window_size, accepted)
        if side is not None and int(side) < -1:
            raise ArgumentError("window_size", window_size, accepted)
        sides.append(None if side is None or int(side) == -1 else int(side))
    return sides[0], sides[1]


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not is_real(softmax_scale) or not _fits_float32(softmax_scale, times=_LOG2_E):
        raise ArgumentError("softmax_scale", softmax_scale, "None for 1/sqrt(head_dim), or a finite number below 2e38")
    # What is 0 to the device must be 0 to us: a kernel for positive scales would multiply -inf by it.
    return float(softmax_scale) if abs(float(softmax_scale)) >= _FLOAT32_MIN else 0.0


def _softcap(softcap: float, softmax_scale: float) -> float:
    if not is_real(softcap) or not _fits_float32(softcap) or softcap < 0:
        raise ArgumentError("softcap", softcap, "0 for none, or a finite positive number")
    cap = float(softcap)
    if 0 < cap < _FLOAT32_MIN or (cap > 0 and not _fits_float32(softmax_scale / cap, times=2 * _LOG2_E)):
        accepted = "0 for none, or a positive number by which the scale can be divided in float32"
        raise ArgumentError("softcap", f"{cap} with softmax_scale {softmax_scale}", accepted)
    return cap
