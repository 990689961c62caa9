"""The Hopper kernel's arithmetic on the CPU: its tiles and their order, its roundings, what it masks and visits. Maxima
are followed exactly, where the kernel leaves them too low.

What the fuzzed properties allow for is so tried without a GPU: they must hold for this, and not for it with a fault.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from yardstick import DTYPES, dtype_name, is_torch, visible_keys

from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import attention_problem

_MASK: dict[str, Any] = {"causal": False, "causal_align": "bottom-right", "window_size": None}


def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """rtk.attention for 16-bit NumPy arrays and torch tensors on the CPU."""
    swap = options["layout"] == "bshd"
    arrays = [_numpy(x) for x in (q, k, v)]
    mask = {name: options.get(name, default) for name, default in _MASK.items()}
    rest = {name: options[name] for name in ("softmax_scale", "softcap", "layout")}
    problem = attention_problem(*(x.shape for x in arrays), dtype_name(q), **mask, **rest)
    if options["config"]:
        config = SPEC.config(problem, **options["config"])
    elif options["batch_invariant"]:
        config = SPEC.pick(problem.without_batch())
    else:
        config = choice.choose(SPEC, problem, gpu_here()).config
    o, lse = _forward(*(x.swapaxes(1, 2) if swap else x for x in arrays), problem, config, mask)
    o = np.ascontiguousarray(o.swapaxes(1, 2) if swap else o)
    out = options.get("out")
    if out is None:
        out = _like(q, o)
    elif is_torch(out):
        out.copy_(_like(q, o))
    else:
        out[...] = o
    return (out, _like(q, lse)) if options["return_lse"] else out


def _numpy(x: Any) -> np.ndarray:
    if not is_torch(x):
        return x
    import torch

    return x.contiguous().view(torch.int16).numpy().view(DTYPES[dtype_name(x)])


def _like(model: Any, x: np.ndarray) -> Any:
    if not is_torch(model):
        return x
    import torch

    return torch.from_numpy(x.view(np.int16)).view(model.dtype) if x.dtype.itemsize == 2 else torch.from_numpy(x)


def _forward(q: Any, k: Any, v: Any, problem: Any, config: Any, mask: dict[str, Any]) -> tuple[Any, Any]:
    f32, group = np.float32, problem.heads_per_kv
    o = np.zeros(problem.o_shape, q.dtype)
    lse = np.full(problem.lse_shape, -np.inf, f32)
    if problem.is_empty:
        return o, lse
    params = SPEC.scalars(problem, config)
    qf = q.astype(f32, order="C")  # or BLAS would sum in another order
    kf, vf = (x.astype(f32, order="C").repeat(group, 1) for x in (k, v))
    seen = visible_keys(problem.seqlen_q, problem.seqlen_k, **mask)
    with np.errstate(all="ignore"):
        for first in range(0, problem.seqlen_q, config.BLOCK_M):
            rows = slice(first, first + config.BLOCK_M)
            top = np.full((*qf[:, :, rows].shape[:3], 1), -np.inf, f32)
            total, acc = np.zeros_like(top), np.zeros((*top.shape[:3], v.shape[3]), f32)
            for start in reversed(range(0, problem.seqlen_k, config.BLOCK_N)):
                keys = slice(start, start + config.BLOCK_N)
                see = seen[rows, keys]
                if not see.any():  # not visited
                    continue
                s = qf[:, :, rows] @ kf[:, :, keys].swapaxes(2, 3)
                if config.SOFTCAP:
                    inner = f32(params.scale / params.softcap * 2 * math.log2(math.e))
                    s = f32(params.softcap) - f32(2 * params.softcap) / (1 + np.exp2(s * inner))
                elif config.PRESCALE:
                    s = s * f32(params.scale)
                s = np.where(see, s, f32(-np.inf))
                new = np.fmax(top, np.fmax.reduce(s, -1, keepdims=True, initial=-np.inf))  # passes over NaN
                offset = np.where(new == -np.inf, f32(0), new) * f32(params.scale_log2)
                correction = np.exp2(top * f32(params.scale_log2) - offset)
                p = np.exp2(s * f32(params.scale_log2) - offset)
                total = total * correction + p.sum(-1, keepdims=True)
                acc = acc * correction + p.astype(q.dtype).astype(f32) @ vf[:, :, keys]
                top = new
            empty = total == 0
            o[:, :, rows] = (acc * np.where(empty, f32(0), 1 / total)).astype(q.dtype)
            sums = (top * f32(params.scale_log2) + np.log2(total)) * f32(math.log(2))
            lse[:, :, rows] = np.where(empty, f32(-np.inf), sums)[..., 0]
    return o, lse
