"""rtk: a runtime kernel toolkit for NVIDIA Hopper.

``rtk.attention(q, k, v)`` on CuPy, PyTorch, NumPy or any DLPack arrays. On a Hopper GPU the kernel is compiled by NVRTC
for the shape in hand and kept on disk; on a CPU the same call runs a NumPy implementation.

A kernel of one's own goes through the same door: a ``.cuh`` file and a ``rtk.KernelSpec`` are compiled by
``rtk.compile``, checked by ``rtk.check_spec`` and ``rtk.check_run``, and run by ``rtk.run``; docs/your-own-kernel.md.

Importing this package is cheap: it imports neither NumPy, CuPy nor torch. Each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtk import autotune as autotune
    from rtk import errors as errors
    from rtk import nvtx as nvtx
    from rtk import torch as torch
    from rtk.api import attention as attention
    from rtk.api import flash_attn_func as flash_attn_func
    from rtk.api import plan as plan
    from rtk.api import stats as stats
    from rtk.arrays import View as View
    from rtk.autotune.choice import freeze as freeze
    from rtk.autotune.recording import record_shapes as record_shapes
    from rtk.checks import check_run as check_run
    from rtk.checks import check_spec as check_spec
    from rtk.jit import Binary as Binary
    from rtk.jit import CompileReport as CompileReport
    from rtk.launch import Plan as Plan
    from rtk.spec import Binding as Binding
    from rtk.spec import KernelSpec as KernelSpec
    from rtk.spec import Operand as Operand
    from rtk.spec import TensorMap as TensorMap
    from rtk.spec import TensorOperand as TensorOperand
    from rtk.spec import alignment as alignment
    from rtk.toolkit import compile as compile
    from rtk.toolkit import run as run

__version__ = "0.1.0"

# public name -> the module that defines it; None for a module that is itself public
_HOME: dict[str, str | None] = {
    "attention": "rtk.api",
    "flash_attn_func": "rtk.api",
    "plan": "rtk.api",
    "stats": "rtk.api",
    "autotune": None,
    "errors": None,
    "freeze": "rtk.autotune.choice",
    "nvtx": None,
    "record_shapes": "rtk.autotune.recording",
    "torch": None,  # not in __all__: it imports torch
    # a kernel of one's own
    "Binary": "rtk.jit",
    "Binding": "rtk.spec",
    "CompileReport": "rtk.jit",
    "KernelSpec": "rtk.spec",
    "Operand": "rtk.spec",
    "Plan": "rtk.launch",
    "TensorMap": "rtk.spec",
    "TensorOperand": "rtk.spec",
    "View": "rtk.arrays",
    "alignment": "rtk.spec",
    "check_run": "rtk.checks",
    "check_spec": "rtk.checks",
    "compile": "rtk.toolkit",
    "run": "rtk.toolkit",
}

__all__ = [
    "Binary",
    "Binding",
    "CompileReport",
    "KernelSpec",
    "Operand",
    "Plan",
    "TensorMap",
    "TensorOperand",
    "View",
    "__version__",
    "alignment",
    "attention",
    "autotune",
    "check_run",
    "check_spec",
    "compile",
    "errors",
    "flash_attn_func",
    "freeze",
    "nvtx",
    "plan",
    "record_shapes",
    "run",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rtk' has no attribute {name!r}")
    home = _HOME[name]
    value = importlib.import_module(f"rtk.{name}") if home is None else getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
