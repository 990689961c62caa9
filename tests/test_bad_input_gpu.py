"""Bad calls with arrays on a GPU: refused before a launch, nothing written, and the CUDA context as good as before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import bad_call_strategies
import bad_calls
import numpy as np
import pytest
from bad_call_libraries import STRANGERS, TORCH
from bad_call_strategies import BadCall
from bad_call_table import EVERYWHERE, broadcast
from bad_calls import OUT, Changes, Check, K, Maker, Q, Table, V, refused, zeros
from hypothesis import HealthCheck, given, settings
from liars import CPU, Forged, SaysDevice, Stranger

import rtk
from rtk.errors import ArgumentError, UnsupportedError

pytestmark = pytest.mark.gpu

EXAMPLES = 250  # random bad calls for each library


def _torch_maker() -> Maker:
    torch = pytest.importorskip("torch")
    return Maker("torch", torch, torch.device("cpu"))


def _odd(make: Maker, shape: tuple[int, ...]) -> Any:
    """Elements of two bytes at an odd address."""
    size = 2 * int(np.prod(shape))
    return make.of(np.zeros(size + 2, np.uint8))[1 : size + 1].view(np.float16).reshape(shape)


def _vast_copies(make: Maker, vast: str) -> Changes:
    """Keys of a terabyte in the memory of one element; TMA cannot read them where they are."""
    seqlen, dims = 1 << 29, {"k": 256, "v": 256}
    arrays = {name: broadcast(make, zeros(1, 1, 1, dim), (2, 2, seqlen, dim)) for name, dim in dims.items()}
    arrays[vast] = broadcast(make, zeros(1, 1, 1, 1), (2, 2, seqlen, 256))
    return {"q": make.of(zeros(2, 4, 5, 256)), "out": None, **arrays}


def _in(dtype: type) -> Changes:
    return {name: zeros(*shape, dtype=dtype) for name, shape in (("q", Q), ("k", K), ("v", V))} | {"out": None}


GPU: Table = {
    "float32": (_in(np.float32), "q"),
    "float64": (_in(np.float64), "q"),
    "float32 without keys": (
        {name: zeros(2, 4, n, 16, dtype=np.float32) for name, n in (("q", 5), ("k", 0), ("v", 0))} | {"out": None},
        "q",
    ),
    "k in NumPy": (lambda _: {"k": zeros(*K)}, "k"),
    "v in NumPy": (lambda _: {"v": zeros(*V)}, "v"),
    "out in NumPy": (lambda _: {"out": zeros(*OUT)}, "out"),
    "q in NumPy": (lambda _: {"q": zeros(*Q)}, "k"),
    "k a stranger": (lambda make: {"k": Stranger(make.of(zeros(*K)))}, "k"),
    "k of torch on the CPU": (lambda _: {"k": _torch_maker().of(zeros(*K))}, "k"),
    "v of torch on the CPU": (lambda _: {"v": _torch_maker().of(zeros(*V))}, "v"),
    "q of torch on the CPU": (lambda _: {"q": _torch_maker().of(zeros(*Q))}, "k"),
    "out of torch on the CPU": (lambda _: {"out": _torch_maker().of(zeros(*OUT))}, "out"),
    "no multiprocessor left": ({"sm_margin": 1000}, "sm_margin"),
    "margin vast": ({"sm_margin": 10**30}, "sm_margin"),
    "k of a terabyte to copy": (lambda make: _vast_copies(make, "k"), "k"),
    "v of a terabyte to copy": (lambda make: _vast_copies(make, "v"), "v"),
}
TORCH_GPU: Table = {
    "q negated when read": (lambda make: {"q": make.module._neg_view(make.of(zeros(*Q)))}, "q"),
    "v negated when read": (lambda make: {"v": make.module._neg_view(make.of(zeros(*V)))}, "v"),
    "out negated when read": (lambda make: {"out": make.module._neg_view(make.poisoned())}, "out"),
    "k pinned on the CPU": (lambda _: {"k": _torch_maker().of(zeros(*K)).pin_memory()}, "k"),
}
CUPY: Table = {
    "q at an odd address": (lambda make: {"q": _odd(make, Q)}, "q"),
    "v at an odd address": (lambda make: {"v": _odd(make, V)}, "v"),
    "out at an odd address": (lambda make: {"out": _odd(make, OUT)}, "out"),
    "q at a null pointer": (
        lambda make: {"q": make.module.ndarray(Q, np.float16, _memory_at(make, 0))},
        "q",
    ),
}
STRANGERS_GPU: Table = {
    "q says it is on the CPU": (lambda make: {"q": SaysDevice(make.of(zeros(*Q)), (CPU, 0))}, "q k"),
    "k on the CPU": (lambda _: {"k": Stranger(zeros(*K))}, "k"),
    "q on the CPU": (lambda _: {"q": Stranger(zeros(*Q))}, "k"),
    "q forged, on the CPU": (lambda _: {"q": Forged(Q)}, "k"),
    "float32": (lambda make: {name: Stranger(make.of(x)) for name, x in _in(np.float32).items() if name != "out"}, "q"),
}
TABLES = {
    "torch": EVERYWHERE | TORCH | GPU | TORCH_GPU,
    "cupy": EVERYWHERE | GPU | CUPY,
}
CASES = [pytest.param(library, name, id=f"{library}-{name}") for library, table in TABLES.items() for name in table]


def _memory_at(make: Maker, address: int) -> Any:
    memory = make.module.cuda.UnownedMemory(address, 1 << 16, None, make.device.id)
    return make.module.cuda.MemoryPointer(memory, 0)


@pytest.fixture(scope="module")
def checks(gpu: Any) -> Callable[[str], Check]:
    made: dict[str, Check] = {}

    def check(library: str) -> Check:
        module = getattr(gpu, library)
        if module is None:
            pytest.skip(f"no {library} that can use the GPU")
        if library not in made:
            device = module.device("cuda", gpu.index) if library == "torch" else module.cuda.Device(gpu.index)
            made[library] = Check(Maker(library, module, device))
        return made[library]

    return check


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_the_good_call_is_good(checks: Callable[[str], Check], library: str) -> None:
    expected = rtk.attention(**bad_calls.good_arrays()).astype(np.float32)
    got = np.frombuffer(checks(library).result or b"", np.float16).reshape(OUT).astype(np.float32)
    np.testing.assert_allclose(got, expected, atol=4e-3)


@pytest.mark.parametrize(("library", "name"), CASES)
def test_refuses(checks: Callable[[str], Check], library: str, name: str) -> None:
    check = checks(library)
    changes, names = TABLES[library][name]
    check(bad_calls.changed_arguments(check.make, changes), names)


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("name", STRANGERS | STRANGERS_GPU)
def test_refuses_strangers(checks: Callable[[str], Check], library: str, name: str) -> None:
    check = checks(library)
    changes, names = (STRANGERS | STRANGERS_GPU)[name]
    check(bad_calls.changed_arguments(check.make, changes), names, strangers=True)


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_random_bad_calls(checks: Callable[[str], Check], library: str, record_property: Any) -> None:
    check = checks(library)
    count = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bad_call_strategies.bad_calls())
    def refuse(call: BadCall) -> None:
        nonlocal count
        count += 1
        check(call.made(check.make), " ".join(call.names))

    refuse()
    record_property("examples", count)


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_the_strangers_would_be_good(checks: Callable[[str], Check], library: str) -> None:
    check = checks(library)
    result = rtk.attention(**check.make.strangers())
    assert check.make.bits(check.make.module.from_dlpack(result)) == check.result


def test_mixtures_of_libraries(checks: Callable[[str], Check]) -> None:
    torch, cupy = checks("torch"), checks("cupy")
    for ours, theirs in ((torch, cupy), (cupy, torch)):
        for name in "kv":
            ours({name: theirs.make.call()[name]}, name)
        ours({"out": theirs.make.poisoned()}, "out")
        ours({"q": theirs.make.call()["q"]}, "k")


def test_torch_in_forward_mode(checks: Callable[[str], Check]) -> None:
    torch, x = checks("torch").make.module, checks("torch").make.call()

    def attend(q: Any) -> Any:
        return rtk.attention(q, x["k"], x["v"]).sum()

    def dual(q: Any) -> None:
        with torch.autograd.forward_ad.dual_level():
            attend(torch.autograd.forward_ad.make_dual(q, q))

    launches = rtk.stats()["launches"]
    for transformed in (lambda q: torch.func.jvp(attend, (q,), (q,)), dual):
        with (
            pytest.raises((ArgumentError, UnsupportedError), match=r"rtk: q: received .*accepted: "),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's own
            transformed(x["q"])
    assert rtk.stats()["launches"] == launches
    checks("torch")({"softcap": -1.0}, "softcap")


def test_a_refusal_during_graph_capture_leaves_the_capture_whole(checks: Callable[[str], Check]) -> None:
    check = checks("torch")
    torch, arguments = check.make.module, check.make.call()
    out = check.make.poisoned()
    scale = torch.ones((), device=check.make.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for changes, names in (({"softmax_scale": scale}, "softmax_scale"), ({"k": arguments["k"][:1]}, "k")):
            refused(arguments | changes, names)
        rtk.attention(**arguments, out=out)
        refused(arguments | {"window_size": (-5, 0)}, "window_size")
    graph.replay()
    torch.cuda.synchronize()
    assert check.make.bits(out) == check.result
