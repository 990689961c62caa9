"""Whether there is a compiler to test with."""

from __future__ import annotations

import pytest

from rtk import toolchain
from rtk.errors import ToolchainError


def has_nvrtc() -> bool:
    try:
        toolchain.nvrtc()
    except ToolchainError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC is installed")
