"""The process that `rtk profile` runs under Nsight Compute: inputs, a warm-up, then one call between profiler calls.

``python -m rtk.benchmarks.profile_target --impl rtk --shape hq=16,sq=8192,d=128,causal``. Without ncu it does the same,
and nothing watches. Exit code 1 with the reason on standard error where the call cannot be made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from rtk import shapes
from rtk.benchmarks import operations, peers
from rtk.errors import ArgumentError, RtkError
from rtk.problem import AttentionProblem

_WARM_UPS = 2  # the first call compiles and loads; the second finds everything in place


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rtk.benchmarks.profile_target")
    parser.add_argument("--impl", default="rtk")
    parser.add_argument("--shape", required=True)
    parser.add_argument("--config", default="")
    arguments = parser.parse_args(argv)
    try:
        _one_call(arguments.impl, shapes.parse(arguments.shape), pins(arguments.config))
    except RtkError as error:
        print(error, file=sys.stderr)
        return 1
    except peers.CannotRun as error:
        print(f"{arguments.impl}: {error}", file=sys.stderr)
        return 1
    return 0


def pins(text: str) -> dict[str, int | bool]:
    """The fields in a line such as "BLOCK_M=128,PINGPONG=true". ArgumentError for what is no such line."""
    found: dict[str, int | bool] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        word = value.lower()
        legal = word.isdecimal() or word in ("true", "false")
        if not legal or not key.isidentifier() or key in found:
            accepted = "fields KEY=VALUE, each once, separated by commas; a VALUE is a whole number, true or false"
            raise ArgumentError("config", repr(part), accepted)
        found[key] = int(word) if word.isdecimal() else word == "true"
    return found


def _one_call(impl: str, problem: AttentionProblem, config: Mapping[str, int | bool]) -> None:
    try:
        import torch
    except ImportError as error:
        raise RtkError(f"the profiled call needs torch: {error}") from error
    if not torch.cuda.is_available():
        raise RtkError("the profiled call needs torch with CUDA and a GPU; torch shows none")
    call = peers.prepared(impl, problem, *operations.known()["attention_fwd"].inputs(problem, None, 0), config=config)
    for _ in range(_WARM_UPS):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main())
