"""How the record of a GPU run comes to be: the real plugin, in a small project with a GPU that is pretended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
COPIED = ("conftest.py", "gpus.py", "gpu_record_plugin.py", "gpu_fixtures.py", "fuzz_options.py")

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
    "torch.py": "raise ImportError",  # a run takes half a second without them
    "cupy.py": "raise ImportError",
    "hypothesis.py": "raise ImportError",
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
    for name in COPIED:
        shutil.copy(TESTS / name, tmp_path / "tests")
    return tmp_path


def run(command, project):
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, env=environment)


def gpu_test(project, *more, tests="tests"):
    """What `make gpu-test` runs, in the small project: (the process, the record or None)."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", tests]
    command += ["--gpu-record", "tests/gpu_record.json", *more]
    done = run(command, project)
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
    done = run(command, project)
    assert done.returncode == 0, done.stdout
    assert "5 skipped" in done.stdout, "without a GPU the GPU tests skip"


# --- several processes -----------------------------------------------------------------------------------------------

MANY = ("-p", "xdist", "-n", "2")


def test_workers_make_the_same_record(project):
    alone, together = gpu_test(project)[1], gpu_test(project, *MANY)[1]
    assert [test[:2] for test in together["tests"]] == [test[:2] for test in alone["tests"]]
    assert together["skipped_reasons"] == alone["skipped_reasons"]
    assert (alone["workers"], together["workers"]) == (0, 2)


def test_workers_go_on_where_a_piece_ended(project):
    gpu_test(project, "--gpu-minutes", "1e-9")
    assert len(kept(project)["tests"]) == 1
    done, record = gpu_test(project, *MANY, "--gpu-minutes", "1e-9")
    assert record is None, done.stdout
    assert 1 < len(kept(project)["tests"]) < 5
    for _ in range(5):
        done, record = gpu_test(project, *MANY, "--gpu-minutes", "1e-9")
        if record:
            break
    assert done.returncode == 0, done.stdout
    assert (record["passed"], record["skipped"]) == (4, 1)


def test_a_worker_that_dies_leaves_no_green_record(project):
    text = "import os, pytest\n@pytest.mark.gpu\ndef test_dies(): os._exit(9)\n"
    (project / "tests" / "test_n.py").write_text(text)
    done, record = gpu_test(project, *MANY)
    assert done.returncode != 0
    assert record is None or record["failed"] + record["errors"] == 1


def test_what_workers_cannot_collect_is_missing(project):
    (project / "tests" / "test_a.py").write_text("import nothing_of_that_name\n")
    done, record = gpu_test(project, *MANY, "--continue-on-collection-errors")
    assert record is None
    assert done.returncode != 0


# --- what tests say about themselves ---------------------------------------------------------------------------------

TALKING = """
import pytest
pytestmark = pytest.mark.gpu
def test_fuzz(record_property):
    record_property("examples", 1500)
    record_property("invalid", 3)
def test_more_fuzz(record_property):
    record_property("examples", 700)
    record_property("seconds", 1.5)
    record_property("seen", True)
def test_defect(record_property):
    record_property("defect", "missing wait")
    record_property("caught_by", "test_delays")
def test_sanitizer(record_property):
    record_property("sanitizer", "memcheck: 0 errors, 12 launches")
def test_twice(record_property):
    record_property("kills", 2)
    record_property("kills", 3)
    record_property("what", object)
"""


def test_properties_are_kept_and_added_up(project):
    (project / "tests" / "test_talk.py").write_text(TALKING)
    done, record = gpu_test(project)
    assert done.returncode == 0, done.stdout
    assert record["sums"] == {"examples": 2200, "invalid": 3, "kills": 5}
    assert record["defects"] == {"missing wait": "test_delays"}
    assert record["sanitizers"] == ["memcheck: 0 errors, 12 launches"]
    properties = record["properties"]
    assert properties["tests/test_talk.py::test_fuzz"] == {"examples": 1500, "invalid": 3}
    assert properties["tests/test_talk.py::test_twice"] == {"kills": [2, 3], "what": "<class 'object'>"}
    assert "tests/test_more.py::test_more" not in properties
    assert record["reasons"] == {"tests/test_small.py::test_skips": "no second GPU"}


# --- in pieces -------------------------------------------------------------------------------------------------------


def kept(project):
    path = project / "tests" / ".gpu_record.partial.json"
    return json.loads(path.read_text()) if path.exists() else None


def outcomes(record):
    return {test.partition("::")[2]: outcome for test, outcome, _ in record["tests"]}


def test_pieces_become_one_record(project):
    whole = outcomes(gpu_test(project)[1])
    (project / "tests" / "gpu_record.json").unlink()
    for piece in range(1, len(whole)):
        done, record = gpu_test(project, "--gpu-minutes", "1e-9")
        assert record is None
        assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
        assert f"{piece} of {len(whole)} tests done, run make gpu-test again" in done.stdout
        assert (len(kept(project)["tests"]), kept(project)["pieces"]) == (piece, piece)
    done, record = gpu_test(project, "--gpu-minutes", "1e-9")
    assert done.returncode == 0, done.stdout
    assert outcomes(record) == whole
    assert record["pieces"] == len(whole)
    assert record["skipped_reasons"] == {"no second GPU": 1}
    assert kept(project) is None
    # The next run begins anew.
    done, record = gpu_test(project, "--gpu-minutes", "9")
    assert (done.returncode, record["pieces"]) == (0, 1)


