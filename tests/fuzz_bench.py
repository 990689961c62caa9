"""Runs the fuzzed calls, on the GPU or on the CPU, and watches the memory around them.

Tensors of torch hold everything; CuPy's and NumPy's arrays are views of their memory. The answers come back as tensors
in bhsd, and what is compared is compared where it is.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fuzz_calls import Call, Placement
from fuzz_inputs import make, planted
from gpu_cases import GUARD
from yardstick import DTYPES, attention_f64, check, check_lse, plain

import rtk


@dataclass
class Answer:
    o: Any  # (batch, heads, seqlen_q, head_dim_v)
    lse: Any  # (batch, heads, seqlen_q), or None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.o, self.lse))


@dataclass
class Placed:
    array: Any  # the library's view
    home: Any  # torch's view of the same elements; dimensions that the array has flipped run forwards
    room: Any  # all of the memory, flat
    flips: tuple[int, ...]


def same_bits(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    import torch

    kind = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def assert_same(a: Answer, b: Answer, why: str) -> None:
    for name, x, y in zip(("o", "lse"), a, b, strict=True):
        if not same_bits(x, y):
            different = (x != y) & ~((x != x) & (y != y))
            places = different.nonzero().tolist()
            where = f"{len(places)} of {x.numel()} values, first at {places[0] if places else 'the bits of a NaN'}"
            raise AssertionError(f"{why}: {name} differs in {where}")


class Bench:
    """Where calls run. `attention` is what is tested: rtk.attention, or another in tests of the tests.

    `exact`: it sums in one order, whatever the heads and the values, as the kernel does and the NumPy path does not.
    """

    def __init__(self, gpu: Any = None, attention: Callable[..., Any] = rtk.attention, exact: bool = False) -> None:
        import torch

        self.exact = exact or gpu is not None
        self.torch, self.attention, self.gpu = torch, attention, gpu
        self.device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu.index)
        self.cupy = None if gpu is None else gpu.cupy
        self._own = threading.local()
        self._sides = itertools.cycle(self._side_streams(8))

    # --- threads and streams ---

    def enter_thread(self) -> None:
        if self.gpu is not None:
            self.torch.cuda.set_device(self.device)
            if self.cupy is not None:
                self.cupy.cuda.Device(self.device.index).use()

    def synchronize(self) -> None:
        if self.gpu is not None:
            self.torch.cuda.synchronize(self.device)

    def alive(self) -> bool:
        """Whether the GPU still answers: some errors end its context."""
        try:
            self.synchronize()
        except Exception:
            return False
        return True

    @contextlib.contextmanager
    def _on(self, call: Call) -> Iterator[None]:
        """The call's stream is current in the call's library, after what was enqueued and before what will be."""
        if self.gpu is None or call.stream == "default":
            yield
            return
        torch = self.torch
        if not hasattr(self._own, "side"):
            self._own.side, self._own.cupy_side = next(self._sides)
        outer = torch.cuda.current_stream(self.device)
        self._own.side.wait_stream(outer)
        with torch.cuda.stream(self._own.side) if self._library(call) == "torch" else self._own.cupy_side:
            yield
        outer.wait_stream(self._own.side)

    def _side_streams(self, count: int) -> list[tuple[Any, Any]]:
        """Streams as torch has them and as CuPy has them (or None). Threads that run at once get different ones."""
        if self.gpu is None:
            return [(None, None)]
        streams = [self.torch.cuda.Stream(self.device) for _ in range(count)]
        if self.cupy is None:
            return [(stream, None) for stream in streams]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what follows it in CuPy 14, older ones do not have
            return [(s, self.cupy.cuda.ExternalStream(s.cuda_stream, self.device.index)) for s in streams]

    def _library(self, call: Call) -> str:
        """CuPy's place is taken by NumPy on the CPU, and by torch where CuPy is missing."""
        if call.library == "cupy":
            return "numpy" if self.gpu is None else "torch" if self.cupy is None else "cupy"
        return call.library

    # --- arrays ---

    def place(self, x: Any, placement: Placement, call: Call, fill: float = float("nan")) -> Placed:
        """Memory full of `fill`, and in it an array in the call's layout with the values of `x`, given in bhsd."""
        values = x if call.case.layout == "bhsd" else x.transpose(1, 2)
        shape = tuple(values.shape)
        library = self._library(call)
        flips = () if library == "torch" else placement.flips  # torch has no negative strides
        room = self.torch.full((placement.room(shape),), fill, dtype=x.dtype, device=self.device)
        home = room.as_strided(shape, placement.strides(shape), placement.offset)
        once = home
        for axis in placement.repeats:
            once, values = once.narrow(axis, 0, min(1, shape[axis])), values.narrow(axis, 0, min(1, shape[axis]))
        once.copy_(values.flip(flips) if flips else values)
        return Placed(self._view(library, room, shape, placement, flips), home, room, flips)

    def _view(self, library: str, room: Any, shape: tuple[int, ...], placement: Placement, flips: Any) -> Any:
        if library == "torch":
            return room.as_strided(shape, placement.strides(shape), placement.offset)
        start, strides = placement.flipped(shape)
        strides_bytes = tuple(2 * stride for stride in strides)
        module: Any = np if library == "numpy" else self.cupy
        flat = room.view(self.torch.int16)
        flat = flat.numpy() if library == "numpy" else module.from_dlpack(flat)
        flat = flat.view(DTYPES[str(room.dtype).removeprefix("torch.")])
        return module.lib.stride_tricks.as_strided(flat[start:], shape, strides_bytes)

    def read(self, placed: Placed, layout: str) -> Any:
        """The values of an array in bhsd."""
        values = placed.home.flip(placed.flips) if placed.flips else placed.home
        return (values if layout == "bhsd" else values.transpose(1, 2)).contiguous()

    def to_torch(self, x: Any, dtype: str) -> Any:
        """A result of any of the libraries."""
        torch = self.torch
        if isinstance(x, torch.Tensor):
            return x
        if 0 in x.shape:
            return torch.empty(x.shape, dtype=getattr(torch, dtype), device=self.device)
        integers = x.view(np.int16 if dtype != "float32" else np.int32)
        taken = torch.from_numpy(integers) if isinstance(x, np.ndarray) else torch.from_dlpack(integers)
        return taken.view(getattr(torch, dtype))

    def inputs(self, call: Call) -> list[Any]:
        """q, k and v in bhsd, with what is planted in them."""
        return planted(call, make(call, self.device))

    # --- running ---

    def run(self, call: Call, inputs: list[Any] | None = None) -> Answer:
        """The answer; nothing but the result may have been written."""
        case = call.case
        arrays = self.inputs(call) if inputs is None else inputs
        placed = [self.place(x, getattr(call, name), call) for name, x in zip("qkv", arrays, strict=True)]
        before = [each.room.clone() for each in placed]
        shape = call.shape("o")
        out = None
        if call.out is not None:
            nothing = self.torch.full(shape, float("nan"), dtype=arrays[0].dtype, device=self.device)
            out = self.place(nothing, call.out, call, GUARD)
        q, k, v = (each.array for each in placed)
        with self._on(call):
            if out is None:
                self._poison(call, shape)
            result = self.attention(q, k, v, **call.options(), out=None if out is None else out.array)
        o, lse = result if call.return_lse else (result, None)
        self._check_kinds(call, o, lse, q)
        for name, each, old in zip("qkv", placed, before, strict=True):
            assert same_bits(each.room, old), f"{name}, or memory around it, was written"
        if out is None:
            answer = self.to_torch(o, case.dtype)
            answer = answer if case.layout == "bhsd" else answer.transpose(1, 2)
        else:
            assert o is out.array, "the result is not the array that was given as out"
            answer = self.read(out, case.layout).clone()
            out.home.fill_(GUARD)
            assert bool((out.room == GUARD).all()), "memory around out was written"
        return Answer(answer.contiguous(), None if lse is None else self.to_torch(lse, "float32"))

    def _poison(self, call: Call, shape: tuple[int, ...]) -> None:
        """Leaves NaN in the memory that the allocator is likely to hand out next, so that what is not written shows."""
        torch = self.torch
        if self._library(call) == "torch":
            for size, dtype in ((shape, getattr(torch, call.case.dtype)), (shape[:3], torch.float32)):
                torch.full(size, float("nan"), dtype=dtype, device=self.device)
        elif self._library(call) == "cupy":
            for size, kind in ((shape, np.int16), (shape[:3], np.int32)):
                left = self.cupy.empty(size, kind)
                if left.nbytes:
                    left.data.memset_async(
                        0xFF, left.nbytes, self.cupy.cuda.get_current_stream()
                    )  # NaN in every format

    def _check_kinds(self, call: Call, o: Any, lse: Any, q: Any) -> None:
        case = call.case
        assert type(o) is type(q), f"the result is a {type(o).__name__}"
        assert tuple(o.shape) == case.o_shape(), f"the result has shape {tuple(o.shape)}"
        assert o.dtype == q.dtype, f"the result has dtype {o.dtype}"
        if lse is not None:
            assert type(lse) is type(q), f"lse is a {type(lse).__name__}"
            assert tuple(lse.shape) == call.shape("o")[:3], f"lse has shape {tuple(lse.shape)}"
            assert str(lse.dtype).removeprefix("torch.") == "float32", f"lse has dtype {lse.dtype}"

    # --- judging ---

    def truth(self, call: Call, inputs: list[Any]) -> tuple[Any, Any, Any]:
        """(o, lse, plain) of the definition, in bhsd."""
        o, lse = attention_f64(*inputs, **call.meaning())
        return o, lse, plain(*inputs, **call.meaning())

    def judge(self, call: Call, answer: Answer, inputs: list[Any]) -> None:
        o64, lse64, ordinary = self.truth(call, inputs)
        check(answer.o, o64, ordinary, call.case.dtype)
        if answer.lse is not None:
            check_lse(answer.lse, lse64)
