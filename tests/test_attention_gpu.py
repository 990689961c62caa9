"""The public functions on the GPU, judged by the rule of tests/yardstick.py. Every failure names its case."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yardstick
from yardstick import DTYPES, attention_f64, check, check_lse, make_inputs, plain, to_f64

import rtk
from rtk import jit
from rtk.errors import ArgumentError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import attention_problem

pytestmark = pytest.mark.gpu

GUARD = 7.0  # what memory around an output holds before and after


# --- arrays of the libraries -----------------------------------------------------------------------------------------


class TorchArrays:
    name = "torch"

    def __init__(self, gpu: Any, index: int | None = None) -> None:
        self.module = gpu.torch
        self.device = self.module.device("cuda", gpu.index if index is None else index)

    def of(self, x: np.ndarray) -> Any:
        if x.dtype == DTYPES["bfloat16"]:
            return self.module.from_numpy(x.view(np.int16)).to(self.device).view(self.module.bfloat16)
        return self.module.from_numpy(x).to(self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return self.module.full(shape, value, dtype=getattr(self.module, dtype), device=self.device)

    def bits(self, x: Any) -> Any:
        return x.view(self.module.int16 if x.dtype.itemsize == 2 else self.module.int32)

    def fill(self, x: Any, value: float) -> None:
        x.fill_(value)

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.expand(shape)

    def synchronize(self) -> None:
        self.module.cuda.synchronize(self.device)


class CupyArrays:
    name = "cupy"

    def __init__(self, gpu: Any, index: int | None = None) -> None:
        self.module = gpu.cupy
        self.device = self.module.cuda.Device(gpu.index if index is None else index)

    def of(self, x: np.ndarray) -> Any:
        with self.device:
            return self.module.asarray(x)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return self.of(np.full(shape, value, DTYPES[dtype]))

    def bits(self, x: Any) -> Any:
        return x.view(np.int16 if x.dtype.itemsize == 2 else np.int32)

    def fill(self, x: Any, value: float) -> None:
        # As integers: not every operation of CuPy knows bfloat16.
        self.bits(x)[...] = int(np.array(value, x.dtype).view(np.int16))

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return self.module.broadcast_to(x, shape)

    def synchronize(self) -> None:
        self.device.synchronize()


def arrays_of(gpu: Any, name: str, index: int | None = None) -> Any:
    if getattr(gpu, name) is None:
        pytest.skip(f"no {name} that can use the GPU")
    return (TorchArrays if name == "torch" else CupyArrays)(gpu, index)


@pytest.fixture(params=["torch", "cupy"])
def library(gpu: Any, request: pytest.FixtureRequest) -> Any:
    return arrays_of(gpu, request.param)


@pytest.fixture
def any_library(gpu: Any) -> Any:
    """One library is enough for what does not depend on it: torch where it is, for its float64 on the GPU."""
    return arrays_of(gpu, "torch" if gpu.torch is not None else "cupy")


@pytest.fixture
def torch(gpu: Any) -> Any:
    return arrays_of(gpu, "torch").module


@pytest.fixture
def cupy(gpu: Any) -> Any:
    return arrays_of(gpu, "cupy").module


def same_bits(library: Any, a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((library.bits(a) == library.bits(b)).all())


def counted(word: str) -> int:
    """How much rtk.stats() counts under names with this word: "cop" for copies, "launch" for launches."""
    counts = [count for name, count in rtk.stats().items() if word in name]
    assert counts, f"rtk.stats() counts nothing like {word!r}"
    return sum(counts)


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    dims: tuple[int, int] = (64, 64)  # head_dim, head_dim_v
    mask: str = "full"
    lengths: tuple[int, int] = (129, 300)  # seqlen_q, seqlen_k
    kind: str = "normal"
    heads: tuple[int, int] = (4, 2)  # of q, of k and v
    dtype: str = "bfloat16"
    layout: str = "bhsd"
    softcap: float = 0.0
    scale: float | None = None
    batch: int = 2

    def __str__(self) -> str:
        sizes = (("d", self.dims), ("s", self.lengths), ("h", self.heads))
        parts = [self.dtype, self.mask, *(f"{letter}{a}x{b}" for letter, (a, b) in sizes)]
        parts += [f"b{self.batch}", self.layout, self.kind]
        parts += [f"cap{self.softcap:g}"] * bool(self.softcap) + [f"scale{self.scale}"] * (self.scale is not None)
        return "-".join(parts)

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """q, k and v in NumPy, in the case's layout. Peaks stand where the mask begins and ends."""
        options = MASKS[self.mask]
        offset = self.lengths[1] - self.lengths[0] if options.get("causal_align") != "top-left" else 0
        left, right = options.get("window_size") or (None, None)
        edges = [offset, offset + 1]
        edges += [offset - left - 1, offset - left] if left not in (None, -1) else []
        edges += [offset + right, offset + right + 1] if right not in (None, -1) else []
        arrays = make_inputs(
            self.kind,
            batch=self.batch,
            heads_q=self.heads[0],
            heads_kv=self.heads[1],
            seqlen_q=self.lengths[0],
            seqlen_k=self.lengths[1],
            head_dim=self.dims[0],
            head_dim_v=self.dims[1],
            dtype=self.dtype,
            rng=np.random.default_rng(seed),
            edges=tuple(edges),
        )
        return [x if self.layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]

    def options(self) -> dict[str, Any]:
        return MASKS[self.mask] | {"softcap": self.softcap, "softmax_scale": self.scale, "layout": self.layout}

    def o_shape(self) -> tuple[int, int, int, int]:
        shape = (self.batch, self.heads[0], self.lengths[0], self.dims[1])
        return shape if self.layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])

    def problem(self) -> Any:
        def shape(heads: int, seqlen: int, dim: int) -> tuple[int, int, int, int]:
            return (self.batch, heads, seqlen, dim) if self.layout == "bhsd" else (self.batch, seqlen, heads, dim)

        defaults: dict[str, Any] = {"causal": False, "causal_align": "bottom-right", "window_size": None}
        return attention_problem(
            shape(self.heads[0], self.lengths[0], self.dims[0]),
            shape(self.heads[1], self.lengths[1], self.dims[0]),
            shape(self.heads[1], self.lengths[1], self.dims[1]),
            self.dtype,
            **(defaults | self.options()),
        )


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal-tl": {"causal": True, "causal_align": "top-left"},
    "w0.0": {"window_size": (0, 0)},
    "w17.5": {"window_size": (17, 5)},
    "w130.64": {"window_size": (130, 64)},
    "w3.700": {"window_size": (3, 700)},
    "w33.": {"window_size": (33, None)},
    "w.20": {"window_size": (-1, 20)},
    "causal-w64.9": {"causal": True, "window_size": (64, 9)},
    "causal-tl-w100.": {"causal": True, "causal_align": "top-left", "window_size": (100, -1)},
    "tl-w70.40": {"causal_align": "top-left", "window_size": (70, 40)},
}
DIMS = [(d, d) for d in (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 136, 160, 192, 200, 256)]
DIMS += [(192, 128), (64, 256), (128, 64), (256, 64), (40, 200)]
LENGTHS = [(1, 1), (1, 777), (777, 1), (129, 1023), (512, 512), (1000, 300), (300, 1000), (64, 64), (65, 63)]
FACTORS: dict[str, list[Any]] = {
    "dims": DIMS,
    "mask": list(MASKS),
    "lengths": LENGTHS,
    "kind": list(yardstick.KINDS),
    "heads": [(3, 3), (6, 2), (8, 1)],
    "dtype": ["bfloat16", "float16"],
    "layout": ["bhsd", "bshd"],
    "softcap": [0.0, 15.0],
    "scale": [None, 0.11],
    "batch": [2, 1],
}


