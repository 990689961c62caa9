"""torch's scaled_dot_product_attention: its cuDNN and FlashAttention-2 backends, and what it chooses by itself."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared

_BACKENDS = {"cudnn": "CUDNN_ATTENTION", "fa2": "FLASH_ATTENTION", "sdpa": None}


def _context(backend: str | None) -> contextlib.AbstractContextManager[Any]:
    if backend is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context: contextlib.AbstractContextManager[Any] = sdpa_kernel(getattr(SDPBackend, backend))
    return context


def _attention_fwd(impl: str, problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    from torch.nn.functional import scaled_dot_product_attention

    if problem.softcap:
        raise CannotRun("no softcap")
    if problem.window_left is not None or problem.window_right not in (None, 0):
        raise CannotRun("no window without a mask in memory")
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if problem.softmax_scale != 1.0 / math.sqrt(problem.head_dim):
        options["scale"] = problem.softmax_scale
    if problem.window_right == 0 and problem.diagonal == 0:
        options["is_causal"] = True
    elif problem.window_right == 0:
        if impl == "cudnn" or problem.diagonal != problem.seqlen_k - problem.seqlen_q:
            raise CannotRun("no causal mask aligned at the bottom right where the lengths differ")
        if problem.seqlen_q > problem.seqlen_k:
            raise CannotRun("NaN for queries that see no key")
        from torch.nn.attention.bias import causal_lower_right  # here: it brings torch's compiler along

        options["attn_mask"] = causal_lower_right(problem.seqlen_q, problem.seqlen_k)
    return Prepared(
        lambda: scaled_dot_product_attention(q, k, v, **options),
        context=functools.partial(_context, _BACKENDS[impl]),
    )


def _load() -> None:
    import torch

    if not torch.cuda.is_available():
        raise CannotRun("torch has no GPU here")


def _version(impl: str) -> str:
    import torch

    if impl == "cudnn":
        release = torch.backends.cudnn.version() or 0
        return f"{release // 10000}.{release // 100 % 100}.{release % 100}"
    return f"torch {torch.__version__}"


PEERS = [
    Peer(impl, _load, functools.partial(_version, impl), {"attention_fwd": functools.partial(_attention_fwd, impl)})
    for impl in _BACKENDS
]
