"""Arrays in and out: what an array of any library is to a kernel, and how to make one of the same kind.

A library is recognised by what is imported already: nothing here imports torch or CuPy to find out whether an array is
theirs. torch and CuPy arrays are read directly (DLPack costs microseconds a tensor); everything else comes through
`__dlpack__` or, on the CPU, `__array__`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rtk.errors import ArgumentError, UnsupportedError

DTYPES = ("float16", "bfloat16", "float32", "float64")  # of attention
ANY_DTYPES = (*DTYPES, "int8", "uint8", "int16", "int32", "int64", "bool")  # of a user's kernel
DEVICES = "arrays on a CUDA device or on the CPU"


@dataclass(frozen=True)
class View:
    """Where an array's elements are. Strides in elements; `device` is the GPU's ordinal, None on the CPU."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int | None


_ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return _ITEMSIZE.get(dtype, 2)


class Library(Protocol):
    """What an array library can do for a kernel."""

    name: str

    def view(self, array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> View:
        """Where the array's elements are. Raises, naming the argument, where a kernel cannot read them."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any: ...
    def result(self, q: Any, head_dim_v: int) -> Any:
        """Memory for the result of a call: as q, with another last dimension."""

    def stream(self, device: int) -> int:
        """The caller's current stream on the device, as a handle."""

    def is_current(self, device: int) -> bool:
        """Whether the device is the calling thread's current one; False where that is dear to ask."""

    def contiguous(self, array: Any) -> Any:
        """A copy in C order."""

    def keep_for_graph(self, temporary: Any) -> None:
        """Keeps a temporary's memory from other uses where a CUDA graph being captured will use it again."""

    def assign(self, target: Any, source: Any) -> None:
        """target[...] = source, where source is of the same library."""

    def written(self, array: Any) -> None:
        """Says to the library that a kernel writes to the array, where it wants to know."""

    def fill(self, array: Any, value: float) -> None: ...
    def writable(self, array: Any) -> bool:
        """Whether the array may be written to."""

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """A CPU array as NumPy, without a copy."""

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        """The inverse of to_numpy."""

    def from_dlpack(self, array: Any) -> Any:
        """Another library's array as one of this, without a copy."""


# --- NumPy -----------------------------------------------------------------------------------------------------------


class NumpyLibrary:
    name = "numpy"

    def view(self, array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> View:
        if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise UnsupportedError(argument, "a masked array", "arrays without a mask", "Fill it: filled(value).")
        dtype, strides = _dtype_and_strides(array, argument, dtypes)
        return View(array.ctypes.data, array.shape, strides, dtype, None)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def result(self, q: Any, head_dim_v: int) -> Any:
        return np.empty((*q.shape[:-1], head_dim_v), q.dtype)

    def stream(self, device: int) -> int:
        raise AssertionError("NumPy arrays have no stream")

    def is_current(self, device: int) -> bool:
        return False

    def contiguous(self, array: Any) -> Any:
        return np.array(array, order="C")

    def keep_for_graph(self, temporary: Any) -> None:
        pass

    def assign(self, target: Any, source: Any) -> None:
        target[...] = source

    def written(self, array: Any) -> None:
        pass

    def fill(self, array: Any, value: float) -> None:
        array.fill(value)

    def writable(self, array: Any) -> bool:
        return bool(array.flags.writeable)

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = array
        return result

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        return array

    def from_dlpack(self, array: Any) -> Any:
        # NumPy's DLPack knows no bfloat16; libraries that have it also give a NumPy array of ml_dtypes' type.
        if hasattr(array, "__array__"):
            return np.asarray(array)
        taken = np.from_dlpack(array)
        if taken.size and taken.flags.owndata:  # NumPy answers a null pointer with memory of its own
            raise BufferError("it has no memory")
        return taken


def _dtype_and_strides(array: Any, argument: str, dtypes: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """Of a NumPy or CuPy array: the dtype's name, checked, and the strides in elements."""
    dtype, size = array.dtype, array.itemsize
    if dtype.name not in dtypes:
        raise ArgumentError(argument, f"dtype {dtype.name}", ", ".join(dtypes))
    if not dtype.isnative:
        raise ArgumentError(argument, f"dtype {dtype.name} in the other byte order", "this machine's byte order")
    if any(stride % size for stride in array.strides):
        received = f"strides of {array.strides} bytes, elements of {size}"
        raise UnsupportedError(argument, received, "strides of whole elements", "Copy the array.")
    return dtype.name, tuple(stride // size for stride in array.strides)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


# --- CuPy ------------------------------------------------------------------------------------------------------------


class CupyLibrary:
    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self._kept_for_graphs: list[Any] = []  # as long as the process lives: nothing tells when a graph is gone

    def view(self, array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> View:
        dtype, strides = _dtype_and_strides(array, argument, dtypes)
        return View(array.data.ptr, array.shape, strides, dtype, array.device.id)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        with self.cupy.cuda.Device(device):
            return self.cupy.empty(shape, numpy_dtype(dtype))

    def result(self, q: Any, head_dim_v: int) -> Any:
        with q.device:
            return self.cupy.empty((*q.shape[:-1], head_dim_v), q.dtype)

    def stream(self, device: int) -> int:
        return int(self.cupy.cuda.get_current_stream(device).ptr)

    def is_current(self, device: int) -> bool:
        return bool(self.cupy.cuda.runtime.getDevice() == device)

    def contiguous(self, array: Any) -> Any:
        with array.device:
            return self.cupy.array(array, order="C", copy=True)

    def keep_for_graph(self, temporary: Any) -> None:
        # CuPy's pool knows nothing of graphs, and would hand the memory out again while replays still write to it.
        stream = self.stream(temporary.device.id)
        if stream and self.cupy.cuda.runtime.streamIsCapturing(stream):  # the null stream is never captured
            self._kept_for_graphs.append(temporary)

    def assign(self, target: Any, source: Any) -> None:
        with target.device:
            target[...] = source

    def written(self, array: Any) -> None:
        pass

    def fill(self, array: Any, value: float) -> None:
        with array.device:
            array.fill(value)

    def writable(self, array: Any) -> bool:
        return True

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        raise AssertionError("CuPy arrays are never on the CPU")

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        raise AssertionError("CuPy arrays are never on the CPU")

    def from_dlpack(self, array: Any) -> Any:
        return self.cupy.from_dlpack(array)


# --- torch -----------------------------------------------------------------------------------------------------------


class TorchLibrary:
    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.forward_ad = torch.autograd.forward_ad
        self.dtype_name = {getattr(torch, name): name for name in ANY_DTYPES}
        self.dtype_of = {name: dtype for dtype, name in self.dtype_name.items()}

    def view(self, array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> View:
        if array.layout is not self.torch.strided or array.is_quantized or array.is_nested:
            received = f"a {'nested ' * array.is_nested}tensor of layout {array.layout}, dtype {array.dtype}"
            raise ArgumentError(argument, received, "a dense strided tensor")
        if type(array).__torch_dispatch__ is not self.torch.Tensor.__torch_dispatch__:  # masked, fake, distributed ...
            received = f"a {type(array).__name__}, which is no plain tensor"
            raise UnsupportedError(argument, received, "tensors whose elements are their own memory")
        dtype = self.dtype_name.get(array.dtype)
        if dtype is None or dtype not in dtypes:
            raise ArgumentError(argument, f"dtype {array.dtype}", ", ".join(f"torch.{name}" for name in dtypes))
        device = array.device
        if device.type not in ("cuda", "cpu"):
            raise UnsupportedError(argument, f"a tensor on {device}", DEVICES)
        if array.requires_grad and self.torch.is_grad_enabled():
            raise UnsupportedError(
                argument,
                "a tensor that requires grad",
                "tensors without grad: a plan and a kernel of one's own have no backward, rtk.attention has",
                "Call it under torch.no_grad(), or detach() the tensor.",
            )
        if self.forward_ad._current_level >= 0 and self.forward_ad.unpack_dual(array).tangent is not None:
            received = "a tensor with a tangent (forward-mode differentiation)"
            raise UnsupportedError(argument, received, "tensors without one", "Call it on the primal.")
        if device.type == "cuda" and array.is_neg():
            received = "a tensor that is negated only when read"
            raise UnsupportedError(argument, received, "tensors as they lie in memory", "Call resolve_neg() on it.")
        return View(
            array.data_ptr(),
            tuple(array.shape),
            array.stride(),
            dtype,
            device.index if device.type == "cuda" else None,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        return self.torch.empty(shape, dtype=self.dtype_of[dtype], device="cpu" if device is None else f"cuda:{device}")

    def result(self, q: Any, head_dim_v: int) -> Any:
        # Its dimensions lie in the order of q's: what was transposed to come here is not copied to go back.
        if head_dim_v <= q.shape[-1] and q.stride(-1) == 1:
            return self.torch.empty_like(q if head_dim_v == q.shape[-1] else q[..., :head_dim_v])
        return q.new_empty((*q.shape[:-1], head_dim_v))

    def stream(self, device: int) -> int:
        return int(self.torch._C._cuda_getCurrentRawStream(device))

    def is_current(self, device: int) -> bool:
        return bool(self.torch._C._cuda_getDevice() == device)

    def contiguous(self, array: Any) -> Any:
        return array.detach().clone(memory_format=self.torch.contiguous_format)

    def keep_for_graph(self, temporary: Any) -> None:
        pass  # torch captures into a memory pool of the graph's own

    def assign(self, target: Any, source: Any) -> None:
        with self.torch.inference_mode():  # also where the target is an inference tensor
            target.copy_(source)

    def written(self, array: Any) -> None:
        if not array.is_inference():  # (such have no version)
            self.torch.autograd.graph.increment_version(array)  # autograd may have saved what was there

    def fill(self, array: Any, value: float) -> None:
        with self.torch.no_grad():
            array.fill_(value)

    def writable(self, array: Any) -> bool:
        return True

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        array = array.detach().resolve_conj().resolve_neg()
        if array.dtype is self.torch.bfloat16:  # NumPy itself has no bfloat16: the bits pass as integers
            result: np.ndarray[Any, Any] = array.view(self.torch.int16).numpy().view(numpy_dtype("bfloat16"))
            return result
        result = array.numpy()
        return result

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Any:
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def from_dlpack(self, array: Any) -> Any:
        return self.torch.from_dlpack(array)


# --- recognition -----------------------------------------------------------------------------------------------------

_LIBRARIES: dict[str, Library] = {}
_MAKERS: dict[str, Callable[[], Library]] = {"numpy": NumpyLibrary, "cupy": CupyLibrary, "torch": TorchLibrary}


def library(name: str) -> Library:
    """The adapter of a library that is imported already (or, for CuPy, can be)."""
    found = _LIBRARIES.get(name)
    if found is None:
        found = _LIBRARIES[name] = _MAKERS[name]()
    return found


def library_of(array: Any) -> Library | None:
    """The adapter whose own array this is, or None."""
    for name, kind in (("torch", "Tensor"), ("cupy", "ndarray"), ("numpy", "ndarray")):
        module = sys.modules.get(name)
        # A module that is only half imported has no such attribute yet.
        if module is not None and isinstance(array, getattr(module, kind, ())):
            return library(name)
    return None
