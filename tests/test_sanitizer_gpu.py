"""compute-sanitizer finds nothing on a small grid of calls; and it does find what is planted for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from defects import Defect
from test_defects_gpu import sources

TESTS = Path(__file__).resolve().parent
ERROR_EXIT = 77


def sanitize(tool: str, package: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTHONPATH": str(package), "RTK_CACHE_DIR": str(cache), "RTK_AUTOTUNE": "off"}
    grid = [sys.executable, str(TESTS / "sanitizer_grid.py")]
    subprocess.run(
        grid, env=environment, check=True, capture_output=True, timeout=300
    )  # compiles outside the sanitizer
    command = [program, "--tool", tool, "--error-exitcode", str(ERROR_EXIT), "--print-limit", "20", *grid]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(gpu, tool: str, tmp_path: Path, record_property) -> None:
    if gpu.cupy is None:
        pytest.skip("CuPy is not installed")
    done = sanitize(tool, sources(tmp_path, None), tmp_path / "cache")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    launches = int(re.search(r"launches (\d+)", done.stdout)[1])
    assert launches >= 6
    record_property("sanitizer", f"{tool}: 0 errors, {launches} launches")


@pytest.mark.gpu
def test_memcheck_finds_a_row_too_many(gpu, tmp_path: Path, record_property) -> None:
    """The net catches: a store beyond the last row of the output."""
    if gpu.cupy is None:
        pytest.skip("CuPy is not installed")
    beyond = Defect(
        "row too many",
        "cuda_src/attention_fwd.cuh",
        "static_cast<u32>(params.extent.seqlen_q)",
        "static_cast<u32>(params.extent.seqlen_q + 64)",
        "",
    )
    done = sanitize("memcheck", sources(tmp_path, beyond), tmp_path / "cache")
    assert done.returncode == ERROR_EXIT and "Invalid __global__ write" in done.stdout, done.stdout[-2000:]
    record_property("defect", "a row too many")
    record_property("caught_by", "memcheck")
