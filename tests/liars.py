"""Foreign arrays for the tests: honest strangers, and DLPack producers that fail or lie."""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA = 1, 2  # DLDeviceType
FLOAT16 = (2, 16, 1)  # DLDataType: code, bits, lanes


class Stranger:
    """An array of a library that rtk has never heard of: DLPack and nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._x.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


class Raises(Stranger):
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("not today")


class RaisesWhenLookedAt(Stranger):
    @property
    def __dlpack__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("do not touch")


class DeviceRaises(Stranger):
    def __dlpack_device__(self) -> Any:
        raise RuntimeError("where am I?")


class NamespaceRaises(Stranger):
    def __array_namespace__(self, **_: Any) -> Any:
        raise RuntimeError("no namespace today")


class Returns(Stranger):
    """Gives something else than a fresh capsule."""

    def __init__(self, x: Any, result: Any) -> None:
        super().__init__(x)
        self.result = result

    def __dlpack__(self, **_: Any) -> Any:
        return self.result


class SaysDevice(Stranger):
    """Says that it is elsewhere than it is."""

    def __init__(self, x: Any, device: Any) -> None:
        super().__init__(x)
        self.device = device

    def __dlpack_device__(self) -> Any:
        return self.device


class Array:
    """`__array__` that gives no array of numbers."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.result

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("use __array__")

    def __dlpack_device__(self) -> Any:
        return (CPU, 0)


# --- a capsule written by hand ---------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_kept: list[Any] = []  # capsules own nothing: what they point to lives as long as the process


class Forged:
    """A DLPack producer whose capsule says whatever it is told to say about a buffer on the CPU."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        name: bytes = b"dltensor",
        data: int | None = None,
        device: tuple[Any, ...] = (CPU, 0),
        said: Any = None,
        ndim: int | None = None,
        dtype: tuple[int, int, int] = FLOAT16,
        byte_offset: int = 0,
    ) -> None:
        self.said = device if said is None else said  # what __dlpack_device__ says; the capsule says `device`
        buffer = (ctypes.c_char * (1 << 16))()
        sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        address = ctypes.addressof(buffer) if data is None else data
        dimensions = len(shape) if ndim is None else ndim
        managed = _Managed(_Tensor(address, *device, dimensions, *dtype, ctypes.addressof(sizes), None, byte_offset))
        self._name = ctypes.c_char_p(name)
        self._managed = managed
        _kept.append((buffer, sizes, managed, name, self._name))

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), self._name, None)

    def __dlpack_device__(self) -> Any:
        return self.said
