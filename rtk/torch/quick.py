"""Calls with torch tensors that were made before, repeated with as little of torch as can be (rtk.repeats)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtk import counters, zeroed
from rtk.arrays import library
from rtk.repeats import _MISALIGNED, Known
from rtk.torch.operators import PLAIN, watched

_library = library("torch")
_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


class TorchKind:
    def key(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...] | None:
        if watched() or type(k) not in PLAIN or type(v) not in PLAIN:
            return None
        if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
            return None
        # (A tensor that is negated when read is the imaginary part of a complex one: its rows have gaps, and a call with
        # such rows is never remembered.)
        try:
            return (
                q.shape, q.stride(), q.dtype, q.get_device(),
                k.shape, k.stride(), k.dtype, k.get_device(),
                v.shape, v.stride(), v.dtype, v.get_device(),
            )  # fmt: skip
        except RuntimeError:  # a sparse tensor has no strides
            return None

    def call(self, known: Known, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        device = known.device
        if (q_at | k_at | v_at) & _MISALIGNED or not (q_at and k_at and v_at) or _device() != device:
            return None
        o = torch.empty_like(q) if known.like_q else _library.result(q, known.o_shape[3])
        lse = torch.empty(known.lse_shape, dtype=torch.float32, device=q.device) if return_lse else None
        plan = known.plan
        counter = zeroed.word(device, _capturing()) if plan.counts else None
        addresses = (q_at, k_at, v_at, o.data_ptr(), 0 if lse is None else lse.data_ptr(), 0, 0)
        plan.launch(addresses, _stream(device), counter, here=True)
        counters.count_repeat()
        return o if lse is None else (o, lse)
