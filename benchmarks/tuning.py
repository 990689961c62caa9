"""How good tuning is: its choices, the model's and the default config against an exhaustive search of the space."""

from __future__ import annotations

from rtk import shapes
from rtk.problem import AttentionProblem

_MASKS = ("", ",causal")
# What the model's constants are fitted to; none of them is among those that it is judged by.
_FIT = (
    *(
        f"b={batch},hq={heads},sq={seqlen},d={d}{mask}"
        for d in (64, 128, 256)
        for mask in _MASKS
        for batch, heads, seqlen in ((4, 16, 384), (24, 8, 640), (1, 16, 1536), (2, 16, 3072), (1, 8, 12288))
    ),
    *(f"hq=16,sq={seqlen},d=192,dv=128{mask}" for mask in _MASKS for seqlen in (1536, 6144)),
    "hq=40,hk=8,sq=3000,d=128,causal",
    "b=4,hq=8,sq=300,sk=6000,d=128",
)
_JUDGED_SUITES = ("paper", "gqa", "small", "ragged", "models")
_JUDGED_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))


def fitted() -> list[AttentionProblem]:
    """The problems whose times the model's constants come from."""
    return [shapes.parse(line) for line in _FIT]
