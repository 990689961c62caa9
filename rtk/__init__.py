"""rtk: a runtime kernel toolkit for NVIDIA Hopper.

``rtk.attention(q, k, v)`` on CuPy, PyTorch, NumPy or any DLPack arrays. On a Hopper GPU the kernel is compiled by NVRTC
for the shape in hand and kept on disk; on a CPU the same call runs a NumPy implementation.

Importing this package is cheap: it imports neither NumPy, CuPy nor torch. Each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtk import errors as errors
    from rtk.api import attention as attention
    from rtk.api import flash_attn_func as flash_attn_func
    from rtk.api import stats as stats

__version__ = "0.1.0"

# public name -> the module that defines it; None for a module that is itself public
_HOME: dict[str, str | None] = {
    "attention": "rtk.api",
    "flash_attn_func": "rtk.api",
    "stats": "rtk.api",
    "errors": None,
}

__all__ = ["__version__", "attention", "errors", "flash_attn_func", "stats"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rtk' has no attribute {name!r}")
    home = _HOME[name]
    value = importlib.import_module(f"rtk.{name}") if home is None else getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
