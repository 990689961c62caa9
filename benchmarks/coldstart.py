"""What one kernel costs a process that has done nothing yet: `python -m rtk.benchmarks.coldstart HEAD_DIM full|causal`.

Prints JSON. `build_ms` is everything up to a cubin in memory: choosing NVRTC, keying, and compiling or reading the disk
cache. `module_load_ms` is the driver's share, where there is a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rtk import driver, jit
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import attention_problem


def main() -> None:
    head_dim, causal = int(sys.argv[1]), sys.argv[2] == "causal"
    shape = (2, 2048 // head_dim, 8192, head_dim)
    options: dict[str, Any] = {"causal_align": "bottom-right", "window_size": None, "softmax_scale": None}
    problem = attention_problem(shape, shape, shape, "bfloat16", causal=causal, softcap=0.0, layout="bhsd", **options)
    config = SPEC.pick(problem)
    available = driver.available()  # starts the driver, which is no part of what a kernel costs
    start = time.perf_counter()
    binary = jit.build(SPEC.render(config))
    built = time.perf_counter()
    if available:
        driver.load(binary.cubin, binary.name, 0, SPEC.shared_bytes(config))
    result = {
        "build_ms": (built - start) * 1e3,
        "module_load_ms": (time.perf_counter() - built) * 1e3 if available else None,
        "from_cache": binary.report.from_cache,
        "problems": binary.report.problems(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
