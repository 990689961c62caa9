"""rtk in torch on the GPU: gradients against float64, operators compiled and captured, drop-ins, held plans."""

from __future__ import annotations

import gc
import resource
import threading
from typing import Any

import pytest

import rtk
from rtk.errors import ArgumentError

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

pytestmark = pytest.mark.gpu

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window_size": (100, 0)},
    "both": {"window_size": (33, 17)},
    "softcap": {"softcap": 20.0, "causal": True},
    "ranges": {"ranges": True, "causal": True},
    "negative scale": {"softmax_scale": -0.05},
}


@pytest.fixture(autouse=True)
def on_the_gpu(gpu: Any) -> Any:
    import rtk.torch

    with torch.cuda.device(gpu.index):
        rtk.torch.reset_stats()
        yield
        torch._dynamo.reset()


def tensors(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = (300, 300),
    dims: tuple[int, int] = (64, 64),
    dtype: Any = None,
    grad: bool = False,
    seed: int = 0,
) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((heads[0], lengths[0], dims[0]), (heads[1], lengths[1], dims[0]), (heads[1], lengths[1], dims[1]))
    made = [torch.randn((batch, *s), generator=generator, device="cuda") for s in shapes]
    return [x.to(dtype or torch.bfloat16).requires_grad_(grad) for x in made]


def options_of(mask: str, batch: int, seqlen_k: int) -> dict[str, Any]:
    options = dict(MASKS[mask])
    if options.pop("ranges", False):
        first = torch.arange(batch, dtype=torch.int32, device="cuda") * 7
        options["kv_range"] = (first, seqlen_k - 5 * first)
    return options


