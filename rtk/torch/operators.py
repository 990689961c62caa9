"""torch.ops.rtk.attention_fwd and attention_bwd: what torch.compile, autograd, autocast, vmap and export see of us.

Defined by `torch.library` with define and impl (its custom_op costs more a call). The backward is an operator of its
own (`rtk.torch.backward`), from the saved q, k, v, o and lse: no forward is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtk import ops, repeats
from rtk.arrays import library
from rtk.errors import UnsupportedError
from rtk.torch import backward
from rtk.torch.watching import is_batch, watched

# None: the default softmax_scale, an unbounded window. `config`: see _of_text.
_OPTIONS = (
    "bool causal=False, bool top_left=False, SymInt? window_left=None, SymInt? window_right=None, "
    "float? softmax_scale=None, float softcap=0.0"
)
_RANGE = "Tensor? kv_first=None, Tensor? kv_end=None"
_FWD = (
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_RANGE}, *, {_OPTIONS}, "
    'str config="", bool batch_invariant=False, SymInt sm_margin=0) -> (Tensor o, Tensor lse)'
)
_BWD = (
    "attention_bwd(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_RANGE}, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)

_library = torch.library.Library("rtk", "DEF")
_library.define(_FWD)
_library.define(_BWD)


# --- forward ---------------------------------------------------------------------------------------------------------


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_first: Tensor | None = None,
    kv_end: Tensor | None = None,
    *,
    causal: bool = False,
    top_left: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    config: str = "",
    batch_invariant: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    align = "top-left" if top_left else "bottom-right"
    window = _window(window_left, window_right)
    with torch.no_grad():  # what the backward needs is saved by autograd's own part
        found = key = None
        if kv_first is None and kv_end is None and not config:
            meaning = (causal, align, window, softmax_scale, softcap, "bhsd")
            found, key = repeats.repeat(q, k, v, (True, *meaning, batch_invariant, sm_margin))
        if found is not None:
            return found  # type: ignore[no-any-return]
        return ops.attention_fwd(  # type: ignore[no-any-return]
            q,
            k,
            v,
            causal=causal,
            causal_align=align,
            window_size=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            kv_range=None if kv_first is None and kv_end is None else (kv_first, kv_end),
            layout="bhsd",
            return_lse=True,
            out=library("torch").result(q, v.shape[3]),
            config=_of_text(config),
            batch_invariant=batch_invariant,
            sm_margin=sm_margin,
            remember_as=key,
        )


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The results' shapes, dtypes and strides, for tensors without memory."""
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v have four dimensions each")
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[0], q.shape[1], q.shape[2]), dtype=lse_dtype)
    return library("torch").result(q, v.shape[3]), lse


_library.impl("attention_fwd", _fwd, "CPU")
_library.impl("attention_fwd", _fwd, "CUDA")
torch.library.register_fake("rtk::attention_fwd", _fwd_fake, lib=_library)


# --- gradients -------------------------------------------------------------------------------------------------------

_MEANING = ("causal", "top_left", "window_left", "window_right", "softmax_scale", "softcap")


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, kv_first, kv_end = inputs
    ctx.save_for_backward(q, k, v, *output, kv_first, kv_end)
    ctx.options = {name: keyword_only_inputs[name] for name in _MEANING}
    ctx.set_materialize_grads(False)


def _backward(options: dict[str, Any], *tensors: Any) -> Any:
    return torch.ops.rtk.attention_bwd(*tensors, **options)


def _differentiate(
    ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None, run: Callable[..., Any] = _backward
) -> tuple[Any, ...]:
    q, k, v, o, lse, kv_first, kv_end = ctx.saved_tensors
    if grad_o is None:
        if grad_lse is None:
            return None, None, None, None, None
        grad_o = torch.zeros_like(o)
    grads = run(ctx.options, grad_o, grad_lse, q, k, v, o, lse, kv_first, kv_end)
    return (*grads, None, None)


