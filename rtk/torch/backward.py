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
_MOST_BLOCKS = 65535  # of a grid's second and third dimension
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
    for side in ("window_left", "window_right"):  # a bound that no pair can pass is none
        bound = options.get(side)
        options[side] = None if bound is None or bound >= q.shape[2] + k.shape[2] else bound
    saved = Saved(grad_o, grad_lse, q, k, v, o, lse, kv_first, kv_end, scale, **options)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
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
    # With more queries than keys they read bounds of a window otherwise than we do, but for one of 0 on the right.
    unlike_ours = q.shape[2] > k.shape[2] and masked and saved.right != 0
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
        and not unlike_ours
        and max(q.shape[:2]) <= _MOST_BLOCKS
        and 0 not in (*q.shape, *k.shape)
        and _implementation() in (None, "RTK")
    )


def _implementation() -> str | None:
    """Who serves torch's FlashAttention operators: None for torch's own kernels."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    name: str | None = None if current is None else current()
    return name


def _flash(saved: Saved) -> Grads:
    # (batch, seqlen, heads, head_dim) there. Nothing was dropped, so nothing is read of the random state.
    here = (saved.q, saved.k, saved.v, saved.o, saved.grad_o)
    q, k, v, o, grad_o = (_readable(x.transpose(1, 2)) for x in here)
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


def _readable(x: Tensor) -> Tensor:
    """x where rows lie so that 16 bytes can be read at once, else a copy."""
    aligned = x.data_ptr() % 16 == 0 and all(
        stride % 8 == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1
    )
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


# --- any call, in chunks of rows -------------------------------------------------------------------------------------


def _chunked(saved: Saved) -> Grads:
    """In float32 (float64 of float64), for as many heads and rows at a time as _CHUNK_BYTES of scores allow."""
    wide = torch.float64 if saved.q.dtype == torch.float64 else torch.float32
    if not (saved.q.numel() and saved.k.numel()):
        return tuple(torch.zeros(x.shape, dtype=wide, device=x.device) for x in (saved.q, saved.k, saved.v))
    batch, heads_kv = saved.k.shape[:2]
    # (batch * heads_kv, query heads that share it, seqlen_q, head_dim), and without the second for k and v
    q, o, grad_o = (x.unflatten(1, (heads_kv, -1)).flatten(0, 1) for x in (saved.q, saved.o, saved.grad_o))
    lse = saved.lse.unflatten(1, (heads_kv, -1)).flatten(0, 1)
    grad_lse = None if saved.grad_lse is None else saved.grad_lse.unflatten(1, (heads_kv, -1)).flatten(0, 1)
    k, v = saved.k.flatten(0, 1), saved.v.flatten(0, 1)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for heads, rows in _chunks(q, k):
        keys, values = (x[heads, None].to(wide) for x in (k, v))
        q_rows, o_rows, do_rows = (x[heads, :, rows].to(wide) for x in (q, o, grad_o))
        lse_rows = lse[heads, :, rows, None].to(wide)
        scores, slope = _scores(saved, q_rows @ keys.mT)
        seen = _visible(saved, heads, rows) & (lse_rows != -math.inf)
        p = torch.where(seen, torch.exp(scores - lse_rows), 0.0)
        delta = (do_rows * o_rows).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[heads, :, rows, None].to(wide)
        ds = p * (do_rows @ values.mT - delta) * slope * saved.softmax_scale
        dq[heads, :, rows] = ds @ keys
        dk[heads] += (ds.mT @ q_rows).sum(1)
        dv[heads] += (p.mT @ do_rows).sum(1)
    grad_q = dq.unflatten(0, (batch, heads_kv)).flatten(1, 2)
    return grad_q, dk.unflatten(0, (batch, heads_kv)), dv.unflatten(0, (batch, heads_kv))


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """(heads of k and v, of all sequences; rows of q): so many that their scores take _CHUNK_BYTES."""
    heads_total, group, seqlen_q, _ = q.shape
    row_bytes = 4 * group * k.shape[1]
    rows = min(seqlen_q, max(16, _CHUNK_BYTES // row_bytes))
    heads = min(heads_total, max(1, _CHUNK_BYTES // (row_bytes * rows)))
    for head in range(0, heads_total, heads):
        for row in range(0, seqlen_q, rows):
            yield slice(head, min(head + heads, heads_total)), slice(row, min(row + rows, seqlen_q))


def _scores(saved: Saved, products: Tensor) -> tuple[Tensor, Tensor | float]:
    """Scaled and capped scores, and their derivative by the scaled ones."""
    scores = products * saved.softmax_scale
    if not saved.softcap:
        return scores, 1.0
    relative = torch.tanh(scores / saved.softcap)
    return relative * saved.softcap, 1 - relative * relative


def _visible(saved: Saved, heads: slice, rows: slice) -> Tensor:
    """(heads or 1, 1, rows, seqlen_k) bool; heads of k and v, of all sequences."""
    device = saved.k.device
    key = torch.arange(saved.k.shape[2], device=device)
    place = torch.arange(rows.start, rows.stop, device=device)[:, None] + saved.diagonal
    seen = torch.ones((1, 1, rows.stop - rows.start, len(key)), dtype=torch.bool, device=device)
    if saved.window_left is not None:
        seen = seen & (place - key <= saved.window_left)
    if saved.right is not None:
        seen = seen & (key - place <= saved.right)
    of_sequence = torch.arange(heads.start, heads.stop, device=device) // saved.k.shape[1]
    if saved.kv_first is not None:
        seen = seen & (key >= saved.kv_first[of_sequence][:, None, None, None])
    if saved.kv_end is not None:
        seen = seen & (key < saved.kv_end[of_sequence][:, None, None, None])
    return seen


Route = tuple[Callable[[Saved], bool], Callable[[Saved], Grads]]
routes: list[Route] = [(_flash_serves, _flash), (lambda saved: True, _chunked)]
