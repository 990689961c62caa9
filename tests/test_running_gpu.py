"""How calls run on the GPU: the same bits again, streams, threads, graphs, devices, and what is refused."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import yardstick
from gpu_cases import Case, CupyArrays, TorchArrays, arrays_of, counted, judge, same_bits
from yardstick import DTYPES, to_f64

import rtk
from rtk.errors import ArgumentError, UnsupportedError

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("built")]


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
