"""attn_implementation="rtk" against "sdpa": tiny models with random weights, on the CPU."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

import rtk.torch  # noqa: E402
from rtk.errors import ToolchainError  # noqa: E402
from rtk.integrations import transformers as integration  # noqa: E402

VOCABULARY, BATCH, LENGTH = 61, 2, 24
HOLES = "fallback: padding with holes"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,  # scores far apart: a wrong mask shows
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    torch.manual_seed(0)
    rtk.torch.reset_stats()


def llama(**changes):
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 2} | changes))


def mistral(**changes):
    sizes = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7}
    return transformers.MistralForCausalLM, transformers.MistralConfig(**(sizes | changes))


def gemma2(**changes):
    own = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**(SIZES | own | changes))


def gpt2(**changes):
    own = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(**(own | changes))


def bert(**changes):
    own = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return transformers.BertModel, transformers.BertConfig(**(SIZES | own | changes))


DECODERS = [llama, mistral, gemma2, gpt2]


def pair(family, dtype=torch.float32, **changes):
    """The same weights twice: as "rtk", and as torch has it (softcap is known to "eager" alone)."""
    kind, config = family(**changes)
    config._attn_implementation = "eager" if family is gemma2 else "sdpa"
    theirs = kind(config).to(dtype).eval()
    _, config = family(**changes)
    config._attn_implementation = "rtk"
    ours = kind(config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(batch=BATCH, length=LENGTH):
    return torch.randint(2, VOCABULARY, (batch, length))


def padding(kind, batch=BATCH, length=LENGTH):
    """int64 (batch, length): the first sequence whole, the second with `kind`."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    where = {"ones": [], "left": range(9), "right": range(length - 5, length), "holes": [0, 6, 7]}[kind]
    mask[1, list(where)] = 0
    return mask


def close(ours, theirs, mask=None, tolerance=2e-4):
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def assert_native(fallbacks=0):
    """All calls, but for so many, were served by rtk."""
    counted = rtk.torch.stats()
    assert counted["native"] > 0, counted
    assert sum(counted.values()) - counted["native"] == fallbacks, counted


def assert_reason(reason):
    counted = rtk.torch.stats()
    assert counted == {"native": 0, f"fallback: {reason}": counted.get(f"fallback: {reason}")}, counted


# --- registering -----------------------------------------------------------------------------------------------------


def test_register_again_and_at_once():
    threads = [threading.Thread(target=integration.register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "rtk" in transformers.AttentionInterface().valid_keys()
    assert "rtk" in masking_utils.AttentionMaskInterface().valid_keys()


def test_import_alone_imports_nothing():
    said = "import sys, rtk.integrations.transformers; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1"])
def test_too_old(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ToolchainError, match=rf"5\.17 or newer, and {version}"):
        integration.register()


@pytest.mark.parametrize("version", ["5.17.0", "5.18.0.dev0", "6.0.0rc1"])
def test_new_enough(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    integration.register()


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ToolchainError, match=r"transformers>=5\.17"):
        integration.register()


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "ones", "left", "right"])
@pytest.mark.parametrize("family", [*DECODERS, bert])
@torch.no_grad()
def test_forward(family, kind):
    ours, theirs = pair(family)
    mask = None if kind is None else padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    close(ours(**inputs)[0], theirs(**inputs)[0], mask)
    assert_native()


@pytest.mark.parametrize("family", [*DECODERS, bert])
@torch.no_grad()
def test_holes_go_to_torch(family):
    ours, theirs = pair(family)
    mask = padding("holes")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    close(ours(**inputs)[0], theirs(**inputs)[0], mask)
    assert rtk.torch.stats() == {"native": 0, HOLES: 2}


@pytest.mark.parametrize("family", [llama, gemma2])
@torch.no_grad()
def test_bfloat16(family):
    ours, theirs = pair(family, torch.bfloat16, initializer_range=0.1)
    mask = padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    close(ours(**inputs)[0], theirs(**inputs)[0], mask, tolerance=0.08)
    assert_native()


@torch.no_grad()
def test_vit():
    def vit():
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3)
        return transformers.ViTModel, config

    ours, theirs = pair(vit)
    image = torch.randn(2, 3, 16, 16)
    close(ours(image)[0], theirs(image)[0])
    assert_native()


