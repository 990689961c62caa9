"""The kernels: each file declares one."""

from __future__ import annotations

from typing import Any

from rtk.kernels import attention_fwd
from rtk.spec import KernelSpec

SPECS: tuple[KernelSpec[Any, Any], ...] = (attention_fwd.SPEC,)


def sample_configs() -> list[tuple[KernelSpec[Any, Any], Any]]:
    """(spec, config) of every kernel's samples: what the tests compile."""
    return [(spec, config) for spec in SPECS for config in spec.samples()]
