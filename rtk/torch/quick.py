"""Calls with torch tensors that were made before, repeated with as little of torch as can be (rtk.repeats)."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rtk import driver, zeroed
from rtk.arrays import library
from rtk.counters import count_repeat
from rtk.launch import Recent
from rtk.repeats import Known, find, is_current, usual
from rtk.torch.watching import PLAIN, modes, watched

_library = library("torch")
_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


def _memory() -> Any:
    """How compiled programs of torch's allocate on the current GPU: without the dispatcher, in half of its time."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, "_empty_strided_cuda", None) or functools.partial(_empty_strided, device="cuda")


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


_empty = _memory()

# What compiled programs of torch's look at their inputs with: a look at three tensors is one call. It compares types,
# shapes, strides, dtypes, devices, whether gradients are wanted, and the modes that want to see the call.
_TensorGuards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_GUARDED = 4  # calls with the same options that are found so; others are looked up by a key
_OPTIONS_REMEMBERED = 256
_TURNS = 64  # after so many lookups a call gets the place of another one

_Guarded = tuple[tuple[Any, Known], ...]


class TorchKind:
    def __init__(self) -> None:
        self._guarded: Recent[Any, _Guarded] = Recent(_OPTIONS_REMEMBERED)
        self._lookups = itertools.count()

    def find(self, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> tuple[Known | None, Any]:
        # (What follows asks about other modes; the looks below see all but torch's own, as FakeTensorMode.)
        if modes() or forward_ad._current_level >= 0 or not usual(*options):
            return None, None
        guarded = self._guarded.get(options)
        if guarded is not None:
            for check, known in guarded:
                if check(q, k, v):
                    if is_current(known):
                        return known, None
                    break
        key = None if watched() else _key(q, k, v, options)
        found = None if key is None else find(key)
        if (
            found is not None
            and _TensorGuards is not None
            and type(q) is type(k) is type(v) is Tensor
            and not (q.requires_grad or k.requires_grad or v.requires_grad)
        ):
            self._guard(q, k, v, options, found)
        return found, key

    def _guard(self, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], known: Known) -> None:
        others = [x for x in self._guarded.get(options) or () if is_current(x[1])]
        if len(others) < _GUARDED or next(self._lookups) % _TURNS == 0:
            sizes, strides = [list(x.size()) for x in (q, k, v)], [list(x.stride()) for x in (q, k, v)]
            guards = _TensorGuards(q, k, v, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            self._guarded.put(options, (*others[1 - _GUARDED :], (guards.check, known)))

    def forget(self) -> None:
        self._guarded.clear()

    def run(self, known: Known, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, return_lse: bool) -> Any:
        plan, device = known.plan, known.device
        here = _device() == device
        if out is None:
            if here:
                out = _empty(known.o_shape, known.o_strides, q.dtype)
            else:
                out = _empty_strided(known.o_shape, known.o_strides, q.dtype, q.device)
        else:
            _library.written(out)
        lse_at = 0
        if return_lse:
            if lse is None:
                lse = torch.empty(known.lse_shape, dtype=torch.float32, device=q.device)
            else:
                _library.written(lse)
            lse_at = lse.data_ptr()
        stream, counter = _stream(device), None
        if plan.counts:
            # (The null stream is never captured, and asking takes as long as three tensors' addresses.)
            counter = zeroed.word(device, stream != 0 and (_capturing() if here else driver.is_capturing(stream)))
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_at, 0, 0)
        plan.launch(addresses, stream, counter, here)
        count_repeat()
        return (out, lse) if return_lse else out


def _key(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if type(k) not in PLAIN or type(v) not in PLAIN:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if q.is_neg() or k.is_neg() or v.is_neg():  # negated only when they are read
        return None
    try:
        return (
            q.size(), q.stride(), q.dtype, q.device,
            k.size(), k.stride(), k.dtype, k.device,
            v.size(), v.stride(), v.dtype, v.device, options,
        )  # fmt: skip
    except RuntimeError:  # a sparse tensor has no strides
        return None