@pytest.mark.parametrize("kind", ["ones", "left", "right"])
@torch.no_grad()
def test_windows_to_both_sides(kind):
    def modernbert():
        own = {"local_attention": 8, "global_attn_every_n_layers": 2, "reference_compile": False}
        return transformers.ModernBertModel, transformers.ModernBertConfig(**(SIZES | own))

    ours, theirs = pair(modernbert)
    mask = padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    close(ours(**inputs)[0], theirs(**inputs)[0], mask)
    assert_native()


@torch.no_grad()
def test_encoder_and_decoder():
    def bart():
        own = {f"{side}_{name}": n for side in ("encoder", "decoder")
               for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        own |= ids | {"d_model": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "init_std": 0.3}
        return transformers.BartForConditionalGeneration, transformers.BartConfig(**own, forced_eos_token_id=None)

    ours, theirs = pair(bart)
    inputs = {"input_ids": tokens(), "attention_mask": padding("right")}
    target = tokens(length=7)
    close(ours(**inputs, decoder_input_ids=target).logits, theirs(**inputs, decoder_input_ids=target).logits)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
    assert_native()


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(24,), (10, 14), (5, 1, 9, 1, 1, 7), (3,) * 8])
@pytest.mark.parametrize("family", [llama, mistral, gemma2])
@torch.no_grad()
def test_prefill_in_chunks(family, chunks, cache, kind):
    """Chunks shorter and longer than the window, single queries between them, caches below and at their size."""
    ours, theirs = pair(family)
    ids, mask = tokens(), padding(kind or "ones")

    def logits(model):
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=32)
        else:
            past = transformers.DynamicCache(config=model.config)
        steps, done = [], 0
        for chunk in chunks:
            seen = None if kind is None else mask[:, : done + chunk]
            inputs = {"input_ids": ids[:, done : done + chunk], "attention_mask": seen}
            steps.append(model(**inputs, past_key_values=past, use_cache=True).logits)
            done += chunk
        return torch.cat(steps, dim=1)

    close(logits(ours), logits(theirs), mask)
    assert_native()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_holes_and_a_cache(cache):
    ours, theirs = pair(gemma2)
    ids, mask = tokens(), padding("holes")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    counted = rtk.torch.stats()
    assert counted[HOLES] >= 6 and sum(counted.values()) == 10  # a window that has moved past the holes has none


@pytest.mark.parametrize("kind", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_generate(family, cache, kind):
    if family is gpt2 and cache == "static" and not transformers.GPT2LMHeadModel._can_compile_fullgraph:
        pytest.skip("transformers has no static cache for it")
    ours, theirs = pair(family)
    mask = padding(kind or "ones")
    ids = tokens().where(mask.bool(), 0)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert_native()


@torch.no_grad()
def test_beams():
    ours, theirs = pair(mistral)
    mask = padding("left")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "attention_mask": mask}
    ids = tokens().where(mask.bool(), 0)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert_native()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("family", [*DECODERS, bert])
def test_backward(family, kind, checkpointing):
    pytest.importorskip("rtk.torch.backward", reason="rtk.attention has no gradients yet")
    models = pair(family)
    ids, mask = tokens(), None if kind is None else padding(kind)
    for model in models:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        result = model(input_ids=ids, attention_mask=mask, use_cache=False)[0] if family is not bert else (
            model(input_ids=ids, attention_mask=mask)[0]
        )  # fmt: skip
        kept = result if mask is None else result[mask.bool()]
        kept.square().mean().backward()
    grads = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert grads[0].keys() == grads[1].keys()
    for name, theirs in grads[1].items():
        close(grads[0][name], theirs, tolerance=2e-3)
    assert_native()


# --- what goes to torch ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_sequences():
    ours, theirs = pair(llama)
    ids = tokens(batch=1)
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    close(ours(**inputs).logits, theirs(**inputs).logits)
    assert_reason("a mask that is no band along the diagonal")


@torch.no_grad()
def test_a_mask_of_the_callers():
    ours, theirs = pair(llama)
    inputs = {"input_ids": tokens(), "attention_mask": torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.7}
    inputs["attention_mask"] |= torch.eye(LENGTH, dtype=torch.bool)
    close(ours(**inputs).logits, theirs(**inputs).logits)
    assert_reason("a mask of four dimensions")


