"""Calls from many threads, without a GPU: a pretended driver sees what each launch was given.

Whatever the threads share, a launch must have the addresses of its own call, on its own stream, with a counter that was
cleared on that stream and that no other call in flight has. (tests/test_concurrency_gpu.py compares results.)
"""

from __future__ import annotations

import ctypes
import itertools
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rtk import arrays, counters, driver, jit, launch, ops, zeroed
from rtk.arrays import View
from rtk.errors import ArgumentError, DriverError
from rtk.jit import Binary, CompileReport
from rtk.kernels.attention_fwd import SPEC

_addresses = itertools.count(1 << 20, 1 << 12)
_here = threading.local()


@dataclass(frozen=True)
class Array:
    """Memory on a pretended GPU."""

    shape: tuple[int, ...]
    dtype: str
    pointer: int

    def view(self) -> View:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        return View(self.pointer, self.shape, tuple(reversed(strides)), self.dtype, 0)


class Library:
    """The array library of the pretended GPU. Its allocator hands out an address again once it is free."""

    name = "pretended"

    def __init__(self) -> None:
        self.made: dict[int, list[int]] = {}  # thread -> addresses allocated in its present call

    def view(self, array: Any, argument: str, *_: Any) -> View:
        if not isinstance(array, Array):
            raise ArgumentError(argument, array, "an array")
        return array.view()

    def empty(self, shape: tuple[int, ...], dtype: str, device: int | None) -> Array:
        array = Array(shape, dtype, next(_addresses))
        _here.made.append(array.pointer)
        return array

    def result(self, q: Any, head_dim_v: int) -> Array:
        return self.empty((*q.shape[:-1], head_dim_v), q.dtype, 0)

    def stream(self, device: int) -> int:
        return int(_here.stream)

    def is_current(self, device: int) -> bool:
        return _here.stream % 512 == 0

    def keep_for_graph(self, temporary: Any) -> None:
        pass

    def writable(self, array: Any) -> bool:
        return True

    def written(self, array: Any) -> None:
        pass


WORDS = 1 << 40  # where the words for counters lie
_taken: set[int] = set()
_taking = threading.Lock()


