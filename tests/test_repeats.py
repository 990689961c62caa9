"""Calls that were made before: what tells them apart, when they go the long way, and what reaches the driver."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import threading
from typing import Any

import pytest

import rtk
from rtk import autotune, counters, ops, repeats, zeroed
from rtk.arrays import library
from rtk.autotune import choice
from rtk.errors import ArgumentError, DriverError, UnsupportedError
from rtk.launch import MisalignedError, Plan

torch = pytest.importorskip("torch")

from rtk.torch import operators, quick  # noqa: E402


class PretendedPlan:
    """Fills o with the number of its launch, where a kernel would compute; notes what it was given."""

    arrays, device, counts = repeats.ARRAYS, 0, True

    def __init__(self, o_bytes: int) -> None:
        self.o_bytes, self.seen, self.lock = o_bytes, [], threading.Lock()

    def launch(self, addresses: Any, stream: int, counter: int, here: bool) -> None:
        if any(address % 16 for address in addresses[:3]):
            raise MisalignedError("q", "an address", "another")
        with self.lock:
            self.seen.append((addresses, stream, counter, here))
            number = len(self.seen)
        ctypes.memset(addresses[3], number % 100, self.o_bytes)


KIND = quick.TorchKind()
OPTIONS = (False, False, "bottom-right", None, None, 0.0, "bhsd", False, 0)


def inputs(**changes: Any) -> list[Any]:
    shape = changes.get("shape", (2, 4, 9, 16))
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)).half() for n in range(3)]


@pytest.fixture
def pretended(monkeypatch: Any) -> Any:
    """torch's CPU tensors said to be on a GPU, as far as a repeated call looks."""
    words = itertools.count(4096, 4)
    monkeypatch.setattr(quick, "_device", lambda: 0)
    monkeypatch.setattr(quick, "_empty", functools.partial(quick._empty_strided, device="cpu"))
    monkeypatch.setattr(quick, "_stream", lambda device: 77)
    monkeypatch.setattr(quick, "_capturing", lambda: False)
    monkeypatch.setattr(zeroed, "word", lambda device, capturing: next(words))
    monkeypatch.setattr(repeats, "kinds", {torch.Tensor: KIND})
    repeats.forget()
    yield monkeypatch
    repeats.forget()


def known(x: list[Any], options: tuple[Any, ...] = OPTIONS, return_lse: bool = False) -> PretendedPlan:
    """As if a kernel had served this call once."""
    plan = PretendedPlan(x[0].nbytes)
    o = library("torch").view(x[0], "o")
    call = repeats.Known(plan, o, tuple(x[0].shape[:3]), choice.stamp())  # type: ignore[arg-type]
    repeats.remember(KIND.find(*x, options)[1], call)
    return plan


def test_a_known_call_is_a_launch_and_nothing_else(pretended: Any) -> None:
    x = inputs()
    plan = known(x)
    before = counters.snapshot()
    first, second = rtk.attention(*x), rtk.attention(*x)
    assert (first.view(torch.uint8) == 1).all() and (second.view(torch.uint8) == 2).all(), "memory of its own"
    assert first.shape == x[0].shape and first.dtype == x[0].dtype
    (addresses, stream, counter, here), (_, _, other, _) = plan.seen
    assert addresses == (*(y.data_ptr() for y in x), first.data_ptr(), 0, 0, 0)
    assert stream == 77 and here and counter != other
    after = counters.snapshot()
    assert (after["calls"] - before["calls"], after["launches"] - before["launches"]) == (2, 2)
    assert after["cpu_calls"] == before["cpu_calls"]


def test_the_second_call_is_the_short_one(pretended: Any) -> None:
    """From a process's very first call on, when no library is known yet."""
    x, ran = inputs(), []
    plan = PretendedPlan(x[0].nbytes)
    view = type(library("torch")).view
    pretended.setattr(type(library("torch")), "view", lambda *given: dataclasses.replace(view(*given), device=0))
    pretended.setattr(PretendedPlan, "run", lambda self, library, addresses: ran.append(addresses), raising=False)
    for check in ("check_room", "_check_gpu"):
        pretended.setattr(ops, check, lambda *_: None)
    pretended.setattr(ops, "_plan", lambda *_: plan)
    pretended.setattr(repeats, "kinds", {})
    results = [rtk.attention(*x) for _ in range(4)]
    assert len(ran) == 2 and len(plan.seen) == 2, "the first makes the library known, the second is remembered"
    assert len({o.data_ptr() for o in results}) == 4
    assert all(o.shape == x[0].shape and o.stride() == x[0].stride() and o.dtype == x[0].dtype for o in results)


def test_other_addresses_and_the_lse(pretended: Any) -> None:
    x, y = inputs(), inputs()
    plan = known(x, (True, *OPTIONS[1:]))
    o, lse = rtk.attention(*y, return_lse=True)
    assert plan.seen[0][0] == (*(z.data_ptr() for z in y), o.data_ptr(), lse.data_ptr(), 0, 0)
    assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32


