"""The kernel of docs/your-own-kernel.md, for the tests: its files and blocks, and a GPU that is played on the CPU.

write_files     the pages' files, into a folder
pages           the pages' Python blocks, in order
FakeGpu         NumPy arrays as if on a GPU, and launches that read the real parameter block
rmsnorm         what such a launch of the kernel does; `inputs` are arrays for it
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rtk import launch
from rtk.arrays import NumpyLibrary, View, numpy_dtype
from rtk.driver import DeviceProperties
from rtk.jit import CompileReport

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (DOCS / "your-own-kernel.md", DOCS / "your-own-kernel-tma.md")
MODULES = ("rmsnorm", "rmsnorm_tma")
_BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>needs|file): (?P<what>[\w .]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    needs: frozenset[str]
    file: str  # where the block goes; "" for one that is run
    code: str

    def run(self, namespace: dict[str, Any]) -> None:
        exec(compile("\n" * self.line + self.code, str(self.page), "exec"), namespace)


def pages() -> Iterator[Block]:
    """Every block of the pages, in order. Blocks in other languages than Python are files."""
    for page in PAGES:
        text = page.read_text()
        for found in _BLOCK.finditer(text):
            file = found["what"] if found["kind"] == "file" else ""
            assert file or found["language"] == "python", f"{page.name}: a block of {found['language']} that is no file"
            needs = frozenset(found["what"].split()) if found["kind"] == "needs" else frozenset()
            yield Block(page, text.count("\n", 0, found.start("code")), needs, file, found["code"])


def write_files(folder: Path) -> None:
    for block in pages():
        if block.file:
            (folder / block.file).write_text(block.code)


def import_files(folder: Path, monkeypatch: Any) -> tuple[ModuleType, ModuleType]:
    """The pages' two modules, as if in a user's folder; forgotten when the test ends."""
    write_files(folder)
    monkeypatch.syspath_prepend(str(folder))
    forget_modules(monkeypatch)
    return tuple(importlib.import_module(name) for name in MODULES)  # type: ignore[return-value]


def forget_modules(monkeypatch: Any) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # noted, so that what a test imports does not stay
        del sys.modules[name]


# --- a GPU on the CPU -------------------------------------------------------------------------------------------------

PROPERTIES = DeviceProperties(0, "Fake H100", "GPU-0", (9, 0), 132, 50 << 20, 232_448, 80 << 30, 2_619_000)
REPORT = CompileReport("fake", 32, 0, 0, 0, 0, (), 0.0, "0.0", False)
Kernel = Callable[[Any, "Launch"], None]  # takes the parameter structure and how it was launched


@dataclass(frozen=True)
class Launch:
    grid: int
    threads: int
    shared_bytes: int
    stream: int
    device: int
    source: Any


class FakeGpu(NumpyLibrary):
    """A library whose arrays are NumPy's, said to be on cuda:0 (or on `devices`), and whose launches call `kernel`."""

    name = "fake"

    def __init__(self, monkeypatch: Any, parameters: type[ctypes.Structure], kernel: Kernel) -> None:
        self.parameters, self.kernel = parameters, kernel
        self.devices: dict[int, int] = {}  # id of an array that is elsewhere -> device
        self.launches: list[Launch] = []
        self.made: list[np.ndarray[Any, Any]] = []
        self.properties = PROPERTIES
        self.local = threading.local()  # the current stream of each thread
        monkeypatch.setattr("rtk.arrays.library_of", lambda x: self if isinstance(x, np.ndarray) else None)
        monkeypatch.setattr("rtk.driver.device_properties", lambda index: replace(self.properties, ordinal=index))
        monkeypatch.setattr("rtk.driver.zero", lambda pointer, size, device, stream: ctypes.memset(pointer, 0, size))
        self.words = np.zeros(1, np.uint32)
        monkeypatch.setattr("rtk.zeroed.word", lambda device, capturing: self.words.ctypes.data)
        monkeypatch.setattr("rtk.driver.is_capturing", lambda stream: False)
        monkeypatch.setattr("rtk.checks.compile_configs", lambda spec, configs: [spec.render(x) for x in configs])
        monkeypatch.setattr("rtk.checks.to_host", lambda library, array: array.copy())
        monkeypatch.setattr(launch, "_load", self.load)
        # A tensor map that can be read back: the address, the extents and the stride of a row.
        monkeypatch.setattr("rtk.driver.on_device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr("rtk.tma.encode", self.encode)
        self.encoded = 0

    def view(self, array: Any, argument: str, *dtypes: Any) -> View:
        return replace(super().view(array, argument, *dtypes), device=self.devices.get(id(array), 0))

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Any:
        kind = numpy_dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        room = np.full(size + 256, 0x7E, np.uint8)  # memory with something in it, aligned as a GPU's is
        start = -room.ctypes.data % 256
        array = room[start : start + size].view(kind).reshape(shape)
        self.made.append(array)
        self.devices[id(array)] = device or 0
        return array

    def result(self, q: Any, head_dim_v: int) -> Any:
        return self.empty((*q.shape[:-1], head_dim_v), q.dtype.name, self.devices.get(id(q), 0))

    def stream(self, device: int) -> int:
        return getattr(self.local, "stream", 0)

    def load(self, source: Any, device: int, shared_bytes: int) -> Any:
        gpu = self

        class Ready:
            def __init__(
                self, grid: int, threads: int, shared_bytes: int, argument: bytes, programmatic: bool = False
            ) -> None:
                assert grid > 0
                self.shape = grid, threads, shared_bytes
                self.bytes = memoryview(bytearray(argument.ljust(-(-len(argument) // 8) * 8, b"\0")))
                self.words = self.bytes.cast("Q")

            def start(self, stream: int, here: bool) -> None:
                launched = Launch(*self.shape, stream, device, source)
                gpu.launches.append(launched)
                gpu.kernel(gpu.parameters.from_buffer_copy(self.bytes), launched)

        class Function:
            ready = Ready

        return REPORT, Function()

    def encode(self, pointer: int, dtype: str, shape: Any, strides: Any, box: Any) -> bytes:
        self.encoded += 1
        return b"".join(int(x).to_bytes(8, "little") for x in (pointer, *shape, *strides, *box)).ljust(128, b"\0")


def at(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """The array at an address, strides in elements."""
    dtype = np.dtype(dtype)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    flat = np.frombuffer((ctypes.c_byte * (reach * dtype.itemsize)).from_address(address or 1), dtype)
    flat.flags.writeable = True
    return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides])


# --- the kernel on that GPU -------------------------------------------------------------------------------------------


def rmsnorm(params: Any, launched: Launch) -> None:
    """What the kernel does, from the parameter block it gets."""
    dtype = numpy_dtype("bfloat16") if "BF16 = true" in launched.source.text else np.float16
    shape = (params.rows, params.columns)
    x = at(params.x, shape, (params.x_stride, 1), dtype).astype(np.float32)
    weight = at(params.weight, shape[1:], (1,), dtype).astype(np.float32)
    y = at(params.y, shape, (params.y_stride, 1), dtype)
    y[...] = x / np.sqrt((x * x).sum(1, keepdims=True) / max(1, params.columns) + np.float32(params.eps)) * weight


def inputs(rows: int = 5, columns: int = 64, dtype: str = "float16", seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, columns)).astype(numpy_dtype(dtype)),
        "weight": rng.standard_normal(columns).astype(numpy_dtype(dtype)),
    }
