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

from rtk.errors import ArgumentError, ToolchainError, UnsupportedError

DTYPES = ("float16", "bfloat16", "float32", "float64")
_DEVICES = "arrays on a CUDA device or on the CPU"


@dataclass(frozen=True)
class View:
    """Where an array's elements are. Strides in elements; `device` is the GPU's ordinal, None on the CPU."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int | None


class Library(Protocol):
    """What an array library can do for a kernel."""

    name: str

    def view(self, array: Any, argument: str) -> View: ...
    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any: ...
    def stream(self, device: int) -> int:
        """The caller's current stream on the device, as a handle."""

    def contiguous(self, array: Any) -> Any:
        """A copy in C order."""

    def assign(self, target: Any, source: Any) -> None:
        """target[...] = source, where source is of the same library."""

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

    def view(self, array: Any, argument: str) -> View:
        dtype = array.dtype.name
        if dtype not in DTYPES:
            raise ArgumentError(argument, f"dtype {dtype}", ", ".join(DTYPES))
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return View(array.ctypes.data, array.shape, strides, dtype, None)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        return np.empty(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        raise AssertionError("NumPy arrays have no stream")

    def contiguous(self, array: Any) -> Any:
        return np.array(array, order="C")

    def assign(self, target: Any, source: Any) -> None:
        target[...] = source

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
        return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)


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

    def view(self, array: Any, argument: str) -> View:
        dtype = array.dtype.name
        if dtype not in DTYPES:
            raise ArgumentError(argument, f"dtype {dtype}", ", ".join(DTYPES))
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return View(array.data.ptr, array.shape, strides, dtype, array.device.id)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        with self.cupy.cuda.Device(device):
            return self.cupy.empty(shape, numpy_dtype(dtype))

    def stream(self, device: int) -> int:
        return int(self.cupy.cuda.get_current_stream(device).ptr)

    def contiguous(self, array: Any) -> Any:
        with array.device:
            return self.cupy.array(array, order="C", copy=True)

    def assign(self, target: Any, source: Any) -> None:
        with target.device:
            target[...] = source

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
        self.dtype_name = {getattr(torch, name): name for name in DTYPES}
        self.dtype_of = {name: dtype for dtype, name in self.dtype_name.items()}

    def view(self, array: Any, argument: str) -> View:
        if array.layout is not self.torch.strided or array.is_quantized:
            received = f"a tensor of layout {array.layout}, dtype {array.dtype}"
            raise ArgumentError(argument, received, "a dense strided tensor")
        dtype = self.dtype_name.get(array.dtype)
        if dtype is None:
            raise ArgumentError(argument, f"dtype {array.dtype}", ", ".join(f"torch.{name}" for name in DTYPES))
        device = array.device
        if device.type not in ("cuda", "cpu"):
            raise UnsupportedError(argument, f"a tensor on {device}", _DEVICES)
        if array.requires_grad and self.torch.is_grad_enabled():
            raise UnsupportedError(
                argument,
                "a tensor that requires grad",
                "tensors without grad: there is no backward yet",
                "Call it under torch.no_grad(), or detach() the tensor.",
            )
        return View(
            array.data_ptr(),
            tuple(array.shape),
            array.stride(),
            dtype,
            device.index if device.type == "cuda" else None,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        return self.torch.empty(shape, dtype=self.dtype_of[dtype], device="cpu" if device is None else f"cuda:{device}")

    def stream(self, device: int) -> int:
        return int(self.torch._C._cuda_getCurrentRawStream(device))

    def contiguous(self, array: Any) -> Any:
        return array.detach().clone(memory_format=self.torch.contiguous_format)

    def assign(self, target: Any, source: Any) -> None:
        with self.torch.no_grad():
            target.copy_(source)

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


@dataclass(frozen=True)
class Adopted:
    """An array of a library unknown here: what it became, and how a result goes back (None: it cannot)."""

    array: Any
    library: Library
    hand_back: Callable[[Any], Any] | None


def adopt(array: Any, argument: str) -> Adopted:
    """Takes an array of any other library through `__dlpack__`, or `__array__` on the CPU.

    A GPU array is read by CuPy, or by torch where CuPy is missing, in the order of the current stream. Raises
    ArgumentError for what is no array.
    """
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        accepted = "an array of NumPy, CuPy, torch or any library with __dlpack__"
        raise ArgumentError(argument, f"an object of type {type(array).__name__}", accepted)
    try:
        kind = int(array.__dlpack_device__()[0])
    except Exception as error:  # a foreign producer may raise anything
        raise _dlpack_refusal(argument, error) from error
    if kind not in (_DL_CPU, _DL_CUDA):
        raise UnsupportedError(argument, f"an array on DLPack device type {kind}", _DEVICES)
    reader = library("numpy") if kind == _DL_CPU else _gpu_reader()
    try:
        taken = reader.from_dlpack(array)
    except Exception as error:
        raise _dlpack_refusal(argument, error) from error
    return Adopted(taken, reader, _from_dlpack_of(array))


_DL_CPU, _DL_CUDA = 1, 2  # DLDeviceType


def _dlpack_refusal(argument: str, error: Exception) -> ArgumentError:
    return ArgumentError(argument, f"a DLPack producer that failed: {error!r}", "an array that DLPack can describe")


def _gpu_reader() -> Library:
    try:
        return library("cupy")
    except ImportError:
        if "torch" in sys.modules:
            return library("torch")
        fix = 'pip install "rtk-kernels[cuda12]"'
        raise ToolchainError("reading a GPU array through DLPack needs CuPy", fix) from None


def _from_dlpack_of(array: Any) -> Callable[[Any], Any] | None:
    namespace = getattr(array, "__array_namespace__", None)
    home = namespace() if callable(namespace) else sys.modules.get(type(array).__module__.split(".")[0])
    found: Callable[[Any], Any] | None = getattr(home, "from_dlpack", None)
    return found
