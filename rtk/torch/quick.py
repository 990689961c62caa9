"""Calls with torch tensors that were made before, repeated with as little of torch as can be (rtk.repeats)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtk import counters, driver, zeroed
from rtk.arrays import library
from rtk.repeats import ALIGNMENT, Known
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
        # (Tensors that are negated when read have rows with gaps, and a call with such rows is never remembered; but
        # for what as_strided makes of them.)
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
        if (q_at | k_at | v_at) % ALIGNMENT or not (q_at and k_at and v_at) or _device() != known.device:
            return None
        return self.run(known, q, k, v, None, None, return_lse)

    def run(self, known: Known, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, return_lse: bool) -> Any:
        plan, device = known.plan, known.device
        if out is None:
            out = torch.empty_like(q) if known.like_q else _library.result(q, known.o_shape[3])
        if return_lse and lse is None:
            lse = torch.empty(known.lse_shape, dtype=torch.float32, device=q.device)
        stream, here, counter = _stream(device), _device() == device, None
        if plan.counts:
            counter = zeroed.word(device, _capturing() if here else driver.is_capturing(stream))
        lse_at = lse.data_ptr() if return_lse else 0
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_at, 0, 0)
        plan.launch(addresses, stream, counter, here=here)
        counters.count_repeat()
        return (out, lse) if return_lse else out
