"""Arrays of the libraries on the GPU: strides, copies, out=, allocators, DLPack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_cases import GUARD, Case, CupyArrays, TorchArrays, arrays_of, counted, judge, same_bits

import rtk

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("built")]


# --- strides, copies and out= ----------------------------------------------------------------------------------------


def strided_views(library: Any) -> Iterator[tuple[str, Any, Any, int]]:
    """(name, function from a NumPy array to a view of the same values, the arrays it is used for, copies it costs)."""

    def transposed(x: Any) -> Any:
        return library.of(np.ascontiguousarray(np.swapaxes(x, 1, 2))).swapaxes(1, 2)

    def heads_outermost(x: Any) -> Any:
        return library.of(np.ascontiguousarray(np.swapaxes(x, 0, 1))).swapaxes(0, 1)

    def within(pads: tuple[int, int, int, int], start: tuple[int, ...] = (0, 0, 0, 0)) -> Any:
        def view(x: np.ndarray) -> Any:
            room = np.full([size + pad for size, pad in zip(x.shape, pads, strict=True)], np.nan, x.dtype)
            place = tuple(slice(s, s + size) for s, size in zip(start, x.shape, strict=True))
            room[place] = x
            return library.of(room)[place]

        return view

    def every_second(x: np.ndarray) -> Any:
        room = np.full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2], x.shape[3]), np.nan, x.dtype)
        room[:, ::2, ::3] = x
        return library.of(room)[:, ::2, ::3]

    def unaligned(x: np.ndarray) -> Any:
        return library.of(np.concatenate([np.zeros(1, x.dtype), x.ravel()]))[1:].reshape(x.shape)

    def columns_apart(x: np.ndarray) -> Any:
        room = np.full((*x.shape, 2), np.nan, x.dtype)
        room[..., 0] = x
        return library.of(room)[..., 0]

    def last_outermost(x: np.ndarray) -> Any:
        return library.of(np.ascontiguousarray(np.moveaxis(x, 3, 0))).swapaxes(0, 1).swapaxes(1, 2).swapaxes(2, 3)

    yield "transposed", transposed, "qkv", 0
    yield "heads outermost", heads_outermost, "qkv", 0
    yield "columns of a wider array", within((0, 0, 0, 24), (0, 0, 0, 8)), "qkv", 0
    yield "box of a larger array", within((1, 2, 5, 16), (1, 1, 3, 16)), "qkv", 0
    yield "every second head, every third row", every_second, "qkv", 0
    yield "unaligned base", unaligned, "qkv", 3
    yield "unaligned base of v", unaligned, "v", 1
    yield "columns two apart", columns_apart, "qk", 2
    yield "head_dim outermost", last_outermost, "qkv", 3
    yield "rows of 2 * (head_dim + 3) bytes", within((0, 0, 0, 3)), "qkv", 3
    yield "base 8 bytes off", within((0, 0, 0, 8), (0, 0, 0, 4)), "k", 1


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strides(library: Any, layout: str) -> None:
    case = Case(mask="causal", dims=(64, 40), layout=layout)
    arrays = case.inputs()
    expected = rtk.attention(*map(library.of, arrays), **case.options())
    for name, view, which, copies in strided_views(library):
        views = [view(x) if letter in which else library.of(x) for letter, x in zip("qkv", arrays, strict=True)]
        before = counted("cop")
        got = rtk.attention(*views, **case.options())
        assert same_bits(library, got, expected), name
        assert counted("cop") - before == copies, f"{name}: {counted('cop') - before} copies, not {copies}"
        assert all(tuple(x.shape) == y.shape for x, y in zip(views, arrays, strict=True)), name


@pytest.mark.parametrize("axis", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_strides_of_zero(library: Any, axis: tuple[int, ...]) -> None:
    case = Case(mask="causal")
    narrow = [x[tuple(slice(0, 1) if a in axis else slice(None) for a in range(4))] for x in case.inputs()]
    shapes = [x.shape for x in case.inputs()]
    wide = [np.ascontiguousarray(np.broadcast_to(x, shape)) for x, shape in zip(narrow, shapes, strict=True)]
    expected = rtk.attention(*map(library.of, wide), **case.options())
    views = [
        library.broadcast(library.of(np.ascontiguousarray(x)), shape) for x, shape in zip(narrow, shapes, strict=True)
    ]
    before = counted("cop")
    assert same_bits(library, rtk.attention(*views, **case.options()), expected)
    assert counted("cop") == before, "a broadcast dimension was copied"


@pytest.mark.parametrize("axis", range(4))
def test_negative_strides(cupy: Any, gpu: Any, axis: int) -> None:
    library = arrays_of(gpu, "cupy")
    case = Case(mask="causal")
    arrays = case.inputs()
    expected = rtk.attention(*map(library.of, arrays), **case.options())
    back = tuple(slice(None, None, -1) if a == axis else slice(None) for a in range(4))
    views = [library.of(np.ascontiguousarray(x[back]))[back] for x in arrays]
    assert all(x.strides[axis] < 0 for x in views)
    before = counted("cop")
    assert same_bits(library, rtk.attention(*views, **case.options()), expected)
    assert counted("cop") - before == 3


OUTS = [
    Case(dims=(64, 64), lengths=(129, 300)),
    Case(dims=(128, 128), lengths=(65, 63), mask="causal", layout="bshd", dtype="float16"),
    Case(dims=(72, 24), lengths=(1, 77), heads=(3, 3)),
    Case(dims=(256, 200), lengths=(193, 193), mask="w17.5"),
    Case(dims=(16, 8), lengths=(300, 40), mask="causal", layout="bshd"),
]


@pytest.mark.parametrize("case", OUTS, ids=str)
def test_out_and_nothing_around_it(library: Any, case: Case) -> None:
    arrays = [library.of(x) for x in case.inputs()]
    expected = rtk.attention(*arrays, **case.options())
    shape = case.o_shape()
    size = int(np.prod(shape))
    # (name, shape of the room, the view of it, whether a temporary is needed)
    inner = (slice(1, -1), slice(1, -1), slice(1, -1), slice(8, -8))
    rooms: list[tuple[str, tuple[int, ...], Any, int]] = [
        ("contiguous", (size + 2048,), lambda room: room[1024 : 1024 + size].reshape(shape), 0),
        ("box", (shape[0] + 2, shape[1] + 2, shape[2] + 2, shape[3] + 16), lambda room: room[inner], 0),
        ("transposed", (shape[2], shape[1], shape[0], shape[3]), lambda room: room.swapaxes(0, 2), 0),
        ("unaligned", (size + 2048,), lambda room: room[1001 : 1001 + size].reshape(shape), 1),
        ("columns apart", (*shape, 2), lambda room: room[..., 1], 1),
        ("odd rows", (*shape[:3], shape[3] + 3), lambda room: room[..., : shape[3]], 1),
    ]
    for name, room_shape, view_of, copies in rooms:
        room = library.full(room_shape, GUARD, case.dtype)
        out = view_of(room)
        library.fill(out, float("nan"))
        before = counted("cop")
        assert rtk.attention(*arrays, **case.options(), out=out) is out, name
        assert counted("cop") - before == copies, f"{name}: {counted('cop') - before} copies, not {copies}"
        assert same_bits(library, out, expected), name
        library.fill(out, GUARD)
        untouched = library.full(room_shape, GUARD, case.dtype)
        assert same_bits(library, room, untouched), f"{name}: memory beside out was written"


def test_results_come_from_the_callers_allocator(torch: Any, gpu: Any) -> None:
    arrays = [TorchArrays(gpu).of(x) for x in Case(lengths=(1000, 1000)).inputs()]
    rtk.attention(*arrays)
    before = torch.cuda.memory_allocated()
    o, lse = rtk.attention(*arrays, return_lse=True)
    held = o.numel() * 2 + lse.numel() * 4
    assert held <= torch.cuda.memory_allocated() - before <= held + 4096
    out = torch.empty_like(o)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rtk.attention(*arrays, out=out)
    assert torch.cuda.max_memory_allocated() - before <= 4096, "out= was given, and a result was allocated all the same"


def test_results_come_from_cupys_allocator(cupy: Any, gpu: Any) -> None:
    arrays = [CupyArrays(gpu).of(x) for x in Case(lengths=(1000, 1000)).inputs()]
    rtk.attention(*arrays)
    sizes = []

    def allocator(size: int) -> Any:
        sizes.append(size)
        return cupy.get_default_memory_pool().malloc(size)

    with cupy.cuda.using_allocator(allocator):
        o = rtk.attention(*arrays)
    assert o.nbytes in sizes


# --- DLPack ----------------------------------------------------------------------------------------------------------


class Stranger:
    """An array of a library that rtk has never heard of: DLPack and nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._x.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


