"""What of torch wants to see a call: modes, transforms, traces, autocast, autograd, tensor subclasses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)
# Names of torch._C: of torch 2.11 and later; what an older one lacks is not asked.
modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_autocast = getattr(torch._C, "_is_any_autocast_enabled", torch.is_autocast_enabled)
_trace = getattr(torch._C, "_get_tracing_state", lambda: None)
_included = getattr(torch._C, "_dispatch_tls_is_dispatch_key_included", lambda key: False)
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)
is_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)  # of is_grads_batched


def watched() -> bool:
    """Whether a mode, a transform, autocast or a trace wants to see what is called."""
    return bool(
        modes()
        or transforms()
        or _autocast()
        or forward_ad._current_level >= 0
        or _trace() is not None
        or (_PRE_DISPATCH is not None and _included(_PRE_DISPATCH))  # torch.export, make_fx(pre_dispatch=True)
    )


def interest(*tensors: Any) -> str:
    """What of torch wants to see the call: "dispatcher", only "autograd", or nothing: ""."""
    if torch.compiler.is_compiling() or watched():
        return "dispatcher"
    ours = [x for x in tensors if isinstance(x, Tensor)]
    if any(type(x) not in PLAIN for x in ours):
        return "dispatcher"
    return "autograd" if torch.is_grad_enabled() and any(x.requires_grad for x in ours) else ""
