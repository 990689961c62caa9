"""The CUDA driver, called by ctypes: what CuPy does not reach (tensor maps, cheap launches), and device facts.

Nothing here needs a driver at import; the first call that does raises ToolchainError where there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rtk.errors import DriverError, ToolchainError

# CUdevice_attribute, CUfunction_attribute: numbers of cuda.h
_SM_COUNT, _MEMORY_CLOCK_KHZ, _L2_BYTES, _CC_MAJOR, _CC_MINOR, _SHARED_OPTIN = 16, 36, 38, 75, 76, 97
_MAX_DYNAMIC_SHARED_BYTES = 8
_CAPTURE_IMPLICIT = 906  # CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode: other threads may allocate meanwhile
_STREAM_NON_BLOCKING = 1  # CUstream_flags
_NOT_INITIALIZED, _NO_CONTEXT, _OTHER_CONTEXT = 3, 201, 400  # CUresult
_TRAP_REPORT = b"rtk_trap_report"  # a variable that only debug builds have
_HOST_MEMORY_PORTABLE_MAPPED = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE | _DEVICEMAP


@dataclass(frozen=True)
class DeviceProperties:
    """Facts of one GPU. Sizes in bytes, clocks in kHz."""

    ordinal: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]
    sm_count: int
    l2_bytes: int
    shared_bytes_per_block: int
    memory_bytes: int
    memory_clock_khz: int


_started_in: int | None = None  # the process that started the driver: this one, or one that it was forked from


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda, initialised. Raises ToolchainError without a driver or a device that answers, and in a forked child."""
    global _started_in
    if _started_in not in (None, os.getpid()):
        raise _forked(f"process {_started_in}")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        fix = "install the NVIDIA driver (libcuda.so.1), or pass arrays that live on the CPU"
        raise ToolchainError(f"no NVIDIA driver: {error}", fix) from None
    code = cuda.cuInit(0)
    if code == _NOT_INITIALIZED:  # the answer where somebody else, say torch, had started it before the fork
        raise _forked("a process")
    if code:
        raise ToolchainError(f"the NVIDIA driver does not start: cuInit returned {code}", "run nvidia-smi")
    _started_in = os.getpid()
    return cuda


def _forked(parent: str) -> ToolchainError:
    hint = 'start processes with spawn: multiprocessing.set_start_method("spawn")'
    return ToolchainError(f"this process was forked from {parent} that had started CUDA, and cannot use the GPU", hint)


def call(function: str, *arguments: object, detail: str = "") -> None:
    """Calls a driver function; anything but CUDA_SUCCESS raises DriverError."""
    code = getattr(library(), function)(*arguments)
    if code:
        raise failed(function, code, detail)


def failed(function: str, code: int, detail: str = "") -> ToolchainError | DriverError:
    """The error that a driver function's code is."""
    if code == _NOT_INITIALIZED:
        return _forked("a process")
    return DriverError(function, code, _error_name(code), detail)


def _error_name(code: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else "unknown error"


def available() -> bool:
    """Whether a driver and at least one GPU answer."""
    try:
        return device_count() > 0
    except (ToolchainError, DriverError):
        return False


def device_count() -> int:
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _attribute(ordinal: int, attribute: int) -> int:
    value = ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), attribute, ordinal)
    return value.value


@functools.cache
def device_properties(ordinal: int) -> DeviceProperties:
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), ordinal)
    identity = (ctypes.c_ubyte * 16)()
    call("cuDeviceGetUuid_v2", identity, ordinal)
    memory = ctypes.c_size_t()
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), ordinal)
    return DeviceProperties(
        ordinal=ordinal,
        name=name.value.decode(),
        uuid=f"GPU-{uuid.UUID(bytes=bytes(identity))}",
        compute_capability=(_attribute(ordinal, _CC_MAJOR), _attribute(ordinal, _CC_MINOR)),
        sm_count=_attribute(ordinal, _SM_COUNT),
        l2_bytes=_attribute(ordinal, _L2_BYTES),
        shared_bytes_per_block=_attribute(ordinal, _SHARED_OPTIN),
        memory_bytes=memory.value,
        memory_clock_khz=_attribute(ordinal, _MEMORY_CLOCK_KHZ),
    )


@functools.cache
def _primary_context(ordinal: int) -> ctypes.c_void_p:
    """The context that CuPy and torch use too; kept for the life of the process."""
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
    return context


