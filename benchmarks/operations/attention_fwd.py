"""Attention forward: q, k and v in (batch, heads, seqlen, head_dim), and o in the same form.

The truth is the definition in float64 with torch on the GPU, of sampled rows: all of it would take longer than what is
measured.
"""

from __future__ import annotations

import math
from typing import Any

from rtk import shapes
from rtk.benchmarks import floors
from rtk.benchmarks.operations import Errors
from rtk.errors import ArgumentError

_STRETCH = 32  # rows at the start, in the middle and at the end of a sequence
_HEADS = 8  # (sequence, head) pairs, spread over all
_OUTLIER_RATE, _OUTLIER_STD = 0.001, 10.0  # FlashAttention-3 (Shah et al. 2024), section 4.3: variance 100


class AttentionForward:
    name = "attention_fwd"

    def describe(self, problem: Any) -> dict[str, Any]:
        left, right = problem.window_left, problem.window_right
        usual_scale = 1.0 / math.sqrt(problem.head_dim)
        top_left = (left is not None or right is not None) and problem.diagonal != problem.seqlen_k - problem.seqlen_q
        return {
            "op": self.name,
            "dtype": problem.dtype,
            "batch": problem.batch,
            "heads_q": problem.num_heads_q,
            "heads_kv": problem.num_heads_kv,
            "seqlen_q": problem.seqlen_q,
            "seqlen_k": problem.seqlen_k,
            "head_dim": problem.head_dim,
            "head_dim_v": problem.head_dim_v,
            "causal": right == 0,
            "window": None if left is None and right in (None, 0) else [left, right],
            "softcap": problem.softcap,
            "softmax_scale": None if problem.softmax_scale == usual_scale else problem.softmax_scale,
            "align": "top-left" if top_left else None,
        }

    def inputs(self, problem: Any, variant: str | None, seed: int, device: str = "cuda") -> tuple[Any, ...]:
        import torch

        if variant not in (None, "outliers"):
            raise ArgumentError("variant", variant, "None or 'outliers'")
        if problem.kv_ranges:
            accepted = "shapes without ranges: the time would be that of the numbers in them"
            raise ArgumentError("shape", shapes.describe(problem), accepted)
        generator = torch.Generator(device=device).manual_seed(seed)
        sizes = [(problem.num_heads_q, problem.seqlen_q, problem.head_dim)]
        sizes += [(problem.num_heads_kv, problem.seqlen_k, d) for d in (problem.head_dim, problem.head_dim_v)]
        tensors = []
        for shape in sizes:
            x = torch.randn((problem.batch, *shape), device=device, generator=generator)
            if variant == "outliers":
                rare = torch.rand(x.shape, device=device, generator=generator) < _OUTLIER_RATE
                x += rare * _OUTLIER_STD * torch.randn(x.shape, device=device, generator=generator)
            tensors.append(x.to(getattr(torch, problem.dtype)))
        return tuple(tensors)

    def input_bytes(self, problem: Any) -> int:
        queries = problem.num_heads_q * problem.seqlen_q * problem.head_dim
        keys = problem.num_heads_kv * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
        return int(2 * problem.batch * (queries + keys))

    def truth(self, problem: Any, tensors: tuple[Any, ...], *, thorough: bool) -> _Rows:
        return _Rows(problem, *tensors, thorough=thorough)

    def tolerance(self, problem: Any) -> float:
        return 0.01 if problem.dtype == "bfloat16" else 0.002  # 4 times what rounding comes to

    def flop(self, problem: Any) -> float:
        return floors.flop(self.describe(problem))

    def line(self, problem: Any) -> str:
        return shapes.describe(problem)

    def parse(self, line: str) -> Any:
        return shapes.parse(line)


class _Rows:
    """Some rows of o in float64."""

    def __init__(self, problem: Any, q: Any, k: Any, v: Any, *, thorough: bool) -> None:
        self.rows = _stretches(problem.seqlen_q, problem.seqlen_q if thorough else _STRETCH)
        self.pairs = _spread(problem.batch, problem.num_heads_q, _HEADS)
        self.exact = [_exact(problem, q, k, v, *pair, rows) for pair in self.pairs for rows in self.rows]

    def errors(self, result: Any) -> Errors:
        places = [(*pair, rows) for pair in self.pairs for rows in self.rows]
        square_error, square, largest, count, worst = 0.0, 0.0, 0.0, 0, 0.0
        for place, exact in zip(places, self.exact, strict=True):
            difference = result[place].double() - exact
            part_error, part = float(difference.square().sum()), float(exact.square().sum())
            # Of its own size: late rows of a causal mask are a hundredth of the first ones.
            relative = math.sqrt(part_error / part) if part else math.inf if part_error else 0.0
            worst = max(worst, relative) if relative == relative else math.inf
            square_error, square, count = square_error + part_error, square + part, count + exact.numel()
            largest = max(largest, float(difference.abs().nan_to_num(math.inf).max()))
        unit = math.sqrt(square / count) if square else 1.0
        return Errors(math.sqrt(square_error / count) / unit, largest / unit, worst)


def _stretches(length: int, stretch: int) -> list[slice]:
    """Rows at the start, in the middle and at the end, none twice."""
    if length <= 3 * stretch:
        return [slice(0, length)]
    middle = length // 2
    return [slice(0, stretch), slice(middle, middle + stretch), slice(length - stretch, length)]


def _spread(batch: int, heads: int, count: int) -> list[tuple[int, int]]:
    total = batch * heads
    chosen = range(total) if total <= count else sorted({i * (total - 1) // (count - 1) for i in range(count)})
    return [divmod(i, heads) for i in chosen]


def _exact(problem: Any, q: Any, k: Any, v: Any, batch: int, head: int, rows: slice) -> Any:
    import torch

    head_kv = head // problem.heads_per_kv
    scores = q[batch, head, rows].double() @ k[batch, head_kv].double().T * problem.softmax_scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + problem.diagonal
    offset = torch.arange(problem.seqlen_k, device=q.device) - row
    if problem.window_left is not None:
        scores.masked_fill_(offset < -problem.window_left, -math.inf)
    if problem.window_right is not None:
        scores.masked_fill_(offset > problem.window_right, -math.inf)
    sees = scores.isfinite().any(-1, keepdim=True)  # a query that sees no key gets 0
    return scores.softmax(-1).where(sees, 0.0) @ v[batch, head_kv].double()


OPERATIONS = [AttentionForward()]
