"""The GPU side of the commands: which GPU, arrays on it through torch or CuPy, timing, and what to measure against.

Inputs are made on the host and copied: so the demo runs where CuPy was installed alone, without cuRAND, cuBLAS or the
headers its own kernels are compiled from.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtk import driver
from rtk.cli import verify
from rtk.errors import RtkError, ToolchainError

Array = NDArray[Any]
_GEMM_SIZE = 8192  # large enough to reach the ceiling of the tensor cores, small enough to take milliseconds
_WARM_UP, _REPEATS = 5, 25


def find() -> tuple[driver.DeviceProperties | None, str]:
    """(the first GPU that the kernels are for, "") or (None, why there is none)."""
    if not driver.available():
        return None, "no NVIDIA driver, or no GPU, on this machine"
    devices = [driver.device_properties(ordinal) for ordinal in range(driver.device_count())]
    for device in devices:
        if device.compute_capability == (9, 0):
            return device, ""
    names = ", ".join("{} ({}.{})".format(device.name, *device.compute_capability) for device in devices)
    return None, f"the kernels need compute capability 9.0; here: {names}"


class Arrays(Protocol):
    """An array library on one GPU."""

    name: str

    def put(self, host: Array) -> Any:
        """A copy on the GPU of a NumPy array (float16, bfloat16 or float32)."""

    def get(self, array: Any) -> Array:
        """A copy on the host, in the same dtype."""

    def median_ms(self, work: Callable[[], object]) -> float:
        """Median time of one call of `work` on the current stream, by CUDA events, warmed up."""

    def matmul(self, a: Any, b: Any) -> Callable[[], object]:
        """A call that multiplies two square matrices of one 16-bit dtype. Raises where no BLAS is installed."""

    def sdpa(self, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], object] | None:
        """A call of torch's scaled_dot_product_attention, or None where this library is not torch."""


def arrays(ordinal: int) -> Arrays:
    """torch where it can use this GPU (SDPA and cuBLAS come with it), else CuPy. ToolchainError where neither can."""
    trouble = []
    for make in (TorchArrays, CupyArrays):
        try:
            return make(ordinal)
        except Exception as error:  # not installed, or installed for another driver: each raises its own kind
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            trouble.append(f"{make.__name__.removesuffix('Arrays').lower()}: {reason}")
    raise ToolchainError(f"no array library can use the GPU ({'; '.join(trouble)})", "rtk doctor")


class TorchArrays:
    def __init__(self, ordinal: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA in this build, or none that the driver serves")
        torch.cuda.set_device(ordinal)
        self._torch = torch
        self._device = f"cuda:{ordinal}"
        self.name = f"torch {torch.__version__}"

    def put(self, host: Array) -> Any:
        if host.dtype.name == "bfloat16":  # NumPy's bfloat16 is foreign to torch: the bits pass as integers
            return self._torch.from_numpy(host.view(np.int16)).view(self._torch.bfloat16).to(self._device)
        return self._torch.from_numpy(host).to(self._device)

    def get(self, array: Any) -> Array:
        if array.dtype is self._torch.bfloat16:
            import ml_dtypes

            bits: Array = array.view(self._torch.int16).cpu().numpy()
            return bits.view(ml_dtypes.bfloat16)
        host: Array = array.cpu().numpy()
        return host

    def median_ms(self, work: Callable[[], object]) -> float:
        def event() -> Any:
            event = self._torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return _median_ms(work, event, self._torch.cuda.synchronize, lambda start, end: start.elapsed_time(end))

    def matmul(self, a: Any, b: Any) -> Callable[[], object]:
        out = self._torch.empty_like(a)
        return lambda: self._torch.matmul(a, b, out=out)

    def sdpa(self, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], object]:
        attention = self._torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, is_causal=causal)


class CupyArrays:
    def __init__(self, ordinal: int) -> None:
        import cupy

        cupy.cuda.Device(ordinal).use()
        self._cupy = cupy
        self.name = f"CuPy {cupy.__version__}"

    def put(self, host: Array) -> Any:
        return self._cupy.asarray(host)

    def get(self, array: Any) -> Array:
        host: Array = array.get()
        return host

    def median_ms(self, work: Callable[[], object]) -> float:
        def event() -> Any:
            event = self._cupy.cuda.Event()
            event.record()
            return event

        return _median_ms(
            work, event, self._cupy.cuda.get_current_stream().synchronize, self._cupy.cuda.get_elapsed_time
        )

    def matmul(self, a: Any, b: Any) -> Callable[[], object]:
        # cuBLAS itself, because cupy.matmul compiles kernels of its own on the way and knows no bfloat16.
        from cupy_backends.cuda.libs import cublas

        handle = self._cupy.cuda.device.get_cublas_handle()
        out = self._cupy.empty_like(a)
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        kind = {"float16": 2, "bfloat16": 14}[a.dtype.name]  # CUDA_R_16F, CUDA_R_16BF
        n, compute_float32, default_algorithm = len(a), 68, -1

        def multiply() -> None:
            left, right = (b.data.ptr, kind, n), (a.data.ptr, kind, n)  # column-major: b·a there is a·b here
            scale, add = one.ctypes.data, zero.ctypes.data
            result = (out.data.ptr, kind, n, compute_float32, default_algorithm)
            cublas.gemmEx(handle, 0, 0, n, n, n, scale, *left, *right, add, *result)

        return multiply

    def sdpa(self, q: Any, k: Any, v: Any, causal: bool) -> None:
        return None


def _median_ms(
    work: Callable[[], object],
    event: Callable[[], Any],
    synchronize: Callable[[], object],
    elapsed_ms: Callable[[Any, Any], float],
) -> float:
    for _ in range(_WARM_UP):
        work()
    synchronize()
    spans = []
    for _ in range(_REPEATS):
        start = event()
        work()
        spans.append((start, event()))
    synchronize()
    return statistics.median(elapsed_ms(start, end) for start, end in spans)


def gemm_ceiling(library: Arrays, dtype: str) -> tuple[float | None, str]:
    """(TFLOP/s of a large square matrix product in `dtype`, "") or (None, why it could not be measured)."""
    shape = (_GEMM_SIZE, _GEMM_SIZE)
    a, b = (library.put(random(shape, dtype, seed)) for seed in (1, 2))
    try:
        ms = library.median_ms(library.matmul(a, b))
    except Exception as error:  # no cuBLAS: CuPy's wheel brings none, and says so in its own way
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]
    return 2.0 * _GEMM_SIZE**3 / ms / 1e9, ""


def random(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """N(0, 1) on the host, in float32 rounded to `dtype`. Random: constant data runs cooler, and so faster."""
    from rtk.arrays import numpy_dtype

    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values.astype(numpy_dtype(dtype))


def smoke() -> tuple[str, str, str]:
    """A small attention on the GPU, checked: (doctor's status, detail, fix)."""
    import rtk

    device, why = find()
    if device is None:
        return "missing", why, ""
    try:
        library = arrays(device.ordinal)
        host = [random((1, 1, 256, 64), "float16", seed) for seed in range(3)]
        o = library.get(rtk.attention(*map(library.put, host), causal=True))
    except RtkError as error:
        return "missing", str(error).splitlines()[0].removeprefix("rtk: "), ""
    verdict = verify.judge([(*(x[0, 0] for x in host), o[0, 0])], causal=True, tiles_each=4)
    if not verdict.right:
        return "missing", f"ran on {device.name} with {library.name}, and its result is wrong", ""
    return "ok", f"ran on {device.name} with {library.name}, and its result is right", ""
