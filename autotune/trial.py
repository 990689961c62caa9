"""Candidates made ready to be timed on one problem: inputs in device memory, a plan and a CUDA graph for each.

Inputs are N(0, 1), since a card draws less power on zeros and clocks higher, and there are as many sets of them as
twice the level-2 cache holds, taken in turn. A turn of a candidate is a replay of a graph of some calls.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtk import driver
from rtk.arrays import View, itemsize, numpy_dtype
from rtk.autotune.device import Device
from rtk.launch import Plan
from rtk.spec import KernelSpec, Operand

_TURN_US = 2000.0  # what a turn should last, so that events are precise
_MOST_CALLS = 64  # in a turn
_PATTERN_ELEMENTS = 4_194_301  # random values that fill the inputs over and over; a prime, so that no row meets itself
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class _Turn:
    run: Callable[[], None]
    calls: int


class Trial:
    """One problem of one kernel on a device; to be entered."""

    def __init__(self, device: Device, spec: KernelSpec[Any, Any], problem: Any, seed: int = 0) -> None:
        self._device, self._spec, self._problem = device, spec, problem
        self._operands = {name: o for name, o in spec.operands(problem).items() if not o.optional}
        self._draw = random.Random(seed)
        self._pattern = np.random.default_rng(seed).standard_normal(_PATTERN_ELEMENTS, np.float32)
        self._patterns: dict[str, np.ndarray[Any, Any]] = {}
        self._kept = contextlib.ExitStack()
        self._sets: list[dict[str, int]] = []
        self._turns: dict[int, _Turn] = {}

    def __enter__(self) -> Trial:
        with contextlib.ExitStack() as entered:
            sizes = {name: math.prod(o.shape) * itemsize(o.dtype) for name, o in self._operands.items()}
            inputs = sum(size for name, size in sizes.items() if not self._operands[name].written)
            l2_bytes = driver.device_properties(self._device.ordinal).l2_bytes
            count = max(1, min(_MOST_CALLS, math.ceil(2 * l2_bytes / max(inputs, 1))))
            results = {
                name: entered.enter_context(self._device.memory(sizes[name]))
                for name, operand in self._operands.items()
                if operand.written
            }
            for _ in range(count):
                addresses = dict(results)
                for name, operand in self._operands.items():
                    if not operand.written:
                        addresses[name] = entered.enter_context(self._device.memory(sizes[name]))
                        self._fill(addresses[name], operand, sizes[name])
                self._sets.append(addresses)
            self._stopwatch = entered.enter_context(self._device.stopwatch())
            self._counter = entered.enter_context(self._device.memory(4))
            driver.zero(self._counter, 4, self._device.ordinal, self._device.stream)
            self._kept = entered.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.close()

    def _fill(self, address: int, operand: Operand, nbytes: int) -> None:
        data = self._values(operand)[: math.prod(operand.shape)].tobytes()
        if data:
            self._device.upload(address, data)
            self._device.repeat(address, len(data), nbytes)

    def _values(self, operand: Operand) -> np.ndarray[Any, Any]:
        """The pattern in an operand's dtype."""
        if operand.dtype not in self._patterns:
            self._patterns[operand.dtype] = self._pattern.astype(numpy_dtype(operand.dtype))
        return self._patterns[operand.dtype]

    # ---------------------------------------------------------------------------------------------------------- timing

    def add(self, index: int, config: Any) -> None:
        """Makes a candidate ready; raises what building or launching it raises."""
        workspace = functools.cache(lambda nbytes: self._kept.enter_context(self._device.memory(nbytes)))
        calls = [self._call(config, addresses, workspace) for addresses in self._sets]
        calls[0]()  # what a first launch leaves behind is not timed
        self._device.synchronize()
        once_us = self._stopwatch(calls[0])
        wanted = max(1, min(_MOST_CALLS, round(_TURN_US / max(once_us, 1.0))))
        count = -(-wanted // len(calls)) * len(calls) if wanted >= len(calls) else wanted

        def work() -> None:
            for call in itertools.islice(itertools.cycle(calls), count):
                call()

        replay = self._kept.enter_context(self._device.graph(work))
        self._turns[index] = _Turn(replay, count)

    def measure(self, candidates: Sequence[int], rounds: int) -> Mapping[int, Sequence[float]]:
        """µs of a call in each round; in a round each candidate has one turn, in an order of its own."""
        found: dict[int, list[float]] = {index: [] for index in candidates}
        for _ in range(rounds):
            for index in self._draw.sample(list(candidates), len(candidates)):
                turn = self._turns[index]
                found[index].append(self._stopwatch(turn.run) / turn.calls)
        return found

    def _call(self, config: Any, addresses: Mapping[str, int], memory: Callable[[int], int]) -> Callable[[], None]:
        """A launch on one set of inputs; `memory` gives the workspace, which calls in one stream may share."""
        device, stream = self._device.ordinal, self._device.stream
        views = {name: self._view(name, addresses[name]) for name in self._operands}
        plan = Plan.of(self._spec, self._problem, config, views, device)
        pointers = [addresses.get(name, 0) for name in plan.arrays]
        if not plan.workspace_bytes:
            return lambda: plan.launch(pointers, stream, self._counter)
        nbytes = -(-plan.workspace_bytes // 4) * 4
        workspace = memory(nbytes)

        def call() -> None:
            driver.zero(workspace, nbytes, device, stream)
            plan.launch([*pointers, workspace], stream, self._counter)

        return call

    def _view(self, name: str, address: int) -> View:
        operand = self._operands[name]
        strides = tuple(math.prod(operand.shape[axis + 1 :]) for axis in range(len(operand.shape)))
        return View(address, operand.shape, strides, operand.dtype, self._device.ordinal)

    # -------------------------------------------------------------------------------------------------------- checking

    def verify(self, config: Any) -> str:
        """What the spec finds wrong with this config's results, in words; "" for nothing."""
        addresses = self._sets[0]
        for name, operand in self._operands.items():
            if operand.written:  # nothing of another candidate may pass for a result of this one
                self._device.upload(addresses[name], b"\xff" * (math.prod(operand.shape) * itemsize(operand.dtype)))
        self._call(config, addresses, lambda nbytes: self._kept.enter_context(self._device.memory(nbytes)))()
        self._device.synchronize()
        arrays: dict[str, Any] = {}
        results: dict[str, Any] = {}
        for name, operand in self._operands.items():
            (results if operand.written else arrays)[name] = self._reader(name, operand, addresses[name])
        return self._spec.verify(self._problem, arrays, results)

    def _reader(self, name: str, operand: Operand, address: int) -> Callable[[tuple[Any, ...]], Any]:
        """Reads parts of an array: inputs from the pattern, results from the device."""
        dtype = numpy_dtype(operand.dtype)
        pattern = None if operand.written else self._values(operand)

        def read(index: tuple[Any, ...]) -> Any:
            *outer, rows = index
            start = 0
            inner = operand.shape[len(index) :]
            for axis, place in enumerate(outer):
                start += place * math.prod(operand.shape[axis + 1 :])
            row = math.prod(inner)
            start += rows.start * row
            count = (rows.stop - rows.start) * row
            if pattern is not None:
                values = pattern[np.arange(start, start + count) % min(len(pattern), math.prod(operand.shape))]
            else:
                data = self._device.download(address + start * dtype.itemsize, count * dtype.itemsize)
                values = np.frombuffer(data, dtype)
            return values.astype(np.float64).reshape(rows.stop - rows.start, *inner)

        return read


@contextlib.contextmanager
def entered(ordinal: int, spec: KernelSpec[Any, Any], problem: Any) -> Iterator[Trial]:
    """A trial on a device of its own, both given back at the end."""
    with Device(ordinal) as device, Trial(device, spec, problem) as trial:
        yield trial
