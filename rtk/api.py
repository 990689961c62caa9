"""The public functions: their documentation, and nothing else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rtk import counters, ops, repeats

if TYPE_CHECKING:
    from rtk.held import AttentionPlan


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    kv_range: tuple[Any, Any] | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    config: Any = None,
    batch_invariant: bool = False,
    sm_margin: int = 0,
) -> Any:
    """softmax(scale * q k^T) v without the matrix of scores in memory (FlashAttention-3, arXiv:2407.08608).

    On a Hopper GPU the kernel for the shape in hand is compiled by NVRTC when it is first asked for, and kept on disk.
    On the CPU the same call runs in NumPy.

    Args:
        q: (batch, heads_q, seqlen_q, head_dim), in layout "bshd" (batch, seqlen_q, heads_q, head_dim). A CuPy, torch or
            NumPy array, or any array with `__dlpack__`. float16 or bfloat16; on the CPU also float32 and float64.
            head_dim is a multiple of 8 up to 256.
        k: (batch, heads_kv, seqlen_k, head_dim). heads_q is a multiple of heads_kv: query head h reads head
            h // (heads_q // heads_kv).
        v: (batch, heads_kv, seqlen_k, head_dim_v); head_dim_v too is a multiple of 8 up to 256.
        causal: a query sees no key after its own position.
        causal_align: where the diagonal lies when seqlen_q and seqlen_k differ, for `causal` and `window_size` alike.
            "bottom-right": the last query stands at the last key (FlashAttention); "top-left": the first at the first
            (torch's is_causal).
        window_size: (left, right), how many keys before and after its own position a query sees, bounds included. None
            or -1 is unbounded.
        softmax_scale: what scores are multiplied by; None is 1 / sqrt(head_dim).
        softcap: c > 0 replaces a score s by c * tanh(s / c), after scaling and before masking.
        kv_range: (first, end), int32 arrays (batch,) of q's library on q's device, each may be None: sequence b has the
            keys first[b] <= j < end[b]; for batches padded on the left or on the right. The diagonal stays where the
            arrays' lengths put it. The numbers are read on the device, without a wait; what of a range lies outside k
            is cut off.
        layout: "bhsd" or "bshd", of q, k, v and the result.
        return_lse: also return the log-sum-exp.
        out: an array to write to, of the result's shape, dtype and device, which shares no memory with the inputs.
        config: a tile configuration to use instead of the chosen one: an `AttentionFwdConfig`, or a dict of some of its
            fields, as {"BLOCK_M": 128, "BLOCK_N": 96}.
        batch_invariant: choose without looking at the batch, so that a sequence gives the same bits whatever else is in
            the batch.
        sm_margin: multiprocessors to leave free for other work.

    Returns:
        o: q's shape with head_dim_v as last dimension, in q's dtype, of q's library, on q's device. With return_lse a
        pair (o, lse), lse float32 (batch, heads_q, seqlen_q), natural logarithm; float64 for float64 inputs. A query
        that sees no key has o = 0 and lse = -inf.

        The work is enqueued on the caller's current stream. Repeats of a call give the same bits. A NaN or infinity in
        a key or value that is masked may reach queries whose tile holds it; beyond seqlen_k nothing is ever read.
        Before capturing a CUDA graph, make the call once: the first one compiles and loads its kernel, which a capture
        does not allow.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit each other.
        UnsupportedError: what this GPU or this build cannot do. Both name the argument, and nothing was launched.
        ToolchainError: NVRTC, CuPy or the driver is missing; `rtk doctor` says what to install.
    """
    torch, key = sys.modules.get("torch"), None
    compiler = getattr(torch, "compiler", None)  # not there where torch is only half imported
    if (compiler is None or not compiler.is_compiling()) and out is None and kv_range is None and config is None:
        meaning = (causal, causal_align, window_size, softmax_scale, softcap, layout)
        result, key = repeats.repeat(q, k, v, (return_lse, *meaning, batch_invariant, sm_margin))
        if result is not None:
            return result
    return _serve(
        torch,
        key,
        q,
        k,
        v,
        causal=causal,
        causal_align=causal_align,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        kv_range=kv_range,
        layout=layout,
        return_lse=return_lse,
        out=out,
        config=config,
        batch_invariant=batch_invariant,
        sm_margin=sm_margin,
    )


def _serve(torch: Any, key: Any, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Through torch's dispatcher where anything of torch wants to see the call; else straight to the kernel."""
    if torch is not None and isinstance(q, getattr(torch, "Tensor", ())):
        from rtk.torch import entry, watching

        interest = watching.interest(q, k, v)
        if interest:
            return entry.attention(q, k, v, **options, interest=interest)
    return ops.attention_fwd(q, k, v, **options, remember_as=key)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """`attention` in the form FlashAttention's users know: (batch, seqlen, heads, head_dim), windows unbounded at -1.

    Options are keywords only: FlashAttention-2's fourth positional argument is a dropout probability, and there is no
    dropout here. Shapes, dtypes, returned values and errors are those of `attention` with layout="bshd".
    """
    return attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        layout="bshd",
        return_lse=return_lse,
    )


def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_align: str = "bottom-right",
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    layout: str = "bhsd",
    return_lse: bool = False,
    config: Any = None,
    batch_invariant: bool = False,
    sm_margin: int = 0,
) -> AttentionPlan:
    """A call of `attention` with these options, prepared for arrays that lie as q, k and v do; nothing is launched.

    `p = rtk.plan(q, k, v, causal=True)`, then `p(q, k, v)` or `p(q, k, v, out)` with those or other arrays of the same
    shapes, strides, dtype and device, as often as one likes: the cheapest call there is. p trusts what it is given;
    `p(q, k, v, out, check=True)` looks first.

    Raises what `attention` raises, and UnsupportedError for arrays that TMA cannot read in place.
    """
    from rtk.held import AttentionPlan

    options = {
        "causal": causal,
        "causal_align": causal_align,
        "window_size": window_size,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "layout": layout,
        "return_lse": return_lse,
        "config": config,
        "batch_invariant": batch_invariant,
        "sm_margin": sm_margin,
    }
    return AttentionPlan(q, k, v, options)


def stats() -> dict[str, int]:
    """Counts since the process began: calls, launches, plans made, arrays that had to be copied."""
    return counters.snapshot()
