"""Tensor maps: how the tensor memory accelerator (TMA) is told the shape of a tensor and of the tile it brings."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from rtk import driver

MAP_BYTES = 128
_ALIGNMENT = 64
STRIDE_MULTIPLE_BYTES = 16  # of every stride but the innermost, and of the base address

# Enumerations of cuda.h: CUtensorMapDataType, -Swizzle, -Interleave, -L2promotion, -FloatOOBfill
_DATA_TYPE = {"float16": 6, "bfloat16": 9}
_SWIZZLE_OF_ROW_BYTES = {32: 1, 64: 2, 128: 3}
_INTERLEAVE_NONE, _L2_PROMOTION_256B, _FILL_ZEROS = 0, 3, 0


def encode(
    pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], element_bytes: int = 2
) -> bytes:
    """A tensor map, 128 bytes.

    `shape`, `strides` (elements) and `box` run from the innermost dimension outwards; the innermost stride is 1. A row
    of the box is 32, 64 or 128 bytes and is swizzled by that width; what lies outside the tensor arrives as zeros.
    """
    rank = len(shape)
    # Where a dimension has one element its stride is never used, yet the driver checks it.
    outer = [
        stride * element_bytes if size > 1 else STRIDE_MULTIPLE_BYTES
        for size, stride in zip(shape, strides, strict=True)
    ]
    storage = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    address = -(-ctypes.addressof(storage) // _ALIGNMENT) * _ALIGNMENT
    driver.call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(address),
        _DATA_TYPE[dtype],
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*outer[1:]),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _INTERLEAVE_NONE,
        _SWIZZLE_OF_ROW_BYTES[box[0] * element_bytes],
        _L2_PROMOTION_256B,
        _FILL_ZEROS,
        detail=f"shape {tuple(shape)}, strides {tuple(strides)}, box {tuple(box)}",
    )
    return ctypes.string_at(address, MAP_BYTES)


def expressible(pointer: int, shape: Sequence[int], strides: Sequence[int], element_bytes: int = 2) -> bool:
    """Whether TMA can read the tensor in place. Dimensions outermost first, strides in elements."""
    if pointer % STRIDE_MULTIPLE_BYTES or (shape[-1] > 1 and strides[-1] != 1):
        return False
    return all(
        size == 1
        or (stride >= 0 and stride * element_bytes % STRIDE_MULTIPLE_BYTES == 0 and stride * element_bytes < 1 << 40)
        for size, stride in zip(shape[:-1], strides[:-1], strict=True)
    )
