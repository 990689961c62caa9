"""The GPU that the tests run on, if there is one that rtk serves."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """The GPU that a test runs on: its number, the driver's properties of it, and the libraries that can use it."""

    index: int
    properties: Any
    torch: Any  # the module, or None where torch is not there or has no CUDA
    cupy: Any  # the module, or None


@functools.cache
def usable_gpu() -> tuple[int | None, str]:
    """(number of the first GPU of compute capability 9.0, "") or (None, why there is none)."""
    from rtk import driver

    if not driver.available():
        return None, "no GPU: the NVIDIA driver is not there or shows none"
    for index in range(driver.device_count()):
        if tuple(driver.device_properties(index).compute_capability) == (9, 0):
            return index, ""
    return None, "no GPU of compute capability 9.0"


def module_with_gpu(name: str) -> Any:
    try:
        module = importlib.import_module(name)
        there = module.cuda.is_available()
    except Exception:  # not installed, or installed without what it needs: either way not a library for GPU tests
        return None
    return module if there else None
