"""The door for kernels that rtk does not bring: compiled and run from a spec, as attention is from its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rtk import arrays as array_libraries
from rtk import counters, jit
from rtk.arrays import ANY_DTYPES, Library, View, itemsize, numpy_dtype
from rtk.autotune import choice
from rtk.cache import Cache
from rtk.errors import ArgumentError
from rtk.jit import Binary
from rtk.launch import PLANS_REMEMBERED, Plan, Recent, check_device
from rtk.operands import check_room, device_name, overlap, overlaps_itself, view_of
from rtk.problem import is_integer
from rtk.spec import WIDEST_ACCESS_BYTES, KernelSpec, Operand, config_fields

Problem = TypeVar("Problem")
Config = TypeVar("Config")


def compile(
    spec: KernelSpec[Problem, Config],
    configs: Iterable[Config] | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int, Binary], None] | None = None,
    cache: Cache | None = None,
) -> list[Binary]:
    """Compiles configurations of a kernel for sm_90a, in parallel, or takes them from the cache. Needs no GPU.

    Args:
        spec: the kernel.
        configs: which; None for `spec.samples()`. `spec.configs(problem)` is all that may serve a problem.
        jobs: threads; None for one per usable CPU.
        progress: called as progress(done, total, binary) when each is finished.
        cache: where cubins are kept; None for the user's cache folder.

    Returns:
        A Binary for each config, in their order. Its `report` has registers, stack and spills (bytes per thread),
        static shared memory (bytes per block), the compiler's warnings and the milliseconds the compile took;
        `report.problems()` says in words what makes the kernel slower than it looks.

    Raises:
        CompileError: NVRTC refuses the source, a static_assert fails, or a header is not found; it shows the source.
        ArgumentError: a config's field is not an int of 32 bits or a bool.
        ToolchainError: there is no NVRTC; `rtk doctor` says what to install.
    """
    chosen = spec.samples() if configs is None else configs
    return jit.build_many([spec.render(config) for config in chosen], jobs=jobs, progress=progress, cache=cache)


def run(
    spec: KernelSpec[Any, Config],
    arrays: Mapping[str, Any],
    *,
    config: Config | None = None,
    sm_margin: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Runs a kernel on arrays of CuPy or torch on a Hopper GPU; on arrays of the CPU, its reference.

    The arrays are checked against `spec.operands(spec.problem(views, **options))`. The kernel is compiled when it is
    first asked for, and enqueued on the caller's current stream; results and workspace come from the caller's
    allocator. What a launch needs is prepared once for all calls with equal options and with arrays of equal shapes,
    strides, dtypes and device: options are for values that repeat. Any number of threads may call.

    Args:
        spec: the kernel.
        arrays: by name. All of one library, on one device. A result that is missing or None is allocated.
        config: the configuration to use; None for what was tuned and stored, else for `spec.pick(problem)`.
        sm_margin: multiprocessors to leave free for other work; the spec's grid heeds it.
        **options: what `spec.problem` takes besides the arrays.

    Returns:
        The arrays that the kernel wrote, by name: those passed, or new ones in C order.

    Raises:
        ArgumentError: an array or option that does not fit; names it, and nothing was launched.
        UnsupportedError: another GPU than Hopper, or no reference for arrays on the CPU.
        CompileError, ToolchainError: as `rtk.compile`.
    """
    library, views = checked_arrays(arrays)
    first = next(iter(views))
    device = views[first].device
    if not is_integer(sm_margin) or sm_margin < 0:
        raise ArgumentError("sm_margin", sm_margin, "an integer of at least 0: multiprocessors to leave free")
    if device is None:
        return _on_cpu(spec, library, arrays, views, options)
    check_device(first, device, sm_margin)
    key = (
        spec,
        config,
        sm_margin,
        device,
        tuple(arrays),
        tuple((name, v.shape, v.strides, v.dtype, v.pointer % WIDEST_ACCESS_BYTES) for name, v in views.items()),
        tuple((name, type(value), value) for name, value in options.items()),
        choice.epoch(),
    )
    call = _prepared(key, {"spec": spec, "config": config, **options})
    if call is None:
        call = _prepare(spec, library, arrays, views, device, config, sm_margin, options)
        _calls.put(key, call)
    _check_written(call.written, library, arrays, views)
    results = dict(arrays)
    for name, operand in call.made.items():
        results[name] = library.empty(operand.shape, operand.dtype, device)
        views[name] = library.view(results[name], name, ANY_DTYPES)
    counters.add("calls")
    call.plan.run(library, [views[name].pointer if name in views else 0 for name in call.plan.arrays])
    for name in call.written:
        if name not in call.made:
            library.written(arrays[name])
    return {name: results[name] for name in call.written}


