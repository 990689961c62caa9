"""What a kernel is: a CUDA template, a frozen configuration whose fields are its constants, and the rules around them.

A kernel is a `.cuh` file and a subclass of KernelSpec, in this package (listed in `rtk/kernels/__init__.py`) or in a
user's own folder (docs/your-own-kernel.md): compiling, caching, loading, launching and checking are the same for both.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rtk.arrays import View, itemsize
from rtk.errors import ArgumentError, UnsupportedError
from rtk.jit import Source

Problem = TypeVar("Problem")  # what a call asks for, without its data; hashable where it is tuned
Config = TypeVar("Config")  # a frozen dataclass of ints and bools, in upper case

CUDA_SOURCE = Path(__file__).resolve().parent / "cuda_src"
# What RTK_DEBUG adds to a build (<rtk/debug.cuh>): a bound on waits, and with "delays" random delays at barriers.
_SPIN_LIMIT = "-DRTK_SPIN_LIMIT_NS=2000000000u"
_DEBUG_OPTIONS = {"1": (_SPIN_LIMIT,), "delays": (_SPIN_LIMIT, "-DRTK_RANDOM_DELAYS")}
SHARED_BYTES_PER_BLOCK = 232_448  # 227 KiB: what one block may have on compute capability 9.0
THREADS_PER_BLOCK = 1024
WIDEST_ACCESS_BYTES = 16  # of one load or store, and what TMA asks of addresses and strides
_TENSOR_MAP_ALIGNMENT = 64
_INT32 = range(-(1 << 31), 1 << 31)


class TensorMap(ctypes.Structure):
    """`rtk::TensorMap` of <rtk/tma.cuh>, in a parameter structure; the launch fills it in."""

    _fields_ = (("opaque", ctypes.c_byte * 128),)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a call of a kernel takes.

    Its address is a multiple of `aligned_bytes`. A contiguous one is in C order without gaps; another has an innermost
    stride of one element, and outer strides that are multiples of `aligned_bytes` and not negative.
    """

    shape: tuple[int, ...]
    dtype: str  # "float16", "bfloat16", "float32", "int32", …
    written: bool = False  # a result: made where the call brings none, and shares no memory with other arrays
    optional: bool = False  # the call may bring None, and the kernel gets a null pointer
    contiguous: bool = True
    aligned_bytes: int = 1


@dataclasses.dataclass(frozen=True)
class TensorOperand:
    """A tensor that the kernel reads by TMA; dimensions innermost first, strides in elements."""

    field: str  # of the parameter structure, a TensorMap; the name of the array too
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a kernel is launched with, but for addresses.

    `parameters` has every value in it except pointers and tensor maps. `pointers` are its fields that take the address
    of an array, `tensors` those that take a tensor map; each has the name of the array. `workspace` is the field that
    takes the address of `workspace_bytes` of device memory, cleared before every launch. `counter` is the field that
    takes the address of a 32-bit word of device memory that no other launch uses: it is zero, and the kernel leaves it
    so, which spares the clearing.
    """

    parameters: ctypes.Structure
    pointers: tuple[str, ...] = ()
    tensors: tuple[TensorOperand, ...] = ()
    workspace: str | None = None
    workspace_bytes: int = 0
    counter: str | None = None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Problems that share a stored choice: those that agree in `exact`, and in every size to the next half-step."""

    exact: tuple[tuple[str, int | float | bool | str], ...]  # names and values
    sizes: tuple[tuple[str, int], ...] = ()  # names and half_steps()

    @property
    def size_steps(self) -> tuple[int, ...]:
        return tuple(step for _, step in self.sizes)


def half_steps(size: int) -> int:
    """A size on a scale of two steps to the doubling: 0 for 1, 2 for 2, 20 for 1024, 21 for about 1448."""
    return round(2 * math.log2(max(size, 1)))