@contextlib.contextmanager
def on_device(ordinal: int) -> Iterator[None]:
    """Makes the device's primary context current for the calling thread, and restores what was."""
    current = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(current))
    wanted = _primary_context(ordinal)
    if current.value == wanted.value:
        yield
        return
    call("cuCtxPushCurrent_v2", wanted)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(current))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("attributes", ctypes.c_uint64),
        ("attribute_count", ctypes.c_uint32),
    )


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with a value that is one int."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("value", ctypes.c_int32),
        ("_rest", ctypes.c_byte * 60),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class Launch:
    """A launch made ready: the kernel's one by-value argument, and what cuLaunchKernelEx takes. For one call at a time.

    The driver copies the argument when it is called: after that `bytes`, or `words` of eight of them, may be changed
    for the next call.
    """

    def __init__(
        self, function: Function, grid: int, threads: int, shared_bytes: int, argument: bytes, programmatic: bool
    ) -> None:
        self._function, self._debug = function, function.trap_report is not None
        self._argument = ctypes.create_string_buffer(argument, -(-len(argument) // 8) * 8)
        self.bytes = memoryview(self._argument).cast("B")
        self.words = self.bytes.cast("Q")
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._argument))
        self._attribute = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        attributes = (ctypes.addressof(self._attribute), 1) if programmatic else (0, 0)
        self._config = _LaunchConfig(grid, 1, 1, threads, 1, 1, shared_bytes, 0, *attributes)
        self._stream = 0
        places = (ctypes.byref(self._config), function.handle, self._arguments, None)
        self.call = functools.partial(library().cuLaunchKernelEx, *places)

    def start(self, stream: int, here: bool = False) -> None:
        """Puts the kernel on the stream. `here`: the device is the thread's current one, which spares asking."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code = self.call() if here else _NO_CONTEXT
        if code:
            if code in (_NO_CONTEXT, _OTHER_CONTEXT):  # a thread's first call, or another library's context
                with on_device(self._function.ordinal):
                    code = self.call()
            if code:
                raise failed("cuLaunchKernelEx", code)
        if self._debug:
            self._function.wait_for_debug_build(stream)


@dataclass(frozen=True)
class Function:
    """A kernel loaded on one device."""

    handle: ctypes.c_void_p
    ordinal: int
    trap_report: ctypes.c_uint64 | None = None  # of a debug build: where it leaves the name of what it waited for

    def ready(self, grid: int, threads: int, shared_bytes: int, argument: bytes, programmatic: bool = False) -> Launch:
        """A launch of `grid` blocks; `argument` is what the kernel takes, by value.

        `programmatic`: blocks may start while the kernel before on the stream ends, and wait for its end themselves
        ("Programmatic Dependent Launch and Synchronization" of the CUDA C++ Programming Guide).
        """
        return Launch(self, grid, threads, shared_bytes, argument, programmatic)

    def wait_for_debug_build(self, stream: int) -> None:
        """Raises DriverError, naming the barrier, where the kernel waited too long. Not while a graph is captured."""
        assert self.trap_report is not None
        if is_capturing(stream):
            return
        code = library().cuStreamSynchronize(ctypes.c_void_p(stream))
        name = self.trap_report.value.to_bytes(8, "little").rstrip(b"\0").decode(errors="replace")
        if code:
            detail = f"the kernel waited too long for barrier {name!r}" if name else ""
            raise failed("cuStreamSynchronize", code, detail)


def is_capturing(stream: int) -> bool:
    """Whether what is put on the stream goes into a CUDA graph."""
    capturing = ctypes.c_int()
    try:
        call("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(capturing))
    except DriverError as error:
        if error.code == _CAPTURE_IMPLICIT:  # the null stream would take part in another stream's capture
            return True
        raise
    return bool(capturing.value)


def synchronize(stream: int) -> None:
    """Waits until all that was put on the stream is done."""
    call("cuStreamSynchronize", ctypes.c_void_p(stream))


@contextlib.contextmanager
def new_stream() -> Iterator[int]:
    """A stream of the current device, for the block; it and the null stream do not wait for each other."""
    stream = ctypes.c_void_p()
    call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
    try:
        yield stream.value or 0
    finally:
        call("cuStreamDestroy_v2", stream)


def allocate_zeroed(nbytes: int, ordinal: int) -> int:
    """Device memory that is kept for the life of the process, cleared; also while a graph is being captured."""
    pointer, mode = ctypes.c_uint64(), ctypes.c_int(CAPTURE_MODE_RELAXED)
    with on_device(ordinal):
        # In the other modes allocating would be refused while any thread captures, and would spoil its capture.
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
            with new_stream() as stream:
                zero(pointer.value, nbytes, ordinal, stream)
                synchronize(stream)
        finally:
            call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return pointer.value


def zero(pointer: int, nbytes: int, ordinal: int, stream: int) -> None:
    """Clears device memory, in the order of the stream. `nbytes` is a multiple of 4."""
    with on_device(ordinal):
        call("cuMemsetD32Async", ctypes.c_uint64(pointer), 0, ctypes.c_size_t(nbytes // 4), ctypes.c_void_p(stream))


def load(cubin: bytes, name: str, ordinal: int, shared_bytes: int) -> Function:
    """Loads a cubin on a device, allowing its kernel `shared_bytes` of dynamic shared memory.

    The module is never unloaded: kernels are few, and unloading would synchronise the device.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with on_device(ordinal):
        call("cuModuleLoadData", ctypes.byref(module), cubin, detail=name)
        call("cuModuleGetFunction", ctypes.byref(function), module, name.encode(), detail=name)
        detail = f"{name}: {shared_bytes} bytes of shared memory"
        report = _attach_trap_report(module) if _TRAP_REPORT in cubin else None
        call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes, detail=detail)
    return Function(function, ordinal, report)


def _attach_trap_report(module: ctypes.c_void_p) -> ctypes.c_uint64:
    """Gives a debug build (<rtk/debug.cuh>) eight bytes of host memory that outlive its context."""
    variable, size, memory = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_void_p()
    call("cuModuleGetGlobal_v2", ctypes.byref(variable), ctypes.byref(size), module, _TRAP_REPORT)
    call("cuMemHostAlloc", ctypes.byref(memory), ctypes.c_size_t(8), _HOST_MEMORY_PORTABLE_MAPPED)
    assert memory.value is not None
    report = ctypes.c_uint64.from_address(memory.value)
    report.value = 0
    call("cuMemcpyHtoD_v2", variable, ctypes.byref(ctypes.c_uint64(memory.value)), ctypes.c_size_t(8))
    return report


def _after_fork() -> None:
    """What was learnt through the driver is forgotten, so that the child's next use of it meets the error."""
    if _started_in is not None:
        for known in (library, device_properties, _primary_context):
            known.cache_clear()


os.register_at_fork(after_in_child=_after_fork)