# --- what was prepared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What all calls with one key share."""

    plan: Plan
    made: dict[str, Operand]  # results that the calls do not bring
    written: tuple[str, ...]


_calls: Recent[Any, _Call] = Recent(PLANS_REMEMBERED)


def _prepared(key: Any, values: Mapping[str, Any]) -> _Call | None:
    try:
        return _calls.get(key)
    except TypeError:
        for name, value in values.items():
            try:
                hash(value)
            except TypeError:
                received = f"a {type(value).__name__}, which has no hash"
                raise ArgumentError(
                    name, received, "a value that can be looked up: a number, string or tuple"
                ) from None
        raise


def _prepare(
    spec: KernelSpec[Any, Any],
    library: Library,
    arrays: Mapping[str, Any],
    views: Mapping[str, View],
    device: int,
    config: Any,
    sm_margin: int,
    options: Mapping[str, Any],
) -> _Call:
    problem, operands = checked_call(spec, arrays, views, options)
    made = {name: operand for name, operand in operands.items() if _is_made(name, operand, views)}
    new = {name: View(0, x.shape, c_strides(x.shape), x.dtype, device) for name, x in made.items()}
    for name, view in new.items():
        check_room(name, "a result", view, view.shape)
    config = _chosen(spec, problem, config, library, device)
    plan = Plan.of(spec, problem, config, {**views, **new}, device, sm_margin=sm_margin)
    unknown = [name for name in plan.arrays if name not in operands]
    if unknown:
        raise ArgumentError(f"{spec.name}.bind", f"the array {unknown[0]!r}", f"one of {', '.join(operands)}")
    written = tuple(x for x, operand in operands.items() if operand.written and (x in views or x in made))
    return _Call(plan, made, written)


def _chosen(spec: KernelSpec[Any, Any], problem: Any, config: Any, library: Library, device: int) -> Any:
    if config is None:
        return choice.for_call(spec, problem, device, library.stream(device)).config
    config_fields(config)
    reason = spec.refusal(problem, config)
    if reason is not None:
        raise ArgumentError("config", f"{config}: {reason}", "a config that can serve the call")
    return config


def _is_made(name: str, operand: Operand, views: Mapping[str, View]) -> bool:
    return operand.written and not operand.optional and name not in views


# --- checks -----------------------------------------------------------------------------------------------------------


class _Views(dict[str, View]):
    """Views by name; asking for an array that was not passed is the caller's error."""

    def __missing__(self, name: str) -> View:
        raise ArgumentError(name, "nothing", "an array")


def checked_arrays(arrays: Mapping[str, Any]) -> tuple[Library, _Views]:
    """The arrays that are there, all of one library and on one device."""
    if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
        raise ArgumentError("arrays", arrays, "arrays by name, as {'x': x, 'weight': weight}")
    found, views, first = None, _Views(), ""
    for name, array in arrays.items():
        if array is None:
            continue
        library = array_libraries.library_of(array)
        if library is None:
            received = f"an object of type {type(array).__name__}"
            hint = "Others go through cupy.from_dlpack or torch.from_dlpack."
            raise ArgumentError(name, received, "an array of CuPy, torch or NumPy", hint)
        if found is None:
            found, first = library, name
        elif library is not found:
            received = f"an object of type {type(array).__name__}"
            raise ArgumentError(name, received, f"an array of {found.name}, as {first} is")
        view = views[name] = view_of(library, array, name, ANY_DTYPES)
        if view.device != views[first].device:
            received = f"an array on {device_name(view.device)}"
            raise ArgumentError(name, received, f"{device_name(views[first].device)}, as {first} is")
    if found is None:
        raise ArgumentError("arrays", "no array", "at least one")
    return found, views


def checked_call(
    spec: KernelSpec[Any, Any], arrays: Mapping[str, Any], views: Mapping[str, View], options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Operand]]:
    """The problem of a call and its operands, each array that is there checked."""
    signature = inspect.signature(spec.problem)
    try:
        signature.bind(views, **options)
    except TypeError as error:
        wanted = [name for name in signature.parameters if name != next(iter(signature.parameters))]
        accepted = ", ".join(wanted) or "none"
        raise ArgumentError("options", f"{', '.join(options) or 'none'}: {error}", accepted) from None
    problem = spec.problem(views, **options)
    operands = spec.operands(problem)
    for name in arrays:
        if name not in operands:
            raise ArgumentError(name, "an array", f"one of {', '.join(operands)}: {spec.name} takes no other")
    for name, operand in operands.items():
        if name in views:
            _check_operand(name, views[name], operand)
        elif not operand.optional and not operand.written:
            raise ArgumentError(name, "nothing", f"an array of shape {operand.shape}, dtype {operand.dtype}")
    return problem, operands


