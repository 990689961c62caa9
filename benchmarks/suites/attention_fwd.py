"""Suites of attention forward."""

from __future__ import annotations

import dataclasses

from rtk import shapes
from rtk.benchmarks import measure
from rtk.benchmarks.suites import Cell, Suite

_OP = "attention_fwd"


def _cells(*lines: str, variants: tuple[str | None, ...] = (None,)) -> tuple[Cell, ...]:
    return tuple(Cell(_OP, shapes.parse(line), variant) for line in lines for variant in variants)


def _mask(causal: bool) -> str:
    return ",causal" if causal else ""


def _paper(dtype: str) -> tuple[Cell, ...]:
    """FlashAttention-3's grid: batch * seqlen 16384, heads * head_dim 2048."""
    return _cells(
        *(
            f"b={16384 // seqlen},hq={2048 // d},sq={seqlen},d={d},dtype={dtype}{_mask(causal)}"
            for d in (64, 128, 256)
            for causal in (False, True)
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
        )
    )


_SMALL = _cells(
    *(f"b=16,hq={heads},sq=512,d=64,dtype=fp16" for heads in (8, 16, 32, 64, 96, 128)),
    "b=1,hq=8,sq=512,d=64,dtype=fp16",
    "b=16,hq=96,sq=4096,d=128,dtype=fp16",
)
_LONG = _cells(*(f"hq=8,sq={seqlen},d={d},causal" for d in (64, 128) for seqlen in (32768, 65536, 131072)))
_GQA = _cells(
    *(
        f"b={batch},hq={heads_q},hk={heads_kv},sq={seqlen},d=128{_mask(causal)}"
        for heads_q, heads_kv, batch, seqlen in ((64, 8, 2, 4096), (32, 8, 2, 8192), (128, 1, 1, 4096))
        for causal in (False, True)
    )
)
_RAGGED = _cells(
    *(f"b=8,hq=16,sq={s},d=128{_mask(causal)}" for s in (777, 1023, 3001) for causal in (False, True)),
    *(f"b=4,hq=16,sq={sq},sk={sk},d=128{_mask(sq < sk)}" for sq, sk in ((777, 3001), (3001, 777), (256, 8191))),
    *(f"b=4,hq=16,sq=4096,d={d}{_mask(causal)}" for d in (72, 80, 96) for causal in (False, True)),
    *(f"b=4,hq=16,sq=4096,d=192,dv=128{_mask(causal)}" for causal in (False, True)),
)
# Prefill of language models, whole models or a share of one GPU of eight; then encoders and image and video models.
_MODELS = _cells(
    *("hq=32,hk=8,sq=2048,d=128,causal", "hq=32,hk=8,sq=8192,d=128,causal"),  # Llama 3 8B, Qwen3 8B
    *("hq=64,hk=8,sq=4096,d=128,causal", "b=4,hq=8,hk=1,sq=4096,d=128,causal"),  # Llama 3 70B, Qwen3 32B
    *("hq=28,hk=4,sq=4096,d=128,causal", "b=4,hq=14,hk=2,sq=2048,d=64,causal"),  # Qwen2.5 7B, 0.5B
    *("hq=32,hk=8,sq=8192,d=128,window=4095:0", "hq=32,hk=8,sq=16384,d=128,window=4095:0"),  # Mistral 7B
    *("hq=16,hk=8,sq=4096,d=256,causal,softcap=50", "hq=16,hk=8,sq=8192,d=256,window=4095:0,softcap=50"),  # Gemma 2
    *("hq=8,hk=4,sq=8192,d=256,causal", "hq=8,hk=4,sq=8192,d=256,window=1023:0"),  # Gemma 3
    *("hq=128,sq=4096,d=192,dv=128,causal", "b=2,hq=16,sq=8192,d=192,dv=128,causal"),  # DeepSeek V3
    *("b=8,hq=12,sq=1024,d=64,causal", "b=8,hq=20,sq=1500,d=64"),  # GPT-2, Whisper large
    *("b=32,hq=16,sq=512,d=64", "b=64,hq=12,sq=197,d=64"),  # BERT large, ViT-B/16
    *("b=32,hq=16,sq=577,d=64", "b=16,hq=16,sq=729,d=72"),  # ViT-L/14 at 336, SigLIP So400m
    *("b=32,hq=16,sq=257,d=80", "b=32,hq=16,sq=256,d=72"),  # ViT-H/14, DiT-XL/2
    *("hq=24,sq=4608,d=128", "hq=12,sq=32760,d=128"),  # FLUX.1, Wan 1.3B
)
_TOY = _cells("b=1,hq=8,sq=128,d=64", "b=1,hq=8,sq=128,d=128,causal")
_COLD = _cells("b=2,hq=16,sq=8192,d=128,causal")
_COLD_OURS = tuple(
    dataclasses.replace(cell, impls=("rtk",))
    for cell in _cells(
        *(
            f"b=2,hq={2048 // d},sq=8192,d={d}{_mask(causal)}"
            for d in (64, 128, 256)
            for causal in (False, True)
            if (d, causal) != (128, True)
        )
    )
)
_ACCURACY = _cells(
    *(
        f"b=1,hq=16,sq=2048,d={d},dtype={dtype}{_mask(causal)}"
        for dtype in ("bf16", "fp16")
        for d in (64, 128, 256)
        for causal in (False, True)
    ),
    variants=(None, "outliers"),
)

_OVERHEAD = (
    "cpu_us: what a loop of 200 eager calls takes on the CPU until all are enqueued, each; median and quartiles over "
    "rounds in which the implementations take turns. us: of the GPU, by replays of a CUDA graph. Always the same "
    "inputs. FlashAttention-3 is called by its operator, the others by the function that users call."
)
_ONCE = (
    "In processes of their own whose torch and CUDA context are there: medians of three with empty caches (`rounds` "
    "says how many; one where it takes long), and one with what the first left."
)
_ERRORS = "Every row of some heads against float64: the RMS and the largest error, as shares of the RMS of float64's."

SUITES = [
    Suite("paper", "FlashAttention-3's grid in bfloat16", _paper("bf16")),
    Suite("paper-fp16", "FlashAttention-3's grid in float16", _paper("fp16")),
    Suite("small", "Small problems in float16: µs, and µs per head", _SMALL, rounds=21),
    Suite("long", "Long context, causal, and the memory it takes", _LONG, measure.times_and_memory, rounds=7),
    Suite("gqa", "Grouped-query and multi-query attention", _GQA),
    Suite("ragged", "Lengths and head_dims that are no powers of two", _RAGGED),
    Suite("models", "Attention of common models", _MODELS),
    Suite("overhead", "CPU time of one call", _TOY, measure.overhead, rounds=11, method=_OVERHEAD),
    Suite(
        "coldstart",
        "Import, and the first and second call of a process",
        _COLD + _COLD_OURS,
        measure.coldstart,
        1,
        _ONCE,
    ),
    Suite("accuracy", "Errors against float64, also with outliers", _ACCURACY, measure.accuracy, 1, _ERRORS),
]
