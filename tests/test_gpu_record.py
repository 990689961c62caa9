"""The committed record of a GPU run: there, green, and of today's CUDA sources. And how such a record comes to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtk.digest import sources_digest

TESTS = Path(__file__).resolve().parent
RECORD = TESTS / "gpu_record.json"
AGAIN = "on a Hopper GPU run `make gpu-test` and commit tests/gpu_record.json"


def recorded():
    assert RECORD.exists(), f"there is no record of a GPU run: {AGAIN}"
    return json.loads(RECORD.read_text())


def test_record_shows_no_failure():
    record = recorded()
    wrong = [test for test, outcome, _ in record["tests"] if outcome in ("failed", "error")]
    assert (record["failed"], record["errors"], wrong) == (0, 0, [])
    assert record["passed"] > 0, "nothing was tested"


def test_record_is_of_these_cuda_sources():
    then, now = recorded()["sources"]["cuda_src"], sources_digest()["cuda_src"]
    assert then == now, f"cuda_src has changed since the recorded GPU run: {AGAIN}"


def test_record_is_whole():
    record = recorded()
    outcomes = [outcome for _, outcome, _ in record["tests"]]
    assert len({test for test, _, _ in record["tests"]}) == len(outcomes)
    assert outcomes.count("passed") == record["passed"]
    assert outcomes.count("skipped") == record["skipped"] == sum(record["skipped_reasons"].values())
    assert set(record["sources"]) == {"cuda_src", "rtk", "autotune"}
    assert record["device"]["compute_capability"] == [9, 0]
    for part, names in {"device": ("name", "uuid", "driver"), "toolchain": ("cuda", "nvrtc", "cupy", "torch")}.items():
        assert set(names) <= set(record[part])
    assert record["date"]
    assert record["duration_s"] > 0


# --- how it is written: the real conftest.py, in a small project of its own with a GPU that is pretended -------------

STUBS = {
    "rtk/__init__.py": "",
    "rtk/driver.py": """
from types import SimpleNamespace
def available(): return True
def device_count(): return 1
def device_properties(i): return SimpleNamespace(name="NVIDIA H200", uuid="GPU-1", compute_capability=(9, 0))
""",
    "rtk/toolchain.py": """
from types import SimpleNamespace
def driver_version(): return (13, 0)
def nvrtc(): return SimpleNamespace(build="12.9.86")
def cupy_wheels(): return []
""",
    "rtk/digest.py": """
import hashlib, pathlib
def sources_digest():
    text = pathlib.Path(__file__).with_name("source").read_bytes()
    return {name: hashlib.sha256(text).hexdigest() for name in ("cuda_src", "rtk", "autotune")}
""",
    "rtk/source": "one",
    "tests/test_small.py": """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass
def test_with_fixture(gpu): assert gpu.properties.name == "NVIDIA H200"
@pytest.mark.gpu
def test_skips(): pytest.skip("no second GPU")
def test_not_for_the_gpu(): raise AssertionError("not selected by -m gpu")
""",
    "tests/test_more.py": "import pytest\n@pytest.mark.gpu\ndef test_more(): pass\n",
    "pytest.ini": "[pytest]\nmarkers =\n    gpu: a GPU\npythonpath = .\n",
}


@pytest.fixture
def project(tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    return tmp_path


def gpu_test(project, *more, tests="tests"):
    """What `make gpu-test` runs, in the small project: (the process, the record or None)."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", tests]
    command += ["--gpu-record", "tests/gpu_record.json", *more]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    path = project / "tests" / "gpu_record.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def test_a_whole_run_is_recorded(project):
    done, record = gpu_test(project)
    assert done.returncode == 0, done.stdout
    assert [test[:2] for test in record["tests"]] == [
        ["tests/test_more.py::test_more", "passed"],
        ["tests/test_small.py::test_good[1]", "passed"],
        ["tests/test_small.py::test_good[2]", "passed"],
        ["tests/test_small.py::test_skips", "skipped"],
        ["tests/test_small.py::test_with_fixture", "passed"],
    ]
    assert (record["passed"], record["failed"], record["errors"], record["skipped"]) == (4, 0, 0, 1)
    assert record["skipped_reasons"] == {"no second GPU": 1}
    assert record["device"]["name"] == "NVIDIA H200"
    assert record["device"]["uuid"] == "GPU-1"
    assert record["toolchain"]["nvrtc"] == "12.9.86"
    assert "gpu record: " in done.stdout


def test_a_failure_and_an_error_are_recorded(project):
    (project / "tests" / "test_bad.py").write_text("""
import pytest
@pytest.fixture
def broken(): raise RuntimeError
@pytest.fixture
def breaks_late():
    yield
    raise RuntimeError
@pytest.mark.gpu
def test_fails(): assert False
@pytest.mark.gpu
def test_never_starts(broken): pass
@pytest.mark.gpu
def test_ends_badly(breaks_late): pass
""")
    done, record = gpu_test(project)
    assert done.returncode == 1
    assert (record["passed"], record["failed"], record["errors"]) == (4, 1, 2)


@pytest.mark.parametrize(
    ("more", "tests"),
    [
        (["-k", "good"], "tests"),
        ([], "tests/test_small.py"),
        (["--ignore", "tests/test_more.py"], "tests"),
        (["-x"], "tests"),
        (["--maxfail", "1"], "tests"),
    ],
    ids=["-k", "one file", "--ignore", "-x", "--maxfail"],
)
def test_a_part_of_a_run_leaves_the_record_alone(project, more, tests):
    (project / "tests" / "gpu_record.json").write_text('{"old": true}')
    if more and more[0] in ("-x", "--maxfail"):
        failing = "import pytest\n@pytest.mark.gpu\ndef test_fails(): assert False\n"
        (project / "tests" / "test_a.py").write_text(failing)
    done, record = gpu_test(project, *more, tests=tests)
    assert record == {"old": True}
    assert "left as it was" in done.stdout


def test_sources_that_change_during_the_run_leave_the_record_alone(project):
    text = "import pathlib, pytest\n@pytest.mark.gpu\ndef test_edit(): pathlib.Path('rtk/source').write_text('two')\n"
    (project / "tests" / "test_edit.py").write_text(text)
    done, record = gpu_test(project)
    assert record is None
    assert "the sources changed" in done.stdout


def test_without_a_gpu_there_is_nothing_to_record(project):
    driver = project / "rtk" / "driver.py"
    driver.write_text(driver.read_text().replace("return True", "return False"))
    done, record = gpu_test(project)
    assert (done.returncode, record) == (pytest.ExitCode.USAGE_ERROR, None)
    assert "nothing to record" in done.stderr
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not not_for", "tests"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "5 skipped" in done.stdout, "without a GPU the GPU tests skip"
