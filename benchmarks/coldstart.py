"""What one implementation costs a process that has done nothing yet.

Measured are import_ms, then first_call_ms and second_call_ms on a GPU whose context is there, from inputs ready to
result ready. Of rtk also build_ms, the part of the first call until a cubin is in memory (choosing NVRTC, keying, and
compiling or reading the disk cache), and what the compiler had to complain about. torch and the CUDA context are
started before: they are no part of what an implementation costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rtk import shapes
from rtk.benchmarks import measure, operations, peers

_TIMEOUT_S = 300


class Failed(Exception):
    """The process ended with an error; the text is its last line."""


def in_new_process(impl: str, problem: Any, caches: Path) -> dict[str, Any]:
    """What a new process measured, with its caches in this folder. Raises Failed."""
    code = _START.format(imports=peers.known()[impl].imports or "pass")
    command = [sys.executable, "-c", code, impl, shapes.describe(problem)]
    environment = {**measure.own_environment(caches), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer within {_TIMEOUT_S} s") from None
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# The import is timed before this module, which imports rtk, is.
_START = """
import sys, time, torch
torch.zeros(1, device="cuda")
start = time.perf_counter()
{imports}
seconds = time.perf_counter() - start
from rtk.benchmarks import coldstart
coldstart.in_this_process(sys.argv[1], sys.argv[2], seconds)
"""


def in_this_process(impl: str, shape: str, import_s: float) -> None:
    """Prints what the process that calls this has measured."""
    import torch

    problem = shapes.parse(shape)
    tensors = operations.known()["attention_fwd"].inputs(problem, None, 0)
    torch.cuda.synchronize()
    peer = peers.known()[impl]
    start = time.perf_counter()
    peer.load()
    loaded = time.perf_counter()
    result: dict[str, Any] = {"import_ms": _ms(import_s + loaded - start)}
    build_s, built = _build(problem) if impl == "rtk" else (0.0, {})
    start = time.perf_counter()
    made = peer.prepare("attention_fwd", problem, tensors)
    with made.context():
        made.call()
        torch.cuda.synchronize()
        first = time.perf_counter()
        made.call()
        torch.cuda.synchronize()
    result |= {"first_call_ms": _ms(build_s + first - start), "second_call_ms": _ms(time.perf_counter() - first)}
    print(json.dumps(result | built))


def _build(problem: Any) -> tuple[float, dict[str, Any]]:
    """(seconds, what a record says of it): the part of rtk's first call until a cubin is in memory."""
    from rtk import jit
    from rtk.kernels.attention_fwd import SPEC

    start = time.perf_counter()
    binary = jit.build(SPEC.render(SPEC.pick(problem)))
    seconds = time.perf_counter() - start
    return seconds, {"build_ms": _ms(seconds), "problems": binary.report.problems()}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
