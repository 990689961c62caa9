"""What a configuration should take, estimated: the first pick of a new shape, and the order in which configs are tried.

A kernel says what its configs make of a problem (`KernelSpec.work`), as arrays with an element per config: `tiles` of
`steps` steps each, `longest` at most; of each step `mma_flop`, `exponentials`, `simple_ops` on the fp32 pipes and
`l2_bytes`; of each tile `tile_bytes`; `overlap`, the share of a step's softmax that runs under its products; `stages`;
whether tiles are handed out as blocks get free (`dynamic`). The machine says how fast each of its units is. A step
takes as long as its slowest unit, a tile its steps and a prologue and an epilogue, an SM its tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtk.spec import KernelSpec


@dataclass(frozen=True)
class Machine:
    """Rates of one SM and clock, unless they say otherwise; see docs/limits.md."""

    sm_count: int = 132
    mma_flop: float = 4096.0
    exponentials: float = 16.0
    simple_ops: float = 128.0
    l2_bytes: float = 40.0
    mma_share: float = 0.9  # what products reach of their rate while they run
    tile_cycles: float = 2200.0  # before the first product and after the last
    step_cycles: float = 60.0  # of barriers and of waiting in each step
    mhz: float = 1755.0


def estimate_us(spec: KernelSpec[Any, Any], problem: Any, configs: Sequence[Any], machine: Machine) -> Any:
    """µs of each config, as a NumPy array; zeros where the kernel says nothing of its work."""
    work = spec.work(problem, configs)
    if not work:
        return np.zeros(len(configs))
    step, tile = _step_cycles(work, machine), _tile_cycles(work, machine)
    tile_cycles = work["steps"] * step + tile
    waves = work["tiles"] / machine.sm_count
    longest = work["longest"] * step + tile
    # A block that hands out tiles as blocks get free ends at most half a tile late; fixed shares end with the fullest.
    even = waves * tile_cycles + 0.5 * longest * np.minimum(1.0, waves)
    uneven = np.ceil(waves) * tile_cycles * np.maximum(1.0, work["longest"] / np.maximum(work["steps"], 1e-9)) ** 0.25
    cycles = np.where(work["dynamic"], np.maximum(even, longest), np.maximum(uneven, longest))
    return cycles / machine.mhz


def ranked(spec: KernelSpec[Any, Any], problem: Any, configs: Sequence[Any], machine: Machine) -> list[int]:
    """The indices of the configs, the one that should be fastest first."""
    return [int(index) for index in np.argsort(estimate_us(spec, problem, configs, machine), kind="stable")]


def _step_cycles(work: Mapping[str, Any], machine: Machine) -> Any:
    mma = work["mma_flop"] / machine.mma_flop / machine.mma_share
    softmax = work["exponentials"] / machine.exponentials + work["simple_ops"] / machine.simple_ops
    hidden = np.minimum(mma, softmax) * work["overlap"]
    load = work["l2_bytes"] / machine.l2_bytes
    return np.maximum(mma + softmax - hidden, load) + machine.step_cycles


def _tile_cycles(work: Mapping[str, Any], machine: Machine) -> Any:
    return machine.tile_cycles + work["tile_bytes"] / machine.l2_bytes
