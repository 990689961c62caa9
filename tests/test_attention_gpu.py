"""The public functions on the GPU, judged by the rule of tests/yardstick.py. Every failure names its case."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import yardstick
from gpu_cases import Case, build, counted, covering, judge, same_bits, truth
from yardstick import attention_f64, check, check_lse, plain, to_f64

import rtk
from rtk.errors import ArgumentError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("built")]


# --- the numeric grid ------------------------------------------------------------------------------------------------


MASKS = ["full", "causal", "causal-tl", "w0.0", "w17.5", "w130.64", "w3.700", "w33.", "w.20"]
MASKS += ["causal-w64.9", "causal-tl-w100.", "tl-w70.40"]
DIMS = [(d, d) for d in (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 136, 160, 192, 200, 256)]
DIMS += [(192, 128), (64, 256), (128, 64), (256, 64), (40, 200)]
LENGTHS = [(1, 1), (1, 777), (777, 1), (129, 1023), (512, 512), (1000, 300), (300, 1000), (64, 64), (65, 63)]
FACTORS: dict[str, list[Any]] = {
    "dims": DIMS,
    "mask": MASKS,
    "lengths": LENGTHS,
    "kind": list(yardstick.KINDS),
    "heads": [(3, 3), (6, 2), (8, 1)],
    "dtype": ["bfloat16", "float16"],
    "layout": ["bhsd", "bshd"],
    "softcap": [0.0, 15.0],
    "scale": [None, 0.11],
    "batch": [2, 1],
}
GRID = [Case(**row) for row in covering(FACTORS)]


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
def test_random_shapes_and_windows(gpu: Any, any_library: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(16):
        left, right = ("" if rng.random() < 0.3 else int(rng.integers(0, 2 ** rng.integers(1, 10))) for _ in "lr")
        align = ["", "tl-"][int(rng.integers(2))]
        cases.append(
            Case(
                dims=((64, 64), (128, 128))[seed % 2],
                mask=f"{align}w{left}.{right}",
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


def _check_causal_rows(q: Any, k: Any, v: Any, o: Any, lse: Any, end: int, label: str) -> None:
    """The 64 rows before `end` against the keys they see: bottom-right makes them a problem of their own."""
    rows, keys = slice(end - 64, end), slice(0, end)
    part = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
    o64, lse64 = attention_f64(*part, causal=True)
    check(o[:, :, rows], o64, plain(*part, causal=True), yardstick.dtype_name(q), label=label)
    check_lse(lse[:, :, rows], lse64, label=label)


def test_a_long_sequence(gpu: Any, torch: Any) -> None:
    """Row blocks of a causal 16K."""
    for dims, dtype in (((64, 64), torch.float16), ((128, 128), torch.bfloat16), ((256, 256), torch.bfloat16)):
        generator = torch.Generator("cuda").manual_seed(1)
        q, k, v = (
            torch.randn(1, heads, 16384, d, device="cuda", dtype=dtype, generator=generator)
            for heads, d in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
        )
        o, lse = rtk.attention(q, k, v, causal=True, return_lse=True)
        for end in (64, 1000, 8192, 12345, 16384):
            _check_causal_rows(q, k, v, o, lse, end, f"{dims} {dtype} rows to {end}")


def test_a_quarter_of_a_million_rows(torch: Any) -> None:
    """Causal at seqlen 262144: sampled rows, and no memory but the results."""
    generator = torch.Generator("cuda").manual_seed(2)
    q, k, v = (
        torch.randn(1, 8, 262144, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
    )
    rtk.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], causal=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, lse = rtk.attention(q, k, v, causal=True, return_lse=True)
    torch.cuda.synchronize()
    results = o.numel() * o.element_size() + lse.numel() * lse.element_size()
    assert torch.cuda.max_memory_allocated() - before <= results + (1 << 20)
    for end in (64, 99_999, 200_000, 262_144):
        for head in range(0, 8, 3):
            of_head = (x[:, head : head + 1] for x in (q, k, v, o, lse))
            _check_causal_rows(*of_head, end, f"rows to {end} of head {head}")


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