def _check_operand(name: str, view: View, operand: Operand) -> None:
    if view.shape != operand.shape:
        raise ArgumentError(name, f"shape {view.shape}", f"shape {operand.shape}")
    if view.dtype != operand.dtype:
        raise ArgumentError(name, f"dtype {view.dtype}", operand.dtype)
    if 0 in view.shape:
        return
    steps = [(length, stride) for length, stride in zip(view.shape, view.strides, strict=True)]
    received = f"shape {view.shape} with strides {view.strides}"
    if operand.contiguous:
        if any(a != b for (length, a), b in zip(steps, c_strides(view.shape), strict=True) if length > 1):
            raise ArgumentError(name, received, "an array in C order without gaps", "Pass a contiguous copy.")
    elif steps and steps[-1][0] > 1 and steps[-1][1] != 1:
        raise ArgumentError(name, received, "an innermost stride of one element", "Pass a contiguous copy.")
    elif any(length > 1 and stride < 0 for length, stride in steps):
        raise ArgumentError(name, received, "strides that are not negative", "Pass a contiguous copy.")
    aligned = operand.aligned_bytes
    if view.pointer % aligned:
        raise ArgumentError(name, f"an array at address {view.pointer:#x}", f"a multiple of {aligned} bytes")
    if not operand.contiguous and any(n > 1 and s * itemsize(view.dtype) % aligned for n, s in steps[:-1]):
        raise ArgumentError(name, received, f"outer strides of a multiple of {aligned} bytes")


def _check_written(
    written: tuple[str, ...], library: Library, arrays: Mapping[str, Any], views: Mapping[str, View]
) -> None:
    """Results that the call brings can be written to, and share no memory."""
    for name in written:
        if name not in views:
            continue
        if not library.writable(arrays[name]):
            raise ArgumentError(name, "a read-only array", "one that can be written")
        if overlaps_itself(views[name]):
            raise ArgumentError(name, f"strides {views[name].strides}: elements share memory", "distinct elements")
        for other, view in views.items():
            if other != name and overlap(views[name], view):
                raise ArgumentError(name, f"an array that shares memory with {other}", "memory of its own")


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array in C order."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.insert(0, step)
        step *= length
    return tuple(strides)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _on_cpu(
    spec: KernelSpec[Any, Any],
    library: Library,
    arrays: Mapping[str, Any],
    views: Mapping[str, View],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    problem, operands = checked_call(spec, arrays, views, options)
    written = tuple(name for name, x in operands.items() if x.written and (name in views or not x.optional))
    _check_written(written, library, arrays, views)
    results = reference(spec, problem, operands, {name: library.to_numpy(arrays[name]) for name in views})
    counters.add("calls")
    counters.add("cpu_calls")
    answer = {}
    for name in written:
        result = library.from_numpy(results[name])
        if name in views:
            library.assign(arrays[name], result)
        answer[name] = arrays[name] if name in views else result
    return answer


def reference(
    spec: KernelSpec[Any, Any], problem: Any, operands: Mapping[str, Operand], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """The spec's reference of NumPy arrays, its results rounded to the dtypes of the operands."""
    exact = exact_reference(spec, problem, operands, arrays)
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: np.ascontiguousarray(result.astype(numpy_dtype(operands[name].dtype)))
            for name, result in exact.items()
        }


def exact_reference(
    spec: KernelSpec[Any, Any], problem: Any, operands: Mapping[str, Operand], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """The spec's reference of NumPy arrays in float64 (integers stay as they are), its shapes checked."""
    given = {
        name: array.astype(np.float64) if operands[name].dtype.endswith(("float16", "float32", "float64")) else array
        for name, array in arrays.items()
    }
    found = spec.reference(problem, given)
    results = {}
    for name, operand in operands.items():
        if operand.written and (name in found or not operand.optional):
            result = np.asarray(found[name]) if name in found else None
            if result is None or result.shape != operand.shape:
                received = "no result" if result is None else f"shape {result.shape}"
                raise ArgumentError(f"{spec.name}.reference: {name}", received, f"shape {operand.shape}")
            results[name] = result
    return results