class KernelSpec(ABC, Generic[Problem, Config]):
    """One kernel.

    A subclass names its source and its parameter structure, and defines `configs`, `threads`, `grid` and `bind`;
    `problem` and `operands` too for rtk.run, `sample_problems` for rtk.check_spec and `reference` for the CPU. The rest
    has defaults. Instances hold no state and stand for their kernels in tables: a header that is edited while the
    process runs is read again for a new instance.

    The header defines a structure and a template in one namespace, here `mine`:

        struct RmsNormParams { … };
        template <class Config, int SHARED_BYTES> __device__ void rmsnorm(const RmsNormParams& params);

    `Config` has the config's fields as `static constexpr int` or `bool`, SHARED_BYTES is shared_bytes(config). The
    structure is the kernel's only argument; that its members are where and what `parameters` says is checked when the
    kernel is compiled.
    """

    name: ClassVar[str]  # a C identifier; with the config's label it names the kernel to profilers
    header: ClassVar[str]  # the file that defines it, found in include_dirs
    parameters: ClassVar[type[ctypes.Structure]]  # fields named as in C++; a name that begins with _ is not compared
    function: ClassVar[str] = ""  # the template's qualified name, "mine::rmsnorm"; "" for rtk::<name>
    parameters_cxx: ClassVar[str] = ""  # the structure's qualified name; "" for the name in Python, beside the function
    include_dirs: ClassVar[Sequence[Path | str]] = (CUDA_SOURCE,)  # looked through in order, then rtk's own
    # Whether every thread executes griddepcontrol.wait before it touches global memory, so that blocks may be started
    # while the kernel before on the stream ends (programmatic dependent launch).
    programmatic_launch: ClassVar[bool] = False

    # -------------------------------------------------------------------------------------------------- configurations

    @abstractmethod
    def configs(self, problem: Problem) -> list[Config]:
        """Every config worth considering for the problem; all of them legal."""

    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why the config cannot serve the problem, or None: the one legality predicate.

        By default the problem's `configs` are the legal ones. Where `configs` itself asks `refusal`, override it.
        """
        return None if config in self.configs(problem) else "it is not among the problem's configs"

    def pick(self, problem: Problem) -> Config:
        """The config to use where nothing was measured, and `work` says nothing: by default the first of `configs`."""
        found = self.configs(problem)
        if not found:
            raise UnsupportedError(self.name, repr(problem), "a problem that some config can serve")
        return found[0]

    def first_picks(self, problem: Problem) -> list[Config]:
        """The configs that a problem which was not tuned may get: the few that are good nearly everywhere.

        With few of them a new shape seldom means a new kernel to compile. By default all of `configs`.
        """
        return self.configs(problem)

    def bucket(self, problem: Problem) -> Bucket:
        """Which stored choice serves the problem: by default one of its own, by its fields or its text."""
        if dataclasses.is_dataclass(problem) and not isinstance(problem, type):
            return Bucket(
                tuple((field.name, str(getattr(problem, field.name))) for field in dataclasses.fields(problem))
            )
        return Bucket((("problem", str(problem)),))

    def describe(self, problem: Problem) -> str:
        """The problem in a line, for people and stored choices."""
        return str(problem)

    def sample_problems(self) -> list[Problem]:
        """Problems whose configs stand for the whole space."""
        return []

    def samples(self) -> list[Config]:
        """A stratified sample of the whole config space, for tests to compile; by default of `sample_problems`."""
        return list(dict.fromkeys(config for problem in self.sample_problems() for config in self.configs(problem)))

    def label(self, config: Config) -> str:
        """A C identifier that names the config, for profilers and reports; by default made of its fields."""
        parts = [self.name]
        for name, value in config_fields(config).items():
            if value is True:
                parts.append(name.lower())
            elif value is not False:
                parts.append(f"{name.lower()}{int(value)}".replace("-", "m"))
        return "_".join(parts)

    # ------------------------------------------------------------------------------------------------------ the launch

    @abstractmethod
    def threads(self, config: Config) -> int:
        """Threads in a block, at most 1024."""

    def shared_bytes(self, config: Config) -> int:
        """Dynamic shared memory of a block, at most SHARED_BYTES_PER_BLOCK."""
        return 0

    @abstractmethod
    def grid(self, problem: Problem, config: Config, sm_count: int) -> int:
        """Blocks to launch, on a device with so many multiprocessors to use. None at 0: nothing is launched."""

    @abstractmethod
    def bind(self, problem: Problem, config: Config, views: Mapping[str, View]) -> Binding:
        """The parameters of a launch, from where the arrays are. An optional array that is not there is not in `views`.

        A launch is prepared once and serves all calls whose arrays agree in shape, strides, dtype and device, and in
        their address modulo 16 bytes: that is all of a view that may be used.
        """

    # -------------------------------------------------------------------------------------- a call: rtk.run and the CPU

    def problem(self, *args: Any, **options: Any) -> Problem:
        """The problem that a call asks for: problem(views, …), with options of the spec's own after `views`.

        `views` are those of the arrays that the call brought. Raises ArgumentError, naming the argument, where they
        make no problem.
        """
        # Declared like this so that type checkers let a spec say which options it takes.
        raise NotImplementedError(f"{type(self).__name__}.problem: rtk.run needs it")

    def operands(self, problem: Problem) -> Mapping[str, Operand]:
        """The arrays that a call takes, by name: rtk.run checks each against this."""
        raise NotImplementedError(f"{type(self).__name__}.operands: rtk.run needs it")

    def reference(self, problem: Problem, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """The results in NumPy, from NumPy arrays: the CPU path, and what rtk.check_run compares with.

        `arrays` come as they are on the CPU, and as float64 where they are floating-point in rtk.check_run.
        """
        raise UnsupportedError(self.name, "arrays on the CPU", "arrays on a GPU: the kernel has no reference")

    # -------------------------------------------------------------------------------------------------------- the tuner

    def work(self, problem: Problem, configs: Sequence[Config]) -> Mapping[str, Any]:
        """What each config makes of the problem, as NumPy arrays for `rtk.autotune.model`; see there for the names.

        By default nothing is known, and configs are tried in their order.
        """
        return {}

    def verify(
        self, problem: Problem, arrays: Mapping[str, Callable[[tuple[Any, ...]], Any]], results: Mapping[str, Any]
    ) -> str:
        """What is wrong with results that a kernel computed, in words; "" for nothing.

        `arrays` are the inputs and `results` what was written, each a function from an index (of integers and slices)
        to a NumPy array in float64. By default nothing is looked at.
        """
        return ""

    # ------------------------------------------------------------------------------------------------------- the source

    def render(self, config: Config) -> Source:
        """The translation unit of one configuration."""
        label = self.label(config)
        function = self.function or f"rtk::{self.name}"
        params = self.parameters_cxx or "::".join([*function.split("::")[:-1], self.parameters.__name__])
        text = "\n".join(
            [
                f"#include <{self.header}>",
                "",
                "struct Config {",
                *(f"    static constexpr {_cxx_constant(k, v)};" for k, v in config_fields(config).items()),
                "};",
                "",
                f"using Params = {params};",
                *_layout_checks(self.parameters),
                "",
                f'extern "C" __global__ void __launch_bounds__({self.threads(config)}, 1)',
                f"{label}(const __grid_constant__ Params params) {{",
                f"    {function}<Config, {self.shared_bytes(config)}>(params);",
                "}",
                "",
            ]
        )
        folders = dict.fromkeys(str(folder) for folder in (*self.include_dirs, CUDA_SOURCE))
        options = _DEBUG_OPTIONS.get(os.environ.get("RTK_DEBUG", ""), ())
        return Source(name=label, text=text, include_dirs=tuple(folders), options=options)


# ----------------------------------------------------------------------------------------------------------- constants


def config_fields(config: Any) -> dict[str, int | bool]:
    """The constants of a config. ArgumentError for what is no dataclass of ints (of 32 bits) and bools."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ArgumentError("config", config, "a frozen dataclass of ints and bools")
    found: dict[str, int | bool] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wants_bool = field.type in ("bool", bool)  # True equals 1, but is another constant
        if not isinstance(value, int) or isinstance(value, bool) != wants_bool or int(value) not in _INT32:
            received = f"{value!r} of type {type(value).__name__}"
            raise ArgumentError(f"config.{field.name}", received, "a bool" if wants_bool else "an int of 32 bits")
        found[field.name] = value
    return found


