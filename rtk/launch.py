"""Plan: a kernel built for one problem, loaded on one device, its parameters filled in but for the addresses."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from rtk import counters, driver, forks, jit, nvtx, tma, zeroed
from rtk.arrays import Library, View
from rtk.driver import Function, Launch
from rtk.errors import ArgumentError, UnsupportedError
from rtk.spec import (
    SHARED_BYTES_PER_BLOCK,
    THREADS_PER_BLOCK,
    Binding,
    KernelSpec,
    TensorMap,
    TensorOperand,
    parameter_bytes,
)

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

PLANS_REMEMBERED = 4096
_MAPS_REMEMBERED = 1 << 15  # of all plans together; allocators hand out the same addresses again and again
_MAX_GRID = (1 << 31) - 1
_ADDRESS_TYPES = (ctypes.c_uint64, ctypes.c_void_p)


class Recent(Generic[Key, Value]):
    """A bounded table that forgets what was not used for long: at least the last capacity / 2 entries are in it.

    Two dicts, the older of which is dropped when the newer is full, so that finding an entry is one lookup. Threads
    share it without a lock: each step is one operation on a dict, and a race costs at most an entry, made again.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._new: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def get(self, key: Key) -> Value | None:
        found = self._new.get(key)
        if found is None:
            found = self._old.get(key)
            if found is not None:
                self.put(key, found)
        return found

    def put(self, key: Key, value: Value) -> None:
        table = self._new
        if len(table) >= self._capacity // 2:
            self._old = table
            self._new = table = {}
        table[key] = value

    def clear(self) -> None:
        self._new, self._old = {}, {}

    def __len__(self) -> int:
        return len({*list(self._new), *list(self._old)})  # copies: other threads may add meanwhile


class MisalignedError(ArgumentError):
    """TMA cannot read at this address."""


class _Maps:
    """The tensor maps of one operand of a plan, by address."""

    _encoded: Recent[tuple[int, int], bytes] = Recent(_MAPS_REMEMBERED)
    _numbers = itertools.count()

    def __init__(self, operand: TensorOperand, device: int) -> None:
        self._operand, self._device = operand, device
        self._number = next(self._numbers)

    def at(self, address: int) -> bytes:
        key = (self._number, address)
        found = self._encoded.get(key)
        if found is None:
            o = self._operand
            if address % tma.STRIDE_MULTIPLE_BYTES or not address:
                received, accepted = (
                    f"an array at address {address:#x}",
                    f"a multiple of {tma.STRIDE_MULTIPLE_BYTES} bytes",
                )
                raise MisalignedError(o.field, received, accepted)
            with driver.on_device(self._device):  # a thread's first call may have no context yet
                found = tma.encode(address, o.dtype, o.shape, o.strides, o.box)
            self._encoded.put(key, found)
        return found


