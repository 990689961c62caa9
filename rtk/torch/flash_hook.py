"""rtk behind torch's own FlashAttention backend, where this torch lets implementations register themselves.

`torch.nn.attention.activate_flash_attention_impl("RTK")` after `register()`: what scaled_dot_product_attention would
give to FlashAttention goes to rtk, its backward to torch's, as ever. `restore_flash_attention_impl()` undoes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtk.api import attention
from rtk.errors import UnsupportedError
from rtk.torch import sdpa, served

NAME = "RTK"
_FORWARD = "_scaled_dot_product_flash_attention"


def register() -> bool:
    """Makes "RTK" one of torch's FlashAttention implementations; False where this torch has no place for others."""
    hook = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if hook is None or not hasattr(torch.library, "get_kernel"):
        return False
    hook(NAME, register_fn=_activate)
    return True


class _Active:
    """What undoes an activation."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        self._library._destroy()


def _activate() -> _Active:
    before = torch.library.get_kernel(f"aten::{_FORWARD}", "CUDA")

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """(o, lse, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask), as the operator says."""
        reason = "a debug mask" if return_debug_mask else sdpa.why_not(
            query, key, value, None, dropout_p, is_causal, scale, enable_gqa=True
        )  # fmt: skip
        if reason is not None:
            served.count_fallback(reason)
            arguments = (query, key, value, dropout_p, is_causal, return_debug_mask)
            return before.call_boxed(keys, *arguments, scale=scale)
        if is_causal and query.shape[2] != key.shape[2]:
            raise UnsupportedError("is_causal", "other lengths of queries than of keys", "equal lengths, as torch asks")
        served.count_native()
        with torch.no_grad():
            o, lse = attention(query, key, value, causal=is_causal, softmax_scale=scale, return_lse=True)
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        offset = torch.zeros((), dtype=torch.uint64, device=query.device)
        mask = torch.empty(0, dtype=query.dtype, device=query.device)
        return o, lse, None, None, query.shape[2], key.shape[2], state, offset, mask

    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl(_FORWARD, forward, "CUDA", with_keyset=True, allow_override=True)
    return _Active(library)