def covering(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows in which every pair of values of every two factors occurs.

    The first two factors are crossed in full; a row's other values are those that bring the most new pairs, of these
    the least used ones.
    """
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for (a, b) in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    used = {(name, i): 0 for name in names for i in range(len(factors[name]))}

    def pairs(row: dict[str, int], name: str, i: int) -> set[Any]:
        found = {
            ((a, x), (name, i)) if names.index(a) < names.index(name) else ((name, i), (a, x)) for a, x in row.items()
        }
        return found & missing

    def filled(row: dict[str, int]) -> dict[str, Any]:
        for name in names:
            if name not in row:
                values = range(len(factors[name]))
                row[name] = max(values, key=lambda i, name=name: (len(pairs(row, name, i)), -used[name, i]))  # type: ignore[misc]
        missing.difference_update(((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2))
        for item in row.items():
            used[item] += 1
        return {name: factors[name][i] for name, i in row.items()}

    crossed = itertools.product(range(len(factors[names[0]])), range(len(factors[names[1]])))
    rows = [filled({names[0]: x, names[1]: y}) for x, y in crossed]
    while missing:
        rows.append(filled(dict(min(missing))))
    return rows


GRID = [Case(**row) for row in covering(FACTORS)]


def truth(gpu: Any, arrays: list[np.ndarray], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(o, lse, plain) of NumPy inputs; computed on the GPU where torch is there."""
    if gpu.torch is not None:
        arrays = [TorchArrays(gpu).of(x) for x in arrays]
    o, lse = attention_f64(*arrays, **options)
    return to_f64(o), to_f64(lse), to_f64(plain(*arrays, **options))


def judge(gpu: Any, got: tuple[Any, Any], case: Case, arrays: list[np.ndarray], label: str = "") -> None:
    o64, lse64, ordinary = truth(gpu, arrays, case.options())
    label = f"{case} {label}".strip()
    check(got[0], o64, ordinary, case.dtype, layout=case.layout, label=label)
    check_lse(got[1], lse64, label=label)


def build(cases: list[Case], configs: list[Any] | None = None) -> None:
    """Compiles the cases' kernels in parallel; what a call would compile on its own, one after another."""
    configs = configs or [SPEC.pick(case.problem()) for case in cases]
    sources = {source.name: source for source in map(SPEC.render, configs)}
    jit.build_many(list(sources.values()))


# --- the numeric grid ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def built(gpu: Any, request: pytest.FixtureRequest) -> None:
    """Compiles what the selected tests will ask for, in parallel."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [spec.params.get("case") for spec in parameters if spec is not None]
    build([case for case in cases if isinstance(case, Case)])


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(gpu: Any, any_library: Any, case: Case) -> None:
    arrays = case.inputs()
    # What is not written is NaN then. Every second case takes the allocation that rtk makes.
    out = any_library.full(case.o_shape(), float("nan"), case.dtype) if GRID.index(case) % 2 else None
    o, lse = rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True, out=out)
    assert out is None or o is out
    assert type(o).__module__.split(".")[0] == any_library.name
    judge(gpu, (o, lse), case, arrays)


def test_lengths_around_every_tile_edge(gpu: Any, any_library: Any) -> None:
    sizes = [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257]
    for lengths, mask in itertools.product(itertools.product(sizes, sizes), ("full", "causal", "w17.5")):
        case = Case(lengths=lengths, mask=mask, kind="index", batch=1, heads=(2, 1), dims=(64, 8))
        arrays = case.inputs()
        judge(gpu, rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True), case, arrays)


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_and_windows(gpu: Any, any_library: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(16):
        left, right = (None if rng.random() < 0.3 else int(rng.integers(0, 2 ** rng.integers(1, 10))) for _ in "lr")
        align = ["bottom-right", "top-left"][int(rng.integers(2))]
        mask = f"{number}:w{left}.{right}-{align}"
        monkeypatch.setitem(MASKS, mask, {"window_size": (left, right), "causal_align": align})
        cases.append(
            Case(
                dims=((64, 64), (128, 128))[seed % 2],
                mask=mask,
                lengths=(int(rng.integers(1, 600)), int(rng.integers(1, 900))),
                kind=yardstick.KINDS[int(rng.integers(4))],
                heads=((1, 1), (4, 2), (5, 1))[int(rng.integers(3))],
                layout=("bhsd", "bshd")[int(rng.integers(2))],
                batch=int(rng.integers(1, 4)),
            )
        )
    build(cases)
    for case in cases:
        arrays = case.inputs(seed)
        judge(gpu, rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True), case, arrays)


@pytest.mark.parametrize("scale", [0.0, 1e-30, -0.05, -0.3, 1.0])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 50.0])
def test_scales(gpu: Any, any_library: Any, scale: float, softcap: float) -> None:
    for mask, dtype, dims in (("full", "float16", (64, 64)), ("causal", "bfloat16", (128, 96))):
        case = Case(scale=scale, softcap=softcap, mask=mask, dtype=dtype, dims=dims, lengths=(200, 333))
        arrays = case.inputs()
        judge(gpu, rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True), case, arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_libraries(gpu: Any, library: Any, layout: str, dtype: str) -> None:
    """CuPy's bfloat16 is ml_dtypes'. Results are of the caller's library and new; lse is float32."""
    case = Case(mask="causal", kind="index", layout=layout, dtype=dtype)
    arrays = case.inputs()
    q, k, v = map(library.of, arrays)
    o, lse = rtk.attention(q, k, v, **case.options(), return_lse=True)
    assert type(o) is type(q)
    assert type(lse) is type(q)
    assert o.dtype == q.dtype
    assert o.device == q.device
    assert yardstick.dtype_name(lse) == "float32"
    judge(gpu, (o, lse), case, arrays)
    alone = rtk.attention(q, k, v, **case.options())
    assert same_bits(library, alone, o), "return_lse changes o"
    for x, y in zip((q, k, v), arrays, strict=True):
        assert same_bits(library, x, library.of(y)), "an input was changed"


def test_flash_attn_func(library: Any) -> None:
    case = Case(layout="bshd")
    q, k, v = (library.of(x) for x in case.inputs())
    assert same_bits(library, rtk.flash_attn_func(q, k, v), rtk.attention(q, k, v, layout="bshd"))
    options: dict[str, Any] = {
        "softmax_scale": 0.2,
        "causal": True,
        "window_size": (90, -1),
        "softcap": 8.0,
        "return_lse": True,
    }
    flash = rtk.flash_attn_func(q, k, v, **options)
    ours = rtk.attention(q, k, v, layout="bshd", **options)
    assert all(same_bits(library, a, b) for a, b in zip(flash, ours, strict=True))


def test_a_long_sequence(gpu: Any, torch: Any) -> None:
    """Row blocks of a causal 16K, each against its own keys: bottom-right makes a block a problem of its own."""
    for dims, dtype in (((64, 64), torch.float16), ((128, 128), torch.bfloat16), ((256, 256), torch.bfloat16)):
        generator = torch.Generator("cuda").manual_seed(1)
        q, k, v = (
            torch.randn(1, heads, 16384, d, device="cuda", dtype=dtype, generator=generator)
            for heads, d in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
        )
        o, lse = rtk.attention(q, k, v, causal=True, return_lse=True)
        for end in (64, 1000, 8192, 12345, 16384):
            rows, keys = slice(end - 64, end), slice(0, end)
            part = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            o64, lse64 = attention_f64(*part, causal=True)
            label = f"{dims} {dtype} rows to {end}"
            check(o[:, :, rows], o64, plain(*part, causal=True), yardstick.dtype_name(q), label=label)
            check_lse(lse[:, :, rows], lse64, label=label)


def test_many_small_problems(gpu: Any, any_library: Any) -> None:
    """More (batch, head) pairs than a grid dimension holds."""
    for case in (
        Case(batch=70000, heads=(1, 1), lengths=(1, 3), dims=(8, 8)),
        Case(batch=3, heads=(1500, 500), lengths=(5, 9), dims=(16, 8), layout="bshd", mask="causal"),
    ):
        arrays = case.inputs()
        judge(gpu, rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True), case, arrays)