class Plan:
    """Everything about a launch that does not change from call to call.

    Threads and streams may share a plan: each call takes a launch of the plan's for itself, and gives it back.
    `arrays` names the arrays whose addresses a launch takes, in that order; `report` is the compiler's.
    """

    def __init__(
        self,
        source: jit.Source,
        device: int,
        binding: Binding,
        *,
        grid: int,
        threads: int,
        shared_bytes: int,
        title: str,
        programmatic: bool = False,
    ) -> None:
        self.device, self.grid, self.threads, self.shared_bytes = device, grid, threads, shared_bytes
        self._programmatic = programmatic
        self.title = title  # of its NVTX range
        self.arrays = (*(operand.field for operand in binding.tensors), *binding.pointers)
        self.workspace_bytes = binding.workspace_bytes
        kind = type(binding.parameters)
        self._template = bytes(binding.parameters).ljust(parameter_bytes(kind), b"\0")
        # (word in the kernel's argument, the tensor maps that go there; None for a plain address)
        self._slots: list[tuple[int, _Maps | None]] = []
        self._slots += [(_word(kind, operand.field), _Maps(operand, device)) for operand in binding.tensors]
        self._slots += [(_word(kind, name), None) for name in binding.pointers]
        if binding.workspace is not None and binding.workspace_bytes:
            self._slots.append((_word(kind, binding.workspace), None))
        self._counter = None if binding.counter is None else _word(kind, binding.counter)
        self.counts = self._counter is not None  # whether a launch needs a word that is zero (rtk.zeroed)
        self.report, self._function = _load(source, device, shared_bytes)
        self._nowhere = (None,) * len(self._slots)
        self._ready: list[_Ready] = []  # launches that no call is using
        counters.add("plans")

    @classmethod
    def of(
        cls,
        spec: KernelSpec[Any, Any],
        problem: Any,
        config: Any,
        views: Mapping[str, View],
        device: int,
        *,
        sm_margin: int = 0,
    ) -> Plan:
        """The plan of a problem for arrays that lie as `views` says, on a device, leaving `sm_margin` multiprocessors.

        Builds and loads the kernel. Raises CompileError where the source is refused, ToolchainError without NVRTC, and
        ArgumentError for what the spec says of itself and cannot be: a grid or a block that is too large, a parameter
        that is no field of its structure.
        """
        binding = spec.bind(problem, config, views)
        grid = spec.grid(problem, config, driver.device_properties(device).sm_count - sm_margin)
        if not 0 <= grid <= _MAX_GRID:
            raise ArgumentError(f"{spec.name}.grid", grid, "0 to 2**31 - 1 blocks")
        for complaint in (*block_problems(spec, config), *_binding_problems(spec, binding, views)):
            raise ArgumentError(*complaint)
        sizes = {"grid": grid, "threads": spec.threads(config), "shared_bytes": spec.shared_bytes(config)}
        title = f"{spec.name} {spec.describe(problem)} {spec.label(config)}"
        return cls(
            spec.render(config),
            device,
            binding,
            **sizes,
            title=title,
            # Two kernels at a time would take the multiprocessors that are to be left.
            programmatic=spec.programmatic_launch and not sm_margin,
        )

    def run(self, library: Library, addresses: Sequence[int]) -> None:
        """Launches on the library's current stream, with a workspace from its allocator where one is needed."""
        stream = library.stream(self.device)
        if self.workspace_bytes:
            # The call's own, from the caller's allocator: no other thread, stream or graph has it.
            words = -(-self.workspace_bytes // 4)
            workspace = library.empty((words,), "float32", self.device)
            pointer = library.view(workspace, "workspace").pointer
            library.keep_for_graph(workspace)
            driver.zero(pointer, 4 * words, self.device, stream)
            addresses = (*addresses, pointer)
        self.launch(addresses, stream, here=library.is_current(self.device))
        counters.add("launches")

    def launch(self, addresses: Sequence[int], stream: int, counter: int | None = None, here: bool = False) -> None:
        """Runs the kernel on the stream, with the addresses of `arrays` (0 for null), then that of a workspace.

        `counter` is the address of a word that is zero, for a plan that needs one; None takes one that is free. `here`:
        the device is the calling thread's current one.
        """
        if not self.grid:
            return
        try:
            ready = self._ready.pop()
        except IndexError:
            function = self._function.ready(
                self.grid, self.threads, self.shared_bytes, self._template, self._programmatic
            )
            ready = _Ready(function)
        if addresses != ready.addresses:
            self._address(ready, addresses)
        if self._counter is not None:
            words = ready.launch.words
            words[self._counter] = zeroed.word(self.device, driver.is_capturing(stream)) if counter is None else counter
        if nvtx.enabled:
            with nvtx.span(self.title):
                ready.launch.start(stream, here)
        else:
            ready.launch.start(stream, here)
        self._ready.append(ready)

    def _address(self, ready: _Ready, addresses: Sequence[int]) -> None:
        """Writes those addresses, and their tensor maps, that are not what the launch had last."""
        before = ready.addresses or self._nowhere
        ready.addresses = None  # what fails half-way is not to be taken for either
        words, block = ready.launch.words, ready.launch.bytes
        for slot, address, last in zip(self._slots, addresses, before):  # noqa: B905  # strict costs 60 ns
            if address != last:
                word, maps = slot
                if maps is None:
                    words[word] = address
                else:
                    block[8 * word : 8 * word + tma.MAP_BYTES] = maps.at(address)
        ready.addresses = tuple(addresses)


class _Ready:
    """A launch, and the addresses that are written in it."""

    __slots__ = ("addresses", "launch")

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.addresses: tuple[int, ...] | None = None


def _word(kind: type[ctypes.Structure], name: str) -> int:
    offset: int = getattr(kind, name).offset
    assert offset % 8 == 0, name
    return offset // 8


def check_device(argument: str, device: int, sm_margin: int) -> None:
    """Raises UnsupportedError where no kernel can run on the device, ArgumentError where none of it would be left."""
    properties = driver.device_properties(device)
    if properties.compute_capability != (9, 0):
        major, minor = properties.compute_capability
        received = f"an array on cuda:{device}, {properties.name}, compute capability {major}.{minor}"
        raise UnsupportedError(argument, received, "a Hopper GPU (H100, H200, GH200), compute capability 9.0")
    if sm_margin >= properties.sm_count:
        raise ArgumentError("sm_margin", sm_margin, f"below the {properties.sm_count} multiprocessors of cuda:{device}")


# --- what a spec may say of itself ------------------------------------------------------------------------------------

Complaint = tuple[str, object, str]  # what, received, accepted


def block_problems(spec: KernelSpec[Any, Any], config: Any) -> list[Complaint]:
    """What of a config's block no device can serve."""
    found: list[Complaint] = []
    if not 1 <= spec.threads(config) <= THREADS_PER_BLOCK:
        found.append((f"{spec.name}.threads", spec.threads(config), f"1 to {THREADS_PER_BLOCK} threads in a block"))
    if not 0 <= spec.shared_bytes(config) <= SHARED_BYTES_PER_BLOCK:
        accepted = f"0 to {SHARED_BYTES_PER_BLOCK} bytes of shared memory for a block"
        found.append((f"{spec.name}.shared_bytes", spec.shared_bytes(config), accepted))
    return found


def _binding_problems(spec: KernelSpec[Any, Any], binding: Binding, views: Mapping[str, View]) -> list[Complaint]:
    what, kind = f"{spec.name}.bind", spec.parameters
    if type(binding.parameters) is not kind:
        return [(what, f"parameters of type {type(binding.parameters).__name__}", kind.__name__)]
    fields = {name: member for name, member, *_ in kind._fields_}
    tensors = [operand.field for operand in binding.tensors]
    addresses = [*binding.pointers, *filter(None, (binding.workspace, binding.counter))]
    found: list[Complaint] = []
    for name in tensors:
        if fields.get(name) is not TensorMap:
            found.append((what, f"the tensor {name!r}", f"a TensorMap of {kind.__name__}"))
        if name not in views:
            found.append((what, f"the tensor {name!r}", "a tensor that the call has: a map needs an address"))
    for name in addresses:
        if fields.get(name) not in _ADDRESS_TYPES:
            found.append((what, f"the pointer {name!r}", f"a field of {kind.__name__}, c_uint64 or c_void_p"))
    if binding.workspace_bytes and binding.workspace is None:
        found.append((what, f"workspace_bytes {binding.workspace_bytes}", "the field that takes its address, too"))
    return found


# --- loading ----------------------------------------------------------------------------------------------------------

_loading = threading.Lock()
forks.new_in_child(globals(), "_loading")
_loaded: dict[tuple[str, int, int], Function] = {}  # by the binary's key, device and shared memory; never unloaded


def _load(source: jit.Source, device: int, shared_bytes: int) -> tuple[jit.CompileReport, Function]:
    binary = jit.build(source)
    place = (binary.key, device, shared_bytes)
    with _loading:
        if place not in _loaded:
            _loaded[place] = driver.load(binary.cubin, binary.name, device, shared_bytes)
        return binary.report, _loaded[place]
