"""rtk.attention in torch on the CPU: gradients, operators under compile, export, autocast and transforms; drop-ins."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rtk
from rtk.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import rtk.torch  # noqa: E402
from rtk.torch import backward, patching, sdpa, served, watching  # noqa: E402

FWD, BWD = torch.ops.rtk.attention_fwd.default, torch.ops.rtk.attention_bwd.default


def ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window_size": (2, 1)},
    "left": {"causal": True, "window_size": (3, None), "causal_align": "top-left"},
    "softcap": {"softcap": 2.0, "causal": True},
    "ranges": {"kv_range": (ints(1, 0), ints(7, 3))},
    "causal ranges": {"kv_range": (ints(4, 0), None), "causal": True},
    "no keys": {"kv_range": (None, ints(0, 7))},
    "negative scale": {"softmax_scale": -0.3},
}


def tensors(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (5, 7),
    dims: tuple[int, int] = (8, 8),
    dtype: Any = None,
    grad: bool = False,
    seed: int = 0,
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads[0], lengths[0], dims[0]),
        (batch, heads[1], lengths[1], dims[0]),
        (batch, heads[1], lengths[1], dims[1]),
    )
    dtype = dtype or torch.float64
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


@pytest.fixture(autouse=True)
def torch_as_found() -> Any:
    served.reset_stats()
    yield
    while patching._depth:
        rtk.torch.unpatch()
    sdpa.serves_cpu = False
    torch._dynamo.reset()


@pytest.fixture
def ours() -> None:
    sdpa.serves_cpu = True


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_by_differences(mask: str) -> None:
    """Of o and of lse, for every option; finite where a row sees no key."""

    def attend(*x: Any) -> Any:
        o, lse = rtk.attention(*x, **MASKS[mask], return_lse=True)
        return o, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(attend, tensors(grad=True))
    assert torch.autograd.gradcheck(lambda *x: attend(*x)[0], tensors(dims=(16, 8), heads=(3, 3), grad=True))


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.tuples(st.integers(1, 40), st.integers(1, 60)),
    st.sampled_from([(8, 8), (16, 8), (8, 24)]),
    st.sampled_from(["full", "causal", "top-left", "window", "softcap"]),
    st.integers(1, 1 << 16),
)
@settings(deadline=None)
def test_gradients_in_chunks_are_those_of_plain_torch(
    batch: int, heads: Any, lengths: Any, dims: Any, mask: str, chunk_bytes: int
) -> None:
    x = tensors(batch, heads, lengths, dims, grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_CHUNK_BYTES", chunk_bytes)
        o = rtk.attention(*x, **MASKS[mask])
        weights = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
        (o * weights).sum().backward()
    y = tensors(batch, heads, lengths, dims, grad=True)
    expected = plainly(*y, **MASKS[mask])
    (expected * weights).sum().backward()
    torch.testing.assert_close(o, expected)
    for ours_, theirs in zip(x, y, strict=True):
        torch.testing.assert_close(ours_.grad, theirs.grad)


def plainly(
    q: Any, k: Any, v: Any, causal: bool = False, causal_align: str = "", window_size: Any = None, softcap: float = 0.0
) -> Any:
    """Attention by torch's own differentiable operations."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / q.shape[3] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[2])[:, None] + (0 if causal_align == "top-left" else k.shape[2] - q.shape[2])
    key = torch.arange(k.shape[2])
    left, right = window_size or (None, None)
    seen = torch.ones(scores.shape[2:], dtype=torch.bool)
    if causal:
        seen &= key <= place
    if left is not None:
        seen &= place - key <= left
    if right is not None:
        seen &= key - place <= right
    weights = torch.where(seen, scores, -torch.inf)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0).softmax(-1) * seen.any(-1, keepdim=True)
    return weights @ v


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_have_the_dtype_and_the_layout_of_the_inputs(dtype: str) -> None:
    x = [y.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for y in tensors(dtype=getattr(torch, dtype))]
    o = rtk.attention(*x, causal=True)
    assert o.dtype == x[0].dtype and o.stride() == torch.empty_like(x[0]).stride()
    o.sum().backward()
    for y in x:
        assert y.grad.dtype == y.dtype and y.grad.stride() == y.stride()
    exact = [y.detach().double().requires_grad_() for y in x]
    rtk.attention(*exact, causal=True).sum().backward()
    for y, z in zip(x, exact, strict=True):
        torch.testing.assert_close(y.grad.double(), z.grad, atol=0.05, rtol=0.05)


