"""Plan: a kernel built for one problem, loaded on one device, its parameters filled in but for the addresses."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading
from collections.abc import Sequence

from rtk import counters, driver, jit, tma
from rtk.driver import Function

_MAPS_REMEMBERED = 256  # addresses for each tensor of a plan: allocators hand out the same ones again and again


@dataclasses.dataclass(frozen=True)
class TensorOperand:
    """A tensor that the kernel reads by TMA; dimensions innermost first, strides in elements."""

    field: str  # of the parameter block
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    _encoded: dict[int, bytes] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def map_at(self, pointer: int) -> bytes:
        """The tensor map for data at this address."""
        found = self._encoded.get(pointer)
        if found is None:
            if len(self._encoded) >= _MAPS_REMEMBERED:
                self._encoded.clear()
            found = self._encoded[pointer] = tma.encode(pointer, self.dtype, self.shape, self.strides, self.box)
        return found


class Plan:
    """Everything about a launch that does not change from call to call.

    A plan holds no state of a call: the parameter block is copied for each, so threads and streams may share a plan.
    """

    def __init__(
        self,
        source: jit.Source,
        device: int,
        *,
        grid: int,
        threads: int,
        shared_bytes: int,
        parameters: ctypes.Structure,
        tensors: Sequence[TensorOperand],
        pointers: Sequence[str],
        workspace_bytes: int = 0,
    ) -> None:
        self.report, self._function = _load(source, device, shared_bytes)
        self.grid, self.threads, self.shared_bytes = grid, threads, shared_bytes
        self.workspace_bytes = workspace_bytes  # of device memory, zeroed, that the caller brings to each launch
        self._template = bytes(parameters)
        kind = type(parameters)
        self._tensors = [(getattr(kind, operand.field).offset, operand) for operand in tensors]
        self._pointers = [getattr(kind, name).offset for name in pointers]
        counters.add("plans")

    def launch(self, tensors: Sequence[int], pointers: Sequence[int], stream: int) -> None:
        """Runs the kernel on the stream, with the addresses of its tensors and of its plain pointers (0 for null)."""
        block = bytearray(self._template)
        for (offset, operand), address in zip(self._tensors, tensors, strict=True):
            block[offset : offset + tma.MAP_BYTES] = operand.map_at(address)
        for offset, address in zip(self._pointers, pointers, strict=True):
            block[offset : offset + 8] = address.to_bytes(8, "little")
        self._function.launch(self.grid, self.threads, self.shared_bytes, stream, block)
        counters.add("launches")


_loading = threading.Lock()


def _load(source: jit.Source, device: int, shared_bytes: int) -> tuple[jit.CompileReport, Function]:
    binary = jit.build(source)
    with _loading:
        return binary.report, _loaded(binary.cubin, binary.name, device, shared_bytes)


@functools.cache
def _loaded(cubin: bytes, name: str, device: int, shared_bytes: int) -> Function:
    return driver.load(cubin, name, device, shared_bytes)
