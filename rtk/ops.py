"""attention_fwd for any array: check, allocate, choose, launch; or, on the CPU, compute."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rtk import arrays, counters, dlpack, reference, repeats, tma
from rtk.arrays import Library, View
from rtk.autotune import choice, recording
from rtk.errors import ArgumentError, RtkError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC, AttentionFwdConfig
from rtk.launch import PLANS_REMEMBERED, Plan, Recent, check_device
from rtk.operands import Operands, check_out, check_room
from rtk.problem import AttentionProblem, attention_problem, is_bool, is_integer, to_bhsd, window_bounds

GPU_DTYPES = ("float16", "bfloat16")
_CONFIGS = "None, an AttentionFwdConfig, or a dict of some of its fields such as {'BLOCK_M': 128, 'BLOCK_N': 96}"
_GREATEST_SOFTCAP = 1000.0  # beyond, tanh in float32 loses more of a score than float16 can tell

_problem = functools.lru_cache(maxsize=PLANS_REMEMBERED, typed=True)(attention_problem)
_plans: Recent[Any, Plan] = Recent(PLANS_REMEMBERED)


def attention_fwd(
    q: Any,
    k: Any,
    v: Any,
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
    remember_as: Any = None,
) -> Any:
    """See rtk.attention. Returns o, or (o, lse) with return_lse.

    remember_as: the key by which the call is remembered, where it can be repeated (rtk.repeats). Its `out`, if there is
    one, lies as the result of a call without would.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "causal_align": causal_align,
        "window_size": window_bounds(window_size),  # checked before it is looked up, where (1, 0) equals (True, 0.0)
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "layout": layout,
    }
    check_steering(return_lse, config, batch_invariant, sm_margin)
    choices = _Choices(config, batch_invariant, sm_margin)
    library = arrays.library_of(q)
    if library is None:
        return _through_dlpack(q, k, v, kv_range, out, return_lse, options, choices)
    _check_library(library, {"k": k, "v": v} if out is None else {"k": k, "v": v, "out": out})
    counters.add("calls")
    operands = Operands(library, q, k, v)
    problem = _checked_problem(operands, options)
    bounds = (0, 0)
    if kv_range is not None:
        bounds = operands.read_range(kv_range, problem.batch)
        problem = replace(problem, kv_ranges=any(bounds))
    _check_choices(problem, choices)
    if out is not None:
        check_out(operands, out, to_bhsd(problem.o_shape, layout))
    device = operands.q.device
    if out is None or device is None:
        check_room("q", "a result", operands.q, problem.o_shape)
    if device is None:
        return _on_cpu(library, problem, q, k, v, kv_range, out, layout, return_lse)
    _check_gpu(problem, device, sm_margin)
    if problem.is_empty:
        return _empty_answer(operands, problem, out, layout, return_lse)
    return _on_gpu(operands, problem, bounds, out, layout, return_lse, choices, remember_as)


def prepare(q: Any, k: Any, v: Any, *, layout: str, return_lse: bool, **options: Any) -> repeats.Known | None:
    """What a call with such arrays takes to be repeated; None where there is nothing to launch."""
    choices = _Choices(*(options.pop(name) for name in ("config", "batch_invariant", "sm_margin")))
    check_steering(return_lse, choices.config, choices.batch_invariant, choices.sm_margin)
    library = arrays.library_of(q)
    assert library is not None
    _check_library(library, {"k": k, "v": v})
    operands = Operands(library, q, k, v)
    options["window_size"] = window_bounds(options["window_size"])
    problem = _checked_problem(operands, {**options, "layout": layout})
    _check_choices(problem, choices)
    device = operands.q.device
    if device is None or problem.is_empty:
        return None
    _check_gpu(problem, device, choices.sm_margin)
    for name, view in zip("qkv", operands.views, strict=True):
        if not tma.expressible(view.pointer, view.shape, view.strides):
            accepted = "addresses and strides of 16 bytes, and rows without gaps"
            raise UnsupportedError(name, f"strides {view.strides} at address {view.pointer:#x}", accepted, "Copy it.")
    out = library.view(library.result(q, problem.head_dim_v), "out")
    stamp = choice.stamp()
    return repeats.Known(_plan(problem, operands, out, layout, choices), out, problem.lse_shape, stamp)


@dataclass(frozen=True)
class _Choices:
    """What steers a launch and not its result's meaning, as received."""

    config: Any
    batch_invariant: bool
    sm_margin: int


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_library(library: Library, others: Mapping[str, Any]) -> None:
    for name, array in others.items():
        if arrays.library_of(array) is not library:
            received = f"an object of type {type(array).__name__}"
            raise ArgumentError(name, received, f"an array of {library.name}, as q is")