def test_only_what_asks_for_it_gets_a_gradient() -> None:
    q, k, v = tensors()
    rtk.attention(q, k.requires_grad_(), v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    assert not rtk.attention(q, k.detach(), v).requires_grad
    with torch.no_grad():
        assert not rtk.attention(q, k, v).requires_grad


def test_layouts_and_flash_attn_func() -> None:
    x = tensors(grad=True)
    swapped = [y.detach().transpose(1, 2).requires_grad_() for y in x]
    rtk.attention(*x, causal=True).square().sum().backward()
    rtk.attention(*swapped, causal=True, layout="bshd").square().sum().backward()
    again = [y.detach().transpose(1, 2).requires_grad_() for y in x]
    rtk.flash_attn_func(*again, causal=True).square().sum().backward()
    for a, b, c in zip(x, swapped, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad.transpose(1, 2))
        torch.testing.assert_close(a.grad, c.grad.transpose(1, 2))


def test_what_has_no_derivative_says_so() -> None:
    x = tensors(grad=True)
    (grad,) = torch.autograd.grad(rtk.attention(*x).square().sum(), x[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivatives"):
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match=r"out: .*None where gradients"):
        rtk.attention(*x, out=torch.empty(2, 4, 5, 8, dtype=torch.float64))


def test_errors_are_those_of_a_call_without_gradients() -> None:
    q, k, v = tensors(grad=True)
    with pytest.raises(ArgumentError, match="k: received shape"):
        rtk.attention(q, k[..., :4], v)
    with pytest.raises(ArgumentError, match="k: received an object of type int"):
        rtk.attention(q, 3, v)
    with pytest.raises(ArgumentError, match="causal_align"):
        rtk.attention(q, k, v, causal=True, causal_align="middle")
    with pytest.raises(ArgumentError, match="config"):
        rtk.attention(q, k, v, config={"BLOCK_N": 7})


@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": 5},
        {"kv_range": (None,) * 3},
        {"kv_range": (None, [1, 2])},
        {"kv_range": (None, torch.zeros(2, dtype=torch.int64))},
        {"config": 3},
        {"config": {"BLOCK_N": 7}},
        {"sm_margin": 1.5},
        {"sm_margin": True},
        {"batch_invariant": 1},
        {"return_lse": 1},
        {"causal": 1},
        {"layout": "sbhd"},
        {"softcap": "a"},
        {"softmax_scale": float("nan")},
        {"window_size": (1, 2, 3)},
    ],
    ids=str,
)
def test_the_same_error_with_and_without_gradients(options: dict[str, Any]) -> None:
    said = []
    for grad in (False, True):
        with pytest.raises(ArgumentError) as caught:
            rtk.attention(*tensors(grad=grad), **options)
        said.append(caught.value.argument)
    assert said[0] == said[1]


def test_far_bounds_are_no_bounds() -> None:
    x = tensors(grad=True)
    for window in ((2**70, 0), (2**40, 2**33), (300, 0)):
        expected = rtk.attention(*(y.detach() for y in x), window_size=window)
        assert torch.equal(rtk.attention(*x, window_size=window), expected)
        grads = torch.autograd.grad(rtk.attention(*x, window_size=window).sum(), x)
        causal = {"causal": True} if window[1] == 0 else {}
        for a, b in zip(grads, torch.autograd.grad(rtk.attention(*x, **causal).sum(), x), strict=True):
            torch.testing.assert_close(a, b)


