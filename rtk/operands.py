"""The arrays of a call: read, checked against each other, and made readable for TMA."""

from __future__ import annotations

from typing import Any

import numpy as np

from rtk import counters, tma
from rtk.arrays import Library, View
from rtk.errors import ArgumentError

_OVERLAP_WORK: Any = 100_000  # steps NumPy may take to decide whether two views share an element


class Operands:
    """q, k and v: the arrays and where they are."""

    def __init__(self, library: Library, q: Any, k: Any, v: Any) -> None:
        self.library = library
        self.arrays = [q, k, v]
        self.views = [library.view(array, name) for array, name in zip(self.arrays, "qkv", strict=True)]
        self.q, self.k, self.v = self.views
        for name, view in (("k", self.k), ("v", self.v)):
            if view.dtype != self.q.dtype:
                raise ArgumentError(name, f"dtype {view.dtype}", f"{self.q.dtype}, as q has")
            if view.device != self.q.device:
                received = f"an array on {device_name(view.device)}"
                raise ArgumentError(name, received, f"{device_name(self.q.device)}, as q is")

    def make_readable(self) -> None:
        """Copies what TMA cannot read where it is."""
        for index, view in enumerate(self.views):
            if not tma.expressible(view.pointer, view.shape, view.strides):
                counters.add("inputs_copied")
                self.arrays[index] = self.library.contiguous(self.arrays[index])
                self.views[index] = self.library.view(self.arrays[index], "qkv"[index])
        self.q, self.k, self.v = self.views


def device_name(device: int | None) -> str:
    return "the CPU" if device is None else f"cuda:{device}"


def check_out(operands: Operands, out: Any, shape: tuple[int, ...]) -> None:
    view = operands.library.view(out, "out")
    if view.shape != shape:
        raise ArgumentError("out", f"shape {view.shape}", f"shape {shape}")
    if view.dtype != operands.q.dtype:
        raise ArgumentError("out", f"dtype {view.dtype}", f"{operands.q.dtype}, as q has")
    if view.device != operands.q.device:
        received = f"an array on {device_name(view.device)}"
        raise ArgumentError("out", received, f"{device_name(operands.q.device)}, as q is")
    if not operands.library.writable(out):
        raise ArgumentError("out", "a read-only array", "one that can be written")
    if _overlaps_itself(view):
        raise ArgumentError("out", f"strides {view.strides}: elements share memory", "distinct elements")
    for name, other in zip("qkv", operands.views, strict=True):
        if _overlap(view, other):
            raise ArgumentError("out", f"an array that shares memory with {name}", "memory of its own")


def _overlaps_itself(view: View) -> bool:
    """Whether a step along some dimension may land inside what the smaller steps cover."""
    covered = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(view.shape, view.strides, strict=True)):
        if size > 1:
            if stride <= covered:
                return 0 not in view.shape
            covered += stride * (size - 1)
    return False


def _overlap(a: View, b: View) -> bool:
    """Whether two views share an element. NumPy solves it from addresses and strides; nothing is read."""
    if 0 in a.shape or 0 in b.shape:
        return False
    try:
        return np.shares_memory(_addresses(a), _addresses(b), max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _addresses(view: View) -> np.ndarray[Any, Any]:
    class Interface:
        __array_interface__ = {  # noqa: RUF012
            "version": 3,
            "data": (view.pointer, True),
            "shape": view.shape,
            "strides": tuple(stride * _itemsize(view.dtype) for stride in view.strides),
            "typestr": f"|V{_itemsize(view.dtype)}",
        }

    return np.asarray(Interface())


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)
