"""A GPU through the driver alone: memory, a stream, graphs and events, so that tuning needs neither torch nor CuPy.

Everything belongs to a `Device`, which gives it all back when its `with` block ends, whatever happened in it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

from rtk import driver
from rtk.driver import call

_SCRATCH_BYTES = 64 << 20  # clearing so much takes some 20 µs, as enqueueing a graph does
_BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC: the CPU sleeps until the event, and does not spin


class Device:
    """What a tuning run has of one GPU. Used in the thread that entered it."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.stream = 0
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> Device:
        with contextlib.ExitStack() as entered:
            entered.enter_context(driver.on_device(self.ordinal))
            self.stream = entered.enter_context(driver.new_stream())
            self._kept = entered.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.close()

    @contextlib.contextmanager
    def memory(self, nbytes: int) -> Iterator[int]:
        """The address of so much memory, at least 256-byte aligned, for as long as the block runs."""
        pointer = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)), detail=f"{nbytes} bytes")
        try:
            yield pointer.value
        finally:
            self.synchronize()  # what is still running may use it
            call("cuMemFree_v2", pointer)

    def upload(self, address: int, data: bytes) -> None:
        call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def download(self, address: int, nbytes: int) -> bytes:
        buffer = ctypes.create_string_buffer(nbytes)
        call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return buffer.raw

    def repeat(self, address: int, filled: int, nbytes: int) -> None:
        """Fills memory by copies of its first `filled` bytes, which are there."""
        while filled < nbytes:
            count = min(filled, nbytes - filled)
            target, source = ctypes.c_uint64(address + filled), ctypes.c_uint64(address)
            call("cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(count), ctypes.c_void_p(self.stream))
            filled += count
        self.synchronize()

    def synchronize(self) -> None:
        driver.synchronize(self.stream)

    @contextlib.contextmanager
    def graph(self, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """What `work` puts on the stream, as something that can be replayed there."""
        stream, graph, executable = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", stream, driver.CAPTURE_MODE_RELAXED)
        try:
            work()
        finally:  # a capture must be ended, also one that failed
            call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            call("cuGraphUpload", executable, stream)  # else the first replay would
        finally:
            call("cuGraphDestroy", graph)
        try:
            yield lambda: call("cuGraphLaunch", executable, stream)
        finally:
            self.synchronize()
            call("cuGraphExecDestroy", executable)

    @contextlib.contextmanager
    def stopwatch(self) -> Iterator[Callable[[Callable[[], None]], float]]:
        """A function that tells how many µs what it is given takes on the stream.

        The GPU is kept busy while the CPU enqueues that, so that the time of enqueueing is no part of it.
        """
        start, end = ctypes.c_void_p(), ctypes.c_void_p()
        with contextlib.ExitStack() as made:
            scratch = made.enter_context(self.memory(_SCRATCH_BYTES))
            for event in (start, end):
                call("cuEventCreate", ctypes.byref(event), _BLOCKING_SYNC)
                made.callback(call, "cuEventDestroy_v2", event)
            stream = ctypes.c_void_p(self.stream)

            def time_us(work: Callable[[], None]) -> float:
                elapsed_ms = ctypes.c_float()
                driver.zero(scratch, _SCRATCH_BYTES, self.ordinal, self.stream)
                call("cuEventRecord", start, stream)
                work()
                call("cuEventRecord", end, stream)
                call("cuEventSynchronize", end)
                call("cuEventElapsedTime", ctypes.byref(elapsed_ms), start, end)
                return elapsed_ms.value * 1e3

            yield time_us
