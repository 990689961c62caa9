"""The checks that rtk's own kernels pass, for any spec: what the compiler made of it, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from rtk import jit
from rtk.arrays import Library, numpy_dtype
from rtk.cache import Cache
from rtk.errors import ArgumentError, CompileError
from rtk.jit import Binary
from rtk.launch import block_problems, check_device
from rtk.spec import SHARED_BYTES_PER_BLOCK, KernelSpec, Operand
from rtk.toolkit import checked_arrays, checked_call, exact_reference, run
from rtk.toolkit import compile as compile_configs

Config = TypeVar("Config")

_GUARD_ELEMENTS = 1024  # before and after each result; a multiple of what any access is aligned to
_GUARD = 77.0  # exact in every dtype


def check_spec(
    spec: KernelSpec[Any, Config],
    configs: Iterable[Config] | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int, Binary], None] | None = None,
    cache: Cache | None = None,
) -> list[str]:
    """What is wrong with a kernel as far as the compiler can tell, in words; empty is the only good answer.

    Compiles `configs` (None for `spec.samples()`) as `rtk.compile` does; needs no GPU. Each must compile, without a
    stack frame, a spill or a performance warning, fit a block's threads and shared memory, and have a label of its own.
    Raises ArgumentError for a field that is no int or bool, ToolchainError where there is no NVRTC.
    """
    chosen = list(spec.samples() if configs is None else configs)
    if not chosen:
        return [f"{spec.name}: no samples: define sample_problems, or pass configs"]
    found: list[str] = []
    by_label: dict[str, Config] = {}
    for config in chosen:
        label = spec.label(config)
        if by_label.setdefault(label, config) != config:
            found.append(f"{label}: the label of {by_label[label]} and of {config}")
    sources = [spec.render(config) for config in chosen]
    try:
        binaries: list[Binary | CompileError] = []
        binaries += jit.build_many(sources, jobs=jobs, progress=progress, cache=cache)
    except CompileError:  # one refused: the others, already compiled or not, are to be heard too
        binaries = [_build(source, cache) for source in sources]
    for config, binary in zip(chosen, binaries, strict=True):
        found += config_problems(spec, config, binary)
    return found


def config_problems(spec: KernelSpec[Any, Config], config: Config, binary: Binary | CompileError) -> list[str]:
    """What is wrong with one compiled config, in words."""
    label = spec.label(config)
    found = [
        f"{label}: {what} {received}, accepted: {accepted}" for what, received, accepted in block_problems(spec, config)
    ]
    if isinstance(binary, CompileError):
        return [*found, f"{label}: {binary}"]
    shared = spec.shared_bytes(config) + binary.report.smem_static_bytes
    if not found and shared > SHARED_BYTES_PER_BLOCK:
        found.append(f"{label}: {shared} bytes of shared memory, {SHARED_BYTES_PER_BLOCK} are there")
    return found + binary.report.problems()


def _build(source: jit.Source, cache: Cache | None) -> Binary | CompileError:
    try:
        return jit.build(source, cache=cache)
    except CompileError as error:
        return error


def check_run(
    spec: KernelSpec[Any, Config],
    arrays: Mapping[str, Any],
    *,
    configs: Iterable[Config] | None = None,
    ulps: float = 1.0,
    absolute: float = 0.0,
    repeatable: bool = True,
    **options: Any,
) -> list[str]:
    """What is wrong with a kernel's results on these arrays of a GPU, in words; empty is the only good answer.

    Runs each config as `rtk.run` does, and raises what that raises. The results must be those of `spec.reference` in
    float64, every element must be written and nothing around them, the other arrays must be left as they were, and a
    second run must give the same bits.

    Args:
        spec: the kernel.
        arrays: its inputs by name, of CuPy or torch. Results are made here, between guard zones; where one is passed,
            they begin as copies of it, for a kernel that reads what it writes.
        configs: which; None for all of `spec.configs(problem)`.
        ulps: how far a result may be off, in units of its last place; integers must be equal.
        absolute: how far it may be off besides.
        repeatable: whether a second run must give the same bits.
        **options: what `spec.problem` takes besides the arrays.
    """
    library, views = checked_arrays(arrays)
    first = next(iter(views))
    device = views[first].device
    if device is None:
        raise ArgumentError(first, "an array on the CPU", "arrays on a GPU: on the CPU the reference itself runs")
    check_device(first, device, 0)
    problem, operands = checked_call(spec, arrays, views, options)
    before = {name: to_host(library, arrays[name]) for name in views}
    expected = exact_reference(spec, problem, operands, before)
    chosen = list(spec.configs(problem) if configs is None else configs)
    compile_configs(spec, chosen)  # in parallel; below they are found one by one
    found: list[str] = []
    for config in chosen:
        label = spec.label(config)
        first_bits: dict[str, bytes] = {}
        for turn in range(2 if repeatable else 1):
            rooms = {name: _Room(library, operands[name], device) for name in expected}
            for name in rooms.keys() & views.keys():
                library.assign(rooms[name].result, arrays[name])
            given = {**arrays, **{name: room.result for name, room in rooms.items()}}
            run(spec, given, config=config, **options)
            for name, room in rooms.items():
                result = room.host()
                if turn == 0:
                    first_bits[name] = result.tobytes()
                    wrong = _mismatch(result, expected[name], operands[name].dtype, ulps, absolute)
                    found += [f"{label}: {name}: {wrong}"] if wrong else []
                    found += [f"{label}: {name}: the kernel wrote outside it"] if room.trespassed() else []
                elif result.tobytes() != first_bits[name]:
                    found.append(f"{label}: {name}: a repeat gives other bits")
        found += [
            f"{label}: {name}: the kernel changed it"
            for name in views
            if name not in rooms and to_host(library, arrays[name]).tobytes() != before[name].tobytes()
        ]
    return found


class _Room:
    """A result between two guard zones, NaN (or the guard) in it until the kernel writes."""

    def __init__(self, library: Library, operand: Operand, device: int) -> None:
        self.library, self.dtype, self.size = library, operand.dtype, math.prod(operand.shape)
        self.room = library.empty((self.size + 2 * _GUARD_ELEMENTS,), operand.dtype, device)
        library.fill(self.room, _GUARD)
        inner = self.room[_GUARD_ELEMENTS : _GUARD_ELEMENTS + self.size]
        if "float" in operand.dtype:
            library.fill(inner, float("nan"))
        self.result = inner.reshape(operand.shape)

    def host(self) -> np.ndarray[Any, Any]:
        return to_host(self.library, self.result)

    def trespassed(self) -> bool:
        room = to_host(self.library, self.room).astype(np.float64)
        guard = 1.0 if self.dtype == "bool" else _GUARD
        return bool((room[:_GUARD_ELEMENTS] != guard).any() or (room[_GUARD_ELEMENTS + self.size :] != guard).any())


def to_host(library: Library, array: Any) -> np.ndarray[Any, Any]:
    """A copy of a GPU array as NumPy, after the work of the current stream."""
    if library.name == "cupy":
        copy: np.ndarray[Any, Any] = array.get()
        return copy
    return library.to_numpy(array.detach().cpu())


def _mismatch(
    got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], dtype: str, ulps: float, absolute: float
) -> str:
    """The worst element in words, or ""."""
    if "float" not in dtype:
        wrong = got.astype(expected.dtype) != expected
        error = wrong.astype(np.float64)
        allowed = np.zeros_like(error)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = expected.astype(numpy_dtype(dtype)).astype(np.float64)  # infinite where it is out of range
            difference = np.abs(got.astype(np.float64) - expected)
        allowed = ulps * _ulp(expected, dtype) + absolute
        same = (got.astype(np.float64) == rounded) | (np.isnan(expected) & np.isnan(got.astype(np.float64)))
        error = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
        wrong = error > allowed
    if not wrong.any():
        return ""
    excess = np.where(wrong, error - allowed, -1.0)
    place = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
    share = f"{int(wrong.sum())} of {wrong.size} elements are off"
    return f"{share}, worst at {place}: {got[place]}, should be {expected[place]:.9g} within {allowed[place]:.3g}"


def _ulp(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The distance of a value to its neighbours in a dtype."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    _, exponent = np.frexp(np.where(np.isfinite(values), np.abs(values), 0.0))
    spacing = np.ldexp(float(info.eps), exponent - 1)
    result: np.ndarray[Any, Any] = np.maximum(spacing, float(info.smallest_subnormal))
    return result
