"""What a configuration should take, estimated: the first pick of a new shape, and the order in which configs are tried.

A kernel says what its configs make of a problem (`KernelSpec.work`), as arrays with an element per config:

- `tiles` of `steps` steps each, `longest` at most, and `own_steps` of each consumer, if it skips the others';
- of each step `mma_flop`, `exponentials`, `simple_ops` on the fp32 pipes and `l2_bytes`;
- of each tile `tile_ops` on the fp32 pipes and `tile_bytes`, besides;
- `team`, how the warpgroups of a block share the tensor cores: an index of `Machine.overlap`;
- `dynamic`, whether tiles are handed out as blocks get free.

A step takes as long as its products and its softmax, less what runs at the same time, and at least as long as its
loads; a tile its steps, and what comes before the first and after the last; an SM its tiles. The machine says how fast
each unit is (docs/limits.md); its other constants were fitted to measured times (`rtk.benchmarks.tuning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtk.autotune.keys import Gpu
from rtk.spec import KernelSpec


@dataclass(frozen=True)
class Machine:
    """Rates of one SM and clock, and what was fitted."""

    sm_count: int = 132
    mhz: float = 1755.0
    mma_flop: float = 4096.0
    exponentials: float = 16.0
    simple_ops: float = 128.0

    l2_bytes: float = 49.8
    mma_share: float = 0.992  # what products reach of their rate while they run
    # The share of the shorter one of products and softmax that the other hides: one consumer warpgroup; two; two that
    # take turns; three; three that take turns; four; four that take turns.
    overlap: tuple[float, ...] = (0.323, 0.834, 0.873, 0.997, 1, 1, 0.97)
    skipped: float = 0.473  # how much of a step a consumer that skips its tile saves the block
    step_cycles: float = 316  # of barriers and of waiting in each step
    first_softmax: float = 1.54  # the share of a step's softmax that nothing hides, once a tile
    late: float = 0.196  # of the longest tile: by how much the last block ends after the others, handing tiles out
    uneven: float = 0.259  # the power of longest over mean tile by which fixed shares are late
    launch_us: float = 3.29

    @classmethod
    def of(cls, gpu: Gpu) -> Machine:
        """What is known of a model of GPU: the constants of an H200, and how many SMs there are."""
        return cls(sm_count=gpu.sm_count)


def estimate_us(spec: KernelSpec[Any, Any], problem: Any, configs: Sequence[Any], machine: Machine) -> Any:
    """µs of each config, as a NumPy array; zeros where the kernel says nothing of its work."""
    work = spec.work(problem, configs)
    return of_work(work, machine) if work else np.zeros(len(configs))


def of_work(work: Mapping[str, Any], machine: Machine) -> Any:
    """estimate_us() of what KernelSpec.work returned."""
    mma = work["mma_flop"] / machine.mma_flop / machine.mma_share
    softmax = work["exponentials"] / machine.exponentials + work["simple_ops"] / machine.simple_ops
    hidden = np.minimum(mma, softmax) * np.array(machine.overlap)[work["team"]]
    load = work["l2_bytes"] / machine.l2_bytes
    step = np.maximum(mma + softmax - hidden, load) + machine.step_cycles
    alone = machine.first_softmax * softmax + work["tile_ops"] / machine.simple_ops
    tile = alone + work["tile_bytes"] / machine.l2_bytes

    steps = work["steps"] - machine.skipped * (work["steps"] - work.get("own_steps", work["steps"]))
    mean, longest = steps * step + tile, work["longest"] * step + tile
    waves = work["tiles"] / machine.sm_count
    handed_out = waves * mean + machine.late * longest * np.minimum(1.0, waves)
    ratio = work["longest"] / np.maximum(work["steps"], 1e-9)
    fixed = np.ceil(waves) * mean * np.maximum(1.0, ratio) ** machine.uneven
    cycles = np.maximum(np.where(work["dynamic"], handed_out, fixed), longest)
    return cycles / machine.mhz + machine.launch_us


def ranked(spec: KernelSpec[Any, Any], problem: Any, configs: Sequence[Any], machine: Machine) -> list[int]:
    """The indices of the configs, the one that should be fastest first."""
    return [int(index) for index in np.argsort(estimate_us(spec, problem, configs, machine), kind="stable")]


def pick(spec: KernelSpec[Any, Any], problem: Any, machine: Machine) -> Any:
    """The one of the kernel's first picks that should be fastest; its own pick where it says nothing of its work."""
    configs = spec.first_picks(problem)
    work = spec.work(problem, configs) if configs else {}
    return configs[int(np.argmin(of_work(work, machine)))] if work else spec.pick(problem)
