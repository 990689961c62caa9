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
are contiguous is a number that the choice of kernel hangs on. register(check_padding=False) takes it that they are, and
nothing waits. A model builds one mask per forward, or one per kind of layer, and never one per layer. Without a padding
mask nothing waits, except several queries on a StaticCache, whose position is known only to the GPU. Where a wait is
not allowed, in a trace or in a graph's capture, transformers' dense mask is built instead. generate() drops a padding
mask of ones by itself.
"""

from __future__ import annotations

import threading

from rtk import forks
from rtk.errors import ToolchainError

__all__ = ["register"]

NAME = "rtk"
_OLDEST = (5, 17)
_FIX = 'pip install "transformers>=5.17"'
_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")


def register(*, check_padding: bool = True) -> None:
    """Makes "rtk" an attention implementation of transformers, for every model; a second call changes `check_padding`.

    Args:
        check_padding: look at every padding mask, once a forward, whether the ones of each row are contiguous; a mask
            with holes goes to transformers' own attention. That waits for the GPU. False takes it that they are, as
            those of a tokenizer's padding=True always are: nothing waits, and a mask with holes gives wrong results (as
            many keys as it has ones are seen, from its first one on).

    Imports torch and transformers. Raises ToolchainError where one is missing, or transformers is older than 5.17.
    """
    with _lock:
        _check_version()
        from transformers import AttentionInterface, AttentionMaskInterface

        from rtk.integrations import transformers_masks
        from rtk.integrations.transformers_attention import attention

        transformers_masks.checks_padding = check_padding
        AttentionMaskInterface.register(NAME, transformers_masks.make_mask)
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