def test_a_backward_within_autocast_is_as_exact() -> None:
    x = tensors(dtype=torch.float32, grad=True, lengths=(60, 60))
    o = rtk.attention(*x, causal=True)
    expected = torch.autograd.grad(o.square().sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(torch.autograd.grad(o.square().sum(), x), expected, strict=True):
            assert torch.equal(a, b)


def test_a_config_goes_through_the_operator() -> None:
    x = tensors(dtype=torch.bfloat16, dims=(64, 64), grad=True)
    config = {"BLOCK_M": 64, "BLOCK_N": 64}
    assert torch.equal(rtk.attention(*x, config=config), rtk.attention(*x))
    # (With dynamic=True the numbers in the dict are symbols, which no kernel can be compiled for.)
    fast = torch.compile(lambda *y: rtk.attention(*y, config=config), fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(*x), rtk.attention(*x))


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_left": 2, "softcap": 2.0}, {"top_left": True}])
def test_opcheck_forward(options: dict[str, Any], grad: bool) -> None:
    torch.library.opcheck(FWD, tuple(tensors(grad=grad)), options)


def test_opcheck_with_ranges_and_backward() -> None:
    x = tensors()
    torch.library.opcheck(FWD, (*x, ints(1, 0), ints(5, 7)), {})
    o, lse = FWD(*x, causal=True)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        BWD, (torch.randn_like(o), torch.randn_like(lse), *x, o, lse), {"causal": True}, test_utils=utils
    )


