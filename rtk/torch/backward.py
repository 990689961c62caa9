"""The gradients of attention from saved q, k, v, o and lse: nothing of the forward is computed again but the scores.

With S the scores, P = exp(S - lse) and D the row sums of dO * O (FlashAttention-2, arXiv:2307.08691, section 3.1.2):

    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - D + dlse),   dQ = scale dS K,   dK = scale dS^T Q

and with a softcap c, S = c tanh(T / c), dT = (1 - (S / c)^2) dS. `routes` is where a backward of our own plugs in: the
first one that says yes serves the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]
_CHUNK_BYTES = 1 << 27  # of scores that are in memory at a time, whatever the lengths


@dataclass(frozen=True)
class Saved:
    """A call of the forward, its results and their gradients. Tensors (batch, heads, seqlen, head_dim)."""

    grad_o: Tensor
    grad_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    kv_first: Tensor | None
    kv_end: Tensor | None
    softmax_scale: float
    causal: bool = False
    top_left: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0

    @property
    def right(self) -> int | None:
        """The bound on the right: a causal mask is one of 0."""
        if not self.causal:
            return self.window_right
        return 0 if self.window_right is None else min(self.window_right, 0)

    @property
    def diagonal(self) -> int:
        return 0 if self.top_left else self.k.shape[2] - self.q.shape[2]


def attention_bwd(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kv_first: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    **options: Any,
) -> Grads:
    """(dq, dk, dv), laid out as empty_like(q), (k), (v) are."""
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    saved = Saved(grad_o, grad_lse, q, k, v, o, lse, kv_first, kv_end, scale, **options)
    with torch.no_grad():
        serve = next(route for serves, route in routes if serves(saved))
        grads = serve(saved)
        return tuple(_laid_out_as(x, grad) for x, grad in zip((q, k, v), grads, strict=True))


def _laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient in memory of its own, as the fake kernel promises it: x's dtype and the strides of empty_like(x)."""
    wanted = torch.empty_like(x)
    if grad.dtype == wanted.dtype and grad.stride() == wanted.stride():
        return grad
    return wanted.copy_(grad)


# --- torch's FlashAttention-2 ----------------------------------------------------------------------------------------


def _flash_serves(saved: Saved) -> bool:
    """What FlashAttention-2's kernels can express: one head_dim, bottom-right masks, no softcap, range or d(lse)."""
    q, k, v = saved.q, saved.k, saved.v
    masked = saved.right is not None or saved.window_left is not None
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3]
        and saved.grad_lse is None
        and not saved.softcap
        and saved.softmax_scale > 0
        and saved.kv_first is None
        and saved.kv_end is None
        and (not masked or not saved.top_left or q.shape[2] == k.shape[2])
        and 0 not in (*q.shape, *k.shape)
    )


def _flash(saved: Saved) -> Grads:
    # (batch, seqlen, heads, head_dim) there. Nothing was dropped, so nothing is read of the random state.
    here = (saved.q, saved.k, saved.v, saved.o, saved.grad_o)
    q, k, v, o, grad_o = (_rows_contiguous(x.transpose(1, 2)) for x in here)
    # A row without keys has lse = -inf here; +inf makes its probabilities zero there.
    lse = torch.where(saved.lse == -math.inf, math.inf, saved.lse)
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    causal = saved.right == 0 and saved.window_left is None
    window = {} if causal else {
        "window_size_left": saved.window_left,
        "window_size_right": saved.right,
    }  # fmt: skip
    grads = torch.ops.aten._flash_attention_backward(
        grad_o, q, k, v, o, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused,
        scale=saved.softmax_scale, **window,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in grads)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# --- any call, in chunks of rows -------------------------------------------------------------------------------------


def _chunked(saved: Saved) -> Grads:
    """In float32 (float64 of float64), for as many heads and rows at a time as _CHUNK_BYTES of scores allow."""
    wide = torch.float64 if saved.q.dtype == torch.float64 else torch.float32
    heads_kv, group = saved.k.shape[1], saved.q.shape[1] // max(saved.k.shape[1], 1)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (saved.q, saved.k, saved.v))
    if not (saved.q.numel() and saved.k.numel()):
        return dq, dk, dv
    # The query heads that share a head of k and v stand together: (batch, heads_kv, group, seqlen, head_dim).
    q, o, grad_o, grad_q = (x.unflatten(1, (heads_kv, group)) for x in (saved.q, saved.o, saved.grad_o, dq))
    lse, grad_lse = (None if x is None else x.unflatten(1, (heads_kv, group)) for x in (saved.lse, saved.grad_lse))
    for batch, head, rows in _chunks(saved, group):
        here = (batch, head, slice(None), rows)
        k, v = (x[batch, head].to(wide) for x in (saved.k, saved.v))
        q_rows, o_rows, do_rows = (x[here].to(wide) for x in (q, o, grad_o))
        assert lse is not None
        scores, slope = _scores(saved, q_rows @ k.mT)
        lse_rows = lse[here][..., None].to(wide)
        seen = _visible(saved, batch, rows) & (lse_rows != -math.inf)
        p = torch.where(seen, torch.exp(scores - lse_rows), 0.0)
        delta = (do_rows * o_rows).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[here][..., None].to(wide)
        ds = p * (do_rows @ v.mT - delta) * slope * saved.softmax_scale
        grad_q[here] = ds @ k
        dk[batch, head] += (ds.mT @ q_rows).sum(0)
        dv[batch, head] += (p.mT @ do_rows).sum(0)
    return dq, dk, dv


def _chunks(saved: Saved, group: int) -> Iterator[tuple[int, int, slice]]:
    """(sequence, head of k and v, rows): so many rows that their scores take _CHUNK_BYTES."""
    batch, heads_kv, seqlen_k, _ = saved.k.shape
    seqlen_q = saved.q.shape[2]
    rows = min(seqlen_q, max(16, _CHUNK_BYTES // (4 * group * seqlen_k)))
    for b in range(batch):
        for head in range(heads_kv):
            for start in range(0, seqlen_q, rows):
                yield b, head, slice(start, min(start + rows, seqlen_q))


def _scores(saved: Saved, products: Tensor) -> tuple[Tensor, Tensor | float]:
    """Scaled and capped scores, and their derivative by the scaled ones."""
    scores = products * saved.softmax_scale
    if not saved.softcap:
        return scores, 1.0
    relative = torch.tanh(scores / saved.softcap)
    return relative * saved.softcap, 1 - relative * relative


def _visible(saved: Saved, batch: int, rows: slice) -> Tensor:
    """(rows, seqlen_k) bool."""
    device = saved.k.device
    key = torch.arange(saved.k.shape[2], device=device)
    place = torch.arange(rows.start, rows.stop, device=device)[:, None] + saved.diagonal
    seen = torch.ones((rows.stop - rows.start, len(key)), dtype=torch.bool, device=device)
    if saved.window_left is not None:
        seen &= place - key <= saved.window_left
    if saved.right is not None:
        seen &= key - place <= saved.right
    if saved.kv_first is not None:
        seen &= key >= saved.kv_first[batch]
    if saved.kv_end is not None:
        seen &= key < saved.kv_end[batch]
    return seen


Route = tuple[Callable[[Saved], bool], Callable[[Saved], Grads]]
routes: list[Route] = [(_flash_serves, _flash), (lambda saved: True, _chunked)]