def _cxx_constant(name: str, value: int | bool) -> str:
    if isinstance(value, bool):
        return f"bool {name} = {'true' if value else 'false'}"
    return f"int {name} = {int(value)}"


# ---------------------------------------------------------------------------------------------------------- parameters


def parameter_bytes(kind: type[ctypes.Structure]) -> int:
    """sizeof in C++, where a structure with tensor maps is aligned as they are, which ctypes cannot say."""
    alignment = _TENSOR_MAP_ALIGNMENT if any(t is TensorMap for _, t, _ in _members(kind)) else 1
    return -(-ctypes.sizeof(kind) // alignment) * alignment


def _members(kind: type[ctypes.Structure], prefix: str = "", start: int = 0) -> Iterator[tuple[str, Any, int]]:
    """(C++ name, ctypes type, offset) of each member to compare, those of inner structures too."""
    for name, member, *_ in kind._fields_:
        offset = start + getattr(kind, name).offset
        if name.startswith("_"):
            continue
        yield prefix + name, member, offset
        if issubclass(member, ctypes.Structure) and member is not TensorMap:
            yield from _members(member, f"{prefix}{name}.", offset)


def _layout_checks(kind: type[ctypes.Structure]) -> Iterator[str]:
    """Assertions that C++ has each member where Python has it. (NVRTC knows no offsetof, but what that is made of.)"""
    for name, member, offset in _members(kind):
        conditions = [
            f"__INTADDR__(&((Params*)0)->{name}) == {offset}",
            f"sizeof(Params::{name}) == {ctypes.sizeof(member)}",
        ]
        # Only a floating-point type keeps a half.
        if member in (ctypes.c_float, ctypes.c_double):
            conditions.append(f"decltype(Params::{name})(0.5) != 0")
        elif member in (ctypes.c_int32, ctypes.c_uint32):
            conditions.append(f"decltype(Params::{name})(0.5) == 0")
        said = f"{kind.__name__} in Python has {name} at byte {offset}, {member.__name__}"
        yield f'static_assert({" && ".join(conditions)}, "{said}");'
    size = parameter_bytes(kind)
    yield f'static_assert(sizeof(Params) == {size}, "{kind.__name__} in Python has {size} bytes");'


# ---------------------------------------------------------------------------------------------------------- addresses


def alignment(view: View) -> int:
    """Bytes that a kernel may access at once along each row of the array: 1 to 16.

    The largest power of two up to 16 that divides the address and, in bytes, every stride but the innermost.
    """
    size = itemsize(view.dtype)
    strides = (stride for stride, length in zip(view.strides[:-1], view.shape[:-1], strict=True) if length > 1)
    found = WIDEST_ACCESS_BYTES
    for place in (view.pointer, *(stride * size for stride in strides)):
        while place % found:
            found //= 2
    return found