def exactly(q: Any, k: Any, v: Any, dtype: Any, **options: Any) -> Any:
    """(o, lse) by torch's differentiable operations in a dtype."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (options.get("softmax_scale") or q.shape[3] ** -0.5)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    offset = 0 if options.get("causal_align") == "top-left" else k.shape[2] - q.shape[2]
    place = torch.arange(q.shape[2], device="cuda")[:, None] + offset
    key = torch.arange(k.shape[2], device="cuda")
    left, right = options.get("window_size") or (None, None)
    seen = torch.ones(scores.shape, dtype=torch.bool, device="cuda")
    if options.get("causal"):
        seen &= key <= place
    if left is not None:
        seen &= place - key <= left
    if right is not None:
        seen &= key - place <= right
    if "kv_range" in options:
        first, end = (x[:, None, None, None] for x in options["kv_range"])
        seen &= (key >= first) & (key < end)
    some = seen.any(-1, keepdim=True)
    scores = torch.where(seen, scores, -torch.inf)
    weights = torch.where(some, scores, 0.0).softmax(-1) * some
    return weights @ v, torch.where(some[..., 0], scores.logsumexp(-1), 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (80, 80)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients(mask: str, dims: tuple[int, int], dtype: str) -> None:
    """No further from float64 than twice what plain operations in the dtype are."""
    kind = getattr(torch, dtype)
    for lengths in ((300, 300), (129, 500), (500, 129)):
        x = tensors(lengths=lengths, dims=dims, dtype=kind, grad=True)
        options = options_of(mask, 2, lengths[1])
        weights = torch.randn(2, 4, lengths[0], dims[1], device="cuda", dtype=kind)
        grads = torch.autograd.grad((rtk.attention(*x, **options) * weights).sum(), x)
        exact, plain = (
            torch.autograd.grad((exactly(*x, kind_, **options)[0] * weights.to(kind_)).sum(), x)
            for kind_ in (torch.float64, kind)
        )
        wide = [y.detach().double().requires_grad_() for y in x]
        exact = torch.autograd.grad((exactly(*wide, torch.float64, **options)[0] * weights.double()).sum(), wide)
        for name, ours, truth, ordinary in zip("qkv", grads, exact, plain, strict=True):
            error, allowed = ((y.double() - truth).square().mean().sqrt().item() for y in (ours, ordinary))
            scale = truth.square().mean().sqrt().item()
            assert error <= 2 * allowed + 1e-3 * scale, f"d{name}, lengths {lengths}: {error} of {allowed}, {scale}"


def test_gradients_of_what_lies_oddly() -> None:
    """Rows that 16 bytes cannot be read of: the forward copies them, and so must the backward."""
    wide = torch.randn(3, 2, 4, 300, 72, device="cuda").bfloat16()
    for start, stop in ((1, 65), (4, 68)):
        x = [y[..., start:stop].detach().requires_grad_() for y in wide]
        z = [y.detach().contiguous().requires_grad_() for y in x]
        rtk.attention(*x, causal=True).float().sum().backward()
        rtk.attention(*z, causal=True).float().sum().backward()
        for a, b in zip(x, z, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("mask", ["full", "causal", "softcap"])
def test_a_gradient_of_lse(mask: str) -> None:
    x = tensors(grad=True)
    options = options_of(mask, 2, 300)

    def loss(o: Any, lse: Any) -> Any:
        return o.double().square().sum() + lse.double().sin().sum()

    grads = torch.autograd.grad(loss(*rtk.attention(*x, **options, return_lse=True)), x)
    wide = [y.detach().double().requires_grad_() for y in x]
    exact = torch.autograd.grad(loss(*exactly(*wide, torch.float64, **options)), wide)
    for ours, truth in zip(grads, exact, strict=True):
        assert (ours.double() - truth).square().mean() <= 1e-4 * truth.square().mean()


def test_the_same_gradients_every_time() -> None:
    x = tensors(grad=True, lengths=(1000, 1000))
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (torch.autograd.grad(rtk.attention(*x, causal=True).square().sum(), x) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    torch.library.opcheck(torch.ops.rtk.attention_fwd.default, tuple(tensors(grad=grad)), {"causal": True})


def test_compiled() -> None:
    def step(q: Any, k: Any, v: Any) -> Any:
        return rtk.attention(q * 1.5, k, v, causal=True).float().square()

    fast = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (72, 130, 515):  # (not head_dim: a trace takes equal sizes to be one)
            x, y = (tensors(lengths=(length, length), grad=True) for _ in range(2))
            fast(*x).sum().backward()
            step(*y).sum().backward()
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    x = tensors(dtype=torch.float32, grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        o = rtk.attention(*x, causal=True)
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert all(y.grad.dtype == torch.float32 for y in x)


def test_a_step_of_training_in_a_graph() -> None:
    x = tensors(grad=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            rtk.attention(*x, causal=True).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    for y in x:
        y.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rtk.attention(*x, causal=True).square().sum().backward()
    for seed in (5, 6):
        others = tensors(seed=seed, grad=True)
        with torch.no_grad():
            for y, z in zip(x, others, strict=True):
                y.copy_(z)
                y.grad.zero_()
        graph.replay()
        rtk.attention(*others, causal=True).square().sum().backward()
        for y, z in zip(x, others, strict=True):
            torch.testing.assert_close(y.grad, z.grad, rtol=0.02, atol=0.02)


# --- calls that repeat -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=str)
def test_repeats_give_the_same(layout: str, dims: tuple[int, int]) -> None:
    shaped = [x.transpose(1, 2).contiguous() if layout == "bshd" else x for x in tensors(dims=dims)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in shaped]
    for x in (shaped, views):
        first, *others = (rtk.attention(*x, causal=True, layout=layout, return_lse=True) for _ in range(5))
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
            assert other[0].stride() == first[0].stride()


def test_the_second_call_on_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What such calls cost rests on it: the long way is not gone."""
    x = tensors()
    for _ in range(2):
        expected = rtk.attention(*x, causal=True)
    monkeypatch.setattr("rtk.ops.attention_fwd", None)
    for _ in range(3):
        assert torch.equal(rtk.attention(*x, causal=True), expected)
    cupy = pytest.importorskip("cupy")
    monkeypatch.undo()
    y = [cupy.from_dlpack(z) for z in x]
    for _ in range(2):
        rtk.attention(*y, causal=True)
    monkeypatch.setattr("rtk.ops.attention_fwd", None)
    assert torch.equal(torch.from_dlpack(rtk.attention(*y, causal=True)), expected)


