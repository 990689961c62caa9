"""After a fork of a process that used the GPU: a clear error in the child, the rest works, the parent is unharmed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).resolve().parents[1]

SET_UP = """
import os, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore", DeprecationWarning)
import numpy as np
import rtk
from rtk import jit

index, name = int(sys.argv[2]), sys.argv[3]
host = np.random.default_rng(0).standard_normal((1, 2, 64, 64))


def on_the_gpu():
    if name == "torch":
        import torch

        return torch.from_numpy(host.astype(np.float16)).to(f"cuda:{index}")
    import cupy

    with cupy.cuda.Device(index):
        return cupy.asarray(host.astype(np.float16))


def to_host(array):
    return array.cpu().numpy() if name == "torch" else array.get()
"""

FORKS = (
    SET_UP
    + """

def in_child(work):
    # What work() returned in a forked child, or its error, as text; a hang ends it.
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else f"ended by {status}"


q = on_the_gpu()
expected = rtk.attention(host, host, host)
if sys.argv[4] == "after rtk used the GPU":
    before = to_host(rtk.attention(q, q, q))
part = q[:, :, :33]
for work in (lambda: rtk.attention(q, q, q), lambda: rtk.attention(part, q, q, return_lse=True)):
    said = in_child(work)
    assert said.startswith("ToolchainError") and 'set_start_method("spawn")' in said, said
    assert "forked from" in said and "CUDA" in said, said
assert in_child(lambda: np.array_equal(rtk.attention(host, host, host), expected)) == "True"
source = jit.Source("k", f'extern "C" __global__ void k(float* p) {{ p[0] = {os.getpid()}; }}')
assert in_child(lambda: jit.build(source).report.registers > 0) == "True"
after = to_host(rtk.attention(q, q, q))  # the parent is none the worse
if sys.argv[4] == "after rtk used the GPU":
    assert np.array_equal(before, after)
assert np.abs(after - expected).max() < 0.01
"""
)


def run(code_or_file: list[str], *arguments: str, folder: Any) -> None:
    environment = os.environ | {"RTK_CACHE_DIR": str(folder)}
    command = [sys.executable, *code_or_file, str(REPOSITORY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("when", ["after rtk used the GPU", "after the library alone did"])
def test_after_a_fork_the_gpu_is_a_clear_error(gpu: Any, library: Any, when: str, tmp_path: Any) -> None:
    """And what needs no GPU works in the child."""
    run(["-c", FORKS], str(gpu.index), library.name, when, folder=tmp_path)


SPAWN = (
    SET_UP
    + """

def work(seed):
    q = on_the_gpu()
    return to_host(rtk.attention(q, q, q))


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    expected = work(0)
    with multiprocessing.Pool(2) as pool:
        for got in pool.map(work, range(2)):
            assert np.array_equal(got, expected)
"""
)


def test_what_the_error_advises_works(gpu: Any, any_library: Any, tmp_path: Any) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)
    run([str(tmp_path / "spawn.py")], str(gpu.index), any_library.name, folder=tmp_path / "cache")
