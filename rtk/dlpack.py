"""Arrays of libraries unknown here, taken through DLPack, and results handed back to them.

A GPU array is read by CuPy, or by torch where CuPy is missing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtk import driver
from rtk.arrays import DEVICES, DTYPES, Library, View, itemsize, library
from rtk.errors import ArgumentError, DriverError, RtkError, ToolchainError, UnsupportedError


@dataclass(frozen=True)
class Adopted:
    """An array of a library unknown here: what it became, and how a result goes back (None: it cannot)."""

    array: Any
    library: Library
    hand_back: Callable[[Any], Any] | None


def adopt(array: Any, argument: str, dtypes: tuple[str, ...] = DTYPES) -> Adopted:
    """Takes an array of any other library through `__dlpack__`, or `__array__` on the CPU.

    A GPU array is read by CuPy, or by torch where CuPy is missing, in the order of the current stream. Raises
    ArgumentError for what is no array.
    """
    try:
        if type(array).__name__.endswith("Tracer") and type(array).__module__.startswith("jax"):
            received, accepted = "a JAX array that is traced (jax.jit, grad, vmap)", "an array with memory"
            hint = "Call it outside of jit, between what is compiled."
            raise UnsupportedError(argument, received, accepted, hint)
        if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
            accepted = "an array of NumPy, CuPy, torch or any library with __dlpack__"
            raise ArgumentError(argument, f"an object of type {type(array).__name__}", accepted)
        kind, ordinal = map(int, array.__dlpack_device__())
        if kind not in (_DL_CPU, _DL_CUDA):
            raise UnsupportedError(argument, f"an array on DLPack device type {kind}", DEVICES)
        if kind == _DL_CUDA and not (driver.available() and 0 <= ordinal < driver.device_count()):
            raise ArgumentError(argument, f"an array on cuda:{ordinal}", "an array on the CPU or on a GPU that is here")
        reader = library("numpy") if kind == _DL_CPU else _gpu_reader()
        taken = reader.from_dlpack(array)
        if kind == _DL_CUDA:
            _check_memory(reader.view(taken, argument, dtypes), ordinal)
        return Adopted(taken, reader, _from_dlpack_of(array, argument))
    except RtkError:
        raise
    except Exception as error:  # a foreign producer may raise anything
        raise _dlpack_refusal(argument, error) from error


_DL_CPU, _DL_CUDA = 1, 2  # DLDeviceType
_MOST_SAID = 300  # characters
_POINTER_DEVICE_ORDINAL = 9  # CUpointer_attribute


def _dlpack_refusal(argument: str, error: Exception) -> ArgumentError:
    said = repr(error)[:_MOST_SAID]  # a producer's error may hold all of its array
    return ArgumentError(argument, f"a DLPack producer that failed: {said}", "an array that DLPack can describe")


def _check_memory(view: View, device: int) -> None:
    """BufferError where the first or the last element is not memory of the GPU that the producer named.

    A kernel that read such an address would take the process's CUDA context with it.
    """
    if 0 in view.shape:
        return
    steps = [(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]
    for element in (sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)):
        address, ordinal = view.pointer + element * itemsize(view.dtype), ctypes.c_int(-1)
        pointer = ctypes.c_uint64(address)
        with driver.on_device(device):
            try:
                driver.call("cuPointerGetAttribute", ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, pointer)
            except DriverError as error:
                raise BufferError(f"{address:#x} is no memory of a GPU: {error}") from error
        if not device == view.device == ordinal.value:
            raise BufferError(f"{address:#x} is memory of cuda:{ordinal.value}, not of cuda:{device}")


def _gpu_reader() -> Library:
    try:
        return library("cupy")
    except ImportError:
        if "torch" in sys.modules:
            return library("torch")
        fix = 'pip install "rtk-kernels[cuda12]"'
        raise ToolchainError("reading a GPU array through DLPack needs CuPy", fix) from None


def _from_dlpack_of(array: Any, argument: str) -> Callable[[Any], Any] | None:
    namespace = getattr(array, "__array_namespace__", None)
    home = namespace() if callable(namespace) else sys.modules.get(type(array).__module__.split(".")[0])
    from_dlpack: Callable[[Any], Any] | None = getattr(home, "from_dlpack", None)
    if from_dlpack is None:
        return None

    asarray = getattr(home, "asarray", None)

    def hand_back(result: Any) -> Any:
        try:
            if isinstance(result, np.ndarray) and result.dtype.name == "bfloat16" and asarray is not None:
                return asarray(result)  # NumPy's own part in DLPack knows no bfloat16
            return from_dlpack(result)
        except Exception as error:
            received = f"an array whose library does not take the result: {error!r}"
            raise ArgumentError(argument, received, "a library whose from_dlpack works") from error

    return hand_back
