"""The same functions from many threads, on many streams, in graphs and on several devices at once.

Whatever runs at the same time, results equal those of one thread by every bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from gpu_cases import Case, arrays_of, build, counted, same_bits

import rtk
from rtk import driver
from rtk.cache import default_cache
from rtk.errors import ArgumentError, DriverError, RtkError

pytestmark = pytest.mark.gpu

# Both schedulers, several kernels, tiles enough for more than one round and too few to fill the GPU.
CASES = [
    Case(mask="causal", lengths=(700, 700), heads=(8, 8)),
    Case(mask="full", lengths=(900, 900), heads=(8, 2)),
    Case(mask="w17.5", lengths=(1500, 1500), heads=(8, 8)),
    Case(dims=(128, 128), mask="causal", lengths=(1000, 1300), heads=(16, 4), layout="bshd"),
    Case(dims=(192, 128), mask="causal", lengths=(333, 333), heads=(8, 8), dtype="float16"),
    Case(dims=(40, 200), mask="full", lengths=(65, 63), softcap=30.0),
    Case(mask="full", lengths=(1, 2000), heads=(32, 4), batch=1),
]


@pytest.fixture(scope="module", autouse=True)
def kernels(gpu: Any) -> None:
    build(CASES)


class Calls:
    """Every case's inputs on the device, and what a single thread computes of them."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.inputs = [[library.of(x) for x in case.inputs(seed)] for seed, case in enumerate(CASES)]
        self.expected = [self(i) for i in range(len(CASES))]
        library.synchronize()

    def __call__(self, i: int, **more: Any) -> tuple[Any, Any]:
        o, lse = rtk.attention(*self.inputs[i], **CASES[i].options(), return_lse=True, **more)
        return o, lse

    def check(self, i: int, got: tuple[Any, Any], label: str) -> None:
        for name, a, b in zip(("o", "lse"), got, self.expected[i], strict=True):
            assert same_bits(self.library, a, b), f"{label}: {name} of {CASES[i]}"

    def new_out(self, i: int) -> Any:
        return self.library.full(CASES[i].o_shape(), float("nan"), CASES[i].dtype)


@pytest.fixture
def calls(library: Any) -> Calls:
    return Calls(library)


@pytest.fixture
def torch_calls(gpu: Any, torch: Any) -> Calls:
    return Calls(arrays_of(gpu, "torch"))


def new_stream(library: Any) -> Any:
    if library.name == "torch":
        return library.module.cuda.Stream(library.device)
    with library.device:
        return library.module.cuda.Stream(non_blocking=True)


@contextlib.contextmanager
def on_stream(library: Any, stream: Any = None) -> Iterator[Any]:
    """The stream (a new one for None) as the calling thread's current one, on the library's device."""
    stream = new_stream(library) if stream is None else stream
    if library.name == "torch":
        with library.module.cuda.device(library.device), library.module.cuda.stream(stream):
            yield stream
    else:
        with library.device, stream:
            yield stream


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0), work(1), … at once; raises the first error, and one for a thread that does not come back."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


# --- threads and streams ----------------------------------------------------------------------------------------------


def test_sixteen_threads_each_on_its_own_stream(calls: Calls) -> None:
    launches = counted("launch")

    def work(number: int) -> None:
        with on_stream(calls.library):
            for turn in range(16):
                order = [(number + turn + i) % len(CASES) for i in range(4)]  # four in flight before any is looked at
                for i, got in [(i, calls(i)) for i in order]:
                    calls.check(i, got, f"thread {number}, turn {turn}")

    in_threads(16, work)
    assert counted("launch") == launches + 16 * 16 * 4


def test_sixteen_threads_on_one_stream(calls: Calls) -> None:
    shared = new_stream(calls.library)

    def work(number: int) -> None:
        with on_stream(calls.library, shared):
            for turn in range(12):
                i = (number + turn) % len(CASES)
                out = calls.new_out(i) if turn % 2 else None
                calls.check(i, calls(i, out=out), f"thread {number}, turn {turn}")

    in_threads(16, work)


def test_one_thread_on_thirty_two_streams(calls: Calls) -> None:
    streams = [new_stream(calls.library) for _ in range(32)]
    calls.library.synchronize()
    flight = []
    for turn in range(4):
        for number, stream in enumerate(streams):
            with on_stream(calls.library, stream):
                i = (turn + number) % len(CASES)
                flight.append((i, calls(i), f"stream {number}, turn {turn}"))
    calls.library.synchronize()
    for i, got, label in flight:
        calls.check(i, got, label)


