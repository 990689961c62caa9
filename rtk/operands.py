"""The arrays of a call: read, checked against each other, and made readable for TMA."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np

from rtk import arrays, counters, driver, tma
from rtk.arrays import DTYPES, Library, View, itemsize
from rtk.errors import ArgumentError, RtkError, UnsupportedError

_OVERLAP_WORK: Any = 100_000  # steps NumPy may take to decide whether two views share an element


class Operands:
    """q, k and v: the arrays and where they are."""

    def __init__(self, library: Library, q: Any, k: Any, v: Any) -> None:
        self.library = library
        self.arrays = [q, k, v]
        self.views = [view_of(library, array, name) for array, name in zip(self.arrays, "qkv", strict=True)]
        self.q, self.k, self.v = self.views
        for name, view in (("k", self.k), ("v", self.v)):
            if view.dtype != self.q.dtype:
                raise ArgumentError(name, f"dtype {view.dtype}", f"{self.q.dtype}, as q has")
            self.check_device(name, view)

    def check_device(self, name: str, view: View) -> None:
        """All arrays of a call are where q is."""
        if view.device != self.q.device:
            received = f"an array on {device_name(view.device)}"
            raise ArgumentError(name, received, f"{device_name(self.q.device)}, as q is")

    def read_range(self, kv_range: Any, batch: int) -> tuple[int, int]:
        """The addresses of the two arrays of a kv_range, 0 for None; checked."""
        accepted = f"None or a pair (first, end), each None or an int32 array of shape ({batch},)"
        if not isinstance(kv_range, (tuple, list)) or len(kv_range) != 2:
            raise ArgumentError("kv_range", kv_range, accepted)
        return self._bound("kv_range[0]", kv_range[0], batch), self._bound("kv_range[1]", kv_range[1], batch)

    def _bound(self, name: str, array: Any, batch: int) -> int:
        if array is None:
            return 0
        if arrays.library_of(array) is not self.library:
            received = f"an object of type {type(array).__name__}"
            raise ArgumentError(name, received, f"None or an array of {self.library.name}, as q is")
        view = view_of(self.library, array, name, ("int32",))
        if view.shape != (batch,):
            raise ArgumentError(name, f"shape {view.shape}", f"shape ({batch},), as q's batch")
        self.check_device(name, view)
        if batch > 1 and view.strides != (1,):
            raise UnsupportedError(name, f"strides {view.strides}", "a contiguous array")
        return view.pointer

    def make_readable(self) -> bool:
        """Copies what TMA cannot read where it is; True where that was nothing."""
        copied = [i for i, x in enumerate(self.views) if not tma.expressible(x.pointer, x.shape, x.strides)]
        for index in copied:
            view = self.views[index]
            check_room("qkv"[index], f"a copy for strides {view.strides},", view, view.shape)
        for index in copied:
            counters.add("inputs_copied")
            self.arrays[index] = self.library.contiguous(self.arrays[index])
            self.library.keep_for_graph(self.arrays[index])
            self.views[index] = self.library.view(self.arrays[index], "qkv"[index])
        self.q, self.k, self.v = self.views
        return not copied


def view_of(library: Library, array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> View:
    """The array's view, if it is one that can be read."""
    try:
        view = library.view(array, argument, dtypes)
    except RtkError:
        raise
    except Exception as error:  # torch.vmap's tensors have no address, a mock's attributes are mocks ...
        received = f"a {type(array).__name__} that cannot be read: {error}"
        raise ArgumentError(argument, received, f"a plain array of {library.name}") from error
    if not view.pointer and 0 not in view.shape:
        raise ArgumentError(argument, f"a {type(array).__name__} without memory", "an array with elements")
    if view.device is not None and view.pointer % itemsize(view.dtype):
        received = f"elements of {itemsize(view.dtype)} bytes at address {view.pointer:#x}"
        raise ArgumentError(argument, received, "an address that is a multiple of the element's size")
    return view


def device_name(device: int | None) -> str:
    return "the CPU" if device is None else f"cuda:{device}"


def check_room(argument: str, what: str, view: View, shape: tuple[int, ...]) -> None:
    """Refuses what needs a new array larger than all of the device's memory: a view of few elements can be vast."""
    size = math.prod(shape) * itemsize(view.dtype)
    room = _host_bytes() if view.device is None else driver.device_properties(view.device).memory_bytes
    if size > room:
        accepted = f"no more than the {room} bytes of memory of {device_name(view.device)}"
        raise UnsupportedError(argument, f"{what} of shape {shape}: {size} bytes", accepted)


@functools.cache
def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_out(operands: Operands, out: Any, shape: tuple[int, ...]) -> None:
    view = view_of(operands.library, out, "out")
    if view.shape != shape:
        raise ArgumentError("out", f"shape {view.shape}", f"shape {shape}")
    if view.dtype != operands.q.dtype:
        raise ArgumentError("out", f"dtype {view.dtype}", f"{operands.q.dtype}, as q has")
    operands.check_device("out", view)
    if not operands.library.writable(out):
        raise ArgumentError("out", "a read-only array", "one that can be written")
    if overlaps_itself(view):
        raise ArgumentError("out", f"strides {view.strides}: elements share memory", "distinct elements")
    for name, other in zip("qkv", operands.views, strict=True):
        if overlap(view, other):
            raise ArgumentError("out", f"an array that shares memory with {name}", "memory of its own")


def overlaps_itself(view: View) -> bool:
    """Whether a step along some dimension may land inside what the smaller steps cover."""
    covered = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(view.shape, view.strides, strict=True)):
        if size > 1:
            if stride <= covered:
                return 0 not in view.shape
            covered += stride * (size - 1)
    return False


def overlap(a: View, b: View) -> bool:
    """Whether two views share an element. NumPy solves it from addresses and strides; nothing is read."""
    if 0 in a.shape or 0 in b.shape:
        return False
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    if a_end <= b_begin or b_end <= a_begin:  # nearly always: asking NumPy takes 40 us
        return False
    try:
        return np.shares_memory(_addresses(a), _addresses(b), max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _span(view: View) -> tuple[int, int]:
    """First byte and end of what the view can reach."""
    low = high = 0
    for size, stride in zip(view.shape, view.strides, strict=True):
        step = (size - 1) * stride
        if step < 0:
            low += step
        else:
            high += step
    size_bytes = itemsize(view.dtype)
    return view.pointer + low * size_bytes, view.pointer + (high + 1) * size_bytes


def _addresses(view: View) -> np.ndarray[Any, Any]:
    class Interface:
        __array_interface__ = {  # noqa: RUF012
            "version": 3,
            "data": (view.pointer, True),
            "shape": view.shape,
            "strides": tuple(stride * itemsize(view.dtype) for stride in view.strides),
            "typestr": f"|V{itemsize(view.dtype)}",
        }

    return np.asarray(Interface())
