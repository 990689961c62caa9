"""The kernel checks pass on the real sources, and each planted defect is caught by the check that is there for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from defects import DEFECTS, Defect
from kernel_checks import CHECKS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TIMEOUT_S = 120


def sources(folder: Path, defect: Defect | None) -> Path:
    """A copy of the package in `folder`, with the defect in it."""
    for name in ("cuda_src", "autotune", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copytree(ROOT / "rtk", folder / "rtk", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    if defect is not None:
        file = folder / defect.file
        text = file.read_text()
        assert text.count(defect.old) == 1, f"{defect.name}: {defect.file} changed, its patch no longer fits"
        file.write_text(text.replace(defect.old, defect.new))
    return folder


def failures(package: Path, checks: list[str], cache: Path, debug: str) -> dict[str, str | None]:
    """What each check says when it runs against the package: None where it passes."""
    environment = {**os.environ, "PYTHONPATH": str(package), "RTK_CACHE_DIR": str(cache)}
    environment |= {"RTK_DEBUG": debug, "RTK_AUTOTUNE": "off"}  # the configs for which the checks were chosen
    command = [sys.executable, str(TESTS / "kernel_checks.py"), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=package)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["check"]: line["failure"] for line in said}
    # A check that said nothing ended the process: that is a failure of it, and of those after it.
    died = f"the process ended with {done.returncode}: {done.stderr[-400:]}"
    return {name: found.get(name, died) for name in checks}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_patch_fits_the_sources(defect: Defect, tmp_path: Path) -> None:
    assert defect.caught_by in CHECKS
    sources(tmp_path, defect)


def test_defects_are_many_and_distinct() -> None:
    assert len(DEFECTS) >= 12
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_check_passes(gpu, check: str) -> None:
    pytest.importorskip("torch")
    CHECKS[check]()


@pytest.mark.gpu
@pytest.mark.parametrize("debug", ["1", "delays"])
def test_checks_pass_in_debug_builds(gpu, tmp_path: Path, debug: str) -> None:
    found = failures(sources(tmp_path, None), list(CHECKS), tmp_path / "cache", debug)
    assert {name: said for name, said in found.items() if said is not None} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_defect_is_caught(gpu, defect: Defect, tmp_path: Path, record_property) -> None:
    package = sources(tmp_path, defect)
    found = failures(package, [defect.caught_by], tmp_path / "cache", "delays" if defect.delays else "1")
    said = found[defect.caught_by]
    assert said is not None, f"{defect.caught_by} does not notice: {defect.name}"
    # Wrong results, or a kernel that was stopped: not a patch that broke the program before it ran.
    assert said.startswith(("AssertionError", "DriverError", "AcceleratorError")), said
    record_property("defect", defect.name)
    record_property("caught_by", defect.caught_by)
    record_property("said", said)


@pytest.mark.gpu
def test_a_wait_that_does_not_end_is_named(gpu, tmp_path: Path) -> None:
    """A producer that never fills K: the debug build ends the kernel and says which barrier it waited for."""
    silent = Defect("no K", "cuda_src/attention_fwd.cuh", 'wait_empty(shared.k_ring, k, "k empty");', "return;", "full")
    said = failures(sources(tmp_path, silent), ["full"], tmp_path / "cache", "1")["full"]
    assert said is not None and "'k full'" in said
