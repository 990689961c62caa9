"""What every test gets: the `gpu` marker and fixture, hypothesis profiles, and the record of a GPU run.

`--gpu-record PATH` writes what a whole run of the GPU tests showed, and for which sources. A part of a run never
replaces the record of a whole one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent

with contextlib.suppress(ImportError):  # a GPU machine may do without
    from hypothesis import HealthCheck, settings

    # No deadline: two workers on two cores, and the first call of anything compiles.
    settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
    settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


# --- the GPU ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """The GPU that a test runs on: its number, the driver's properties of it, and the libraries that can use it."""

    index: int
    properties: Any
    torch: Any  # the module, or None where torch is not there or has no CUDA
    cupy: Any  # the module, or None


@functools.cache
def usable_gpu() -> tuple[int | None, str]:
    """(number of the first GPU of compute capability 9.0, "") or (None, why there is none)."""
    from rtk import driver

    if not driver.available():
        return None, "no GPU: the NVIDIA driver is not there or shows none"
    for index in range(driver.device_count()):
        if tuple(driver.device_properties(index).compute_capability) == (9, 0):
            return index, ""
    return None, "no GPU of compute capability 9.0"


def module_with_gpu(name: str) -> Any:
    try:
        module = importlib.import_module(name)
        there = module.cuda.is_available()
    except Exception:  # not installed, or installed without what it needs: either way not a library for GPU tests
        return None
    return module if there else None


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """A GPU that rtk serves; the test is skipped where there is none."""
    index, why = usable_gpu()
    if index is None:
        pytest.skip(why)
    from rtk import driver

    found = Gpu(index, driver.device_properties(index), module_with_gpu("torch"), module_with_gpu("cupy"))
    if found.torch is not None:
        found.torch.cuda.set_device(index)
    if found.cupy is not None:
        found.cupy.cuda.Device(index).use()
    return found


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and usable_gpu()[0] is None:
        skip = pytest.mark.skip(reason=usable_gpu()[1])
        for item in marked:
            item.add_marker(skip)


# --- the record of a GPU run -----------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rtk")
    group.addoption("--gpu-record", metavar="PATH", help="write what a whole run of the GPU tests showed (-m gpu)")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-record")
    if not path or hasattr(config, "workerinput"):  # under xdist the controller sees every report
        return
    index, why = usable_gpu()
    if index is None:
        raise pytest.UsageError(f"--gpu-record: {why}, so there is nothing to record")
    config.pluginmanager.register(Recorder(Path(config.invocation_params.dir, path), index), "rtk-gpu-record")


def why_partial(config: pytest.Config) -> str | None:
    """Why this run is not the whole of the GPU tests; None when it is."""
    option = config.option
    if option.markexpr != "gpu":
        return "it was not selected by -m gpu alone"
    for name, flag in [
        ("keyword", "-k"),
        ("deselect", "--deselect"),
        ("ignore", "--ignore"),
        ("ignore_glob", "--ignore-glob"),
        ("lf", "--last-failed"),
        ("stepwise", "--stepwise"),
        ("collectonly", "--collect-only"),
        ("setuponly", "--setup-only"),
        ("setupplan", "--setup-plan"),
    ]:
        if getattr(option, name, None):
            return f"{flag} was given"
    named = {Path(config.invocation_params.dir, argument).resolve() for argument in config.args}
    if not named & {TESTS, TESTS.parent}:
        return "only some test files were named"
    return None


@dataclass
class Recorder:
    path: Path
    index: int
    started: float = field(default_factory=time.time)
    tests: dict[str, tuple[str, float]] = field(default_factory=dict)  # id -> outcome, seconds
    reasons: dict[str, str] = field(default_factory=dict)  # id of a skipped test -> why
    sources: dict[str, str] = field(default_factory=dict)
    outcome: str = ""

    def pytest_sessionstart(self) -> None:
        self.sources = digest()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, seconds = self.tests.get(report.nodeid, ("", 0.0))
        if report.failed:
            outcome = "failed" if report.when == "call" and outcome != "error" else "error"
        elif report.skipped:
            outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[report.nodeid] = str(getattr(report, "wasxfail", reason)).removeprefix("Skipped: ")
        elif report.when == "call":
            outcome = "passed"
        self.tests[report.nodeid] = outcome, seconds + report.duration

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        partial = why_partial(session.config)
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or session.shouldstop:
            partial = partial or "it did not run to its end"
        elif session.shouldfail:
            partial = partial or "it stopped at a failure"
        if not partial and digest() != self.sources:
            partial = "the sources changed while it ran"
        if partial:
            self.outcome = f"{self.path} left as it was: this run is not a record of all GPU tests ({partial})"
            return
        write_atomically(self.path, as_text(self.record()))
        self.outcome = f"{self.path} written"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"gpu record: {self.outcome}")

    def record(self) -> dict[str, Any]:
        counts = Counter(outcome for outcome, _ in self.tests.values())
        skipped = Counter(self.reasons[test] for test, (outcome, _) in self.tests.items() if outcome == "skipped")
        return {
            "sources": self.sources,
            "device": describe_device(self.index),
            "toolchain": describe_toolchain(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.started, 1),
            "passed": counts["passed"],
            "failed": counts["failed"],
            "errors": counts["error"],
            "xfailed": counts["xfailed"],
            "skipped": sum(skipped.values()),
            "skipped_reasons": dict(sorted(skipped.items())),
            "tests": [[test, outcome, round(seconds, 3)] for test, (outcome, seconds) in sorted(self.tests.items())],
        }


def digest() -> dict[str, str]:
    from rtk.digest import sources_digest

    return sources_digest()


def describe_device(index: int) -> dict[str, Any]:
    from rtk import driver

    properties = driver.device_properties(index)
    answer = query_nvidia_smi(index, "uuid,driver_version")
    return {
        "name": properties.name,
        "uuid": str(getattr(properties, "uuid", None) or (answer[0] if answer else "unknown")),
        "compute_capability": list(properties.compute_capability),
        "driver": answer[1] if answer else "unknown",
    }


def query_nvidia_smi(index: int, fields: str) -> list[str] | None:
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in answer.strip().split(",")]


def describe_toolchain() -> dict[str, Any]:
    from rtk import toolchain

    cuda = toolchain.driver_version()
    return {
        "cuda": "unknown" if cuda is None else f"{cuda[0]}.{cuda[1]}",
        "nvrtc": toolchain.nvrtc().build,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "cupy": ", ".join(toolchain.cupy_wheels()) or None,
        "torch": getattr(module_with_gpu("torch"), "__version__", None),
    }


def as_text(record: dict[str, Any]) -> str:
    """Indented JSON with one test a line, so that a diff of two records can be read."""
    tests = ",\n".join(f"    {json.dumps(test)}" for test in record["tests"])
    head = json.dumps({name: value for name, value in record.items() if name != "tests"}, indent=2)
    return f'{head[:-2]},\n  "tests": [\n{tests}\n  ]\n}}\n'


def write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