def _checked_problem(operands: Operands, options: Mapping[str, Any]) -> AttentionProblem:
    shapes = (operands.q.shape, operands.k.shape, operands.v.shape, operands.q.dtype)
    try:
        return _problem(*shapes, **options)
    except RtkError:
        raise
    except Exception:  # an argument that cannot be hashed: the check itself says which, and what is accepted
        return attention_problem(*shapes, **options)


def check_steering(return_lse: Any, config: Any, batch_invariant: Any, sm_margin: Any) -> None:
    """Checks what does not change a result's meaning, by itself."""
    if not is_bool(return_lse):
        raise ArgumentError("return_lse", return_lse, "True or False")
    if not is_integer(sm_margin) or sm_margin < 0:
        raise ArgumentError("sm_margin", sm_margin, "an integer of at least 0: multiprocessors to leave free")
    if not is_bool(batch_invariant):
        raise ArgumentError("batch_invariant", batch_invariant, "True or False")
    if config is not None and not isinstance(config, (Mapping, AttentionFwdConfig)):
        raise ArgumentError("config", config, _CONFIGS)


def _check_choices(problem: AttentionProblem, choices: _Choices) -> None:
    if choices.config is not None:
        _pinned(problem, choices.config)


def _pinned(problem: AttentionProblem, config: Any) -> AttentionFwdConfig:
    """The config that the caller asked for, checked."""
    if isinstance(config, Mapping):
        try:
            config = SPEC.config(problem, **config)
        except Exception as error:
            raise ArgumentError("config", config, _CONFIGS) from error
    if not isinstance(config, AttentionFwdConfig) or not _well_typed(config):
        raise ArgumentError("config", config, _CONFIGS)
    reason = SPEC.refusal(problem, config)
    if reason is not None:
        raise ArgumentError("config", f"{config}: {reason}", "a config that can serve the call")
    return config


def _well_typed(config: AttentionFwdConfig) -> bool:
    """Ints and bools where the class has them. (True equals 1, but is another constant.)"""
    return all(type(getattr(config, field.name)).__name__ == field.type for field in fields(config))


def _check_gpu(problem: AttentionProblem, device: int, sm_margin: int) -> None:
    if problem.dtype not in GPU_DTYPES:
        received = f"dtype {problem.dtype} on a GPU"
        raise UnsupportedError("q", received, " or ".join(GPU_DTYPES), "float32 and float64 run on the CPU.")
    if problem.softcap > _GREATEST_SOFTCAP:
        raise UnsupportedError("softcap", problem.softcap, f"up to {_GREATEST_SOFTCAP:g} on a GPU")
    check_device("q", device, sm_margin)


# --- GPU --------------------------------------------------------------------------------------------------------------


def _on_gpu(
    operands: Operands,
    problem: AttentionProblem,
    bounds: tuple[int, int],
    out: Any,
    layout: str,
    return_lse: bool,
    choices: _Choices,
    remember_as: Any,
) -> Any:
    library, device = operands.library, operands.q.device
    assert device is not None
    in_place = operands.make_readable()
    target = out
    if out is not None:
        view = library.view(out, "out")
        if not tma.expressible(view.pointer, view.shape, view.strides):
            counters.add("outputs_copied")
            target = None
    if target is None:
        target = library.result(operands.arrays[0], problem.head_dim_v)
    lse = library.empty(problem.lse_shape, "float32", device) if return_lse else None
    target_view = library.view(target, "out")
    recording.seen(problem)
    stamp = choice.stamp()  # a choice that comes in from here on is another one
    plan = _plan(problem, operands, target_view, layout, choices)
    lse_pointer = 0 if lse is None else library.view(lse, "lse").pointer
    plan.run(library, (*(view.pointer for view in operands.views), target_view.pointer, lse_pointer, *bounds))
    repeats.learn(library)
    if remember_as is not None and in_place:
        repeats.remember(remember_as, repeats.Known(plan, target_view, problem.lse_shape, stamp))
    if out is not None and target is out:
        library.written(out)
    elif out is not None:
        library.keep_for_graph(target)
        library.assign(out, target)
        target = out
    return (target, lse) if return_lse else target


def _plan(problem: AttentionProblem, operands: Operands, out: View, layout: str, choices: _Choices) -> Plan:
    strides = tuple(view.strides for view in operands.views)
    config = choices.config
    pin = tuple(sorted(config.items())) if isinstance(config, Mapping) else config
    key = (
        *(problem, strides, out.strides, out.device, layout, pin, choices.batch_invariant, choices.sm_margin),
        choice.epoch(),
    )
    plan = _plans.get(key)
    if plan is None:
        if choice.current_mode() == "record":
            recording.note(problem)
        plan = _make_plan(problem, operands, out, layout, choices)
        _plans.put(key, plan)
    return plan