class Cuda:
    """libcuda: notes, for the calling thread, what it launched."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = 4096
        return 0

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        module._obj.value = int(cubin)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = module.value
        return 0

    def cuModuleGetGlobal_v2(self, *_: Any) -> int:
        return 500

    def cuTensorMapEncodeTiled(self, place: Any, dtype: Any, rank: Any, pointer: Any, shape: Any, *rest: Any) -> int:
        ctypes.memset(place, 0, 128)
        (ctypes.c_uint64 * 5).from_address(place.value)[:] = [pointer.value, *shape]
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        pointer._obj.value = WORDS
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
        stream = config._obj.stream
        block = SPEC.parameters.from_address(arguments[0])
        maps = [tuple((ctypes.c_uint64 * 5).from_buffer(getattr(block, name))) for name in "qkv"]
        _here.seen.append((stream, function.value, *maps, block.o, block.lse, block.tile_counter))
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *_: 0


@pytest.fixture
def gpu_pretended(monkeypatch) -> Library:
    """Calls with `Array`s go to the pretended GPU; small tables, so that they overflow all the time."""
    library, cuda = Library(), Cuda()
    handles: dict[str, int] = {}

    def build(source: Any, *, cache: Any = None) -> Binary:
        handle = handles.setdefault(source.name, len(handles) + 1)
        report = CompileReport(source.name, 168, 0, 0, 0, 0, (), 1.0, "1.2.3", False)
        return Binary(source.name, source.name, b"%d" % handle, report)

    properties = driver.DeviceProperties(0, "pretended", "GPU-0", (9, 0), 132, 50 << 20, 232_448, 1 << 40, 1)
    monkeypatch.setattr(driver, "library", lambda: cuda)
    monkeypatch.setattr(driver, "device_properties", lambda ordinal: properties)
    monkeypatch.setattr(driver, "_primary_context", lambda ordinal: ctypes.c_void_p(4096))
    monkeypatch.setattr(arrays, "library_of", lambda array: library if isinstance(array, Array) else None)
    monkeypatch.setattr(jit, "build", build)
    monkeypatch.setattr(ops, "_plans", launch.Recent(8))
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(zeroed, "_words", {})
    _taken.clear()
    monkeypatch.setattr(launch._Maps, "_encoded", launch.Recent(16))
    return library


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0), work(1), … at once; raises the first error. Threads are switched as often as Python can."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


SHAPES = [(b, h, s, d) for b, h in ((1, 2), (40, 8)) for s in (64, 300, 900) for d in (64, 128)]
OPTIONS: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (64, 0)}, {"softcap": 30.0}]


def call(operands: list[Array], stream: int, **options: Any) -> None:
    """One call of rtk.attention, and all that must be true of it."""
    import rtk

    _here.stream, _here.made, _here.seen = stream, [], []
    o, lse = rtk.attention(*operands, return_lse=True, **options)
    (launched,) = _here.seen
    launched_on, function, *maps, o_pointer, lse_pointer, counter = launched
    assert launched_on == stream, "on the caller's stream"
    assert maps == [(array.pointer, *array.shape[::-1]) for array in operands], "its own tensor maps"
    assert (o_pointer, lse_pointer) == (o.pointer, lse.pointer)
    assert _here.made == [o.pointer, lse.pointer] and function > 0
    if counter:
        assert 0 <= counter - WORDS < 1 << 20 and counter % 4 == 0
        with _taking:
            assert counter not in _taken, "the counter is this call's own"
            _taken.add(counter)


def test_many_threads_share_plans_and_no_call_has_anything_of_another(gpu_pretended):
    launches = counters.snapshot()["launches"]
    addresses = [
        [next(_addresses) for _ in range(3)] for _ in range(24)
    ]  # allocators hand out the same again and again
    turns = 150

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(turns):
            shape = rng.choice(SHAPES)
            operands = [Array(shape, "bfloat16", pointer) for pointer in rng.choice(addresses)]
            call(operands, stream=rng.randrange(5) << 8, **rng.choice(OPTIONS))

    in_threads(16, work)
    assert counters.snapshot()["launches"] == launches + 16 * turns


def test_the_first_call_of_a_shape_raced_by_threads(gpu_pretended):
    operands = [Array((40, 8, 300, 64), "bfloat16", next(_addresses)) for _ in range(3)]
    for head_dim in range(8, 257, 8):
        operands = [Array((40, 8, 300, head_dim), "bfloat16", next(_addresses)) for _ in range(3)]
        in_threads(8, lambda number, operands=operands: call(operands, stream=number << 8))
    assert len(launch._loaded) == 32, "each kernel was loaded once"


def test_failing_calls_amid_good_ones(gpu_pretended, monkeypatch):
    good = [Array((2, 4, 300, 64), "bfloat16", next(_addresses)) for _ in range(3)]
    fails = [0]
    really_launch = Cuda.cuLaunchKernelEx

    def launch_kernel(self: Any, *arguments: Any) -> int:
        if _here.stream == 13 << 8:
            fails[0] += 1
            return 700
        return really_launch(self, *arguments)

    monkeypatch.setattr(Cuda, "cuLaunchKernelEx", launch_kernel)

    def work(number: int) -> None:
        for turn in range(60):
            if number % 4 == 0:
                with pytest.raises(ArgumentError):
                    call([*good[:2], Array((2, 4, 299, 64), "bfloat16", 64)], stream=0)
                with pytest.raises(ArgumentError):
                    call(good, stream=0, config={"BLOCK_N": turn * 16 + 8})
                assert _here.seen == []
            elif number % 4 == 1:
                with pytest.raises(DriverError):
                    call(good, stream=13 << 8)
            else:
                call(good, stream=number << 8)

    in_threads(8, work)
    assert fails == [120]


def test_the_table_of_recent_things_under_threads():
    table: launch.Recent[int, int] = launch.Recent(64)

    def work(number: int) -> None:
        rng = random.Random(number)
        for turn in range(4000):
            key = rng.randrange(100)
            found = table.get(key)
            assert found is None or found == key * key
            if found is None:
                table.put(key, key * key)
            if turn % 1000 == 999:
                table.clear()

    in_threads(8, work)
    assert len(table) <= 64 + 8