@pytest.mark.parametrize("dims", [(16, 16), (16, 8), (8, 24)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_fake_results_are_laid_out_as_real_ones(dims: tuple[int, int], order: tuple[int, ...]) -> None:
    from torch._subclasses import FakeTensorMode

    back = [order.index(n) for n in range(3)]
    x = [y.permute(*order, 3).contiguous().permute(*back, 3) for y in tensors(dims=dims, dtype=torch.float32)]
    real = FWD(*x)
    with FakeTensorMode() as mode:
        fake = FWD(*map(mode.from_tensor, x))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def test_compiled_whole_and_once_for_all_lengths() -> None:
    def step(q: Any, k: Any, v: Any) -> Any:
        return rtk.attention(q.sin(), k, v, causal=True, window_size=(6, 0)).cos()

    fast = compiled(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 33, 64):
            x = tensors(lengths=(length, length), grad=True)
            y = [z.detach().requires_grad_() for z in x]
            fast(*x).sum().backward()
            step(*y).sum().backward()
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(a.grad, b.grad)


def test_compiled_with_every_option() -> None:
    def step(q: Any, k: Any, v: Any, first: Any) -> Any:
        o, lse = rtk.attention(q, k, v, softcap=3.0, kv_range=(first, None), layout="bshd", return_lse=True)
        return o + lse.transpose(1, 2)[..., None], rtk.flash_attn_func(q, k, v, causal=True)

    x = [y.transpose(1, 2) for y in tensors()]
    for a, b in zip(compiled(step)(*x, ints(1, 2)), step(*x, ints(1, 2)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return rtk.attention(q, k, v, causal=True, softmax_scale=0.3)

    x = tuple(tensors())
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, {2: length}, {2: length})
    x = tuple(tensors(lengths=(6, 6)))
    program = torch.export.export(Attend(), x, dynamic_shapes=shapes)
    longer = tensors(lengths=(11, 11))
    torch.testing.assert_close(program.module()(*longer), Attend()(*longer))


def test_autocast() -> None:
    x = tensors(dtype=torch.float32, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = rtk.attention(*x, causal=True)
        assert o.dtype == torch.bfloat16
        assert FWD(*x)[0].dtype == torch.bfloat16
        assert rtk.attention(*tensors(dtype=torch.float64)).dtype == torch.float64, "as torch does"
    o.float().sum().backward()
    assert all(y.grad.dtype == torch.float32 for y in x)
    assert torch.equal(o, rtk.attention(*(y.bfloat16() for y in x), causal=True))


def test_vmap_and_func() -> None:
    x = tensors()
    stacked = [torch.stack([y, 2 * y, -y], 1) for y in x]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return rtk.attention(q, k, v, causal=True)

    got = torch.vmap(attend, in_dims=1, out_dims=1)(*stacked)
    torch.testing.assert_close(got[:, 1], attend(*(2 * y for y in x)))
    assert torch.vmap(attend, in_dims=1)(*(y[:, :, :, :0] for y in stacked)).shape == (3, 2, 4, 0, 8)
    got = torch.vmap(attend, in_dims=(1, None, None))(stacked[0], *x[1:])
    torch.testing.assert_close(got[2], attend(-x[0], *x[1:]))

    def loss(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v).square().sum()

    y = [z.clone().requires_grad_() for z in x]
    loss(*y).backward()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))
    for a, b in zip(grads(*x), y, strict=True):
        torch.testing.assert_close(a, b.grad)
    each = torch.vmap(grads, in_dims=1)(*stacked)
    for a, b in zip(each, grads(*(2 * z for z in x)), strict=True):
        torch.testing.assert_close(a[1], b)


def test_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        rtk.attention(*tensors())
    assert "rtk.attention_fwd.default" in seen
    plain = tensors()
    assert not watching.interest(*plain) and watching.interest(plain[0].requires_grad_()) == "autograd"


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None)
def test_drop_in_means_what_torch_means(data: Any) -> None:
    batch, heads_kv, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    lengths = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    dims = data.draw(st.sampled_from([(8, 8), (16, 8), (64, 64), (24, 40), (12, 12)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    q, k, v = tensors(batch, (heads_kv * group, heads_kv), lengths, dims, dtype)
    options: dict[str, Any] = {
        "is_causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([None, 0.3])),
        "enable_gqa": True,
    }
    if data.draw(st.booleans()):
        options["attn_mask"], options["is_causal"] = torch.rand(lengths) > 0.3, False
        options["attn_mask"][:, 0] = True
    sdpa.serves_cpu = True
    before = dict(rtk.torch.stats())
    got = rtk.torch.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, sdpa.torch_sdpa(q, k, v, **options))
    changed = {name for name, count in rtk.torch.stats().items() if count != before.get(name, 0)}
    served_by_torch = "attn_mask" in options or dims == (12, 12)
    assert len(changed) == 1 and (changed == {"native"}) is not served_by_torch


def test_gradients_through_the_drop_in(ours: None) -> None:
    x = tensors(grad=True)
    y = [z.detach().requires_grad_() for z in x]
    rtk.torch.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True).sum().backward()
    F.scaled_dot_product_attention(*y, is_causal=True, enable_gqa=True).sum().backward()
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


REASONS: dict[str, tuple[Any, str]] = {
    "mask": (lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(5, 7, dtype=q.dtype)}), "an attention mask"),
    "dropout": (lambda q, k, v: ((q, k, v), {"dropout_p": 0.1}), "dropout"),
    "head_dim": (lambda q, k, v: ((q[..., :7], k[..., :7], v), {}), "a head_dim that is no multiple of 8 up to 256"),
    "three": (lambda q, k, v: ((q[0], k[0], v[0]), {}), "tensors that have not four dimensions"),
    "broadcast": (lambda q, k, v: ((q, k[:1], v[:1]), {}), "shapes that are broadcast, or do not fit"),
    "empty": (lambda q, k, v: ((q[:, :, :0], k, v), {}), "tensors without elements"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_goes_to_torch_and_why(what: str, ours: None, caplog: Any) -> None:
    make, reason = REASONS[what]
    arguments, options = make(*tensors(heads=(2, 2)))
    with caplog.at_level(logging.WARNING, "rtk"):
        for _ in range(3):
            rtk.torch.scaled_dot_product_attention(*arguments, **options)
    assert rtk.torch.stats() == {"native": 0, f"fallback: {reason}": 3}
    assert [reason in record.getMessage() for record in caplog.records] == [True], "said once"


def test_who_disables_flash_gets_torch(ours: None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = [y.requires_grad_() for y in tensors(heads=(2, 2))]
    with sdpa_kernel(SDPBackend.MATH):
        o = rtk.torch.scaled_dot_product_attention(*x)
        (grad,) = torch.autograd.grad(o.square().sum(), x[0], create_graph=True)
        grad.sum().backward()  # which ours has not
    reason = "FlashAttention disabled, as by torch.nn.attention.sdpa_kernel"
    assert rtk.torch.stats() == {"native": 0, f"fallback: {reason}": 1}
    for options in ({"scale": torch.tensor(0.5)}, {"scale": float("inf")}, {"is_causal": 0}):
        rtk.torch.reset_stats()
        try:
            rtk.torch.scaled_dot_product_attention(*x, **options)
        except TypeError:
            assert options == {"is_causal": 0}
        assert rtk.torch.stats() == {"native": 0, "fallback: an option of another type": 1}


def test_the_cpu_is_torchs() -> None:
    x = tensors(heads=(2, 2))
    assert torch.equal(rtk.torch.scaled_dot_product_attention(*x), F.scaled_dot_product_attention(*x))
    assert rtk.torch.stats() == {"native": 0, "fallback: tensors on the CPU": 1}


def test_torchs_errors_stay_torchs(ours: None) -> None:
    q, k, v = tensors()
    for arguments, options in (
        ((q, k, v), {}),  # other heads, without enable_gqa
        ((q, k[..., :4], v), {}),
        ((q, k, v.float()), {}),
        ((q, k, v), {"is_causal": True, "attn_mask": torch.zeros(5, 7)}),
    ):
        with pytest.raises(Exception) as theirs:
            F.scaled_dot_product_attention(*arguments, **options)
        with pytest.raises(type(theirs.value)) as got:
            rtk.torch.scaled_dot_product_attention(*arguments, **options)
        assert str(got.value) == str(theirs.value)


# --- patching --------------------------------------------------------------------------------------------------------


def test_a_patched_program(ours: None) -> None:
    original = F.scaled_dot_product_attention
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32)
    expected, _ = module(x, x, x, need_weights=False)
    with rtk.torch.patched():
        got, _ = module(x, x, x, need_weights=False)
        assert F.scaled_dot_product_attention is rtk.torch.scaled_dot_product_attention
        with rtk.torch.patched():
            pass
        assert F.scaled_dot_product_attention is not original, "the outer block goes on"
        fast = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        y = tensors()
        torch.testing.assert_close(fast(*y), original(*y, is_causal=True, enable_gqa=True))
    assert F.scaled_dot_product_attention is original
    torch.testing.assert_close(got, expected)
    assert rtk.torch.stats()["native"] >= 2
    rtk.torch.unpatch()  # once too often
    assert F.scaled_dot_product_attention is original


def test_patching_from_many_threads() -> None:
    original, wrong = F.scaled_dot_product_attention, []

    def work() -> None:
        for _ in range(300):
            with rtk.torch.patched():
                if F.scaled_dot_product_attention is original:
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and F.scaled_dot_product_attention is original


def test_somebody_else_patched_meanwhile(monkeypatch: Any) -> None:
    original = F.scaled_dot_product_attention
    rtk.torch.patch()

    def theirs(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with pytest.warns(RuntimeWarning, match="somebody else"):
        rtk.torch.unpatch()
    assert F.scaled_dot_product_attention is theirs
    monkeypatch.undo()
    F.scaled_dot_product_attention = original


def test_a_batch_of_gradients() -> None:
    """What torch maps over in the backward goes through the operator, which has a rule for it."""
    x = [torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    o = rtk.attention(*x, causal=True)
    batch = torch.randn(3, *o.shape, dtype=torch.float64)
    expected = [torch.autograd.grad(o, x, g, retain_graph=True) for g in batch]
    for got in (
        torch.autograd.grad(o, x, batch, retain_graph=True, is_grads_batched=True),
        torch.vmap(lambda g: torch.autograd.grad(o, x, g, retain_graph=True))(batch),
    ):
        for place, grads in enumerate(zip(*expected, strict=True)):
            torch.testing.assert_close(got[place], torch.stack(grads))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_counting_after_a_fork_in_the_midst_of_a_count() -> None:
    """A child's locks are new: those of its parent's other threads are held by nobody that is there."""
    code = """if True:
        import os, signal, sys
        import rtk.torch
        from rtk.torch import patching, served
        with served._lock, patching._lock:
            child = os.fork()
            if not child:
                signal.alarm(20)
                served.count_native()
                with rtk.torch.patched():
                    pass
                os._exit(rtk.torch.stats()["native"])
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).resolve().parents[1], timeout=120
    )
    assert done.returncode == 1
