"""transformers' attention interface, served by rtk.attention where it can and by transformers' own where not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

import rtk
from rtk.errors import UnsupportedError
from rtk.integrations.transformers_masks import TRACED, BandMask
from rtk.problem import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from rtk.torch import served
from rtk.torch.sdpa import HALF, HOPPER

_log = logging.get_logger(__name__)

# Options that change the result and that rtk.attention has not; why, where they are neither None nor 0.
_NOT_OURS = {
    "cache": "a paged cache",
    "dropout": "dropout",
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it; registered as "rtk".

    Args:
        module: the attention layer; its `is_causal` counts where neither a mask nor the argument says.
        query: (batch, heads_q, seqlen_q, head_dim).
        key, value: (batch, heads_kv, seqlen_k, head_dim), heads_kv as the model has them, not repeated.
        attention_mask: what transformers_masks.make_mask returned, or a mask (batch, 1 or heads, seqlen_q, seqlen_k) of
            the caller's. It says all: `sliding_window` among the options is not looked at, as in "sdpa".
        softcap: None or 0 for none.
        options: dropout, position_bias, s_aux, cache, output_attentions, as in "sdpa".

    Returns:
        (batch, seqlen_q, heads_q, head_dim), contiguous, and None in the place of the weights.
    """
    if options.get("output_attentions"):
        _log.warning_once('"rtk" attention keeps no weights: use attn_implementation="eager" for output_attentions.')
    if options.get("sinks") is not None:
        raise UnsupportedError("sinks", "values to add to the softmax's sum", "None", 'Use "eager" with this model.')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reason = _why_not(query, key, value, attention_mask, options)
    if reason is None:
        served.count_native()
        return _serve(query, key, value, attention_mask, causal, scaling, softcap).contiguous(), None
    served.count_fallback(reason)
    mask = _as_dense(attention_mask, key)
    if softcap or options.get("s_aux") is not None:
        return _plain(query, key, value, mask, causal, scaling, softcap, options), None
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, mask, scaling=scaling, is_causal=is_causal, **options
    )


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """(batch, seqlen_q, heads_q, head_dim) by rtk.attention."""
    how: dict[str, Any]
    if mask is None:  # one query stands at the last key, several at the first ones: so "sdpa" has it
        how = {"causal": bool(causal and query.shape[2] > 1), "causal_align": "top-left"}
    elif isinstance(mask, BandMask):
        seen = mask.seen
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
        how = {"window_size": (seen.band.left, seen.band.right), "kv_range": seen.kv_range}
    else:
        how = {"kv_range": (mask[0, 0, 0], mask[1, 0, 0])}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    o: Tensor = rtk.attention(q, k, v, softmax_scale=scaling, softcap=softcap or 0.0, layout="bshd", **how)
    return o


# --- what we cannot serve --------------------------------------------------------------------------------------------


def _why_not(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> str | None:
    """Why rtk.attention cannot serve the call, in a few words; None where it can."""
    for name, reason in _NOT_OURS.items():
        option = options.get(name)
        if option is not None and (isinstance(option, Tensor) or option != 0):
            return reason
    return _why_not_tensors(query, key, value) or _why_not_mask(query, key, mask)


def _why_not_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.device.type == "cuda":
        if torch.cuda.get_device_capability(query.device) != HOPPER:
            return "another GPU than Hopper"
        cast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in HALF
        if query.dtype not in HALF and not cast:
            return f"dtype {query.dtype} on a GPU".replace("torch.", "")
    elif query.device.type != "cpu":
        return "another kind of device"
    if not query.dtype == key.dtype == value.dtype:
        return "several dtypes"
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1]:
        return "shapes that are broadcast"
    if any(x.shape[3] % HEAD_DIM_MULTIPLE or x.shape[3] > MAX_HEAD_DIM for x in (query, value)):
        return f"a head_dim that is no multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    return None


def _why_not_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> str | None:
    if mask is None:
        return None
    if _is_ranges(mask):
        return None if mask.shape[3] == query.shape[0] and query.shape[2] == 1 else "shapes that are broadcast"
    if not isinstance(mask, BandMask):
        return TRACED if torch.compiler.is_compiling() else getattr(mask, "rtk_reason", "a mask of four dimensions")
    if mask.shape != (query.shape[0], 1, query.shape[2], key.shape[2]):
        return "shapes that are broadcast"
    return None


def _is_ranges(mask: Tensor) -> bool:
    """Whether it is the int32 (2, 1, 1, batch) that make_mask has for one query."""
    return bool(mask.dtype == torch.int32 and mask.shape[:3] == (2, 1, 1))


def _as_dense(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """What "sdpa" would have got: None or (batch, 1, seqlen_q, seqlen_k)."""
    if isinstance(mask, BandMask):
        return mask.dense()
    if mask is not None and _is_ranges(mask):
        place = torch.arange(key.shape[2], device=mask.device)
        first, end = mask[0, 0, 0, :, None, None, None], mask[1, 0, 0, :, None, None, None]
        return (place >= first) & (place < end)
    return mask


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Softmax with softcap and sinks, written out, shapes as in `attention`: torch's own function has neither."""
    heads_kv, seqlen_q, seqlen_k = key.shape[1], query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = (query.unflatten(1, (heads_kv, -1)) @ key.unsqueeze(2).mT).flatten(1, 2).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and seqlen_q > 1:
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    sinks = options.get("s_aux")
    if sinks is not None:  # one more key of each head, whose value is zero
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :seqlen_k].to(value.dtype)
    weights = torch.nn.functional.dropout(weights, options.get("dropout", 0.0))
    o = (weights.unflatten(1, (heads_kv, -1)) @ value.unsqueeze(2)).flatten(1, 2)
    return o.transpose(1, 2).contiguous()
