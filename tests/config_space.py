"""The config space of the attention kernel: all of it, and the sample of it that every test run compiles.

What can go wrong in a config (a spill, above all) depends on its size, the mask and the score function. So the sample
holds the largest tiles of each head_dim and number of consumers under the heaviest mask, and random others from each
combination of mask, score function and consumers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rtk.kernels.attention_fwd import SPEC
from rtk.problem import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, AttentionProblem

HEAD_DIMS = range(HEAD_DIM_MULTIPLE, MAX_HEAD_DIM + 1, HEAD_DIM_MULTIPLE)
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "right": {"window_right": 0},
    "left": {"window_left": 128},
    "both": {"window_left": 128, "window_right": 0},
}
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 30.0},
    "prescale": {"softmax_scale": -0.1},  # a scale that is not positive
}
DTYPES = ("bfloat16", "float16")
CONSUMERS = (1, 2, 3, 4)
UNEQUAL = ((192, 128), (64, 256), (256, 64), (128, 64), (40, 200), (8, 256), (256, 8), (72, 136))
_BASE = AttentionProblem(2, 4, 2, 1024, 1024, 128, 128, "bfloat16", 0.1)


def problem(
    dims: tuple[int, int], mask: str = "full", score: str = "plain", dtype: str = "bfloat16", ranges: bool = False
) -> AttentionProblem:
    sizes = {"head_dim": dims[0], "head_dim_v": dims[1]}
    return replace(_BASE, **sizes, dtype=dtype, kv_ranges=ranges, **MASKS[mask], **SCORES[score])


def equal(head_dim: int) -> tuple[int, int]:
    return head_dim, head_dim


def largest() -> Iterator[Any]:
    """For each head_dim and number of consumers the config with the widest tile; the other choices take turns."""
    turn = 0
    for head_dim in HEAD_DIMS:
        # The accumulators of a head_dim that is no multiple of 16 are those of the next one that is; and a thread of
        # one consumer warpgroup has the registers and the tiles of one of two.
        consumers_here = (1 + head_dim // 16 % 2,) if head_dim % 16 else (2, 3, 4) if head_dim % 64 else CONSUMERS
        for consumers in consumers_here:
            turn += 1
            score = ("plain", "softcap", "plain", "prescale")[turn % 4]
            ranges = turn // 2 % 2 > 0
            found = SPEC.configs(problem(equal(head_dim), "both", score, DTYPES[turn // 4 % 2], ranges))
            found = [config for config in found if config.NUM_CONSUMER_WARPGROUPS == consumers]
            widest = max((config.BLOCK_N for config in found), default=None)
            found = [config for config in found if config.BLOCK_N == widest]
            if found:
                yield found[turn % len(found)]


def scattered(each: int, seed: int = 0) -> Iterator[Any]:
    """`each` random configs of every combination of mask, score function and number of consumers."""
    rng = random.Random(seed)
    for mask in MASKS:
        for score in SCORES:
            for consumers in CONSUMERS:
                for turn in range(each):
                    found: list[Any] = []
                    while not found:  # the most consumers have registers for narrow heads only
                        dims = rng.choice([*map(equal, HEAD_DIMS), *UNEQUAL * 2])
                        found = SPEC.configs(problem(dims, mask, score, rng.choice(DTYPES), turn % 2 > 0))
                        found = [config for config in found if config.NUM_CONSUMER_WARPGROUPS == consumers]
                    yield rng.choice(found)


def sample(each: int = 2, every: int = 1) -> list[Any]:
    """The stratified sample: fewer with a lower `each`, and with only `every` n-th of the largest."""
    return list(dict.fromkeys([*list(largest())[::every], *scattered(each)]))


def whole(
    dims: tuple[tuple[int, int], ...] = (), masks: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()
) -> Iterator[Any]:
    """Every config of every mask, score function and kind of range. Without `dtypes` the two take turns."""
    for pair in dims or (*map(equal, HEAD_DIMS), *UNEQUAL):
        for mask in masks or tuple(MASKS):
            for score in ("plain", "softcap") if mask != "full" else SCORES:
                found = [c for ranges in (False, True) for c in SPEC.configs(problem(pair, mask, score, ranges=ranges))]
                for turn, config in enumerate(found):
                    wanted = dtypes or (DTYPES[turn // 2 % 2],)
                    yield from (replace(config, BF16=dtype == "bfloat16") for dtype in wanted)
