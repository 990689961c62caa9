"""The public functions on the CPU: NumPy arrays, torch tensors and strangers with __dlpack__."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import yardstick
from liars import Stranger
from yardstick import DTYPES, attention_f64, check, check_lse, make_inputs, plain, to_f64

import rtk
from rtk.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("error")

SHAPE: dict[str, Any] = {
    "batch": 2,
    "heads_q": 4,
    "heads_kv": 2,
    "seqlen_q": 37,
    "seqlen_k": 53,
    "head_dim": 16,
    "head_dim_v": 24,
}
LIBRARIES = ("numpy", "torch")


class Library:
    """Makes arrays of one library out of NumPy's, so that each test runs on every library."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.torch = pytest.importorskip("torch") if name == "torch" else None
        self.kind = np.ndarray if self.torch is None else self.torch.Tensor

    def of(self, x: np.ndarray) -> Any:
        if self.torch is None:
            return x
        if x.dtype == DTYPES["bfloat16"]:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised as a rule; here NaN, so that what is not written shows."""
        return self.of(np.full(shape, np.nan, DTYPES[dtype]))


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


def inputs(dtype: str = "float32", kind: str = "normal", layout: str = "bhsd", **shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    arrays = make_inputs(kind, **(SHAPE | shape), dtype=dtype, rng=rng)
    return [x if layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]


def judge(got: Any, arrays: list[np.ndarray], label: str = "", **options: Any) -> None:
    """`got` is (o, lse) of these inputs."""
    o, lse = got
    o64, lse64 = attention_f64(*arrays, **options)
    dtype = arrays[0].dtype.name
    layout = options.get("layout", "bhsd")
    check_lse(lse, lse64, label=label)
    if dtype in ("float16", "bfloat16"):
        check(o, o64, plain(*arrays, **options), dtype, layout=layout, label=label)
    else:
        assert yardstick.dtype_name(o) == dtype, label
        tolerance = 1e-4 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(to_f64(o), o64, rtol=tolerance, atol=tolerance, err_msg=label)


def same_bits(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((to_f64(a) == to_f64(b)).all())


# --- what it computes ------------------------------------------------------------------------------------------------


def test_signature() -> None:
    """The signature is a promise: names, order, kinds and defaults."""
    parameters = inspect.signature(rtk.attention).parameters
    assert {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "causal": False,
        "causal_align": "bottom-right",
        "window_size": None,
        "softmax_scale": None,
        "softcap": 0.0,
        "kv_range": None,
        "layout": "bhsd",
        "return_lse": False,
        "out": None,
        "config": None,
        "batch_invariant": False,
        "sm_margin": 0,
    }
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["q", "k", "v"]
    flash = inspect.signature(rtk.flash_attn_func).parameters
    assert list(flash)[:3] == ["q", "k", "v"]
    assert {
        name: flash[name].default for name in ("softmax_scale", "causal", "window_size", "softcap", "return_lse")
    } == {
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "return_lse": False,
    }
    q, k, v = inputs()
    with pytest.raises(TypeError):
        rtk.attention(q, k, v, True)  # type: ignore[call-arg]


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window_size": (5, 3)},
    "window-top-left": {"window_size": (5, 3), "causal_align": "top-left"},
    "left-only": {"window_size": (5, None)},
    "right-only": {"window_size": (-1, 2)},
    "causal-window": {"causal": True, "window_size": (9, 4)},
    "window-0": {"window_size": (0, 0)},
    "scale": {"softmax_scale": 0.7},
    "scale-0": {"softmax_scale": 0, "causal": True},
    "scale-negative": {"softmax_scale": -0.4},
    "softcap": {"softcap": 1.5},
    "softcap-int": {"softcap": 2, "causal": True, "softmax_scale": 3},
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", OPTIONS)
def test_is_attention(library: Library, name: str, dtype: str, layout: str) -> None:
    for kind in ("normal", "index"):
        arrays = inputs(dtype, kind, layout)
        o, lse = rtk.attention(*map(library.of, arrays), **OPTIONS[name], layout=layout, return_lse=True)
        assert isinstance(o, library.kind)
        assert isinstance(lse, library.kind)
        assert tuple(o.shape) == ((2, 4, 37, 24) if layout == "bhsd" else (2, 37, 4, 24))
        assert tuple(lse.shape) == (2, 4, 37)
        assert yardstick.dtype_name(lse) == ("float64" if dtype == "float64" else "float32")
        judge((o, lse), arrays, f"{name} {dtype} {layout} {kind}", **OPTIONS[name], layout=layout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (300, 1), (65, 63), (300, 130)])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (8, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(dtype: str, lengths: tuple[int, int], heads: tuple[int, int], causal: bool) -> None:
    for head_dim, head_dim_v in ((8, 256), (256, 8), (72, 40)):
        arrays = inputs(
            dtype,
            batch=1,
            heads_q=heads[0],
            heads_kv=heads[1],
            seqlen_q=lengths[0],
            seqlen_k=lengths[1],
            head_dim=head_dim,
            head_dim_v=head_dim_v,
        )
        got = rtk.attention(*arrays, causal=causal, return_lse=True)
        judge(got, arrays, f"{dtype} {lengths} {heads} {head_dim}/{head_dim_v}", causal=causal)


def test_every_head_dim() -> None:
    for head_dim in range(8, 257, 8):
        arrays = inputs(head_dim=head_dim, head_dim_v=264 - head_dim, batch=1, seqlen_q=3)
        judge(rtk.attention(*arrays, return_lse=True), arrays, f"head_dim {head_dim}")


def test_ways_to_say_unbounded(library: Library) -> None:
    arrays = [library.of(x) for x in inputs()]
    full = rtk.attention(*arrays)
    for window in (None, (None, None), (-1, -1), (-1, None), (None, -1), (1000, 1000), (10**12, 10**12)):
        assert same_bits(rtk.attention(*arrays, window_size=window), full), window
    causal = rtk.attention(*arrays, causal=True)
    steps: list[Any] = [(-1, 0), (None, 0), (np.int64(-1), np.int32(0))]
    for window in steps:
        assert same_bits(rtk.attention(*arrays, window_size=window), causal), window
        assert same_bits(rtk.attention(*arrays, window_size=window, causal=True), causal), window
    assert same_bits(
        rtk.attention(*arrays, window_size=(4, 3), causal=True), rtk.attention(*arrays, window_size=(4, 0))
    )
    assert not same_bits(full, causal)


def test_return_lse(library: Library) -> None:
    arrays = [library.of(x) for x in inputs()]
    alone = rtk.attention(*arrays)
    assert isinstance(alone, library.kind)
    pair = rtk.attention(*arrays, return_lse=True)
    assert isinstance(pair, tuple)
    assert same_bits(pair[0], alone)


def test_rows_without_keys(library: Library) -> None:
    arrays = [library.of(x) for x in inputs(seqlen_q=60, seqlen_k=20)]
    o, lse = rtk.attention(*arrays, causal=True, return_lse=True)
    assert (to_f64(o)[:, :, :40] == 0).all()
    assert np.isneginf(to_f64(lse)[:, :, :40]).all()
    assert np.isfinite(to_f64(lse)[:, :, 40:]).all()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (2, 0, 0)])
def test_empty(library: Library, shape: tuple[int, int, int], layout: str) -> None:
    batch, seqlen_q, seqlen_k = shape
    arrays = [
        library.of(x) for x in inputs("bfloat16", "normal", layout, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    ]
    dims = (batch, 4, seqlen_q, 24) if layout == "bhsd" else (batch, seqlen_q, 4, 24)
    out = library.empty(dims, "bfloat16")
    for target in (None, out):
        o, lse = rtk.attention(*arrays, layout=layout, causal=True, return_lse=True, out=target)
        assert tuple(o.shape) == dims
        assert tuple(lse.shape) == (batch, 4, seqlen_q)
        assert yardstick.dtype_name(o) == "bfloat16"
        assert yardstick.dtype_name(lse) == "float32"
        assert (to_f64(o) == 0).all()
        assert np.isneginf(to_f64(lse)).all()
        assert target is None or o is target


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_out(library: Library, dtype: str, layout: str) -> None:
    arrays = [library.of(x) for x in inputs(dtype, "normal", layout)]
    expected, expected_lse = rtk.attention(*arrays, layout=layout, return_lse=True)
    out = library.empty(tuple(expected.shape), dtype)
    assert rtk.attention(*arrays, layout=layout, out=out) is out
    assert same_bits(out, expected)
    out = library.empty(tuple(expected.shape), dtype)
    o, lse = rtk.attention(*arrays, layout=layout, out=out, return_lse=True)
    assert o is out
    assert same_bits(lse, expected_lse)
    assert same_bits(out, expected)


def test_out_of_any_strides_and_nothing_beside_it(library: Library) -> None:
    arrays = [library.of(x) for x in inputs()]
    expected = to_f64(rtk.attention(*arrays))
    room = np.full((24 + 3, 37 + 2, 2, 4 * 2), 7.0, np.float32)
    view = library.of(room).swapaxes(0, 3).swapaxes(0, 2).swapaxes(1, 2)[:, ::2, 1:38, 3:]
    assert tuple(view.shape) == expected.shape
    assert rtk.attention(*arrays, out=view) is view
    np.testing.assert_array_equal(to_f64(view), expected)
    view[...] = 7
    assert (room == 7).all()


def test_inputs_of_any_strides(library: Library) -> None:
    arrays = inputs()
    expected = to_f64(rtk.attention(*arrays))
    for start in (0, 1):
        views = []
        for x in arrays:
            room = np.full((x.shape[3] + 1, 2 * x.shape[1], x.shape[2], x.shape[0]), np.nan, np.float32)
            view = library.of(room).swapaxes(0, 3)[:, ::2, :, start : start + x.shape[3]]
            view[...] = library.of(x)
            views.append(view)
        np.testing.assert_array_equal(to_f64(rtk.attention(*views)), expected)
    if library.name == "numpy":
        flipped = [np.ascontiguousarray(x[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1] for x in arrays]
        assert all(min(x.strides) < 0 for x in flipped)
        np.testing.assert_array_equal(to_f64(rtk.attention(*flipped)), expected)


def test_strides_of_zero(library: Library) -> None:
    arrays = inputs()
    for axis in range(3):
        wide = [np.broadcast_to(x.take([0], axis), x.shape) for x in arrays]
        views = wide
        if library.torch is not None:
            views = [library.of(x.take([0], axis)).expand(x.shape) for x in arrays]
        expected = rtk.attention(*(library.of(x.copy()) for x in wide), causal=True)
        assert same_bits(rtk.attention(*views, causal=True), expected), axis


def test_inputs_are_left_alone(library: Library) -> None:
    arrays = inputs("bfloat16") + inputs("float64")
    before = [x.tobytes() for x in arrays]
    for three in (arrays[:3], arrays[3:]):
        if library.name == "numpy":
            for x in three:
                x.setflags(write=False)
        rtk.attention(*map(library.of, three), causal=True, softcap=3.0, softmax_scale=-1.0)
    assert [x.tobytes() for x in arrays] == before


def test_result_is_new_memory(library: Library) -> None:
    """Nothing is cached between calls, and the result is no view of an input."""
    arrays = [library.of(x) for x in inputs(seqlen_q=1, seqlen_k=1)]
    first = rtk.attention(*arrays)
    kept = to_f64(first).copy()
    second = rtk.attention(*arrays)
    second[...] = 99
    np.testing.assert_array_equal(to_f64(first), kept)
    np.testing.assert_array_equal(to_f64(arrays[2][:, [0, 0, 1, 1]]), kept)


def test_choices_for_the_gpu_do_not_change_the_cpu(library: Library) -> None:
    arrays = [library.of(x) for x in inputs("float16")]
    expected = rtk.attention(*arrays)
    assert same_bits(rtk.attention(*arrays, batch_invariant=True, sm_margin=4), expected)
    assert same_bits(rtk.attention(*arrays, batch_invariant=np.True_, sm_margin=np.int64(4)), expected)
    assert same_bits(rtk.attention(*arrays, config={"BLOCK_M": 128, "BLOCK_N": 96}), expected)


def test_flash_attn_func(library: Library) -> None:
    q, k, v = (library.of(x) for x in inputs("bfloat16", "normal", "bshd"))
    assert same_bits(rtk.flash_attn_func(q, k, v), rtk.attention(q, k, v, layout="bshd"))
    flash = rtk.flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(7, -1), softcap=2.0, return_lse=True
    )
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True, "window_size": (7, None), "softcap": 2.0}
    ours = rtk.attention(q, k, v, layout="bshd", return_lse=True, **options)
    assert all(same_bits(a, b) for a, b in zip(flash, ours, strict=True))


def test_nan_reaches_rows_that_see_it_and_no_others(library: Library) -> None:
    arrays = inputs()
    clean = rtk.attention(*arrays, causal=True)
    for bad in (np.nan, np.inf):
        q, k, v = (x.copy() for x in arrays)
        v[:, :, 30] = bad
        o = to_f64(rtk.attention(*map(library.of, (q, k, v)), causal=True))
        seen = np.arange(37) + 53 - 37 >= 30
        np.testing.assert_allclose(o[:, :, ~seen], clean[:, :, ~seen], atol=1e-6)
        assert not np.isfinite(o[:, :, seen]).any()


def test_stats_count_calls() -> None:
    before = rtk.stats()
    assert all(isinstance(name, str) and type(count) is int for name, count in before.items())
    rtk.attention(*(x[:, :, ::-1, ::-1] for x in inputs()))
    after = rtk.stats()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed.get("calls") == 1
    # Copies are counted where they cost something: on the GPU.
    assert not any("cop" in name or "launch" in name for name in changed)
    after["calls"] = -1
    assert rtk.stats()["calls"] > 0


def test_numpy_needs_neither_torch_nor_cupy() -> None:
    program = (
        "import sys, numpy as np, rtk\n"
        "x = np.ones((1, 1, 4, 8), np.float16)\n"
        "assert (rtk.attention(x, x, x, causal=True) == 1).all()\n"
        "print([name for name in ('torch', 'cupy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr


def test_threads() -> None:
    arrays = inputs(seqlen_q=200, seqlen_k=300)
    expected = rtk.attention(*arrays, causal=True)
    results: list[Any] = [None] * 6

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = rtk.attention(*arrays, causal=True)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(result, expected) for result in results)


# --- strangers -------------------------------------------------------------------------------------------------------


class Guest(Stranger):
    """A stranger whose library takes arrays back."""

    def __array_namespace__(self, **_: Any) -> Any:
        return Guest

    @staticmethod
    def from_dlpack(x: Any) -> Guest:
        return Guest(np.from_dlpack(x))


def test_dlpack() -> None:
    arrays = inputs()
    expected, expected_lse = rtk.attention(*arrays, causal=True, return_lse=True)
    o, lse = rtk.attention(*map(Guest, arrays), causal=True, return_lse=True)
    assert type(o) is Guest
    assert type(lse) is Guest
    np.testing.assert_array_equal(np.from_dlpack(o), expected)
    np.testing.assert_array_equal(np.from_dlpack(lse), expected_lse)
    q, k, v = (Guest(x.swapaxes(1, 2)) for x in arrays)
    assert type(rtk.flash_attn_func(q, k, v)) is Guest
    # A library without from_dlpack gets something that any library can take.
    np.testing.assert_array_equal(np.from_dlpack(rtk.attention(*map(Stranger, arrays), causal=True)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_on_the_cpu(dtype: str) -> None:
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # or it takes most of a GPU's memory, if there is one
    jax = pytest.importorskip("jax")
    arrays = inputs(dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        o, lse = rtk.attention(*map(jax.numpy.asarray, arrays), causal=True, return_lse=True)
    assert isinstance(o, jax.Array)
    judge((o, lse), arrays, causal=True)
    with jax.default_device(jax.devices("cpu")[0]):
        q, k, v = map(jax.numpy.asarray, arrays)
        with pytest.raises(UnsupportedError, match=r"q: received a JAX array that is traced.*outside of jit"):
            jax.jit(rtk.attention)(q, k, v)
