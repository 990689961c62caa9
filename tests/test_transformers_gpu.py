"""attn_implementation="rtk" and the drop-in on the GPU: small random models in half precision, head_dim 64 and more.

The models are those of tests/test_transformers.py, wider. Half precision rounds differently in every implementation, so
both are compared with the same weights in float32: ours may be no further from it than twice what torch's is.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_transformers as tiny  # noqa: E402

import rtk.torch  # noqa: E402
from rtk.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.gpu

LENGTH = 200
WIDE: dict[Any, dict[str, Any]] = {
    tiny.llama: {"hidden_size": 256, "head_dim": 64},
    tiny.mistral: {"hidden_size": 256, "head_dim": 128, "sliding_window": 50},
    tiny.gemma2: {"hidden_size": 256, "head_dim": 256, "sliding_window": 50},
    tiny.gpt2: {"n_embd": 256},
    tiny.bert: {"hidden_size": 256},
}
POSITIONS = {tiny.gpt2: "n_positions"}


@pytest.fixture(autouse=True)
def on_the_gpu(gpu: Any) -> Any:
    integration.register()
    torch.manual_seed(0)
    with torch.cuda.device(gpu.index):
        rtk.torch.reset_stats()
        yield


def model(family: Any, attention: str, dtype: Any, weights: Any = None) -> Any:
    wide = WIDE[family] | {POSITIONS.get(family, "max_position_embeddings"): 512, "initializer_range": 0.05}
    kind, config = family(**wide)
    config._attn_implementation = attention
    made = kind(config)
    if weights is not None:
        made.load_state_dict(weights)
    return made.to("cuda", dtype).eval()


def trio(family: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """(ours, torch's, torch's in float32) with the same weights."""
    theirs = "eager" if family is tiny.gemma2 else "sdpa"
    exact = model(family, theirs, torch.float32)
    weights = {name: x.cpu() for name, x in exact.state_dict().items()}
    return model(family, "rtk", dtype, weights), model(family, theirs, dtype, weights), exact


def last(found: Any) -> Any:
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def no_worse(ours: Any, theirs: Any, exact: Any) -> None:
    error, ordinary = ((x.double() - exact.double()).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 2 * ordinary + 1e-3 * exact.double().square().mean().sqrt(), (error, ordinary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("family", WIDE, ids=lambda family: family.__name__)
def test_forward_and_backward(family: Any, kind: str | None, dtype: Any) -> None:
    models = trio(family, dtype)
    x = tiny.tokens(length=LENGTH).cuda()
    mask = None if kind is None else tiny.padding(kind, length=LENGTH).cuda()
    seen = torch.ones_like(x).bool() if mask is None else mask.bool()
    outputs, grads = [], []
    for each in models:
        out = last(each(x, attention_mask=mask))[seen]
        outputs.append(out.detach())
        out.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten().float() for p in each.parameters() if p.grad is not None]))
    no_worse(*outputs)
    no_worse(*grads)
    tiny.assert_native()


@pytest.mark.parametrize("family", [tiny.llama, tiny.mistral, tiny.gemma2, tiny.gpt2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [None, "left"])
def test_generate(family: Any, kind: str | None) -> None:
    """Greedy, in bfloat16: logits are torch's for as long as the tokens are, which two that are tied may end."""
    ours, theirs, _ = trio(family, torch.bfloat16)
    x = tiny.tokens(length=LENGTH).cuda()
    mask = torch.ones_like(x) if kind is None else tiny.padding(kind, length=LENGTH).cuda()
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True}
    got = ours.generate(x, **options, output_logits=True)
    rtk.torch.stats()
    expected = theirs.generate(x, **options, output_logits=True)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        same = (got.sequences[:, : LENGTH + step] == expected.sequences[:, : LENGTH + step]).all(-1)
        if not same.any():
            assert step > 3, "they part at once"
            break
        torch.testing.assert_close(a[same], b[same], rtol=0.1, atol=0.1 * b.abs().max().item())
    tiny.assert_native()


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2, tiny.bert], ids=lambda family: family.__name__)
def test_the_drop_in_patched(family: Any) -> None:
    """At least 90% of a model's calls are ours with nothing but patch(), where no padding asks for a mask."""
    _, theirs, exact = trio(family, torch.bfloat16)
    x = tiny.tokens(length=LENGTH).cuda()
    plain = last(theirs(x))
    with rtk.torch.patched():
        ours = last(theirs(x))
    no_worse(ours, plain, last(exact(x)))
    counted = rtk.torch.stats()
    assert counted["native"] >= 0.9 * sum(counted.values()) > 0, counted


def test_vit() -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 256}
    config = transformers.ViTConfig(**sizes, image_size=64, patch_size=8)
    config._attn_implementation = "sdpa"
    exact = transformers.ViTModel(config).cuda().eval()
    made = []
    for attention in ("rtk", "sdpa"):
        config = transformers.ViTConfig(**sizes, image_size=64, patch_size=8)
        config._attn_implementation = attention
        made.append(transformers.ViTModel(config).cuda().eval())
        made[-1].load_state_dict(exact.state_dict())
        made[-1].to(torch.bfloat16)
    pixels = torch.randn(3, 3, 64, 64, device="cuda")
    no_worse(*(each(pixels.bfloat16()).last_hidden_state for each in made), exact(pixels).last_hidden_state)
    tiny.assert_native()


def test_padding_without_a_wait() -> None:
    ours, theirs, exact = trio(tiny.mistral, torch.bfloat16)
    x, mask = tiny.tokens(length=LENGTH).cuda(), tiny.padding("left", length=LENGTH).cuda()
    seen = mask.bool()
    integration.register(check_padding=False)
    try:
        with torch.no_grad():
            last(ours(x, attention_mask=mask, use_cache=False))  # (transformers' own cache waits)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = last(ours(x, attention_mask=mask, use_cache=False))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            no_worse(got[seen], last(theirs(x, attention_mask=mask))[seen], last(exact(x, attention_mask=mask))[seen])
    finally:
        integration.register()
    tiny.assert_native()
