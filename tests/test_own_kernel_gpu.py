"""A user's own kernel on a GPU: the pages' blocks, every config over ragged shapes, libraries, streams, refusals."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from own_kernel import DOCS, forget_modules, import_files, pages, write_files

import rtk
from rtk.arrays import numpy_dtype
from rtk.errors import ArgumentError, UnsupportedError

pytestmark = pytest.mark.xdist_group("own-kernel-gpu")

SHAPES = [(1, 8), (1, 1), (3, 1000), (129, 1001), (64, 1002), (31, 1004), (257, 4096), (17, 16384), (5, 24576), (0, 64)]
TMA_SHAPES = [(1, 8), (7, 64), (1000, 1000), (3001, 4096), (9, 7160), (20_000, 128)]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return import_files(tmp_path, monkeypatch)[0]


@pytest.fixture
def tma(own: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return import_files(tmp_path, monkeypatch)[1]


@pytest.fixture(params=["torch", "cupy"])
def library(request: Any, gpu: Any) -> Any:
    """How arrays get onto the GPU and back: of(host), host(array), and the module."""
    module = getattr(gpu, request.param)
    if module is None:
        pytest.skip(f"no {request.param} with a GPU")
    if request.param == "cupy":
        return SimpleNamespace(name="cupy", module=module, of=module.asarray, host=lambda x: x.get())

    def of(host: np.ndarray) -> Any:
        if host.dtype == numpy_dtype("bfloat16"):
            return module.from_numpy(host.view(np.int16)).view(module.bfloat16).cuda(gpu.index)
        return module.from_numpy(host).cuda(gpu.index)

    def host(x: Any) -> np.ndarray:
        x = x.cpu()
        if x.dtype == module.bfloat16:
            return x.view(module.int16).numpy().view(numpy_dtype("bfloat16"))
        return x.numpy()

    return SimpleNamespace(name="torch", module=module, of=of, host=host)


def inputs(rows: int, columns: int, dtype: str = "float16", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, columns)).astype(numpy_dtype(dtype)),
        "weight": rng.standard_normal(columns).astype(numpy_dtype(dtype)),
    }


def on_gpu(library: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: library.of(array) for name, array in arrays.items()}


def close(y: np.ndarray, arrays: dict[str, np.ndarray], eps: float = 1e-6) -> bool:
    """Against float64, within a unit of the last place; nothing of rtk is used."""
    x, weight = (arrays[name].astype(np.float64) for name in ("x", "weight"))
    expected = x / np.sqrt((x * x).sum(1, keepdims=True) / max(1, x.shape[1]) + eps) * weight
    unit = 2.0**-7 if y.dtype == numpy_dtype("bfloat16") else 2.0**-10
    return bool(np.allclose(y.astype(np.float64), expected, rtol=unit, atol=2.0**-24))


def same_bits(library: Any, a: Any, b: Any) -> bool:
    return library.host(a).tobytes() == library.host(b).tobytes()


def counted(name: str) -> int:
    return rtk.stats()[name]


# --- the pages --------------------------------------------------------------------------------------------------------


def test_every_block_of_the_pages(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu.torch is None or gpu.cupy is None:
        pytest.skip("needs torch and CuPy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_modules(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for block in pages():
        if block.file:
            (tmp_path / block.file).write_text(block.code)
        else:
            block.run(namespace)
            ran += 1
    assert ran == sum(text.count("```python") for text in (page.read_text() for page in DOCS.glob("your-own*"))) - 2


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_config(gpu: Any, own: ModuleType, library: Any, shape: tuple[int, int], dtype: str) -> None:
    host = inputs(*shape, dtype)
    arrays = on_gpu(library, host)
    assert rtk.check_run(own.SPEC, arrays, eps=0.25) == []
    assert close(library.host(rtk.run(own.SPEC, arrays, eps=0.25)["y"]), host, 0.25)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", TMA_SHAPES, ids=str)
def test_every_config_of_the_tma_kernel(
    gpu: Any, tma: ModuleType, library: Any, shape: tuple[int, int], dtype: str
) -> None:
    host = inputs(*shape, dtype)
    arrays = on_gpu(library, host)
    assert rtk.check_run(tma.TMA, arrays) == []
    assert close(library.host(rtk.run(tma.TMA, arrays)["y"]), host)
    for margin in (100, gpu.properties.sm_count - 1):  # fewer blocks, more tiles for each
        assert close(library.host(rtk.run(tma.TMA, arrays, sm_margin=margin)["y"]), host)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_and_strides(gpu: Any, own: ModuleType, library: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(25):
        rows, columns = int(rng.integers(1, 300)), int(rng.integers(1, 3000))
        first, pad = (int(n) for n in rng.integers(0, 9, 2))
        dtype = str(rng.choice(["float16", "bfloat16"]))
        host = inputs(rows, first + columns + pad, dtype, seed)
        wide = library.of(host["x"])
        x, weight = wide[:, first : first + columns], library.of(host["weight"][:columns])
        y = library.of(np.full((rows, columns + 16), 7, numpy_dtype(dtype)))
        assert rtk.run(own.SPEC, {"x": x, "weight": weight, "y": y[:, 8 : 8 + columns]})
        cut = {"x": host["x"][:, first : first + columns], "weight": host["weight"][:columns]}
        whole = library.host(y)
        assert close(whole[:, 8 : 8 + columns], cut), (rows, columns, first, pad, dtype)
        assert (whole[:, :8] == 7).all() and (whole[:, 8 + columns :] == 7).all()
        assert library.host(wide).tobytes() == host["x"].tobytes()


def test_nan_and_inf_stay_in_their_rows(gpu: Any, own: ModuleType, tma: ModuleType, library: Any) -> None:
    host = inputs(40, 1000)
    host["x"][3, 7], host["x"][9, 999], host["x"][11, 0], host["x"][20] = np.nan, np.inf, -np.inf, 0
    with np.errstate(all="ignore"):
        assert rtk.check_run(own.SPEC, on_gpu(library, host)) == []
        assert rtk.check_run(tma.TMA, on_gpu(library, host)) == []


def test_more_than_2_31_elements(gpu: Any, own: ModuleType) -> None:
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    rows, columns = (1 << 31) // 4096 + 3, 4096
    if torch.cuda.mem_get_info(gpu.index)[0] < 4 * 2 * rows * columns:
        pytest.skip("needs 18 GB of device memory")
    x = torch.zeros(rows, columns, dtype=torch.float16, device="cuda")
    x[-1], x[0], x[1 << 18] = 3, 1, 2
    y = rtk.run(own.SPEC, {"x": x, "weight": torch.ones(columns, dtype=torch.float16, device="cuda")})["y"]
    assert bool((y[[0, 1 << 18, -1]] == 1).all()) and int((y != 0).sum()) == 3 * columns


# --- libraries, streams, threads --------------------------------------------------------------------------------------


def test_results_are_the_callers(gpu: Any, own: ModuleType, library: Any) -> None:
    arrays = on_gpu(library, inputs(5, 1000))
    y = rtk.run(own.SPEC, arrays)["y"]
    assert type(y) is type(arrays["x"]) and y.dtype == arrays["x"].dtype and y.device == arrays["x"].device
    room = library.of(np.zeros((5, 1000), np.float16))
    assert rtk.run(own.SPEC, {**arrays, "y": room})["y"] is room and same_bits(library, room, y)


def test_torch_streams(gpu: Any, own: ModuleType) -> None:
    """The launch follows what the caller's stream does first, and not the default stream."""
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")
    rtk.run(own.SPEC, {"x": x, "weight": weight})  # compiled and loaded
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        for value in range(1, 30):
            torch.cuda._sleep(2_000_000)
            x.fill_(value)
            y = rtk.run(own.SPEC, {"x": x, "weight": weight})["y"]
            copy = y.clone()
            x.zero_()
            assert bool((copy == 1).all()), value
    torch.cuda.synchronize()


