"""rtk in PyTorch: operators that compile, differentiate and are captured, and drop-ins for torch's own attention.

    rtk.attention(q, k, v)                          on torch tensors: differentiable, and an operator to torch.compile
    rtk.torch.scaled_dot_product_attention(...)     torch's signature and meaning; what we cannot serve, torch serves
    rtk.torch.patch(), unpatch(), patched()         the same for a whole program
    rtk.torch.MultiheadAttention                    nn.MultiheadAttention with grouped heads, windows and RoPE
    rtk.torch.stats()                               who served how many calls, and why it was not us

Importing this module imports torch; `import rtk` does not. docs/pytorch.md is the guide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rtk.errors import ToolchainError


class MissingTorch(ToolchainError, ImportError):
    """There is no torch: an ImportError too, for who tries to import this module."""


try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingTorch(f"rtk.torch needs PyTorch: {error}", 'pip install "rtk-kernels[torch]"') from error

from rtk.torch import operators as operators  # noqa: E402

if TYPE_CHECKING:
    from rtk.torch.multihead import MultiheadAttention as MultiheadAttention
    from rtk.torch.patching import patch as patch
    from rtk.torch.patching import patched as patched
    from rtk.torch.patching import unpatch as unpatch
    from rtk.torch.sdpa import scaled_dot_product_attention as scaled_dot_product_attention
    from rtk.torch.served import count_fallback as count_fallback
    from rtk.torch.served import count_native as count_native
    from rtk.torch.served import reset_stats as reset_stats
    from rtk.torch.served import stats as stats

_HOME = {
    "MultiheadAttention": "rtk.torch.multihead",
    "count_fallback": "rtk.torch.served",
    "count_native": "rtk.torch.served",
    "patch": "rtk.torch.patching",
    "patched": "rtk.torch.patching",
    "reset_stats": "rtk.torch.served",
    "scaled_dot_product_attention": "rtk.torch.sdpa",
    "stats": "rtk.torch.served",
    "unpatch": "rtk.torch.patching",
}

__all__ = [
    "MultiheadAttention",
    "count_fallback",
    "count_native",
    "patch",
    "patched",
    "reset_stats",
    "scaled_dot_product_attention",
    "stats",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rtk.torch' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
