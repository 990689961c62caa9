"""What one implementation costs a process that has done nothing yet.

Measured are import_ms, then first_call_ms and second_call_ms on a GPU whose context is there, from inputs ready to
result ready. Of rtk also two parts of the first call: choose_ms, until it is known which configuration serves (the
stores of choices are read), and build_ms, from there until its cubin is in memory (choosing NVRTC, keying, and
compiling or reading the disk cache); and what the compiler had to complain about. torch and the CUDA context are
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

from rtk.benchmarks import operations, peers

_TIMEOUT_S = 300


class Failed(Exception):
    """The process ended with an error; the text is its last line."""


def in_new_process(op: str, impl: str, problem: Any, caches: Path) -> dict[str, Any]:
    """What a new process measured, with its caches in this folder. Raises Failed."""
    code = _START.format(imports=peers.known()[impl].imports or "pass")
    operation = operations.known()[op]
    command = [sys.executable, "-c", code, op, impl, operation.line(problem)]
    environment = {**_own_caches(caches), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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
coldstart.in_this_process(*sys.argv[1:4], seconds)
"""


def in_this_process(op: str, impl: str, line: str, import_s: float) -> None:
    """Prints what the process that calls this has measured."""
    import torch

    operation = operations.known()[op]
    problem = operation.parse(line)
    tensors = operation.inputs(problem, None, 0)
    torch.cuda.synchronize()
    peer = peers.known()[impl]
    start = time.perf_counter()
    peer.load()
    loaded = time.perf_counter()
    result: dict[str, Any] = {"import_ms": _ms(import_s + loaded - start)}
    build_s, built = _build(problem) if (op, impl) == ("attention_fwd", "rtk") else (0.0, {})
    start = time.perf_counter()
    made = peer.prepare(op, problem, tensors)
    with made.context():
        made.call()
        torch.cuda.synchronize()
        first = time.perf_counter()
        made.call()
        torch.cuda.synchronize()
    result |= {"first_call_ms": _ms(build_s + first - start), "second_call_ms": _ms(time.perf_counter() - first)}
    print(json.dumps(result | built))


def _build(problem: Any) -> tuple[float, dict[str, Any]]:
    """(seconds, what a record says of them): the parts of rtk's first call until a cubin is in memory."""
    from rtk import jit
    from rtk.autotune import choice
    from rtk.autotune.keys import Gpu
    from rtk.kernels.attention_fwd import SPEC

    start = time.perf_counter()
    config = choice.choose(SPEC, problem, Gpu.of(0)).config
    chosen = time.perf_counter()
    binary = jit.build(SPEC.render(config))
    built = time.perf_counter()
    parts = {"choose_ms": _ms(chosen - start), "build_ms": _ms(built - chosen), "problems": binary.report.problems()}
    return built - start, parts


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _own_caches(folder: Path) -> dict[str, str]:
    """This process's environment, with the caches of every implementation in a folder."""
    names = (
        *("RTK_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME"),
        *("FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"),
    )
    return {**os.environ, **{name: str(folder / name.lower()) for name in names}}