def test_cupy_streams(gpu: Any, own: ModuleType) -> None:
    cupy = gpu.cupy
    if cupy is None:
        pytest.skip("needs CuPy")
    host = inputs(2000, 4096)
    weight, y = cupy.asarray(host["weight"]), cupy.zeros((2000, 4096), cupy.float16)
    rtk.run(own.SPEC, {"x": cupy.asarray(host["x"]), "weight": weight, "y": y})
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.empty((2000, 4096), cupy.float16)
        x.set(host["x"], stream=stream)
        rtk.run(own.SPEC, {"x": x, "weight": weight, "y": y})
        got = y.get(stream=stream)
        stream.synchronize()
    assert close(got, host)


def test_cuda_graph(gpu: Any, own: ModuleType, tma: ModuleType) -> None:
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    x = torch.randn(777, 1000, dtype=torch.float16, device="cuda")
    weight, y = torch.ones(1000, dtype=torch.float16, device="cuda"), torch.empty_like(x)
    for spec in (own.SPEC, tma.TMA):
        rtk.run(spec, {"x": x, "weight": weight, "y": y})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rtk.run(spec, {"x": x, "weight": weight, "y": y})
        for _ in range(3):
            x.normal_()
            y.zero_()
            graph.replay()
            assert torch.equal(y, rtk.run(spec, {"x": x, "weight": weight})["y"])