def test_a_test_that_would_take_too_long_waits_for_the_next_piece(project):
    """How long a test takes is known from the record before."""
    record = gpu_test(project)[1]
    path = project / "tests" / "gpu_record.json"
    record["tests"] = [[test, outcome, 900 if "good[2]" in test else 1] for test, outcome, _ in record["tests"]]
    path.write_text(json.dumps(record))
    gpu_test(project, "--gpu-minutes", "10")
    assert outcomes(kept(project)) == {"test_more": "passed", "test_good[1]": "passed"}


@pytest.mark.parametrize(
    "change", ["rtk/source", "tests/test_more.py", "tests/data.json", "driver", "toolchain", "option"]
)
def test_pieces_of_different_things_are_not_joined(project, change):
    gpu_test(project, "--gpu-minutes", "1e-9")
    assert len(kept(project)["tests"]) == 1
    more = []
    if change == "driver":
        file = project / "rtk" / "driver.py"
        file.write_text(file.read_text().replace("H200", "H100"))
    elif change == "toolchain":
        file = project / "rtk" / "toolchain.py"
        file.write_text(file.read_text().replace("12.9.86", "13.0.88"))
    elif change == "option":
        more = ["--fuzz-seed", "5"]
    else:
        with (project / change).open("a") as file:
            file.write("\n")
    gpu_test(project, "--gpu-minutes", "1e-9", *more)
    assert (len(kept(project)["tests"]), kept(project)["pieces"]) == (1, 1)


def test_records_and_caches_are_no_sources(project):
    gpu_test(project, "--gpu-minutes", "1e-9")
    for name in ("gpu_record.json", "fuzz_record.json", ".hidden", "__pycache__/x.pyc"):
        (project / "tests" / name).parent.mkdir(exist_ok=True)
        (project / "tests" / name).write_text("{}")
    gpu_test(project, "--gpu-minutes", "1e-9")
    assert kept(project)["pieces"] == 2


def test_a_run_that_was_killed_goes_on(project):
    # Every test is kept at once, and the second one takes the process with it, the first time.
    plugin = project / "tests" / "gpu_record_plugin.py"
    plugin.write_text(plugin.read_text().replace("KEEP_EVERY_S = 5.0", "KEEP_EVERY_S = 0.0"))
    text = "import os, pathlib, pytest\n@pytest.mark.gpu\ndef test_dies():\n    flag = pathlib.Path('died')\n"
    text += "    if not flag.exists():\n        flag.touch()\n        os._exit(9)\n"
    (project / "tests" / "test_n.py").write_text(text)
    done, record = gpu_test(project)
    assert (done.returncode, record) == (9, None)
    assert outcomes(kept(project)) == {"test_more": "passed"}
    done, record = gpu_test(project)
    assert done.returncode == 0, done.stdout
    assert (record["pieces"], record["passed"], record["retried"]) == (2, 6 - 1, {})
    assert "1 deselected" in done.stdout or "2 deselected" in done.stdout


def test_what_failed_runs_again_and_is_told(project):
    text = "import pathlib, pytest\n@pytest.mark.gpu\ndef test_flaky():\n    flag = pathlib.Path('failed')\n"
    text += "    if not flag.exists():\n        flag.touch()\n        assert False\n"
    (project / "tests" / "test_a.py").write_text(text)
    done, record = gpu_test(project, "-x")
    assert (done.returncode, record, len(kept(project)["tests"])) == (1, None, 1)
    done, record = gpu_test(project)
    assert done.returncode == 0, done.stdout
    assert record["retried"] == {"tests/test_a.py::test_flaky": "failed"}
    assert outcomes(record)["test_flaky"] == "passed"


def test_what_cannot_be_collected_is_missing(project):
    (project / "tests" / "test_a.py").write_text("import nothing_of_that_name\n")
    done, record = gpu_test(project, "--continue-on-collection-errors")
    assert record is None
    assert done.returncode != 0
    assert "test_a.py cannot be collected" in done.stdout


def test_a_damaged_piece_is_no_piece(project):
    (project / "tests" / ".gpu_record.partial.json").write_text("{")
    done, record = gpu_test(project)
    assert (done.returncode, record["pieces"]) == (0, 1)


# --- of some files ---------------------------------------------------------------------------------------------------


def test_a_record_of_some_files(project):
    """`make fuzz`: a record of its own, in pieces of its own."""
    (project / "tests" / "test_talk.py").write_text(TALKING)
    to = ["--gpu-record", "tests/fuzz_record.json", "--gpu-record-files", "--fuzz-examples", "7"]
    path = project / "tests" / "fuzz_record.json"
    done, _ = gpu_test(project, *to, "--gpu-minutes", "1e-9", tests="tests/test_talk.py")
    assert done.returncode != 0
    assert "1 of 5 tests done, run make fuzz again" in done.stdout
    assert not path.exists()
    done, gpu_record = gpu_test(project, *to, tests="tests/test_talk.py")
    assert (done.returncode, gpu_record) == (0, None), done.stdout
    record = json.loads(path.read_text())
    assert record["options"]["files"] == ["tests/test_talk.py"]
    assert record["options"]["fuzz_examples"] == 7
    assert record["sums"]["examples"] == 2200
    for part in ("tests", "tests/test_talk.py::test_fuzz"):
        path.unlink(missing_ok=True)
        done, _ = gpu_test(project, *to, tests=part)
        assert not path.exists(), part
        assert "names of whole files" in done.stdout
