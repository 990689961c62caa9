"""What a kernel is: a CUDA template, a frozen configuration whose fields are its constants, and the rules around them.

To add a kernel, write `cuda_src/foo.cuh` and a subclass of KernelSpec in `rtk/kernels/foo.py`, and list it in
`rtk/kernels/__init__.py`. Compiling, caching, loading, the tests and the tuner walk that list.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rtk.driver import DeviceProperties
from rtk.jit import Source

Problem = TypeVar("Problem")
Config = TypeVar("Config")  # a frozen dataclass of ints and bools, in upper case

CUDA_SOURCE = Path(__file__).resolve().parent / "cuda_src"
# RTK_DEBUG=1: a wait that lasts two seconds traps.
_SPIN_LIMIT = "-DRTK_SPIN_LIMIT_NS=2000000000u"
_DEBUG_OPTIONS = {"1": (_SPIN_LIMIT,), "delays": (_SPIN_LIMIT, "-DRTK_RANDOM_DELAYS")}
SHARED_BYTES_PER_BLOCK = 232_448  # 227 KiB: what one block may have on compute capability 9.0


class KernelSpec(ABC, Generic[Problem, Config]):
    """One kernel. Instances hold no state."""

    name: ClassVar[str]  # of the device function rtk::<name><Config>
    header: ClassVar[str]  # the file that defines it, found in include_dirs
    parameters: ClassVar[type[ctypes.Structure]]  # the by-value argument
    parameters_cxx: ClassVar[str]  # its C++ name
    include_dirs: ClassVar[tuple[Path, ...]] = (CUDA_SOURCE,)

    @abstractmethod
    def refusal(self, problem: Problem, config: Config) -> str | None:
        """Why the config cannot serve the problem, or None: the one legality predicate."""

    @abstractmethod
    def configs(self, problem: Problem) -> list[Config]:
        """Every config worth considering for the problem; all of them legal."""

    @abstractmethod
    def pick(self, problem: Problem) -> Config:
        """The config to use where nothing was measured."""

    @abstractmethod
    def samples(self) -> list[Config]:
        """A stratified sample of the whole config space, which the tests compile."""

    @abstractmethod
    def label(self, config: Config) -> str:
        """A C identifier that names the config, for profilers and reports."""

    @abstractmethod
    def threads(self, config: Config) -> int:
        """Threads in a block."""

    @abstractmethod
    def shared_bytes(self, config: Config) -> int:
        """Dynamic shared memory of a block."""

    @abstractmethod
    def grid(self, problem: Problem, config: Config, device: DeviceProperties, sm_margin: int = 0) -> int:
        """Blocks to launch."""

    def render(self, config: Config) -> Source:
        """The translation unit of one configuration."""
        label = self.label(config)
        params = self.parameters_cxx
        text = "\n".join(
            [
                f"#include <{self.header}>",
                "",
                "struct Config {",
                *(f"    static constexpr {_cxx_constant(k, v)};" for k, v in config_fields(config).items()),
                "};",
                "",
                f'static_assert(sizeof({params}) == {ctypes.sizeof(self.parameters)}, "host and device disagree");',
                "",
                f'extern "C" __global__ void __launch_bounds__({self.threads(config)}, 1)',
                f"{label}(const __grid_constant__ {params} params) {{",
                f"    rtk::{self.name}<Config, {self.shared_bytes(config)}>(params);",
                "}",
                "",
            ]
        )
        return Source(
            name=label,
            text=text,
            include_dirs=tuple(str(folder) for folder in self.include_dirs),
            options=_DEBUG_OPTIONS.get(os.environ.get("RTK_DEBUG", ""), ()),
        )


def config_fields(config: Any) -> dict[str, int | bool]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _cxx_constant(name: str, value: int | bool) -> str:
    if isinstance(value, bool):
        return f"bool {name} = {'true' if value else 'false'}"
    return f"int {name} = {value}"