def test_threads_and_streams_do_not_disturb_each_other(gpu: Any, own: ModuleType, tma: ModuleType) -> None:
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    calls = []
    for spec in (own.SPEC, tma.TMA):
        for rows, columns in ((100, 1000), (1000, 1000), (3000, 4096)):
            x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
            calls.append((spec, {"x": x, "weight": torch.randn(columns, dtype=torch.bfloat16, device="cuda")}))
    expected = [rtk.run(*call)["y"] for call in calls]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            torch.cuda.set_device(gpu.index)
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(40):
                    i = (index + turn) % len(calls)
                    if not torch.equal(rtk.run(*calls[i])["y"], expected[i]):
                        wrong.append(f"thread {index}, turn {turn}")
        except Exception as error:
            wrong.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_the_first_call_from_many_threads(gpu: Any, own: ModuleType) -> None:
    """One compile, one load, however many threads ask at once."""
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    x = torch.randn(10, 1000, dtype=torch.float16, device="cuda")
    weight = torch.randn(1000, dtype=torch.float16, device="cuda")
    spec, results, start = own.RmsNorm(), [], threading.Barrier(8)

    def work() -> None:
        torch.cuda.set_device(gpu.index)
        start.wait()
        results.append(rtk.run(spec, {"x": x, "weight": weight})["y"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 8 and all(torch.equal(y, results[0]) for y in results)


def test_another_device(gpu: Any, own: ModuleType, tma: ModuleType) -> None:
    torch = gpu.torch
    if torch is None or torch.cuda.device_count() < 2:
        pytest.skip("needs torch and two GPUs")
    other = next(index for index in range(torch.cuda.device_count()) if index != gpu.index)
    if torch.cuda.get_device_capability(other) != (9, 0):
        pytest.skip("needs two Hopper GPUs")
    x = torch.randn(100, 1000, dtype=torch.float16, device=f"cuda:{other}")
    weight = torch.randn(1000, dtype=torch.float16, device=f"cuda:{other}")
    for spec in (own.SPEC, tma.TMA):
        y = rtk.run(spec, {"x": x, "weight": weight})["y"]
        assert y.device == x.device
        assert torch.equal(
            y.cpu(), rtk.run(spec, {"x": x.cuda(gpu.index), "weight": weight.cuda(gpu.index)})["y"].cpu()
        )
        with pytest.raises(ArgumentError, match="weight: received an array on cuda"):
            rtk.run(spec, {"x": x, "weight": weight.cuda(gpu.index)})


# --- refusals and mistakes --------------------------------------------------------------------------------------------


def test_it_refuses_before_a_launch(gpu: Any, own: ModuleType, library: Any) -> None:
    host = inputs(6, 64)
    good = on_gpu(library, host)
    x, weight = good["x"], good["weight"]
    other = gpu.cupy if library.name == "torch" else gpu.torch
    launches = counted("launches")
    bad: list[tuple[str, dict[str, Any]]] = [
        ("x", {"x": x[0]}),
        ("x", {"x": None}),
        ("x", {"x": "x"}),
        ("x", {"x": library.of(host["x"].astype(np.float32))}),
        ("x", {"x": x[:, ::2], "weight": weight[:32]}),
        ("weight", {"weight": weight[1:]}),
        ("weight", {"weight": None}),
        ("weight", {"weight": library.of(host["weight"].astype(numpy_dtype("bfloat16")))}),
        ("weight", {"weight": host["weight"]}),
        ("y", {"y": x}),
        ("y", {"y": x[:3]}),
        ("y", {"y": library.of(np.zeros((6, 64), np.float32))}),
        ("y", {"y": library.of(np.zeros((12, 64), np.float16))[:, ::2]}),
        ("z", {"z": x}),
    ]
    if other is not None:
        theirs = other.zeros((6, 64), dtype=other.float16)
        bad.append(("y", {"y": theirs if library.name == "torch" else theirs.cuda()}))
    for name, changes in bad:
        with pytest.raises((ArgumentError, UnsupportedError)) as caught:
            rtk.run(own.SPEC, {**good, **changes})
        assert caught.value.argument == name, f"{changes.keys()}: {caught.value}"
    for name, options in (("eps", {"eps": []}), ("options", {"epsilon": 1}), ("sm_margin", {"sm_margin": 10_000})):
        with pytest.raises(ArgumentError) as caught_option:
            rtk.run(own.SPEC, good, **options)
        assert caught_option.value.argument == name
    assert counted("launches") == launches
    assert close(library.host(rtk.run(own.SPEC, good)["y"]), host), "the next good call works"


def test_torch_tensors_that_need_grad(gpu: Any, own: ModuleType) -> None:
    torch = gpu.torch
    if torch is None:
        pytest.skip("needs torch")
    x = torch.randn(4, 64, dtype=torch.float16, device="cuda", requires_grad=True)
    weight = torch.ones(64, dtype=torch.float16, device="cuda")
    with pytest.raises(UnsupportedError, match="x: received a tensor that requires grad"):
        rtk.run(own.SPEC, {"x": x, "weight": weight})
    with torch.no_grad():
        assert rtk.run(own.SPEC, {"x": x, "weight": weight})["y"].shape == (4, 64)


def test_other_gpus_are_refused(gpu: Any, own: ModuleType, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = on_gpu(library, inputs(4, 64))
    properties = dataclasses.replace(gpu.properties, compute_capability=(8, 0))
    monkeypatch.setattr("rtk.driver.device_properties", lambda index: properties)
    with pytest.raises(UnsupportedError, match=r"8\.0.*9\.0"):
        rtk.run(own.SPEC, arrays)


FAULTS = {
    "the last column is left out": ("if (column < columns) store_scaled", "if (column + 8 < columns) store_scaled"),
    "one warp's sum is left out": ("for (int warp = 0;", "for (int warp = 1;"),
    "eps is forgotten": (" + params.eps", ""),
    "a row too many is written": ("row < params.rows ?", "row <= params.rows ?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_run_finds_a_fault_in_the_source(
    gpu: Any, own: ModuleType, library: Any, tmp_path: Path, fault: str
) -> None:
    before, after = FAULTS[fault]
    header = tmp_path / "rmsnorm.cuh"
    assert before in header.read_text()
    header.write_text(header.read_text().replace(before, after))
    host = inputs(7, 1000)
    room = np.concatenate([host["x"], np.ones((9, 1000), np.float16)])  # what a row too many reads is there
    arrays = {"x": library.of(room)[:7], "weight": library.of(host["weight"])}
    found = rtk.check_run(own.RmsNorm(), arrays, eps=0.5)
    assert found, fault
    assert ("outside" in "".join(found)) == (fault == "a row too many is written"), found


def test_a_debug_build(gpu: Any, tmp_path: Path) -> None:
    """Random delays at barriers change nothing. In a process of its own, which reads the environment first."""
    if gpu.torch is None:
        pytest.skip("needs torch")
    write_files(tmp_path)
    code = (
        "import torch, rtk\nfrom rmsnorm_tma import TMA\n"
        "x = torch.randn(3001, 1000, dtype=torch.bfloat16, device='cuda')\n"
        "print(rtk.check_run(TMA, {'x': x, 'weight': torch.ones(1000, dtype=x.dtype, device='cuda')}))\n"
    )
    root = Path(rtk.__file__).resolve().parent.parent
    for debug in ("1", "delays"):
        environment = {**os.environ, "RTK_DEBUG": debug, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
