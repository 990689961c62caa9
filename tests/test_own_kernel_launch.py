"""How rtk.run puts a launch together, and attention with it: real specs and parameter blocks, a GPU that is NumPy."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
from own_kernel import FakeGpu, at, import_files, inputs, rmsnorm

import rtk
from rtk.arrays import numpy_dtype
from rtk.errors import ArgumentError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC as ATTENTION

BF16 = numpy_dtype("bfloat16")


@pytest.fixture
def own(tmp_path, monkeypatch):
    return import_files(tmp_path, monkeypatch)[0]


@pytest.fixture
def fake(own, monkeypatch):
    return FakeGpu(monkeypatch, own.RmsNormParams, rmsnorm)


def close(own, y, arrays, eps=1e-6):
    problem = own.RmsNormProblem(*arrays["x"].shape, "", eps)
    exact = own.SPEC.reference(problem, {name: a.astype(np.float64) for name, a in arrays.items()})["y"]
    return np.allclose(y.astype(np.float64), exact, rtol=2**-7, atol=1e-6)


def plans_made(call):
    before = rtk.stats()["plans"]
    call()
    return rtk.stats()["plans"] - before


# --- launching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (33, 1000), (7, 1001), (3, 1002), (1, 16384)], ids=str)
def test_it_runs_over_ragged_shapes(own, fake, shape, dtype):
    arrays = inputs(*shape, dtype)
    y = rtk.run(own.SPEC, arrays, eps=0.25)["y"]
    assert any(y is made for made in fake.made), "the result comes from the caller's allocator"
    assert y.dtype == arrays["x"].dtype and close(own, y, arrays, 0.25)
    problem = own.RmsNormProblem(*shape, dtype, 0.25, np.gcd(8, shape[1]))
    config = own.SPEC.pick(problem)
    (done,) = fake.launches
    assert (done.threads, done.shared_bytes) == (own.SPEC.threads(config), own.SPEC.shared_bytes(config))
    assert done.grid == own.SPEC.grid(problem, config, 132)
    assert done.source.name == own.SPEC.label(config)


def test_every_config_of_a_problem(own, fake):
    arrays = inputs(37, 1000)
    configs = own.SPEC.configs(own.RmsNormProblem(37, 1000, "float16", 1e-6))
    for config in configs:
        assert close(own, rtk.run(own.SPEC, arrays, config=config)["y"], arrays)
    assert [done.source.name for done in fake.launches] == [own.SPEC.label(config) for config in configs]


def test_a_result_that_is_passed_is_written(own, fake):
    arrays = inputs()
    room = np.full((5, 80), 7, np.float16)
    y = room[:, 8:72]
    assert rtk.run(own.SPEC, {**arrays, "y": y})["y"] is y
    assert close(own, y, arrays) and (room[:, :8] == 7).all() and (room[:, 72:] == 7).all()
    rtk.run(own.SPEC, {**arrays, "y": None})
    assert len(fake.made) == 1


def test_strided_rows_are_read_where_they_are(own, fake):
    wide = inputs(5, 100)
    arrays = {"x": wide["x"][::2, 4:68], "weight": wide["weight"][:64]}
    assert close(own, rtk.run(own.SPEC, arrays)["y"], {k: np.ascontiguousarray(a) for k, a in arrays.items()})
    assert "VECTOR = 4" in fake.launches[0].source.text, "eight elements would not be aligned"


def test_a_misaligned_address_is_another_launch(own, fake):
    room = np.ones((4 * 64 + 8,), np.float16)
    weight = np.ones(64, np.float16)
    start = -room.ctypes.data % 16 // 2
    for shift, vector in ((0, 8), (1, 1), (2, 2), (0, 8)):
        rtk.run(own.SPEC, {"x": room[start + shift :][: 3 * 64].reshape(3, 64), "weight": weight})
        assert f"VECTOR = {vector};" in fake.launches[-1].source.text


def test_equal_calls_share_what_was_prepared(own, fake):
    def call(**options):
        return lambda: rtk.run(own.SPEC, inputs(5, 64), **options)

    assert plans_made(call()) == 1 and plans_made(call()) == 0
    assert plans_made(call(eps=1e-6)) == 1  # said, though it is the default
    assert plans_made(call(eps=1)) == 1 and plans_made(call(eps=1.0)) == 1 and plans_made(call(eps=1.0)) == 0
    assert plans_made(call(sm_margin=1)) == 1
    assert plans_made(lambda: rtk.run(own.RmsNorm(), inputs())) == 1, "a new instance reads its header again"


def test_no_rows_no_launch(own, fake):
    y = rtk.run(own.SPEC, inputs(0, 64))["y"]
    assert y.shape == (0, 64) and fake.launches == []
    assert rtk.run(own.SPEC, inputs(4, 0))["y"].shape == (4, 0)


def test_the_current_stream_and_device(own, fake):
    fake.local.stream = 0xBEEF
    arrays = inputs()
    rtk.run(own.SPEC, arrays)
    for array in arrays.values():
        fake.devices[id(array)] = 1
    y = rtk.run(own.SPEC, arrays)["y"]
    assert [(done.stream, done.device) for done in fake.launches] == [(0xBEEF, 0), (0xBEEF, 1)]
    assert fake.devices[id(y)] == 1


def test_threads_do_not_disturb_each_other(own, fake):
    cases = [inputs(rows, columns, seed=rows) for rows, columns in ((3, 64), (5, 1000), (9, 1001), (2, 4096))]
    expected = [rtk.run(own.SPEC, arrays)["y"].copy() for arrays in cases]
    fake.launches.clear()
    wrong = []

    def work(index):
        fake.local.stream = index
        for turn in range(100):
            i = (index + turn) % len(cases)
            if not np.array_equal(rtk.run(own.SPEC, cases[i])["y"], expected[i]):
                wrong.append((index, turn))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(done.stream for done in fake.launches) == sorted([0, 1, 2, 3] * 100)


# --- what is refused --------------------------------------------------------------------------------------------------


def bad_calls():
    x, weight = inputs()["x"], inputs()["weight"]
    frozen = np.empty((5, 64), np.float16)
    frozen.flags.writeable = False
    yield "x", {"x": None}, "nothing"
    yield "weight", {"weight": None}, r"nothing; accepted: an array of shape \(64,\)"
    yield "x", {"x": [1.0, 2.0]}, "type list"
    yield "x", {"x": x[0]}, "2 dimensions"
    yield "x", {"x": x.astype(np.float32)}, "dtype float32; accepted: float16 or bfloat16"
    yield "x", {"x": x.astype(complex)}, "dtype complex128"
    yield "x", {"x": x[:, ::2], "weight": weight[:32]}, "innermost stride"
    yield "x", {"x": x[::-1]}, "not negative"
    yield "weight", {"weight": weight[:-1]}, r"shape \(63,\); accepted: shape \(64,\)"
    yield "weight", {"weight": weight.astype(BF16)}, "dtype bfloat16; accepted: float16"
    yield "weight", {"weight": np.ones(128, np.float16)[::2]}, "C order"
    yield "y", {"y": np.empty((5, 65), np.float16)}, "shape"
    yield "y", {"y": np.empty((5, 64), np.float32)}, "dtype"
    yield "y", {"y": frozen}, "read-only"
    yield "y", {"x": x, "y": x[:]}, "shares memory with x"
    yield (
        "y",
        {"y": np.lib.stride_tricks.as_strided(np.empty(128, np.float16), (5, 64), (0, 2))},
        "elements share memory",
    )
    yield "z", {"z": x}, "rmsnorm takes no other"
    yield "options", {"epsilon": 1e-5}, "epsilon.*accepted: eps"
    yield "eps", {"eps": []}, "a list, which has no hash"
    yield "sm_margin", {"sm_margin": -1}, "at least 0"
    yield "sm_margin", {"sm_margin": 132}, "below the 132 multiprocessors"
    yield "config", {"config": "fast"}, "dataclass"


OPTIONS = ("eps", "epsilon", "sm_margin", "config")


@pytest.mark.parametrize(("name", "changes", "said"), list(bad_calls()))
def test_it_refuses(own, fake, name, changes, said):
    arrays = {**inputs(), **{k: v for k, v in changes.items() if k not in OPTIONS}}
    options = {k: v for k, v in changes.items() if k in OPTIONS}
    with pytest.raises((ArgumentError, UnsupportedError), match=said) as caught:
        rtk.run(own.SPEC, arrays, **options)
    assert caught.value.argument == name
    assert fake.launches == []
    assert close(own, rtk.run(own.SPEC, inputs())["y"], inputs()), "the next good call works"


def test_it_refuses_a_config_of_another_problem(own, fake):
    other = own.SPEC.pick(own.RmsNormProblem(5, 64, "bfloat16", 1e-6))
    with pytest.raises(ArgumentError, match=r"config: .*not among the problem's configs"):
        rtk.run(own.SPEC, inputs(), config=other)
    with pytest.raises(ArgumentError, match=r"config\.VECTOR"):
        rtk.run(own.SPEC, inputs(), config=replace(other, VECTOR="8"))
    with pytest.raises(UnsupportedError, match="rmsnorm: received"):
        rtk.run(own.SPEC, inputs(1, 1 << 17))


def test_it_refuses_what_is_not_arrays_by_name(own, fake):
    for arrays in ([1], None, {}, {1: np.ones(3)}, {"x": None}):
        with pytest.raises(ArgumentError, match="arrays: received"):
            rtk.run(own.SPEC, arrays)


def test_it_refuses_other_devices(own, fake):
    arrays = inputs()
    fake.devices[id(arrays["weight"])] = 1
    with pytest.raises(ArgumentError, match="weight: received an array on cuda:1; accepted: cuda:0, as x is"):
        rtk.run(own.SPEC, arrays)
    fake.properties = replace(fake.properties, compute_capability=(8, 0), name="A100")
    with pytest.raises(UnsupportedError, match=r"x: received an array on cuda:0, A100, compute capability 8\.0"):
        rtk.run(own.SPEC, inputs())


def test_it_refuses_a_mixture_of_libraries(own):
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="weight: received an object of type Tensor; accepted: an array of numpy"):
        rtk.run(own.SPEC, {"x": inputs()["x"], "weight": torch.ones(64, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": lambda *_: -1}, r"rmsnorm\.grid: received -1"),
        ({"grid": lambda *_: 1 << 31}, r"rmsnorm\.grid"),
        ({"threads": lambda *_: 2048}, r"rmsnorm\.threads: received 2048"),
        ({"shared_bytes": lambda *_: 1 << 18}, r"rmsnorm\.shared_bytes"),
        ({"bind": lambda self, *_: rtk.Binding(CountParams())}, "parameters of type CountParams"),
        ({"bind": lambda self, *_: rtk.Binding(self.parameters(), pointers=("x", "z"))}, "the pointer 'z'"),
        ({"bind": lambda self, *_: rtk.Binding(self.parameters(), pointers=("rows",))}, "the pointer 'rows'"),
        ({"bind": lambda self, *_: rtk.Binding(self.parameters(), pointers=("x_stride",))}, "the pointer 'x_stride'"),
        ({"bind": lambda self, *_: rtk.Binding(self.parameters(), workspace_bytes=4)}, "workspace_bytes 4"),
        (
            {
                "bind": lambda self, *_: rtk.Binding(
                    self.parameters(), tensors=(rtk.TensorOperand("x", "", (), (), ()),)
                )
            },
            "the tensor 'x'",
        ),
    ],
    ids=range(10),
)
def test_a_spec_that_contradicts_itself(own, fake, changes, said):
    spec = type("Variant", (own.RmsNorm,), changes)()
    with pytest.raises(ArgumentError, match=said):
        rtk.run(spec, inputs())
    assert fake.launches == []


# --- other parameters: workspace, optional arrays, integers, tensor maps ----------------------------------------------


class CountParams(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("out", ctypes.c_uint64),
        ("counter", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class NoConfig:
    N: int = 1


class Count(rtk.KernelSpec):
    name = "count"
    header = "count.cuh"
    parameters = CountParams

    def configs(self, problem):
        return [NoConfig()]

    def threads(self, config):
        return 128

    def grid(self, problem, config, sm_count):
        return sm_count

    def bind(self, problem, config, views):
        return rtk.Binding(CountParams(), pointers=("a", "mask", "out"), workspace="counter", workspace_bytes=12)

    def problem(self, views):
        return views["a"].shape[0]

    def operands(self, problem):
        return {
            "a": rtk.Operand((problem,), "int32", aligned_bytes=8),
            "mask": rtk.Operand((problem,), "bool", optional=True),
            "out": rtk.Operand((1,), "int64", written=True),
        }

    def reference(self, problem, arrays):
        assert arrays["a"].dtype == np.int32
        return {"out": arrays["a"][arrays.get("mask", slice(None))].sum(keepdims=True)}


def count(params, launched):
    counter = at(params.counter, (3,), (1,), np.int32)
    assert not counter.any(), "the workspace is cleared"
    counter[:] = 1
    a = at(params.a, (6,), (1,), np.int32)
    mask = slice(None) if not params.mask else at(params.mask, (6,), (1,), bool)
    at(params.out, (1,), (1,), np.int64)[0] = a[mask].sum()


def test_a_workspace_an_optional_array_and_integers(monkeypatch):
    fake = FakeGpu(monkeypatch, CountParams, count)
    spec, a, mask = Count(), np.arange(6, dtype=np.int32), np.arange(6) % 2 == 0
    for _ in range(2):
        assert rtk.run(spec, {"a": a})["out"] == 15
        assert rtk.run(spec, {"a": a, "mask": None})["out"] == 15
        assert rtk.run(spec, {"a": a, "mask": mask})["out"] == 6
    assert rtk.check_run(spec, {"a": a, "mask": mask}) == []
    assert [done.grid for done in fake.launches[:6]] == [132] * 6
    rtk.run(spec, {"a": a}, sm_margin=100)
    assert fake.launches[-1].grid == 32
    with pytest.raises(ArgumentError, match="mask: received dtype int64; accepted: bool"):
        rtk.run(spec, {"a": a, "mask": mask.astype(np.int64)})
    with pytest.raises(ArgumentError, match=r"a: received an array at address .*; accepted: a multiple of 8 bytes"):
        rtk.run(spec, {"a": np.arange(7, dtype=np.int32)[1:]})


def test_the_reference_gets_integers_as_they_are():
    a, mask = np.arange(6, dtype=np.int32), np.arange(6) % 2 == 0
    out = rtk.run(Count(), {"a": a, "mask": mask})["out"]
    assert out.tolist() == [6] and out.dtype == np.int64


@pytest.fixture
def tma(own, tmp_path, monkeypatch):
    return import_files(tmp_path, monkeypatch)[1]


def test_tensor_maps(tma, monkeypatch):
    def kernel(params, launched):
        address, columns, rows, one, more, unit, stride, _, _, *box = np.frombuffer(params.x.opaque, np.int64)[:13]
        assert (one, more, unit) == (1, 1, 1) and (rows, columns) == (params.rows, params.columns)
        tile = f"ROWS_PER_BLOCK = {box[1]};"
        assert box[0] == 64 and box[2:] == [1, 1] and tile in launched.source.text
        x = at(int(address), (rows, columns), (int(stride), 1), np.float16).astype(np.float32)
        y = at(params.y, (rows, columns), (params.y_stride, 1), np.float16)
        weight = at(params.weight, (columns,), (1,), np.float16)
        y[...] = x / np.sqrt((x * x).mean(1, keepdims=True) + params.eps) * weight

    fake = FakeGpu(monkeypatch, tma.RmsNormTmaParams, kernel)
    cases = [inputs(50, 1000, seed=seed) for seed in range(4)]
    room = np.empty((4, 50 * 1000 + 8), np.float16)
    for index, arrays in enumerate(cases):  # at addresses that are multiples of 16, as a GPU's are
        start = -room[index].ctypes.data % 16 // 2
        arrays["x"] = room[index, start : start + 50_000].reshape(50, 1000)
        arrays["x"][...] = inputs(50, 1000, seed=index)["x"]
        arrays["weight"] = fake.empty((1000,), "float16", 0)
        arrays["weight"][...] = index + 1
    for _ in range(3):
        for arrays in cases:
            assert rtk.check_run(tma.TMA, arrays, configs=tma.TMA.configs(TMA_PROBLEM(tma))[:1]) == []
    assert fake.encoded == 4, "a map is encoded once for each address"
    with pytest.raises(UnsupportedError, match="rmsnorm_tma: received"):
        rtk.run(tma.TMA, inputs(5, 1001))


def TMA_PROBLEM(tma):
    return tma.RmsNormProblem(50, 1000, "float16", 1e-6)


# --- attention goes through the same door -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_attention_is_bound_like_any_kernel(monkeypatch, layout):
    seen = []

    def kernel(params, launched):
        seen.append((params, launched))
        at(params.o, (2 * 4 * 33 * 64,), (1,), np.int16)[:] = 5
        if params.lse:
            at(params.lse, (2 * 4 * 33,), (1,), np.float32)[:] = 6

    fake = FakeGpu(monkeypatch, ATTENTION.parameters, kernel)

    def array(heads, seqlen):
        shape = (2, heads, seqlen, 64) if layout == "bhsd" else (2, seqlen, heads, 64)
        return fake.empty(shape, "bfloat16", 0)

    q, k, v = array(4, 33), array(2, 77), array(2, 77)
    for return_lse in (False, True, False):
        got = rtk.attention(q, k, v, causal=True, layout=layout, return_lse=return_lse, config={"SCHEDULER": 1})
        o = got[0] if return_lse else got
        params = seen[-1][0]
        assert o.shape == q.shape and (o.view(np.int16) == 5).all() and params.o == o.ctypes.data
        assert (params.lse == 0) != return_lse and params.tile_counter != 0
        for name, x, heads, rows in (("q", q, 4, 33), ("k", k, 2, 77), ("v", v, 2, 77)):
            words = np.frombuffer(getattr(params, name).opaque, np.int64)
            steps = (64, rows * 64) if layout == "bhsd" else (heads * 64, 64)  # from row to row, from head to head
            assert words[0] == x.ctypes.data and words[1:5].tolist() == [64, rows, heads, 2]
            assert words[5:9].tolist() == [1, *steps, heads * rows * 64]
        steps = (64, 33 * 64) if layout == "bhsd" else (4 * 64, 64)
        assert (params.o_row_bytes, params.o_head_bytes, params.o_batch_bytes) == (
            *(2 * x for x in steps),
            2 * 4 * 33 * 64,
        )
        assert (params.extent.seqlen_q, params.extent.end_key, params.extent.diagonal_right) == (33, 77, 44)
        assert (params.schedule.num_heads, params.schedule.num_heads_total, params.heads_per_kv) == (4, 8, 2)
    assert len({launched.source.name for _, launched in seen}) == 1
    assert fake.encoded == 3, "equal calls share a plan and its maps"
    rtk.attention(q, k, v, causal=True, layout=layout, sm_margin=130)
    assert seen[-1][1].grid == 2 and seen[-1][0].tile_counter == 0