# --- more than 2^31 elements -----------------------------------------------------------------------------------------

LIMIT = 1 << 31


def test_more_than_2_31_elements_in_one_head(torch: Any) -> None:
    rows = LIMIT // 256 + 129
    q = torch.empty(1, 1, rows, 256, dtype=torch.bfloat16, device="cuda").normal_()
    k, v = (torch.randn(1, 1, 100, 256, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    assert q.numel() > LIMIT
    o, lse = rtk.attention(q, k, v, return_lse=True)
    for start in (0, rows // 2 - 64, LIMIT // 256 - 64, LIMIT // 256, rows - 64):
        part = slice(start, start + 64)
        o64, lse64 = attention_f64(q[:, :, part], k, v)
        check(o[:, :, part], o64, plain(q[:, :, part], k, v), "bfloat16", label=f"rows from {start}")
        check_lse(lse[:, :, part], lse64, label=f"rows from {start}")


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_more_than_2_31_elements_in_a_batch(torch: Any, layout: str) -> None:
    shape = (65, 32, 4096, 256) if layout == "bhsd" else (65, 4096, 32, 256)
    small = (65, 4, 80, 256) if layout == "bhsd" else (65, 80, 4, 256)
    q = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    k, v = (torch.randn(small, dtype=torch.float16, device="cuda") for _ in "kv")
    assert q.numel() > LIMIT
    o, lse = rtk.attention(q, k, v, layout=layout, return_lse=True)
    for b, start in itertools.product((0, 31, 63, 64), (0, 2048, 4096 - 64)):
        rows = (
            slice(b, b + 1),
            *((slice(None), slice(start, start + 64)) if layout == "bhsd" else (slice(start, start + 64),)),
        )
        part = (q[rows], k[b : b + 1], v[b : b + 1])
        o64, lse64 = attention_f64(*part, layout=layout)
        label = f"batch {b}, rows from {start}"
        check(o[rows], o64, plain(*part, layout=layout), "float16", layout=layout, label=label)
        check_lse(lse[b : b + 1, :, start : start + 64], lse64, label=label)


def test_more_than_2_31_elements_of_keys(torch: Any) -> None:
    """Each row's weight lies on one key, and the far ones stand beyond element 2^31."""
    keys = LIMIT // 256 + 999
    places = [0, 1, 100, keys // 2, LIMIT // 256 - 1, LIMIT // 256, LIMIT // 256 + 1, keys - 2, keys - 1]
    k = torch.zeros(1, 1, keys, 256, dtype=torch.bfloat16, device="cuda")
    v = torch.empty_like(k).normal_()
    assert k.numel() > LIMIT
    q = torch.zeros(1, 1, len(places), 256, dtype=torch.bfloat16, device="cuda")
    for row, place in enumerate(places):
        q[0, 0, row, row] = 32
        k[0, 0, place, row] = 32  # 32 * 32 / sqrt(256) = 64, and e^64 outweighs eight million keys at 0
    o, lse = rtk.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(o, v[:, :, places], rtol=0, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 64.0), rtol=0, atol=1e-4)


# --- the same bits ---------------------------------------------------------------------------------------------------


REPEATED = [
    Case(dims=dims, mask=mask, lengths=(4000, 4100), heads=(16, 4))
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256))
    for mask in ("full", "causal", "w130.64")
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_repeats_give_the_same_bits(any_library: Any, case: Case) -> None:
    arrays = [any_library.of(x) for x in case.inputs()]
    first = rtk.attention(*arrays, **case.options(), return_lse=True)
    for repeat in range(9):
        again = rtk.attention(*arrays, **case.options(), return_lse=True)
        for name, a, b in zip(("o", "lse"), first, again, strict=True):
            assert same_bits(any_library, a, b), f"{case}: {name} differs in repeat {repeat}"


INVARIANT = [
    Case(dims=dims, lengths=lengths, mask=mask, batch=37, heads=(8, 2))
    for dims in ((64, 64), (128, 128))
    for lengths in ((1, 1000), (100, 100), (1000, 1500))
    for mask in ("full", "causal")
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_batch_invariant(any_library: Any, case: Case) -> None:
    arrays = [any_library.of(x) for x in case.inputs()]
    together = rtk.attention(*arrays, **case.options(), return_lse=True, batch_invariant=True)
    for part in (slice(0, 1), slice(36, 37), slice(5, 8)):
        alone = rtk.attention(*(x[part] for x in arrays), **case.options(), return_lse=True, batch_invariant=True)
        for name, a, b in zip(("o", "lse"), together, alone, strict=True):
            assert same_bits(any_library, a[part], b), f"{case}: {name} of sequences {part} depends on the batch"
    for margin in (1, 66, 131):
        fewer = rtk.attention(*arrays, **case.options(), return_lse=True, batch_invariant=True, sm_margin=margin)
        for name, a, b in zip(("o", "lse"), together, fewer, strict=True):
            assert same_bits(any_library, a, b), f"{case}: {name} depends on the number of SMs ({margin} fewer)"


def test_threads_and_streams_do_not_disturb_each_other(torch: Any, gpu: Any) -> None:
    library = arrays_of(gpu, "torch")
    cases = [
        Case(mask=mask, lengths=(n, n), heads=(8, 8)) for mask, n in (("causal", 700), ("full", 900), ("w17.5", 1500))
    ]
    inputs = [[library.of(x) for x in case.inputs()] for case in cases]
    expected = [rtk.attention(*x, **case.options()) for x, case in zip(inputs, cases, strict=True)]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            torch.cuda.set_device(gpu.index)
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(30):
                    i = (index + turn) % len(cases)
                    if not same_bits(library, rtk.attention(*inputs[i], **cases[i].options()), expected[i]):
                        wrong.append(f"thread {index}, turn {turn}: {cases[i]}")
        except Exception as error:
            wrong.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


# --- configurations --------------------------------------------------------------------------------------------------

PINNED = [
    Case(dims=(64, 64), mask="full", dtype="bfloat16", kind="index", lengths=(300, 700)),
    Case(dims=(128, 128), mask="causal", dtype="float16", kind="index", lengths=(300, 700)),
    Case(dims=(192, 128), mask="causal-w64.9", dtype="bfloat16", softcap=15.0, lengths=(500, 450)),
    Case(dims=(40, 200), mask="w33.", dtype="float16", lengths=(200, 450)),
]


@pytest.mark.parametrize("case", PINNED, ids=str)
def test_every_config(gpu: Any, any_library: Any, case: Case) -> None:
    configs = SPEC.configs(case.problem())
    assert len(configs) > 1
    build([case], configs)
    arrays = case.inputs()
    o64, lse64, ordinary = truth(gpu, arrays, case.options())
    on_gpu = [any_library.of(x) for x in arrays]
    plans = counted("plan")
    for config in configs:
        out = any_library.full(case.o_shape(), float("nan"), case.dtype)
        o, lse = rtk.attention(*on_gpu, **case.options(), return_lse=True, out=out, config=config)
        check(o, o64, ordinary, case.dtype, layout=case.layout, label=f"{case} {config}")
        check_lse(lse, lse64, label=f"{case} {config}")
        again = rtk.attention(*on_gpu, **case.options(), config=config)
        assert same_bits(any_library, o, again), f"{case} {config}: a repeat differs"
    assert counted("plan") - plans >= len(configs) - 1, "not every pinned config was made into a plan of its own"


def test_config_as_a_dict(any_library: Any) -> None:
    case = Case()
    arrays = [any_library.of(x) for x in case.inputs()]
    config = SPEC.configs(case.problem())[0]
    by_class = rtk.attention(*arrays, config=config)
    assert same_bits(any_library, rtk.attention(*arrays, config=dataclasses.asdict(config)), by_class)
    rtk.attention(*arrays, config={"BLOCK_N": 64})
    for bad in ({"BLOCK_M": 100}, {"BLOCK_N": 4096}, {"WRONG": 1}, "fast", dataclasses.replace(config, HEAD_DIM=72)):
        with pytest.raises((ArgumentError, UnsupportedError), match="config"):
            rtk.attention(*arrays, config=bad)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_sm_margin(gpu: Any, any_library: Any, mask: str) -> None:
    case = Case(mask=mask, lengths=(1000, 1000), heads=(8, 2))
    arrays = case.inputs()
    on_gpu = [any_library.of(x) for x in arrays]
    for margin in (1, 100, gpu.properties.sm_count - 1):
        got = rtk.attention(*on_gpu, **case.options(), return_lse=True, sm_margin=margin)
        judge(gpu, got, case, arrays, f"sm_margin {margin}")
    with pytest.raises((ArgumentError, UnsupportedError), match="sm_margin"):
        rtk.attention(*on_gpu, sm_margin=gpu.properties.sm_count)


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


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_nan_and_inf_reach_the_rows_that_see_them(
    any_library: Any, dims: tuple[int, int], where: str, bad: float
) -> None:
    case = Case(dims=dims, mask="causal", lengths=(2048, 2048), batch=1)
    q, k, v = case.inputs()
    clean = to_f64(rtk.attention(*map(any_library.of, (q, k, v)), **case.options()))
    (k if where == "k" else v)[:, 1, 1500] = bad  # key 1500 of the second kv head
    o, lse = (to_f64(x) for x in rtk.attention(*map(any_library.of, (q, k, v)), **case.options(), return_lse=True))
    # A key of Inf meets queries of both signs: its scores are NaN.
    assert not np.isfinite(o[:, 2:, 1500:]).any(), "a row that sees the key does not show it"
    if where == "v":
        assert np.isfinite(lse).all(), "the values do not enter the log-sum-exp"
    # A tile may carry it to rows that share it; no block of queries and no tile of keys is wider than 256.
    np.testing.assert_array_equal(o[:, :, : 1500 - 512], clean[:, :, : 1500 - 512])
    np.testing.assert_array_equal(o[:, :2], clean[:, :2], err_msg="another kv head's rows")


BEYOND = [
    Case(dims=dims, mask=mask, lengths=lengths, layout=layout)
    for dims in ((64, 64), (72, 40), (128, 256))
    for mask in ("full", "causal")
    for lengths in ((65, 63), (1, 1), (129, 300), (200, 129))
    for layout in ("bhsd", "bshd")
]


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_what_lies_beyond_the_arrays_never_matters(any_library: Any, case: Case) -> None:
    arrays = case.inputs()
    expected = rtk.attention(*map(any_library.of, arrays), **case.options(), return_lse=True)
    pads = (1, 1, 150, 8) if case.layout == "bhsd" else (1, 150, 1, 8)
    place = tuple(slice(pad, -pad) for pad in pads)
    for bad in (float("nan"), float("inf")):
        views = []
        for x in arrays:
            room = np.full([size + 2 * pad for size, pad in zip(x.shape, pads, strict=True)], bad, x.dtype)
            room[place] = x
            views.append(any_library.of(room)[place])
        before = counted("cop")
        got = rtk.attention(*views, **case.options(), return_lse=True)
        assert counted("cop") == before, "these views need no copy"
        for name, a, b in zip(("o", "lse"), got, expected, strict=True):
            assert same_bits(any_library, a, b), f"{name} depends on the {bad} around the arrays"


def test_nan_in_a_query_stays_in_its_row(any_library: Any) -> None:
    case = Case(lengths=(300, 200))
    q, k, v = case.inputs()
    clean = to_f64(rtk.attention(*map(any_library.of, (q, k, v))))
    q[1, 2, 77, 5] = np.nan
    o, lse = (to_f64(x) for x in rtk.attention(*map(any_library.of, (q, k, v)), return_lse=True))
    assert np.isnan(o[1, 2, 77]).all()
    assert np.isnan(lse[1, 2, 77])
    o[1, 2, 77] = clean[1, 2, 77]
    np.testing.assert_array_equal(o, clean)


# --- streams, graphs, devices ----------------------------------------------------------------------------------------


def test_torch_streams(torch: Any, gpu: Any) -> None:
    """On the current stream, after what was enqueued there, and without waiting for it."""
    case = Case(mask="causal", lengths=(500, 500))
    source = [TorchArrays(gpu).of(x) for x in case.inputs()]
    expected = rtk.attention(*source, **case.options())
    targets = [torch.zeros_like(x) for x in source]
    rtk.attention(*targets, **case.options())  # compiled and planned before the clock counts
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)
        for target, x in zip(targets, source, strict=True):
            target.copy_(x)
        got = rtk.attention(*targets, **case.options())
        assert not stream.query(), "the call waited for the stream"
        for target in targets:
            target.zero_()  # after the kernel has read it
    stream.synchronize()
    assert same_bits(TorchArrays(gpu), got, expected)


def test_cupy_streams(cupy: Any, gpu: Any) -> None:
    case = Case(mask="causal", lengths=(500, 500))
    library = CupyArrays(gpu)
    source = [library.of(x) for x in case.inputs()]
    expected = rtk.attention(*source, **case.options())
    targets = [library.full(x.shape, 0, case.dtype) for x in source]
    rtk.attention(*targets, **case.options())
    ballast = cupy.empty(1 << 32, np.uint8)
    library.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(200):  # about a quarter of a second
            ballast.data.memset_async(1, ballast.nbytes, stream)
        for target, x in zip(targets, source, strict=True):
            target.data.copy_from_device_async(x.data, x.nbytes, stream)
        got = rtk.attention(*targets, **case.options())
        assert not stream.done, "the call waited for the stream"
        for target in targets:
            target.data.memset_async(0, target.nbytes, stream)
    stream.synchronize()
    assert same_bits(library, got, expected)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_cuda_graph(torch: Any, gpu: Any, mask: str) -> None:
    case = Case(mask=mask, lengths=(700, 900), heads=(8, 2))
    library = TorchArrays(gpu)
    arrays = [library.of(x) for x in case.inputs()]
    out = torch.empty(case.o_shape(), dtype=torch.bfloat16, device=library.device)
    rtk.attention(*arrays, **case.options(), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rtk.attention(*arrays, **case.options(), out=out)
    for seed in (1, 2, 3):
        for target, x in zip(arrays, case.inputs(seed), strict=True):
            target.copy_(library.of(x))
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(library, out, rtk.attention(*arrays, **case.options())), f"replay {seed}"


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_another_device(gpu: Any, name: str) -> None:
    """Arrays on a device that is not the current one; what is current stays so."""
    library = arrays_of(gpu, name)
    count = library.module.cuda.device_count() if name == "torch" else library.module.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip("one GPU only")
    other = arrays_of(gpu, name, 1 - gpu.index)
    case = Case(mask="causal", kind="index")
    arrays = case.inputs()
    q, k, v = map(other.of, arrays)
    o, lse = rtk.attention(q, k, v, **case.options(), return_lse=True)
    assert o.device == q.device == lse.device
    judge(gpu, (o, lse), case, arrays, f"on device {1 - gpu.index}")
    if name == "torch":
        assert library.module.cuda.current_device() == gpu.index
    else:
        assert library.module.cuda.Device().id == gpu.index
    with pytest.raises((ArgumentError, UnsupportedError), match=r"\bk\b"):
        rtk.attention(q, library.of(arrays[1]), v)
    with pytest.raises((ArgumentError, UnsupportedError), match=r"\bout\b"):
        rtk.attention(q, k, v, **case.options(), out=library.full(case.o_shape(), 0, case.dtype))


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


# --- what it refuses, and what needs no launch -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(library: Any, shape: tuple[int, int, int], layout: str) -> None:
    case = Case(batch=shape[0], lengths=shape[1:], layout=layout, dims=(64, 40))
    arrays = [library.of(x) for x in case.inputs()]
    launches = counted("launch")
    for out in (None, library.full(case.o_shape(), float("nan"), case.dtype)):
        o, lse = rtk.attention(*arrays, **case.options(), return_lse=True, out=out)
        assert out is None or o is out
        assert tuple(o.shape) == case.o_shape()
        assert tuple(lse.shape) == (shape[0], 4, shape[1])
        assert (to_f64(o) == 0).all()
        assert np.isneginf(to_f64(lse)).all()
        assert yardstick.dtype_name(o) == case.dtype
        assert type(o) is type(lse) is type(arrays[0])
    assert counted("launch") == launches


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_refuses_wide_dtypes(library: Any, dtype: str) -> None:
    launches = counted("launch")
    for batch in (2, 0):
        arrays = [library.of(x) for x in Case(dtype=dtype, batch=batch).inputs()]
        with pytest.raises(UnsupportedError, match=rf"q: received .*{dtype}.*accepted: .*float16.*bfloat16"):
            rtk.attention(*arrays)
    assert counted("launch") == launches


def test_refuses_other_gpus(any_library: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [any_library.of(x) for x in Case().inputs()]
    launches = counted("launch")
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        properties = dataclasses.replace(gpu.properties, compute_capability=capability)
        monkeypatch.setattr("rtk.driver.device_properties", lambda index, found=properties: found)
        with pytest.raises(UnsupportedError, match=rf"{capability[0]}\.{capability[1]}.*9\.0"):
            rtk.attention(*arrays)
    assert counted("launch") == launches


def test_refuses_bad_calls_before_a_launch(library: Any) -> None:
    case = Case()
    q, k, v = map(library.of, case.inputs())
    launches = counted("launch")
    bad: list[tuple[str, dict[str, Any]]] = [
        ("q", {"q": q[0]}),
        ("k", {"k": k[:1]}),
        ("v", {"v": v[:, :, 1:]}),
        ("v", {"v": library.of(case.inputs()[2].astype(np.float16))}),
        ("q", {"q": q[:, :3]}),
        ("q", {"q": q[..., :60], "k": k[..., :60]}),
        ("window_size", {"window_size": (-5, 0)}),
        ("softmax_scale", {"softmax_scale": float("nan")}),
        ("softcap", {"softcap": -1.0}),
        ("out", {"out": library.full(case.o_shape(), 0, "float16")}),
        ("out", {"out": library.full((2, 4, 129, 72), 0, "bfloat16")}),
        ("out", {"out": q}),
        ("out", {"out": library.broadcast(library.full((1, 4, 129, 64), 0, "bfloat16"), case.o_shape())}),
        ("out", {"out": np.zeros(case.o_shape(), DTYPES["bfloat16"])}),
        ("k", {"k": case.inputs()[1]}),
        ("k", {"k": None}),
        ("sm_margin", {"sm_margin": -1}),
    ]
    for name, changes in bad:
        with pytest.raises((ArgumentError, UnsupportedError)) as caught:
            rtk.attention(**({"q": q, "k": k, "v": v} | changes))
        assert caught.value.argument == name, f"{changes.keys()}: {caught.value}"
    assert counted("launch") == launches


def test_refuses_mixtures(torch: Any, cupy: Any, gpu: Any) -> None:
    case = Case(dtype="float16")
    ours = dict(zip("qkv", map(TorchArrays(gpu).of, case.inputs()), strict=True))
    theirs = dict(zip("qkv", map(CupyArrays(gpu).of, case.inputs()), strict=True))
    for name in "kv":
        for good, other in ((ours, theirs[name]), (theirs, ours[name]), (ours, ours[name].cpu())):
            with pytest.raises((ArgumentError, UnsupportedError)) as caught:
                rtk.attention(**(good | {name: other}))
            assert caught.value.argument == name, str(caught.value)
    assert isinstance(rtk.attention(**{name: x.cpu() for name, x in ours.items()}), torch.Tensor)
