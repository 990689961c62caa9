"""A small grid of calls for compute-sanitizer: every kind of mask, slab and scheduler, on CuPy arrays.

Each array is an allocation of its own (no pool), so that a byte beyond its end is nobody's. Prints the launches made.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

import rtk

# heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, options
CASES: list[tuple[int, int, int, int, int, int, dict[str, Any]]] = [
    (2, 2, 200, 300, 64, 64, {}),
    (4, 2, 130, 130, 128, 128, {"causal": True}),
    (1, 1, 65, 257, 80, 40, {"window_size": (50, 20)}),
    (2, 1, 100, 100, 256, 256, {"causal": True, "softcap": 10.0}),
    (2, 2, 129, 64, 96, 96, {"config": {"SCHEDULER": 1, "BLOCK_N": 64}}),
    (70, 70, 256, 256, 64, 64, {"causal": True}),  # more tiles than multiprocessors
]


def main() -> None:
    cupy.cuda.set_allocator(None)
    for heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v, options in CASES:
        q = on_gpu(2, heads_q, seqlen_q, head_dim)
        k = on_gpu(2, heads_kv, seqlen_k, head_dim)
        v = on_gpu(2, heads_kv, seqlen_k, head_dim_v)
        rtk.attention(q, k, v, return_lse=True, **options)
        cupy.cuda.Device().synchronize()
    print(f"launches {rtk.stats()['launches']}")


def on_gpu(*shape: int) -> Any:
    return cupy.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16))


if __name__ == "__main__":
    main()