class Guest(Stranger):
    """A stranger whose library takes arrays back."""

    module: Any = None

    def __array_namespace__(self, **_: Any) -> Any:
        return type(self)

    @classmethod
    def from_dlpack(cls, x: Any) -> Guest:
        return cls(cls.module.from_dlpack(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dlpack(gpu: Any, library: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guest, "module", library.module)
    case = Case(mask="causal", dtype=dtype)
    arrays = [library.of(x) for x in case.inputs()]
    expected = rtk.attention(*arrays, **case.options(), return_lse=True)
    copies = counted("cop")
    got = rtk.attention(*map(Guest, arrays), **case.options(), return_lse=True)
    assert counted("cop") == copies
    for a, b in zip(got, expected, strict=True):
        assert type(a) is Guest
        assert same_bits(library, a._x, b)
    bare = rtk.attention(*map(Stranger, arrays), **case.options())
    assert same_bits(library, library.module.from_dlpack(bare), expected[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax(gpu: Any, dtype: str) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[gpu.index]
    except RuntimeError as error:
        pytest.skip(f"JAX has no GPU: {error}")
    case = Case(mask="causal", dtype=dtype, layout="bshd")
    arrays = case.inputs()
    o, lse = rtk.attention(*(jax.device_put(x, device) for x in arrays), **case.options(), return_lse=True)
    assert isinstance(o, jax.Array)
    assert isinstance(lse, jax.Array)
    assert o.devices() == {device}
    judge(gpu, (o, lse), case, arrays)
