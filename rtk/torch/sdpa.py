"""torch's scaled_dot_product_attention, served by rtk's kernels where they can."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rtk import repeats
from rtk.api import attention
from rtk.problem import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from rtk.torch import served
from rtk.torch.watching import PLAIN

HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
torch_sdpa = torch._C._nn.scaled_dot_product_attention  # torch's own, whatever is patched

# On the CPU torch's own is the faster one: only tests, which have no GPU, ask for ours.
serves_cpu = False


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: its signature, its meaning, its errors.

    query (batch, heads, seqlen_q, head_dim), key and value (batch, heads_kv, seqlen_k, …); is_causal is aligned
    top-left, as in torch. Calls that rtk's kernel cannot serve (a mask, dropout, float32, another GPU, …) go to torch's
    own function; `rtk.torch.stats()` counts them by reason, and each reason is logged once.
    """
    if attn_mask is None and dropout_p == 0.0 and not torch.compiler.is_compiling():
        o = _again(query, key, value, is_causal, scale, enable_gqa)
        if o is not None:
            return o
    reason = why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        served.count_fallback(reason)
        return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    served.count_native()
    return attention(query, key, value, causal=is_causal, causal_align="top-left", softmax_scale=scale)


def _again(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool) -> Any:
    """The result of a call that rtk.attention has served before; None where it has not.

    What it has served it need not be asked about again, but for what torch minds and rtk does not.
    """
    if not _flash_is_enabled() or type(query) not in PLAIN:
        return None
    if not enable_gqa and not (type(key) in PLAIN and query.dim() == key.dim() == 4 and query.size(1) == key.size(1)):
        return None
    o, _ = repeats.repeat(query, key, value, (False, is_causal, "top-left", None, scale, 0.0, "bhsd", False, 0))
    if o is not None:
        served.count_native()
    return o


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why rtk's kernel cannot serve a call of scaled_dot_product_attention, in a few words; None where it can."""
    if attn_mask is not None:
        return "an attention mask"
    if dropout_p != 0.0:
        return "dropout"
    if not isinstance(is_causal, bool) or not (scale is None or _is_plain(scale)):
        return "an option of another type"
    return _why_not_tensors(query, key, value) or _why_not_shapes(query, key, value, enable_gqa)


def _is_plain(scale: Any) -> bool:
    return isinstance(scale, (int, float)) and math.isfinite(scale)


def _why_not_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not all(isinstance(x, Tensor) for x in (query, key, value)):
        return "what is no tensor"
    if not torch.compiler.is_compiling() and any(type(x) not in PLAIN for x in (query, key, value)):
        return "a tensor subclass"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not _flash_is_enabled():
        return "FlashAttention disabled, as by torch.nn.attention.sdpa_kernel"
    if any(x.is_nested or x.layout is not torch.strided for x in (query, key, value)):
        return "nested or sparse tensors"
    if query.device.type == "cpu":
        if not serves_cpu:
            return "tensors on the CPU"
    elif query.device.type != "cuda":
        return "another kind of device"
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability(query.device) != HOPPER:
        return "another GPU than Hopper"
    if not query.device == key.device == value.device:
        return "tensors on several devices"
    if query.device.type == "cuda" and torch.float64 in (query.dtype, key.dtype, value.dtype):
        return "dtype float64"  # which autocast leaves alone
    if torch.is_autocast_enabled(query.device.type):
        dtypes = {torch.get_autocast_dtype(query.device.type) if x.is_floating_point() else x.dtype
                  for x in (query, key, value)}  # fmt: skip
    else:
        dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1:
        return "several dtypes"
    if dtypes.isdisjoint(HALF) and not (serves_cpu and query.device.type == "cpu"):
        return f"dtype {query.dtype}".replace("torch.", "")
    return None


@served.at_trace_time
def _flash_is_enabled() -> bool:
    return bool(torch.backends.cuda.flash_sdp_enabled())


def _why_not_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    if not query.dim() == key.dim() == value.dim() == 4:
        return "tensors that have not four dimensions"
    heads, heads_kv = query.shape[1], key.shape[1]
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        return "shapes that are broadcast, or do not fit"
    if heads != heads_kv and (not enable_gqa or heads_kv == 0 or heads % heads_kv):
        return "shapes that are broadcast, or do not fit"
    for x in (query, value):
        if x.shape[3] % HEAD_DIM_MULTIPLE or not 0 < x.shape[3] <= MAX_HEAD_DIM:
            return f"a head_dim that is no multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if query.numel() == 0 or key.numel() == 0:
        return "tensors without elements"
    return None