def test_torch_and_cupy_threads_at_once(gpu: Any) -> None:
    both = [Calls(arrays_of(gpu, name)) for name in ("torch", "cupy")]

    def work(number: int) -> None:
        calls = both[number % 2]
        with on_stream(calls.library):
            for turn in range(12):
                i = (number // 2 + turn) % len(CASES)
                calls.check(i, calls(i), f"{calls.library.name} thread {number}, turn {turn}")

    in_threads(16, work)


COLD = Case(dims=(88, 104), mask="causal", lengths=(500, 700), heads=(8, 2), batch=6)


def test_the_first_call_of_a_shape_raced_by_threads(library: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Neither compiled, nor loaded, nor planned: each of eight threads makes what is missing, and compiles once."""
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path))
    config = {"BLOCK_N": 48 if library.name == "torch" else 64, "STAGES": 2}  # a kernel that no other test builds
    arrays = [library.of(x) for x in COLD.inputs()]
    library.synchronize()
    results: list[Any] = [None] * 8

    def work(number: int) -> None:
        with on_stream(library) as stream:
            results[number] = rtk.attention(*arrays, **COLD.options(), return_lse=True, config=config)
            stream.synchronize()

    in_threads(8, work)
    assert default_cache().stats()["writes"] == 1
    expected = rtk.attention(*arrays, **COLD.options(), return_lse=True, config=config)
    for number, got in enumerate(results):
        for name, a, b in zip(("o", "lse"), got, expected, strict=True):
            assert same_bits(library, a, b), f"{name} of thread {number}"


def test_failing_calls_amid_good_ones(calls: Calls, tmp_path: Any, monkeypatch: Any) -> None:
    """Bad arguments, and a driver that refuses to load a kernel once: the others never notice, the next try works."""
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path))
    config = {"BLOCK_N": 80 if calls.library.name == "torch" else 96, "STAGES": 2}
    cold = [calls.library.of(x) for x in COLD.inputs()]
    really_load, refused = driver.load, []

    def load(cubin: bytes, name: str, *rest: Any) -> Any:
        if "d88x104" in name and not refused:
            refused.append(name)
            raise DriverError("cuModuleLoadData", 2, "CUDA_ERROR_OUT_OF_MEMORY", name)
        return really_load(cubin, name, *rest)

    monkeypatch.setattr(driver, "load", load)
    q, k, v = calls.inputs[0]
    bad: list[dict[str, Any]] = [
        {"k": k[:, :3]},
        {"v": v[:, :, 1:]},
        {"q": q[..., :60]},
        {"k": calls.inputs[4][1]},
        {"window_size": (-5, 0)},
        {"softmax_scale": float("nan")},
        {"out": q},
        {"config": {"BLOCK_N": 13}},
        {"sm_margin": 10_000},
        {"layout": "sbhd"},
    ]

    def work(number: int) -> None:
        with on_stream(calls.library):
            for turn in range(10):
                if number % 4 == 0:
                    with pytest.raises(RtkError) as caught:
                        rtk.attention(**({"q": q, "k": k, "v": v} | bad[(turn + number) % len(bad)]))
                    assert isinstance(caught.value, (ValueError, NotImplementedError)), caught.value
                elif number == 1 and turn == 5:
                    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
                        rtk.attention(*cold, **COLD.options(), config=config)
                    rtk.attention(*cold, **COLD.options(), config=config)
                else:
                    i = (number + turn) % len(CASES)
                    calls.check(i, calls(i), f"thread {number}, turn {turn}")

    in_threads(12, work)
    assert len(refused) == 1
    calls.library.synchronize()  # no error waits in the context
    for i in range(len(CASES)):
        calls.check(i, calls(i), "afterwards")


# --- graphs -----------------------------------------------------------------------------------------------------------


def captured(torch: Any, calls: Calls, i: int, out: Any) -> Any:
    """A graph of one call, captured in a mode that lets other threads do as they like meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        rtk.attention(*calls.inputs[i], **CASES[i].options(), out=out)
    return graph


def test_replays_of_one_graph_amid_eager_calls(torch: Any, torch_calls: Calls) -> None:
    calls = torch_calls
    graphs = []
    for i in range(4):
        out = calls.new_out(i)
        graphs.append((captured(torch, calls, i, out), out))
    torch.cuda.synchronize()

    def work(number: int) -> None:
        with on_stream(calls.library) as stream:
            for turn in range(25):
                if number < 4:  # one thread a graph: replays share its memory
                    graph, out = graphs[number]
                    out.fill_(float("nan"))
                    graph.replay()
                    stream.synchronize()
                    assert same_bits(calls.library, out, calls.expected[number][0]), f"replay {turn}: {CASES[number]}"
                else:
                    i = (number + turn) % 4  # the same plans as the graphs
                    calls.check(i, calls(i), f"thread {number}, turn {turn}")

    in_threads(12, work)


def test_two_graphs_replayed_on_two_streams_at_once(torch: Any, torch_calls: Calls) -> None:
    """Also of the same call: each graph has a counter of its own."""
    calls = torch_calls
    for pair in ((0, 3), (0, 0), (2, 2)):
        outs = [calls.new_out(i) for i in pair]
        graphs = [captured(torch, calls, i, out) for i, out in zip(pair, outs, strict=True)]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for turn in range(40):
            for out in outs:
                out.fill_(float("nan"))
            torch.cuda.synchronize()
            for _ in range(5):
                for graph, stream in zip(graphs, streams, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
            torch.cuda.synchronize()
            for i, out in zip(pair, outs, strict=True):
                assert same_bits(calls.library, out, calls.expected[i][0]), f"turn {turn} of {pair}: {CASES[i]}"


def test_one_graph_replayed_on_two_streams(torch: Any, torch_calls: Calls) -> None:
    """A graph never runs beside itself, whatever streams it is put on: its one counter is enough."""
    calls = torch_calls
    out = calls.new_out(0)
    graph = captured(torch, calls, 0, out)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for turn in range(100):
        with torch.cuda.stream(streams[turn % 2]):
            graph.replay()
    torch.cuda.synchronize()
    assert same_bits(calls.library, out, calls.expected[0][0])


def test_capture_in_one_thread_while_others_call(torch: Any, torch_calls: Calls) -> None:
    calls = torch_calls
    done = threading.Event()

    def work(number: int) -> None:
        if number:
            with on_stream(calls.library):
                turn = 0
                while not done.is_set():
                    i = (number + turn) % len(CASES)
                    calls.check(i, calls(i), f"thread {number}, turn {turn}")
                    turn += 1
            return
        try:
            for turn in range(12):
                i = turn % 4
                out = calls.new_out(i)
                graph = captured(torch, calls, i, out)
                for _ in range(3):
                    out.fill_(float("nan"))
                    graph.replay()
                    assert same_bits(calls.library, out, calls.expected[i][0]), f"capture {turn}: {CASES[i]}"
        finally:
            done.set()

    in_threads(7, work)


@pytest.mark.parametrize("what", ["workspace", "copy"])
def test_memory_that_a_cupy_graph_uses_is_not_handed_out_again(cupy: Any, gpu: Any, what: str) -> None:
    """CuPy's pool knows nothing of graphs: the copy of an input must not return to it. (The counter is none of it.)"""
    library = arrays_of(gpu, "cupy")
    calls = Calls(library)
    q, k, v = calls.inputs[0]
    if what == "copy":  # rows that TMA cannot step over
        room = library.full((*q.shape[:3], q.shape[3] + 1), 0, CASES[0].dtype)
        library.bits(room)[..., :-1] = library.bits(q)
        q = room[..., :-1]
    out = calls.new_out(0)
    with on_stream(library) as stream:
        library.synchronize()
        rtk.attention(q, k, v, **CASES[0].options(), out=out)
        stream.synchronize()
        stream.begin_capture()
        rtk.attention(q, k, v, **CASES[0].options(), out=out)
        graph = stream.end_capture()
        held = [cupy.empty(size, np.uint8) for size in [512] * 64 + [calls.inputs[0][0].nbytes] * 8]
        for array in held:
            array.data.memset_async(0x5A, array.nbytes, stream)
        for _ in range(3):
            library.fill(out, float("nan"))
            graph.launch(stream)
            stream.synchronize()
            assert same_bits(library, out, calls.expected[0][0])
        for number, array in enumerate(held):
            assert (cupy.asnumpy(array) == 0x5A).all(), f"a replay wrote to array {number} of the caller"


# --- devices ----------------------------------------------------------------------------------------------------------


def test_two_devices_in_one_process(gpu: Any, library: Any) -> None:
    torch_like = library.name == "torch"
    count = library.module.cuda.device_count() if torch_like else library.module.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip("one GPU only")
    both = [Calls(arrays_of(gpu, library.name, index)) for index in (gpu.index, 1 - gpu.index)]

    def work(number: int) -> None:
        calls = both[number % 2]
        with on_stream(calls.library):
            for turn in range(12):
                i = (number + turn) % len(CASES)
                calls.check(i, calls(i), f"device {number % 2}, thread {number}, turn {turn}")

    in_threads(12, work)
    # By turns in one thread, whose current device stays what it was: the arrays' device counts.
    flight = [(calls, i, calls(i)) for i in range(len(CASES)) for calls in both]
    for calls, i, got in flight:
        calls.library.synchronize()
        with on_stream(calls.library):
            calls.check(i, got, "by turns")
    with pytest.raises(ArgumentError, match="k: "):
        rtk.attention(both[0].inputs[0][0], both[1].inputs[0][1], both[0].inputs[0][2])