LONG_WAYS: dict[str, Any] = {
    "causal": {"causal": True},
    "causal as a number": {"causal": 0},
    "softcap as a bool": {"softcap": False},
    "scale": {"softmax_scale": 0.25},
    "window": {"window_size": (3, 0)},
    "a list for a window": {"window_size": [None, None]},
    "lse": {"return_lse": True},
    "layout": {"layout": "bshd"},
    "alignment": {"causal_align": "top-left"},
    "batch-invariant": {"batch_invariant": True},
    "margin": {"sm_margin": 3},
    "config": {"config": {"BLOCK_M": 64}},
    "range": {"kv_range": (None, None)},
    "out": {"out": True},
}


@pytest.mark.parametrize("what", LONG_WAYS)
def test_another_option_is_another_call(pretended: Any, what: str) -> None:
    x = inputs()
    plan = known(x)
    options = dict(LONG_WAYS[what])
    if "out" in options:
        options["out"] = torch.empty_like(x[0])
    try:
        rtk.attention(*x, **options)
    except ArgumentError:
        assert what in ("causal as a number", "softcap as a bool")
    assert not plan.seen


@pytest.mark.parametrize("guarded", [False, True])
def test_another_tensor_is_another_call(pretended: Any, guarded: bool) -> None:
    x = inputs()
    plan = known(x)
    if guarded:
        rtk.attention(*x)
        plan.seen.clear()
    q, k, v = x
    wide = torch.zeros(2, 4, 9, 17).half()
    masked = wide[..., :16]
    for others in (
        (masked, k, v),  # other strides
        (q.transpose(0, 1).contiguous().transpose(0, 1), k, v),
        (q[:1], k[:1], v[:1]),
        (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        (torch.nn.Parameter(q), k, v),
        (torch._neg_view(q), k, v),
    ):
        rtk.attention(*others)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert odd.data_ptr() % 16
    rtk.attention(odd, k, v)  # TMA cannot read there
    assert not plan.seen
    rtk.attention(q, k, torch.nn.Parameter(v, requires_grad=False))
    assert len(plan.seen) == 1


@pytest.mark.parametrize("guarded", [False, True])
def test_what_watches_sees_the_call(pretended: Any, guarded: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    x = inputs()
    plan = known(x)
    if guarded:  # found by a look at the tensors, without a key
        rtk.attention(*x)
        assert KIND.find(*x, OPTIONS)[1] is None
        plan.seen.clear()
    with Watch():
        rtk.attention(*x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):  # torch's own modes, which its looks do not see
        rtk.attention(*x)
    for pre_dispatch in (False, True):
        traced = make_fx(lambda q: rtk.attention(q, x[1], x[2]) * 2, pre_dispatch=pre_dispatch)(x[0])
        assert "attention_fwd" in traced.code, "not a constant"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rtk.attention(*x).dtype == torch.bfloat16
    torch.vmap(lambda q: rtk.attention(q, x[1], x[2]))(x[0][None])
    y = [z.clone().requires_grad_() for z in x]
    assert rtk.attention(*y).requires_grad
    torch.compile(lambda *z: rtk.attention(*z), fullgraph=True, backend="eager")(*x)
    with rtk.record_shapes():
        rtk.attention(*x)
    assert not plan.seen
    with torch.no_grad():
        rtk.attention(*y)
    assert len(plan.seen) == 1


def test_another_device_or_another_choice(pretended: Any) -> None:
    x = inputs()
    plan = known(x)
    pretended.setattr(quick, "_device", lambda: 1)
    pretended.setattr(quick.driver, "is_capturing", lambda stream: False)
    rtk.attention(*x)
    assert plan.seen.pop()[3] is False, "the driver is told to look for the context"
    pretended.setattr(quick, "_device", lambda: 0)
    with autotune.using("off"):
        rtk.attention(*x)
    assert not plan.seen
    rtk.attention(*x)
    assert not plan.seen, "prepared before a mode came and went: made anew by the long way"
    plan = known(x)
    rtk.attention(*x)
    assert plan.seen


def test_gradients_wanted_since(pretended: Any) -> None:
    """A look at tensors that was made without gradients does not take those that want some for the same."""
    x = [y.requires_grad_() for y in inputs()]
    plan = known_without_gradients(x)
    with torch.no_grad():
        for _ in range(3):
            rtk.attention(*x)
            rtk.attention(*(y.detach() for y in x))  # found by a look from the second on
    assert len(plan.seen) == 6 and len(KIND._guarded.get(OPTIONS)) == 1
    plan.seen[3:] = []
    assert rtk.attention(*x).requires_grad and len(plan.seen) == 3
    with torch.inference_mode():
        rtk.attention(*x)
    assert len(plan.seen) == 4
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs()[0], inputs()[0])
        with pytest.raises(UnsupportedError, match="tangent"):
            rtk.attention(dual, *inputs()[1:])
    assert len(plan.seen) == 4


def test_gradients_of_a_known_call(pretended: Any) -> None:
    """Its forward is a launch; what the launch wrote is what the backward gets, and no option is checked again."""
    x = [y.requires_grad_() for y in inputs()]
    with torch.no_grad():
        plan = known(x, (True, True, *OPTIONS[2:]))
    saved: list[Any] = []
    pretended.setattr(
        operators.backward, "attention_bwd", lambda *given, **options: saved.append((given, options)) or x
    )
    o, lse = rtk.attention(*x, causal=True, return_lse=True)
    assert len(plan.seen) == 1 and plan.seen[0][0][3:5] == (o.data_ptr(), lse.data_ptr())
    alone = rtk.attention(*x, causal=True)
    assert len(plan.seen) == 2 and alone.requires_grad
    (o.sum() + lse.sum() + alone.sum()).backward()
    assert len(saved) == 2 and all(options["causal"] and not options["top_left"] for _, options in saved)
    assert {given[5].data_ptr() for given, _ in saved} == {o.data_ptr(), alone.data_ptr()}
    assert all(torch.equal(y.grad, 2 * y) for y in x)
    odd = torch.empty(x[0].numel() + 1, dtype=x[0].dtype)[1:].view(x[0].shape).requires_grad_()
    assert rtk.attention(odd, *x[1:], causal=True).requires_grad and len(plan.seen) == 2, "by the long way"
    for wrong in ({"causal": 1}, {"causal": True, "return_lse": "no"}):
        with pytest.raises(ArgumentError, match=list(wrong)[-1]):
            rtk.attention(*x, **wrong)


def known_without_gradients(x: list[Any]) -> PretendedPlan:
    with torch.no_grad():
        return known(x)


def test_calls_in_turn(pretended: Any) -> None:
    """More calls of the same options than are found at once: each is served by its own plan, and places change."""
    shapes = [(1, 2, n, 16) for n in range(3, 13)]
    plans = {shape: known(inputs(shape=shape)) for shape in shapes}
    for turn in range(100):
        for shape in shapes:
            assert rtk.attention(*inputs(shape=shape)).shape == shape
            assert len(plans[shape].seen) == turn + 1
    assert len(KIND._guarded.get(OPTIONS)) == 4
    for _ in range(100):  # at last also those that had no place
        for shape in shapes[-3:]:
            rtk.attention(*inputs(shape=shape))
    assert {id(plans[shape]) for shape in shapes[-3:]} & {id(each[1].plan) for each in KIND._guarded.get(OPTIONS)}
    repeats.forget()
    assert KIND._guarded.get(OPTIONS) is None


def test_many_threads(pretended: Any) -> None:
    shapes = [(1, 2, n, 16) for n in range(3, 11)]
    plans = {shape: known(inputs(shape=shape)) for shape in shapes}
    wrong: list[Any] = []

    def work(number: int) -> None:
        x = {shape: inputs(shape=shape) for shape in shapes}
        for turn in range(200):
            shape = shapes[(number + turn) % len(shapes)]
            o = rtk.attention(*x[shape])
            if o.shape != shape or not (o.view(torch.uint8) == o.view(torch.uint8).flatten()[0]).all():
                wrong.append(shape)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    before = counters.snapshot()["launches"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sum(len(plan.seen) for plan in plans.values()) == 1600
    assert counters.snapshot()["launches"] == before + 1600
    seen = [counter for plan in plans.values() for _, _, counter, _ in plan.seen]
    assert len(set(seen)) == len(seen), "no two launches share a word"


def test_the_table_is_bounded(pretended: Any, monkeypatch: Any) -> None:
    from rtk.launch import Recent

    monkeypatch.setattr(repeats, "_known", Recent(8))
    for n in range(3, 40):
        known(inputs(shape=(1, 2, n, 16)))
    assert len(repeats._known) <= 8


def test_nvtx_ranges(monkeypatch: Any) -> None:
    """Each launch in a range of its title while ranges are wanted, an error's too; else nothing is asked of NVTX."""
    import sys
    import types

    from rtk import nvtx

    said: list[str] = []
    stand_in = types.SimpleNamespace(RangePush=said.append, RangePop=lambda: said.append("end"))
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nvtx=stand_in))

    def start(stream: int, here: bool) -> None:
        said.append(f"on {stream}")
        if stream == 13:
            raise DriverError("cuLaunchKernelEx", 719, "CUDA_ERROR_LAUNCH_FAILED", "")

    plan = object.__new__(Plan)
    plan.title, plan.grid, plan.device, plan._slots, plan._counter = "attention_fwd b=1 m128", 1, 0, [], None
    ready = types.SimpleNamespace(addresses=(), launch=types.SimpleNamespace(start=start))
    plan._ready = [ready, ready, ready]  # type: ignore[list-item]
    plan.launch((), 1)
    nvtx.enable()
    try:
        plan.launch((), 2)
        with pytest.raises(DriverError):
            plan.launch((), 13)
    finally:
        nvtx.enable(False)
    plan.launch((), 3)
    title = "attention_fwd b=1 m128"
    assert said == ["on 1", title, "on 2", "end", title, "on 13", "end", "on 3"]