def _chosen(problem: AttentionProblem, choices: _Choices, library: Library, device: int) -> AttentionFwdConfig:
    """Of a batch-invariant call nothing that was measured may decide: it would have depended on the batch."""
    if choices.batch_invariant:
        return SPEC.pick(problem.without_batch())
    config: AttentionFwdConfig = choice.for_call(SPEC, problem, device, library.stream(device)).config
    return config


def _make_plan(problem: AttentionProblem, operands: Operands, out: View, layout: str, choices: _Choices) -> Plan:
    assert out.device is not None
    if choices.config is not None:
        config = _pinned(problem, choices.config)
    else:
        config = _chosen(problem, choices, operands.library, out.device)
    # As the kernel sees them, whatever the layout: (batch, heads, seqlen, head_dim).
    views = {
        name: replace(view, shape=to_bhsd(view.shape, layout), strides=to_bhsd(view.strides, layout))
        for name, view in zip("qkvo", (*operands.views, out), strict=True)
    }
    return Plan.of(SPEC, problem, config, views, out.device, sm_margin=choices.sm_margin)


def _empty_answer(operands: Operands, problem: AttentionProblem, out: Any, layout: str, return_lse: bool) -> Any:
    """No keys, or no queries: zeros and -inf, without a launch of ours."""
    library, device = operands.library, operands.q.device
    if out is None:
        out = library.empty(to_bhsd(problem.o_shape, layout), problem.dtype, device)
    library.fill(out, 0.0)
    if not return_lse:
        return out
    lse = library.empty(problem.lse_shape, "float32", device)
    library.fill(lse, float("-inf"))
    return out, lse


# --- CPU --------------------------------------------------------------------------------------------------------------


def _on_cpu(
    library: Library,
    problem: AttentionProblem,
    q: Any,
    k: Any,
    v: Any,
    kv_range: Any,
    out: Any,
    layout: str,
    return_lse: bool,
) -> Any:
    first, end = (None if x is None else library.to_numpy(x) for x in kv_range or (None, None))
    counters.add("cpu_calls")
    o, lse = reference.attention_fwd(
        *(_numpy_bhsd(library, array, layout) for array in (q, k, v)),
        softmax_scale=problem.softmax_scale,
        softcap=problem.softcap,
        window_left=problem.window_left,
        window_right=problem.window_right,
        diagonal=problem.diagonal,
        kv_range=(first, end),
    )
    result = library.from_numpy(np.ascontiguousarray(o if layout == "bhsd" else o.swapaxes(1, 2)))
    if out is not None:
        library.assign(out, result)
        result = out
    return (result, library.from_numpy(lse)) if return_lse else result


def _numpy_bhsd(library: Library, array: Any, layout: str) -> np.ndarray[Any, Any]:
    host = library.to_numpy(array)
    return host if layout == "bhsd" else host.swapaxes(1, 2)


# --- other libraries --------------------------------------------------------------------------------------------------


def _through_dlpack(
    q: Any, k: Any, v: Any, kv_range: Any, out: Any, return_lse: bool, options: Mapping[str, Any], choices: _Choices
) -> Any:
    """Arrays of a library unknown here: taken by DLPack, computed, handed back by the library's from_dlpack."""
    taken = [dlpack.adopt(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v"))]
    if out is not None:
        received = f"an object of type {type(out).__name__}"
        raise UnsupportedError("out", received, "None: results are handed back through DLPack")
    for name, operand in zip("kv", taken[1:], strict=True):
        if operand.library is not taken[0].library:
            raise ArgumentError(name, "an array on another kind of device", "arrays on one device")
    if isinstance(kv_range, (tuple, list)):
        named = ((x, f"kv_range[{place}]") for place, x in enumerate(kv_range))
        kv_range = tuple(x if x is None else dlpack.adopt(x, name, ("int32",)).array for x, name in named)
    result = attention_fwd(
        taken[0].array,
        taken[1].array,
        taken[2].array,
        **options,
        kv_range=kv_range,
        return_lse=return_lse,
        out=None,
        config=choices.config,
        batch_invariant=choices.batch_invariant,
        sm_margin=choices.sm_margin,
    )
    hand_back = taken[0].hand_back
    if hand_back is None:
        return result
    return tuple(hand_back(x) for x in result) if return_lse else hand_back(result)
