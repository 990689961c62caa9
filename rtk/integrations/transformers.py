"""attn_implementation="rtk" for Hugging Face transformers.

    import rtk.integrations.transformers
    rtk.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="rtk", dtype=torch.bfloat16)

Served by rtk.attention: causal, sliding-window and bidirectional attention, grouped heads, softcap, batches padded on
the left or on the right, chunked prefill, decoding with dynamic, static and sliding caches. The rest is handed to
transformers' own "sdpa" attention (softcap and sinks, which that has not, to a plain softmax here) with the mask it
would have had; `rtk.torch.stats()` counts those calls by reason, and each reason is logged once:

    dropout in training, a position bias, attention sinks, paged caches, head_dim not a multiple of 8 or above 256,
    float32 on a GPU, another GPU than Hopper, padding with holes, patterns that are no band along the diagonal (chunks,
    packed sequences, image tokens), masks the caller made, masks made while tracing (torch.compile, graph capture)

What waits for the GPU: building a mask from a padding mask, once (transformers' own masks wait there too): whether ones
are contiguous is a number that the choice of kernel hangs on. A model builds one mask per forward, or one per kind of
layer, and never one per layer. Without a padding mask nothing waits, except several queries on a StaticCache, whose
position is known only to the GPU. Where a wait is not allowed, in a trace or in a graph's capture, transformers' dense
mask is built instead. generate() drops a padding mask of ones by itself.
"""

from __future__ import annotations

import threading

from rtk.errors import ToolchainError

__all__ = ["register"]

NAME = "rtk"
_OLDEST = (5, 17)
_FIX = 'pip install "transformers>=5.17"'
_lock = threading.Lock()


def register() -> None:
    """Makes "rtk" an attention implementation of transformers, for every model; a second call changes nothing.

    Imports torch and transformers. Raises ToolchainError where one is missing, or transformers is older than 5.17.
    """
    with _lock:
        _check_version()
        from transformers import AttentionInterface, AttentionMaskInterface

        from rtk.integrations.transformers_attention import attention
        from rtk.integrations.transformers_masks import make_mask

        AttentionMaskInterface.register(NAME, make_mask)
        AttentionInterface.register(NAME, attention)


def _check_version() -> None:
    import rtk.torch  # noqa: F401  says itself what is missing

    try:
        import transformers
    except ImportError as error:
        raise ToolchainError(f"the integration needs transformers: {error}", _FIX) from error
    version: str = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ToolchainError(f"the integration needs transformers 5.17 or newer, and {version} is installed", _FIX)
