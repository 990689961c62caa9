"""The committed records of GPU runs: there, green, whole, and of today's CUDA sources and tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from defects import DEFECTS

from rtk.digest import sources_digest

TESTS = Path(__file__).resolve().parent
RECORD = TESTS / "gpu_record.json"
FUZZ_RECORD = TESTS / "fuzz_record.json"
FUZZ_FILES = ["tests/test_fuzz_gpu.py", "tests/test_stateful_gpu.py"]  # as in the Makefile
AGAIN = "on a Hopper GPU run `make gpu-test` and commit tests/gpu_record.json"

# Why a test may be skipped in a recorded run. Whatever is not here is a test that was forgotten.
ALLOWED_SKIPS = {
    r"one GPU only": "the recorded runs are made on machines with one GPU",
    r"needs torch and two GPUs": "the same, of a test that also needs torch, which the recorded runs have",
}
# Tests that may have failed once before they passed, and why: {} is the only good answer.
ALLOWED_RETRIES: dict[str, str] = {}
# Files whose tests ran on a GPU, but not yet in a recorded run; an entry that is recorded must go.
UNRECORDED: tuple[str, ...] = ()
EXAMPLES, EXAMPLES_ONCE = 2000, 20_000
DEFECTS_CAUGHT = 12
SANITIZERS = {"memcheck", "racecheck", "synccheck"}


@pytest.fixture(scope="module")
def record():
    assert RECORD.exists(), f"there is no record of a GPU run: {AGAIN}"
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def fuzz_record():
    assert FUZZ_RECORD.exists(), f"{EXAMPLES_ONCE} examples are to be run once: `make fuzz`, on a Hopper GPU"
    return json.loads(FUZZ_RECORD.read_text())


def collected(*files):
    """The ids of the tests for the GPU, as pytest collects them today."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu"]
    done = subprocess.run([*command, *files], cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def assert_same_tests(found, files, without=()):
    then = {test for test, _, _ in found["tests"]}
    now = {test for test in collected(*files) if test.partition("::")[0] not in without}
    assert now, "nothing was collected"
    new, gone = sorted(now - then), sorted(then - now)
    assert not new and not gone, (
        f"not in the record: {new[:10]} ({len(new)}); no longer there: {gone[:10]} ({len(gone)})"
    )


def assert_green(found):
    wrong = [test for test, outcome, _ in found["tests"] if outcome in ("failed", "error")]
    assert (found["failed"], found["errors"], wrong) == (0, 0, [])
    assert found["passed"] > 0, "nothing was tested"
    for reason in found["skipped_reasons"]:
        assert any(re.fullmatch(allowed, reason) for allowed in ALLOWED_SKIPS), f"skipped: {reason}"
    assert set(found["retried"]) <= set(ALLOWED_RETRIES), "failed at first, and passed when they ran again"


def test_record_is_green(record):
    assert_green(record)


def test_record_is_of_these_cuda_sources(record):
    then, now = record["sources"]["cuda_src"], sources_digest()["cuda_src"]
    assert then == now, f"cuda_src has changed since the recorded GPU run: {AGAIN}"


def test_record_is_of_these_tests(record):
    recorded = {test.partition("::")[0] for test, _, _ in record["tests"]}
    assert not recorded & set(UNRECORDED), "recorded by now"
    assert_same_tests(record, ["tests"], without=UNRECORDED)


def test_record_is_whole(record):
    outcomes = [outcome for _, outcome, _ in record["tests"]]
    assert len({test for test, _, _ in record["tests"]}) == len(outcomes)
    assert outcomes.count("passed") == record["passed"]
    assert outcomes.count("skipped") == record["skipped"] == sum(record["skipped_reasons"].values())
    assert "files" not in record["options"], "only the tests in some files"
    assert set(record["sources"]) == {"cuda_src", "rtk", "autotune", "tests"}
    assert record["device"]["compute_capability"] == [9, 0]
    for part, names in {"device": ("name", "uuid", "driver"), "toolchain": ("cuda", "nvrtc", "cupy", "torch")}.items():
        assert set(names) <= set(record[part])
    assert record["date"]
    assert record["duration_s"] > 0
    assert set(record["properties"]) <= {test for test, _, _ in record["tests"]}


def test_record_has_enough_examples(record):
    assert record["sums"]["examples"] >= EXAMPLES


def test_record_has_every_defect(record):
    """Each planted defect was caught, by the check that is there for it."""
    caught = record["defects"]
    assert len(caught) >= DEFECTS_CAUGHT
    assert {defect.name: defect.caught_by for defect in DEFECTS}.items() <= caught.items()
    assert all(caught.values()), "caught by nothing that has a name"


def test_record_has_every_sanitizer(record):
    """Each ran on some launches and found nothing."""
    runs = [re.fullmatch(r"(\w+): 0 errors, (\d+) \w+", run) for run in record["sanitizers"]]
    assert all(runs), record["sanitizers"]
    assert {run[1] for run in runs if run and int(run[2]) > 0} >= SANITIZERS


def test_fuzzing_was_recorded(fuzz_record):
    """Once, and not again for each change of the sources."""
    assert_green(fuzz_record)
    assert fuzz_record["options"]["files"] == FUZZ_FILES
    assert fuzz_record["sums"]["examples"] >= EXAMPLES_ONCE
    assert {test.partition("::")[0] for test, _, _ in fuzz_record["tests"]} == set(FUZZ_FILES)


def test_fuzz_files_are_those_of_the_makefile():
    text = (TESTS.parent / "Makefile").read_text()
    assert f"FUZZ_FILES := {' '.join(FUZZ_FILES)}\n" in text
    assert f"--fuzz-examples {EXAMPLES_ONCE}" in text