def test_plan() -> None:
    q, k, v = tensors(lengths=(1000, 1000))
    plan = rtk.plan(q, k, v, causal=True, return_lse=True)
    expected = rtk.attention(q, k, v, causal=True, return_lse=True)
    out, lse = torch.full_like(q, float("nan")), torch.empty(2, 4, 1000, device="cuda")
    for got in (plan(q, k, v), plan(q, k, v, check=True), plan(q, k, v, out, lse)):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    with pytest.raises(ArgumentError, match="as the plan was made for"):
        plan(q[:1], k, v, check=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(q, k, v, out, lse)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, rtk.attention(q, k, v, causal=True))


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = torch.cuda.current_device()
    there = (here + 1) % torch.cuda.device_count()
    x = tensors(grad=True)
    y = [z.detach().to(there).requires_grad_() for z in x]
    plan = rtk.plan(*(z.detach() for z in y), causal=True)
    for _ in range(4):  # the long way, then the short ones
        with torch.no_grad():
            expected = rtk.attention(*x, causal=True)
            for got in (rtk.attention(*y, causal=True), plan(*y), plan(*y, torch.empty_like(y[0]))):
                assert got.get_device() == there and torch.equal(got.to(here), expected)
            drop_in = rtk.torch.scaled_dot_product_attention(*y, is_causal=True, enable_gqa=True)
            assert drop_in.get_device() == there and torch.equal(drop_in.to(here), expected)
            with torch.cuda.device(there):
                assert torch.equal(rtk.attention(*y, causal=True).to(here), expected)
                assert torch.equal(rtk.attention(*x, causal=True), expected)
        for z in (x, y):
            rtk.attention(*z, causal=True).square().sum().backward()
        for a, b in zip(x, y, strict=True):  # (torch's backward adds up in any order)
            torch.testing.assert_close(a.grad, b.grad.to(here), rtol=0.02, atol=0.05)
        assert torch.cuda.current_device() == here
    side = torch.cuda.Stream(there)
    with torch.cuda.stream(side), torch.no_grad():
        assert torch.equal(rtk.attention(*y, causal=True).to(here), expected)


def test_threads_on_streams_of_their_own() -> None:
    shapes = [tensors(lengths=(n, n), seed=n) for n in (64, 200, 777, 1500)]
    expected = [rtk.attention(*x, causal=True) for x in shapes]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(100):
                i = (number + turn) % len(shapes)
                if not torch.equal(rtk.attention(*shapes[i], causal=True), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_steady_state(record_property: Any) -> None:
    """A hundred thousand calls of 500 shapes: neither host nor device memory grows."""
    shapes = [tensors(1, (2, 1), (16 + n, 16 + n), seed=n) for n in range(500)]
    for x in shapes * 4:
        rtk.attention(*x, causal=True)
    torch.cuda.synchronize()
    gc.collect()
    host, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.cuda.memory_reserved()
    for turn in range(200):
        for x in shapes:
            rtk.attention(*x, causal=True)
        if turn % 20 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host
    record_property("host_kib", grown)
    assert grown < 16 << 10 and torch.cuda.memory_reserved() == device


# --- drop-ins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_drop_in(causal: bool, dtype: str) -> None:
    for lengths, heads in (((300, 300), (4, 4)), ((77, 500), (8, 2)), ((500, 77), (4, 1))):
        x = tensors(lengths=lengths, heads=heads, dtype=getattr(torch, dtype), grad=True)
        y = [z.detach().requires_grad_() for z in x]
        expected = F.scaled_dot_product_attention(*y, is_causal=causal, enable_gqa=True)
        with rtk.torch.patched():
            got = F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.1)
    assert rtk.torch.stats() == {"native": 3}


def test_what_torch_serves() -> None:
    q, k, v = tensors(heads=(4, 4))
    mask = torch.ones(300, 300, dtype=torch.bool, device="cuda")
    for arguments, options in (((q, k, v), {"attn_mask": mask}), ((q.float(), k.float(), v.float()), {})):
        got = rtk.torch.scaled_dot_product_attention(*arguments, **options)
        assert torch.equal(got, F.scaled_dot_product_attention(*arguments, **options))
    assert rtk.torch.stats() == {"native": 0, "fallback: an attention mask": 1, "fallback: dtype float32": 1}


def test_torchs_own_hook() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from rtk.torch import flash_hook

    if not flash_hook.register():
        pytest.skip("this torch has no place for other implementations")
    x, y = (tensors(heads=(4, 4), grad=True) for _ in range(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = F.scaled_dot_product_attention(*y, is_causal=True)
        torch.nn.attention.activate_flash_attention_impl("RTK")
        try:
            got = F.scaled_dot_product_attention(*x, is_causal=True)
            F.scaled_dot_product_attention(*x, is_causal=True, dropout_p=0.5)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    assert rtk.torch.stats() == {"native": 1, "fallback: dropout": 1}
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    got.float().square().sum().backward()
    expected.float().square().sum().backward()
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.1)
