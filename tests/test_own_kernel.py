"""A user's own kernel, without a GPU: the pages that build one, compiling, reports, errors, and the CPU path."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
from own_kernel import forget_modules, import_files, pages

import rtk
from rtk import jit
from rtk.arrays import numpy_dtype
from rtk.cache import Cache
from rtk.errors import ArgumentError, CompileError, ToolchainError, UnsupportedError
from rtk.kernels.attention_fwd import SPEC as ATTENTION

pytestmark = pytest.mark.xdist_group("own-kernel")  # what one test compiles, the next takes from memory

BF16 = numpy_dtype("bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of these tests' own."""
    folder = tmp_path_factory.getbasetemp() / "own-kernel-cubins"
    monkeypatch.setenv("RTK_CACHE_DIR", str(folder))
    return Cache(folder)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The pages' module `rmsnorm`, in a user's folder."""
    return import_files(tmp_path, monkeypatch)[0]


@pytest.fixture
def tma(own, tmp_path, monkeypatch):
    return import_files(tmp_path, monkeypatch)[1]


@pytest.fixture
def nvrtc():
    try:
        jit.build(jit.Source("probe", 'extern "C" __global__ void probe() {}'))
    except ToolchainError as error:
        pytest.skip(str(error))


# --- the pages --------------------------------------------------------------------------------------------------------


def test_every_block_of_the_pages_up_to_the_launch(nvrtc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_modules(monkeypatch)
    namespace = {"__name__": "page"}
    for block in pages():
        compile(block.code, str(block.page), "exec") if block.file.endswith("py") or not block.file else None
        if block.file:
            (tmp_path / block.file).write_text(block.code)
        elif not block.needs:
            block.run(namespace)
    said = capsys.readouterr().out
    assert "registers" in said and "THREADS_PER_ROW is a power of two" in said
    assert "weight: received shape (999,); accepted: shape (1000,)" in said


def test_the_pages_show_what_they_say():
    """A launch on torch and on CuPy, errors, all configs compared with float64, and times."""
    needs = [block.needs for block in pages()]
    assert {"gpu", "torch"} in needs and {"gpu", "cupy"} in needs and set() in needs
    code = "".join(block.code for block in pages())
    for name in ("rtk.compile(", "rtk.check_spec(", "rtk.check_run(", "rtk.run(", "interleaved("):
        assert name in code


# --- compiling --------------------------------------------------------------------------------------------------------


def test_each_tile_size_compiles_and_is_reported(own, nvrtc, cache):
    problem = own.RmsNormProblem(4096, 1000, "float16", 1e-6)
    configs = own.SPEC.configs(problem)
    seen = []
    binaries = rtk.compile(own.SPEC, configs, progress=lambda *done: seen.append(done), cache=cache)
    assert [binary.name for binary in binaries] == [own.SPEC.label(config) for config in configs]
    assert len({binary.name for binary in binaries}) == len(configs) > 3
    assert [(done, total) for done, total, _ in seen] == [(i + 1, len(configs)) for i in range(len(configs))]
    for binary in binaries:
        assert isinstance(binary, rtk.Binary) and isinstance(binary.report, rtk.CompileReport)
        assert binary.report.problems() == [] and 0 < binary.report.registers <= 128
        assert binary.name.encode() in binary.cubin


def test_a_compiled_kernel_is_taken_from_the_cache(own, nvrtc, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cubins")
    configs = own.SPEC.configs(own.RmsNormProblem(1, 64, "float16", 1e-6))[:2]
    first = rtk.compile(own.SPEC, configs, cache=cache)
    again = rtk.compile(own.SPEC, configs, cache=Cache(tmp_path / "cubins"))
    assert [x.report.from_cache for x in first] == [False, False] and [x.cubin for x in again] == [
        x.cubin for x in first
    ]
    monkeypatch.setattr(jit, "_memory", type(jit._memory)())  # as in another process
    from_disk = rtk.compile(own.SPEC, configs, cache=Cache(tmp_path / "cubins"))
    assert all(x.report.from_cache for x in from_disk) and [x.cubin for x in from_disk] == [x.cubin for x in first]


def test_an_edited_header_is_another_kernel(own, nvrtc, tmp_path, cache):
    config = own.SPEC.configs(own.RmsNormProblem(1, 64, "float16", 1e-6))[0]
    (before,) = rtk.compile(own.SPEC, [config], cache=cache)
    header = tmp_path / "rmsnorm.cuh"
    header.write_text(header.read_text().replace("+ params.eps", "+ 2.0f * params.eps"))
    (after,) = rtk.compile(own.SPEC, [config], cache=cache)
    assert after.key != before.key and after.cubin != before.cubin


def test_the_samples_are_clean(own, tma, nvrtc, cache):
    seen = []
    assert (
        rtk.check_spec(own.SPEC, own.SPEC.samples()[::7], cache=cache, progress=lambda *done: seen.append(done)) == []
    )
    assert rtk.check_spec(tma.TMA, tma.TMA.samples()[::4], cache=cache) == []
    assert seen


def test_rtks_own_kernel_goes_through_the_same_check(nvrtc, cache):
    assert rtk.check_spec(ATTENTION, ATTENTION.samples()[:2], cache=cache) == []


def test_every_sample_suits_a_sample_problem(own, tma):
    for spec in (own.SPEC, tma.TMA, ATTENTION):
        assert spec.samples()
        for problem in spec.sample_problems():
            assert spec.refusal(problem, spec.pick(problem)) is None
            assert len({spec.label(config) for config in spec.configs(problem)}) == len(set(spec.configs(problem)))


# --- errors of a spec and its source ----------------------------------------------------------------------------------


def tiny(own, **changes):
    """A config of 64 columns."""
    return replace(own.SPEC.configs(own.RmsNormProblem(1, 64, "float16", 1e-6))[0], **changes)


def variant(own, **changes):
    """The spec with other class attributes."""
    return type("Variant", (own.RmsNorm,), changes)()


def test_the_text_of_a_static_assert_reaches_the_exception(own, nvrtc, cache):
    with pytest.raises(CompileError) as caught:
        rtk.compile(own.SPEC, [tiny(own), tiny(own, VECTOR=3)], cache=cache)
    assert "VECTOR is 1, 2, 4 or 8 elements: up to 16 bytes" in str(caught.value)
    assert "rmsnorm.cuh, line" in str(caught.value), "the source around it is shown"
    found = rtk.check_spec(own.SPEC, [tiny(own), tiny(own, VECTOR=3)], cache=cache)
    assert len(found) == 1 and "VECTOR is 1, 2, 4 or 8" in found[0] and "vector3" in found[0]


FIELDS = {
    "one too few": (lambda fields: fields[:-1], "in Python has 48 bytes"),
    "one too many": (lambda fields: (*fields, ("more", ctypes.c_int64)), "more"),
    "two swapped": (lambda fields: (*fields[:-2], fields[-1], fields[-2]), "in Python has eps at byte 44"),
    "an int for a float": (
        lambda fields: (*fields[:-1], ("eps", ctypes.c_int32)),
        "in Python has eps at byte 48, c_int",
    ),
    "a float for an int": (
        lambda fields: (*fields[:-2], ("columns", ctypes.c_float), fields[-1]),
        "columns at byte 44",
    ),
    "a narrow stride": (lambda f: (*f[:3], ("x_stride", ctypes.c_int32), *f[4:]), "x_stride at byte 24"),
    "another name": (lambda fields: (*fields[:-1], ("epsilon", ctypes.c_float)), "epsilon"),
}


@pytest.mark.parametrize("how", FIELDS)
def test_a_structure_that_python_sees_differently(own, nvrtc, cache, how):
    change, said = FIELDS[how]
    params = type("RmsNormParams", (ctypes.Structure,), {"_fields_": change(own.RmsNormParams._fields_)})
    with pytest.raises(CompileError) as caught:
        rtk.compile(variant(own, parameters=params), [tiny(own)], cache=cache)
    assert said in str(caught.value)


def test_members_of_inner_structures_are_compared_too(nvrtc, tmp_path, cache):
    (tmp_path / "k.cuh").write_text(
        "#include <rtk/tma.cuh>\n"
        "namespace a::b { struct In { int n; float f; }; struct P { float* y; rtk::TensorMap x; In in; };\n"
        "template <class Config, int SHARED_BYTES> RTK_DEVICE void k(const P& p) { *p.y = p.in.f * Config::N; } }"
    )

    class In(ctypes.Structure):
        _fields_ = (("n", ctypes.c_int32), ("f", ctypes.c_float))

    class Swapped(ctypes.Structure):
        _fields_ = (("f", ctypes.c_float), ("n", ctypes.c_int32))

    def spec(inner):
        fields = (("y", ctypes.c_void_p), ("_gap", ctypes.c_byte * 56), ("x", rtk.TensorMap), ("in", inner))
        attributes = {
            "name": "k",
            "header": "k.cuh",
            "function": "a::b::k",
            "include_dirs": (tmp_path,),
            "parameters": type("P", (ctypes.Structure,), {"_fields_": fields}),
        }
        return type("Spec", (Simple,), attributes)()

    assert rtk.check_spec(spec(In), [One(3)], cache=cache) == []  # padded to the alignment of tensor maps by itself
    assert "in.f at byte 192" in rtk.check_spec(spec(Swapped), [One(3)], cache=cache)[0]


@dataclass(frozen=True)
class One:
    N: int = 1


class Simple(rtk.KernelSpec):
    """The least that a spec must say."""

    def configs(self, problem):
        return [One(problem)]

    def threads(self, config):
        return 32

    def grid(self, problem, config, sm_count):
        return 1

    def bind(self, problem, config, views):
        return rtk.Binding(self.parameters(), pointers=("y",))


@pytest.mark.parametrize(
    ("field", "value"),
    [("VECTOR", 8.0), ("VECTOR", "8"), ("VECTOR", None), ("VECTOR", 1 << 31), ("VECTOR", True), ("BF16", 1)],
)
def test_a_field_of_a_wrong_type(own, field, value):
    with pytest.raises(ArgumentError, match=rf"config\.{field}.*accepted: (an int of 32 bits|a bool)"):
        rtk.compile(own.SPEC, [tiny(own, **{field: value})])


@pytest.mark.parametrize("config", [None, "fast", {"VECTOR": 8}, 8])
def test_what_is_no_config(own, config):
    with pytest.raises(ArgumentError, match="config: received"):
        rtk.compile(own.SPEC, [config])


def test_a_header_that_is_not_there(own, nvrtc, tmp_path, cache):
    with pytest.raises(CompileError, match=r"rmsnorm2\.cuh .* was not found"):
        rtk.compile(variant(own, header="rmsnorm2.cuh"), [tiny(own)], cache=cache)
    (tmp_path / "outer.cuh").write_text('#include "rmsnorm.cuh"\n#include <vector>\n')
    with pytest.raises(CompileError, match=r"include of vector in outer\.cuh, line 2"):
        rtk.compile(variant(own, header="outer.cuh"), [tiny(own)], cache=cache)


def test_a_function_that_is_not_there(own, nvrtc, cache):
    with pytest.raises(CompileError, match='"rmsnrom"'):
        rtk.compile(variant(own, function="mine::rmsnrom"), [tiny(own)], cache=cache)
    with pytest.raises(CompileError, match="RmsNormParams"):
        rtk.compile(variant(own, function="rmsnorm"), [tiny(own)], cache=cache)


def test_blocks_that_no_device_can_serve(own, nvrtc, cache):
    wide = variant(own, threads=lambda self, config: 1056)
    assert any("1056, accepted: 1 to 1024 threads" in said for said in rtk.check_spec(wide, [tiny(own)], cache=cache))
    greedy = variant(own, shared_bytes=lambda self, config: 232_449)
    assert any("232449, accepted: 0 to 232448" in said for said in rtk.check_spec(greedy, [tiny(own)], cache=cache))


def test_labels_that_tell_nothing_apart(own, nvrtc, cache):
    spec = variant(own, label=lambda self, config: "same")
    assert any("the label of" in said for said in rtk.check_spec(spec, [tiny(own), tiny(own, BF16=True)], cache=cache))


def test_a_spec_without_samples(own):
    assert rtk.check_spec(variant(own, sample_problems=lambda self: [])) == [
        "rmsnorm: no samples: define sample_problems, or pass configs"
    ]


def test_a_kernel_that_spills_is_reported(own, nvrtc, cache):
    greedy = tiny(own, THREADS_PER_ROW=1024, VECTORS=24)  # 96 registers of data a thread, where 64 are there
    found = rtk.check_spec(own.SPEC, [tiny(own), greedy], cache=cache)
    assert found and all(own.SPEC.label(greedy) in said for said in found)
    assert any("spills" in said for said in found)


def test_the_defaults_of_a_spec():
    spec = type("Spec", (Simple,), {"name": "simple"})()
    assert spec.pick(3) == One(3) and spec.shared_bytes(One()) == 0
    assert spec.refusal(3, One(3)) is None and "not among" in spec.refusal(3, One(4))
    assert spec.label(One(-3)) == "simple_nm3" and spec.samples() == []
    with pytest.raises(NotImplementedError, match=r"rtk\.run needs it"):
        rtk.run(spec, {"x": np.zeros(3, np.float32)})
    with pytest.raises(UnsupportedError, match="simple: received 7; accepted: a problem"):
        type("None_", (Simple,), {"name": "simple", "configs": lambda self, problem: []})().pick(7)


# --- on the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_reference_runs_on_the_cpu(own, library, dtype):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 33)).astype(numpy_dtype(dtype)), np.ones(33, numpy_dtype(dtype))
    expected = (x.astype(float) / np.sqrt((x.astype(float) ** 2).mean(1, keepdims=True) + 0.5)).astype(x.dtype)
    out = np.zeros_like(x)
    if library == "torch":
        torch = pytest.importorskip("torch")
        x, weight, out = (torch.from_numpy(a.view(np.int16)).view(getattr(torch, dtype)) for a in (x, weight, out))
    y = rtk.run(own.SPEC, {"x": x, "weight": weight}, eps=0.5)["y"]
    assert type(y) is type(x) and y.dtype == x.dtype
    assert rtk.run(own.SPEC, {"x": x, "weight": weight, "y": out}, eps=0.5)["y"] is out
    for got in (y, out):
        got = got if library == "numpy" else got.float().numpy()
        assert np.array_equal(np.asarray(got, np.float32), expected.astype(np.float32))


def test_without_a_reference_the_cpu_is_refused(own):
    spec = variant(own, reference=rtk.KernelSpec.reference)
    with pytest.raises(UnsupportedError, match="arrays on the CPU"):
        rtk.run(spec, {"x": np.ones((2, 8), np.float16), "weight": np.ones(8, np.float16)})


@pytest.mark.parametrize("wrong", [{}, {"y": np.zeros((2, 3))}])
def test_a_reference_of_another_shape_is_the_specs_error(own, wrong):
    spec = variant(own, reference=lambda self, problem, arrays: wrong)
    with pytest.raises(ArgumentError, match=r"rmsnorm\.reference: y: received"):
        rtk.run(spec, {"x": np.ones((2, 8), np.float16), "weight": np.ones(8, np.float16)})