torch.library.register_autograd("rtk::attention_fwd", _differentiate, setup_context=_save, lib=_library)


def _bwd_fake(grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_library.impl("attention_bwd", backward.attention_bwd, "CPU")
_library.impl("attention_bwd", backward.attention_bwd, "CUDA")
torch.library.register_fake("rtk::attention_bwd", _bwd_fake, lib=_library)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError("backward", "a derivative of the backward", "first derivatives: create_graph=False")


torch.library.register_autograd("rtk::attention_bwd", _no_second_derivative, lib=_library)


# --- autocast, vmap --------------------------------------------------------------------------------------------------


def _autocast_for(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Any, dtype: torch.dtype) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible and x.device.type == device_type else x

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.rtk.attention_fwd(*(cast(x, dtype) for x in (q, k, v)), *rest, **options)

    _library.impl("attention_fwd", run, key)


_autocast_for("cuda", "AutocastCUDA")
_autocast_for("cpu", "AutocastCPU")


def _folded(info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """A mapped dimension is more batch: it goes before the batch of each tensor, and is made one with it."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    return [fold(x, dim) for x, dim in zip(arguments, in_dims, strict=False)]


def _vmap_of(operator: Any, results: int) -> Callable[..., Any]:
    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        found = operator(*_folded(info, in_dims, arguments), **options)
        size = info.batch_size
        return tuple(x.unflatten(0, (size, x.shape[0] // max(size, 1))) for x in found), (0,) * results

    return run


torch.library.register_vmap("rtk::attention_fwd", _vmap_of(torch.ops.rtk.attention_fwd, 2), lib=_library)
torch.library.register_vmap("rtk::attention_bwd", _vmap_of(torch.ops.rtk.attention_bwd, 3), lib=_library)


class Transformable(torch.autograd.Function):  # type: ignore[misc]
    """The same gradients for torch.func, whose transforms want them as an autograd.Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(options: dict[str, Any], *tensors: Any) -> Any:
        return torch.ops.rtk.attention_fwd(*tensors, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        options, *tensors = inputs
        _save(ctx, tuple(tensors), options, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_differentiate(ctx, grads[0], grads[1], _TransformableBackward.apply)


class _TransformableBackward(torch.autograd.Function):  # type: ignore[misc]
    generate_vmap_rule = True

    @staticmethod
    def forward(options: dict[str, Any], *tensors: Any) -> Any:
        return torch.ops.rtk.attention_bwd(*tensors, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _no_second_derivative(ctx)


class Direct(torch.autograd.Function):  # type: ignore[misc]
    """The same gradients where nothing but autograd wants to see the call: the dispatcher's part in it takes 0.1 ms."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], known: repeats.Known | None, *tensors: Any) -> Any:
        if known is None:
            results = _fwd(*tensors, **options)
        else:
            q, k, v, *_ = tensors
            results = repeats.kinds[type(q)].run(known, q, k, v, None, None, return_lse=True)
        _save(ctx, tensors, options, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *_differentiate(ctx, grads[0], grads[1], _direct_backward)


def _direct_backward(options: dict[str, Any], *tensors: Any) -> Any:
    # With create_graph a second derivative would be wanted of this one: the operator says that there is none. And what
    # watches, or gradients that are a batch of gradients, are the operator's too.
    batched = any(is_batch(x) for x in tensors[:2] if x is not None)
    return (_backward if batched or torch.is_grad_enabled() or watched() else _plain_backward)(options, *tensors)


def _plain_backward(options: dict[str, Any], *tensors: Any) -> Any:
    return backward.attention_bwd(*tensors, **options)


# --- options ---------------------------------------------------------------------------------------------------------


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None] | None:
    return None if left is None and right is None else (left, right)


def _of_text(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    fields = dict(part.split("=", 1) for part in text.split(","))
    words: dict[str, Any] = {"True": True, "False": False}
    return {name: words[value] if value in words else _number(value) for name, value in fields.items()}


def _number(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text
