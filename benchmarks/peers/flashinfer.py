"""FlashInfer's ragged prefill, with equal lengths."""

from __future__ import annotations

import functools
from typing import Any

from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared, window_of
from rtk.benchmarks.peers.versions import installed

_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends


@functools.cache
def _library() -> Any:
    import flashinfer

    return flashinfer


def _attention_fwd(problem: Any, q: Any, k: Any, v: Any) -> Prepared:
    import torch

    causal, (left, right) = window_of(problem)
    if right not in (-1, 0):
        raise CannotRun("no window on the right")
    batch, lengths = problem.batch, (problem.seqlen_q, problem.seqlen_k)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # (tokens, heads, head_dim)
    starts = [torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length for length in lengths]
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = _library().BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        *starts,
        problem.num_heads_q,
        problem.num_heads_kv,
        problem.head_dim,
        head_dim_vo=problem.head_dim_v,
        causal=causal or right == 0,
        sm_scale=problem.softmax_scale,
        window_left=left,
        logits_soft_cap=problem.softcap or None,
        q_data_type=q.dtype,
    )

    def canonical(o: Any) -> Any:
        return o.unflatten(0, (batch, problem.seqlen_q)).transpose(1, 2)

    return Prepared(lambda: wrapper.run(q, k, v), canonical)


def _version() -> str | None:
    return installed("flashinfer-python")


PEERS = [Peer("flashinfer", _library, _version, {"attention_fwd": _attention_fwd}, "import flashinfer")]
