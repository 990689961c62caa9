"""Other implementations of attention forward behind one signature, each used where it is present.

A peer takes (batch, heads, seqlen, head_dim) torch tensors and a causal flag and returns a call without arguments, so
that what it has to rearrange is done before it is timed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]
Peer = Callable[[Any, Any, Any, bool], Call]


def rtk(q: Any, k: Any, v: Any, causal: bool) -> Call:
    import rtk

    return lambda: rtk.attention(q, k, v, causal=causal)


def _sdpa(backend: str, q: Any, k: Any, v: Any, causal: bool) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return call


cudnn: Peer = functools.partial(_sdpa, "CUDNN_ATTENTION")
fa2: Peer = functools.partial(_sdpa, "FLASH_ATTENTION")


@functools.cache
def _fa3_operator() -> Any:
    """FlashAttention-3's operator: of an installed flash_attn_interface, or of the library RTK_BENCH_FA3 names."""
    import torch

    library = os.environ.get("RTK_BENCH_FA3")
    if library:
        torch.ops.load_library(library)
    else:
        import flash_attn_interface  # noqa: F401
    return torch.ops.flash_attn_3.fwd


def fa3(q: Any, k: Any, v: Any, causal: bool) -> Call:
    operator = _fa3_operator()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # FlashAttention's own layout
    scale = 1.0 / math.sqrt(q.shape[-1])
    return lambda: operator(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)[0].transpose(1, 2)


PEERS: dict[str, Peer] = {"rtk": rtk, "fa3": fa3, "cudnn": cudnn, "fa2": fa2}


def present() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that answer here, and the reason for each that does not."""
    import torch

    found, absent = {}, {}
    for name, peer in PEERS.items():
        q = torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
        try:
            peer(q, q, q, False)()
            torch.cuda.synchronize()
            found[name] = peer
        except Exception as error:  # each peer fails in its own way
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, absent