@torch.no_grad()
def test_head_dim():
    ours, theirs = pair(llama, head_dim=12)
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    close(ours(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"])
    assert_reason("a head_dim that is no multiple of 8 up to 256")


@torch.no_grad()
def test_head_dim_with_softcap():
    ours, theirs = pair(gemma2, head_dim=12)
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    close(ours(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"])
    assert_reason("a head_dim that is no multiple of 8 up to 256")


@torch.no_grad()
def test_dropout():
    ours, theirs = pair(llama, attention_dropout=0.3)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        results.append(model(input_ids=tokens()[:, :8] * 0 + 5).logits)
    close(*results)
    assert_reason("dropout")


@pytest.mark.parametrize("kind", [None, "left"])
@torch.no_grad()
def test_sinks(kind):
    def gpt_oss(**changes):
        own = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7, "num_local_experts": 2}
        own |= {"num_experts_per_tok": 1, "layer_types": ["sliding_attention", "full_attention"]}
        return transformers.GptOssForCausalLM, transformers.GptOssConfig(**(SIZES | own | changes))

    kind_of, config = gpt_oss()
    config._attn_implementation = "eager"
    theirs = kind_of(config).eval()
    _, config = gpt_oss()
    config._attn_implementation = "rtk"
    ours = kind_of(config).eval()
    ours.load_state_dict(theirs.state_dict())
    mask = None if kind is None else padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    close(ours(**inputs).logits, theirs(**inputs).logits, mask)
    assert_reason("attention sinks")


# --- masks -----------------------------------------------------------------------------------------------------------


def functions():
    window, both = (
        masking_utils.sliding_window_causal_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function,
    )
    return {
        "causal": masking_utils.causal_mask_function,
        "all": masking_utils.bidirectional_mask_function,
        "window": window(4),
        "window of one": window(1),
        "both sides": both(3),
        "wide": window(100),
        "nested": masking_utils.and_masks(window(6), masking_utils.sliding_window_overlay(3)),
    }  # fmt: skip


def as_bool(mask, q_length, kv_length):
    """What a mask of make_mask lets through, bool (batch, 1, q_length, kv_length), from what the kernel is told."""
    from rtk.integrations.transformers_masks import BandMask

    query, key = torch.arange(q_length)[:, None], torch.arange(kv_length)[None]
    if isinstance(mask, BandMask):
        seen = mask.seen
        own = query + seen.keys - q_length
        left, right = seen.band.left, seen.band.right
        through = key < seen.keys
        through = through & (key >= own - left) if left is not None else through
        through = through & (key <= own + right) if right is not None else through
        through = through.expand(BATCH, 1, q_length, kv_length)
        if seen.kv_range is not None:
            first, end = (x[:, None, None, None] for x in seen.kv_range)
            through = through & (key >= first) & (key < end)
        return through
    if mask.dtype == torch.int32:
        return ((key >= mask[0, 0, 0, :, None, None, None]) & (key < mask[1, 0, 0, :, None, None, None])).expand(
            BATCH, 1, q_length, kv_length
        )
    return mask


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", [None, "ones", "left", "right", "holes", "nothing"])
@pytest.mark.parametrize("name", functions())
def test_masks_let_through_what_theirs_do(name, kind, held):
    """Every pattern at many places of queries and keys, with the place on the host and on the device."""
    from rtk.integrations.transformers_masks import make_mask

    for q_length, kv_length, q_offset, kv_offset in (
        *((24, 24, 0, 0), (1, 24, 23, 0), (7, 24, 17, 0), (7, 24, 0, 0), (7, 24, 5, 0), (1, 24, 6, 0)),
        *((1, 9, 20, 12), (5, 9, 16, 12), (6, 10, 20, 16), (1, 1, 0, 0), (3, 24, 22, 0)),
    ):
        mask = None
        if kind == "nothing":
            mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        elif kind is not None:
            mask = padding(kind).bool()
        arguments = {
            "batch_size": BATCH,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": torch.tensor(q_offset) if held else q_offset,
            "kv_offset": kv_offset,
            "mask_function": functions()[name],
            "attention_mask": mask,
        }
        for skip in (False, True):
            both = name in ("all", "both sides")  # who may skip is told apart, as transformers does
            ours = make_mask(
                **arguments, allow_is_causal_skip=skip and not both, allow_is_bidirectional_skip=skip and both
            )
            theirs = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
            if ours is None:
                triangle = torch.ones(q_length, kv_length, dtype=torch.bool).tril()
                assert skip and bool((theirs == (True if both or q_length == 1 else triangle)).all())
            else:
                assert torch.equal(as_bool(ours, q_length, kv_length), theirs), (arguments, skip)


def test_patterns_that_are_no_band():
    from rtk.integrations.transformers_masks import band_of

    zeros = torch.zeros(BATCH, dtype=torch.int64)
    causal = masking_utils.causal_mask_function
    for function in (
        masking_utils.chunked_causal_mask_function(4, zeros),
        masking_utils.or_masks(causal, masking_utils.blockwise_overlay(zeros[None])),
        masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(zeros[None])),
        masking_utils.and_masks(causal, lambda b, h, i, j: i >= j),
        lambda b, h, i, j: i >= j,
    ):
        assert band_of(function) is None


def test_a_described_mask_is_the_tensor_to_whoever_looks():
    from rtk.integrations.transformers_masks import BandMask, make_mask

    arguments = {"batch_size": BATCH, "q_length": LENGTH, "kv_length": LENGTH, "attention_mask": padding("left").bool()}
    mask, theirs = make_mask(**arguments), masking_utils.sdpa_mask(**arguments)
    assert isinstance(mask, BandMask) and mask.shape == theirs.shape and mask.dtype == theirs.dtype
    assert mask.contiguous() is mask and mask.to("cpu") is mask and mask._dense is None
    there = mask.to("meta")
    assert isinstance(there, BandMask) and there.seen.kv_range[0].is_meta and mask._dense is None
    assert torch.equal(mask[:, :, -3:, :5], theirs[:, :, -3:, :5])
    assert torch.equal(mask & theirs, theirs) and torch.equal(~mask, ~theirs) and torch.equal(mask.clone(), theirs)
    assert torch.equal(mask.float(), theirs.float()) and "BandMask" in repr(mask)


def test_one_look_at_the_padding_of_a_forward(monkeypatch):
    from rtk.integrations import transformers_masks

    looks, look = [], transformers_masks._state
    monkeypatch.setattr(transformers_masks, "_state", lambda padding: looks.append(1) or look(padding))
    ours, _ = pair(llama)
    with torch.no_grad():
        ours(input_ids=tokens(), attention_mask=padding("left"))
        assert len(looks) == 1
        ours(input_ids=tokens())
    assert len(looks) == 1


def test_padding_that_is_taken_to_be_ranges(monkeypatch):
    """check_padding=False: nothing is read back from the device, and real padding gives what it gives otherwise."""
    from rtk.integrations import transformers_masks

    ours, theirs = pair(mistral)
    mask, ids = padding("left"), tokens()
    holed = mask.clone()
    holed[:, LENGTH // 2] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        integration.register(check_padding=False)
        try:
            monkeypatch.setattr(torch.Tensor, "__int__", None)
            monkeypatch.setattr(torch.Tensor, "__bool__", None)
            got = ours(ids, attention_mask=mask).logits
            monkeypatch.undo()
            ours(ids, attention_mask=holed)
            assert_native()
        finally:
            integration.register()
        close(got, expected, mask)
        assert transformers_masks.checks_padding
        close(ours(ids, attention_mask=holed).logits, theirs(ids, attention_mask=holed).logits, holed)


@pytest.mark.parametrize("family", [llama, mistral])
@torch.no_grad()
def test_compiled(family):
    ours, theirs = pair(family)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    inputs = {"input_ids": tokens()}
    close(compiled(**inputs).logits, theirs(**inputs).logits)
    if family is llama:  # a window needs a mask, which a trace cannot describe
        assert_native()
    inputs["attention_mask"] = padding("left")
    close(compiled(**inputs).logits, theirs(**inputs).logits, inputs["attention_mask"])


@pytest.mark.parametrize("kind", [None, "left"])
@pytest.mark.parametrize("family", [llama, mistral, gemma2])
@torch.no_grad()
def test_generate_compiled(family, kind):
    """generate() compiles the decode steps of a static cache, on a GPU by itself: the masks come from outside."""
    torch._dynamo.reset()
    ours, theirs = pair(family)
    compiling = transformers.generation.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    mask = padding(kind or "ones")
    ids = tokens().where(mask.bool(), 0)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "attention_mask": mask}
    assert torch.equal(ours.generate(ids, compile_config=compiling, **options), theirs.generate(ids, **options))
    assert_native()
