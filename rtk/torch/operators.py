"""torch.ops.rtk.attention_fwd and attention_bwd: what torch.compile, autograd, autocast, vmap and export see of us.

Defined by `torch.library` with define and impl (its custom_op costs more a call). The backward is an operator of its
own (`rtk.torch.backward`), from the saved q, k, v, o and lse: no forward is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rtk import ops, repeats
from rtk.arrays import library
from rtk.errors import ArgumentError, UnsupportedError
from rtk.launch import MisalignedError
from rtk.problem import check_numbers, check_words, window_bounds
from rtk.torch import backward

# None: the default softmax_scale, an unbounded window. `config`: see _as_text.
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


class _Transformable(torch.autograd.Function):  # type: ignore[misc]
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


class _Direct(torch.autograd.Function):  # type: ignore[misc]
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
    batched = any(_is_batch(x) for x in tensors[:2] if x is not None)
    return (_backward if batched or torch.is_grad_enabled() or watched() else _plain_backward)(options, *tensors)


def _plain_backward(options: dict[str, Any], *tensors: Any) -> Any:
    return backward.attention_bwd(*tensors, **options)


# --- the public function's way in ------------------------------------------------------------------------------------


PLAIN = (Tensor, torch.nn.Parameter)
# Names of torch._C: of torch 2.11 and later; what an older one lacks is not asked.
modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_autocast = getattr(torch._C, "_is_any_autocast_enabled", torch.is_autocast_enabled)
_trace = getattr(torch._C, "_get_tracing_state", lambda: None)
_included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False)
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)
_is_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)  # of is_grads_batched


def watched() -> bool:
    """Whether a mode, a transform, autocast or a trace wants to see what is called."""
    return bool(
        modes()
        or _transforms()
        or _autocast()
        or forward_ad._current_level >= 0
        or _trace() is not None
        or (_PRE_DISPATCH is not None and _included(_PRE_DISPATCH))  # torch.export, make_fx(pre_dispatch=True)
    )


def interest(*tensors: Any) -> str:
    """What of torch wants to see the call: "dispatcher", only "autograd", or nothing: ""."""
    if torch.compiler.is_compiling() or watched():
        return "dispatcher"
    ours = [x for x in tensors if isinstance(x, Tensor)]
    if any(type(x) not in PLAIN for x in ours):
        return "dispatcher"
    return "autograd" if torch.is_grad_enabled() and any(x.requires_grad for x in ours) else ""


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
    direct = interest == "autograd"
    if direct and layout == "bhsd" and out is kv_range is config is None and isinstance(return_lse, bool):
        meaning = (causal, causal_align, window_size, softmax_scale, softcap)
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
    meaning = (causal, causal_align, window_size, softmax_scale, softcap)
    options = _options(meaning, batch_invariant, sm_margin) | {"config": _as_text(config)}
    if torch.compiler.is_compiling():
        o, lse = torch.ops.rtk.attention_fwd(q, k, v, first, end, **options)
    elif _transforms():
        o, lse = _Transformable.apply(options, q, k, v, first, end)
    elif direct:
        o, lse = _Direct.apply(options, None, q, k, v, first, end)
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
        return _Direct.apply(_options(meaning, batch_invariant, sm_margin), known, q, k, v, None, None)
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


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None] | None:
    return None if left is None and right is None else (left, right)


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


def _of_text(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    fields = dict(part.split("=", 1) for part in text.split(","))
    words: dict[str, Any] = {"True": True, "False": False}
    return {name: words[value] if value in words else _number(value) for name, value in fields.items()}


def _number(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text
