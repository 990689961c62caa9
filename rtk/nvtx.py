"""NVTX ranges around launches, for Nsight Systems' timeline and ncu's filters: on with RTK_NVTX=1, or `enable()`.

A range is called after the kernel, the problem and the configuration, as rtk's command line writes them. What a CUDA
graph replays has none: only its capture has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from rtk.errors import ToolchainError

enabled = os.environ.get("RTK_NVTX", "0") not in ("", "0")


def enable(on: bool = True) -> None:
    """Ranges from now on, in all threads; `enable(False)`: none."""
    global enabled
    enabled = on


@contextlib.contextmanager
def span(title: str) -> Iterator[None]:
    """A range of the calling thread's for the block."""
    try:
        from cupy.cuda import nvtx
    except ImportError as error:
        raise ToolchainError(f"NVTX ranges are pushed by CuPy: {error}", 'pip install "rtk-kernels[cuda12]"') from None

    nvtx.RangePush(title)
    try:
        yield
    finally:
        nvtx.RangePop()
