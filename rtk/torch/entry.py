"""rtk.attention where torch wants to see the call: checked, then by the operator, or as a function of autograd's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtk import ops, repeats
from rtk.errors import ArgumentError, UnsupportedError
from rtk.launch import MisalignedError
from rtk.problem import check_numbers, check_words, window_bounds
from rtk.torch.operators import Direct, Transformable
from rtk.torch.watching import transforms


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    causal_align: str,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    kv_range: Any,
    layout: str,
    return_lse: bool,
    out: Any,
    config: Any,
    batch_invariant: bool,
    sm_margin: int,
    interest: str,
) -> Any:
    """rtk.attention for whom `interest` names: arguments as there."""
    direct = interest == "autograd"  # neither while compiling nor under a transform
    meaning = (causal, causal_align, window_size, softmax_scale, softcap)
    if direct and layout == "bhsd" and out is kv_range is config is None and isinstance(return_lse, bool):
        found = _again(q, k, v, meaning, batch_invariant, sm_margin)
        if found is not None:
            return found if return_lse else found[0]
    if not torch.compiler.is_compiling():  # a trace meets wrong arguments when the kernel runs
        _check_tensors(q, k, v)
        check_words(causal, causal_align, layout)
        check_numbers(softmax_scale, softcap)
        ops.check_steering(return_lse, config, batch_invariant, sm_margin)
    if out is not None:
        accepted = "None where gradients, a transform, a trace, autocast or a tensor subclass are in play"
        raise UnsupportedError("out", "an array", accepted, "Under torch.no_grad() it is written to.")
    swapped = layout == "bshd"
    if swapped:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    first, end = _bounds(kv_range)
    options = _options(meaning, batch_invariant, sm_margin) | {"config": _as_text(config)}
    if direct:
        o, lse = Direct.apply(options, None, q, k, v, first, end)
    elif not torch.compiler.is_compiling() and transforms():
        o, lse = Transformable.apply(options, q, k, v, first, end)
    else:
        o, lse = torch.ops.rtk.attention_fwd(q, k, v, first, end, **options)
    o = o.transpose(1, 2) if swapped else o
    return (o, lse) if return_lse else o


def _again(q: Tensor, k: Tensor, v: Tensor, meaning: tuple[Any, ...], batch_invariant: bool, sm_margin: int) -> Any:
    """(o, lse), differentiable, of a call whose forward was made before and need not be checked; None of another."""
    kind = repeats.kinds.get(type(q))
    if kind is None:
        return None
    with torch.no_grad():
        known, _ = kind.find(q, k, v, (True, *meaning, "bhsd", batch_invariant, sm_margin))
    if known is None:
        return None
    try:
        return Direct.apply(_options(meaning, batch_invariant, sm_margin), known, q, k, v, None, None)
    except MisalignedError:
        return None


def _options(meaning: tuple[Any, ...], batch_invariant: bool, sm_margin: int) -> dict[str, Any]:
    """The operator's options, of rtk.attention's (causal, causal_align, window_size, softmax_scale, softcap)."""
    causal, causal_align, window_size, softmax_scale, softcap = meaning
    left, right = (None if side is None or side >= _FAR else side for side in window_bounds(window_size))
    return {
        "causal": causal,
        "top_left": causal_align == "top-left",
        "window_left": left,
        "window_right": right,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "batch_invariant": batch_invariant,
        "sm_margin": sm_margin,
    }


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What would not be an error of ours further down."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not issubclass(type(x), Tensor):  # a mock says that it is an instance
            raise ArgumentError(name, f"an object of type {type(x).__name__}", "an array of torch, as q is")
        if x.is_nested or type(x).__module__.startswith("torch.masked"):
            raise ArgumentError(name, f"a {type(x).__name__}, nested or masked", "a dense strided tensor")
        if (
            torch.autograd.forward_ad._current_level >= 0
            and torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        ):
            received = "a tensor with a tangent (forward-mode differentiation)"
            raise UnsupportedError(name, received, "tensors without one", "Reverse mode works: torch.func.grad.")


_FAR = 1 << 31  # beyond any key


def _bounds(kv_range: Any) -> tuple[Any, Any]:
    if kv_range is None:
        return None, None
    accepted = "None or a pair (first, end), each None or an int32 tensor (batch,)"
    if not isinstance(kv_range, (tuple, list)) or len(kv_range) != 2:
        raise ArgumentError("kv_range", kv_range, accepted)
    for place, x in enumerate(kv_range):
        if x is not None and not isinstance(x, Tensor):
            raise ArgumentError(f"kv_range[{place}]", f"an object of type {type(x).__name__}", accepted)
    return kv_range[0], kv_range[1]


def _as_text(config: Any) -> str:
    """Fields as "BLOCK_M=64,PINGPONG=True": what an operator can take. (By hand: a trace cannot follow json.)"""
    if config is None:
        return ""
    fields = dict(config) if isinstance(config, Mapping) else vars(config)
    return ",".join([f"{name}={value}" for name, value in fields.items()])
