"""What the card does at best in this very run: matrix products and copies, against which results are read."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

from rtk.benchmarks import timing

_SIZE = 8192  # of a square matrix product
_COPY_BYTES = 1 << 30


def measure(rounds: int = 11) -> dict[str, float]:
    """bf16_tflops and fp8_tflops of a product of 8192 × 8192 matrices, copy_gbps read and written by a copy of 1 GiB.

    fp8 is left out where this torch has no such product.
    """
    import torch

    # Not torch's own generator: it stays unusable after the capture of a graph has failed.
    generator = torch.Generator(device="cuda").manual_seed(0)
    calls = {"bf16_tflops": [_bf16(torch, generator)], "copy_gbps": [_copy(torch)]}
    with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
        call = _fp8(torch, generator)
        call()
        calls["fp8_tflops"] = [call]
    units = {"bf16_tflops": 2 * _SIZE**3 / 1e6, "fp8_tflops": 2 * _SIZE**3 / 1e6, "copy_gbps": 2 * _COPY_BYTES / 1e3}
    found = timing.interleaved(calls, rounds)
    return {name: round(units[name] / found[name].us, 1) for name in found}


def joined(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of several measurements."""
    names = measured[0].keys() if measured else ()
    return {name: round(statistics.median(each[name] for each in measured if name in each), 1) for name in names}


def _bf16(torch: Any, generator: Any) -> timing.Call:
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


def _fp8(torch: Any, generator: Any) -> timing.Call:
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _copy(torch: Any) -> timing.Call:
    # By a kernel: a graph's own copies, as of copy_(), reach less than two thirds of it.
    a = torch.arange(_COPY_BYTES // 4, device="cuda", dtype=torch.int32)
    b = torch.empty_like(a)
    return lambda: torch.neg(a, out=b)
