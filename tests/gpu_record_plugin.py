"""The record of a GPU run: what each test showed, on which device, with which tools, for which sources.

`--gpu-record PATH` writes it once every GPU test has run; a part of the tests never replaces the record of all. With
`--gpu-minutes M` a run stops before it takes longer, keeps what it has beside the record, and the next one goes on from
there: as long as sources, tests, tools, options and the kind of GPU are the same. Nor does a run that was killed begin
anew. What a test gives to `record_property` stands in the record, and whole numbers are added up by name.

The Recorder collects what was shown; a Piece chooses what runs and when to stop. With pytest-xdist (`-n`) every worker
has a Piece, and the Recorder sits in the process that they report to.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from gpus import module_with_gpu, usable_gpu

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RECORD = TESTS / "gpu_record.json"
KEPT = ("passed", "skipped", "xfailed")  # outcomes that the next piece of a run takes over
KEEP_EVERY_S = 5.0
HANDED = "rtk_gpu_record"  # a worker's Piece, as xdist hands it on


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rtk")
    group.addoption("--gpu-record", metavar="PATH", help="write what a whole run of the GPU tests showed (-m gpu)")
    group.addoption("--gpu-record-files", action="store_true", help="... of the tests in the files named, not of all")
    group.addoption("--gpu-minutes", type=float, metavar="M", help="stop before M minutes; the next run goes on")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        if handed := config.workerinput.get(HANDED):
            config.pluginmanager.register(Piece(**handed))
        return
    path = config.getoption("--gpu-record")
    if not path:
        return
    index, why = usable_gpu()
    if index is None:
        raise pytest.UsageError(f"--gpu-record: {why}, so there is nothing to record")
    config.pluginmanager.register(Recorder(Path(config.invocation_params.dir, path), index, config), "rtk-gpu-record")


def pytest_report_header() -> str | None:
    """Of what the committed record is, and what has changed since."""
    try:
        record = json.loads(RECORD.read_text())
        changed = [name for name, now in digests().items() if record["sources"].get(name) != now]
        return f"gpu record: {record['date'][:10]}, {record['device']['name']}; changed since: {changed or 'nothing'}"
    except (OSError, ValueError, KeyError, ImportError):
        return None


def why_partial(config: pytest.Config) -> str | None:
    """Why this run is not the whole of the GPU tests (or of the files named); None when it is."""
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
    named = [Path(config.invocation_params.dir, argument).resolve() for argument in config.args]
    if option.gpu_record_files:
        return None if all(path.is_file() for path in named) else "--gpu-record-files needs names of whole files"
    return None if {TESTS, ROOT} & {*named} else "only some test files were named"


@dataclass
class Result:
    """What one test showed."""

    outcome: str = ""
    seconds: float = 0.0
    reason: str = ""  # of a skip or an expected failure
    properties: dict[str, Any] = field(default_factory=dict)


@dataclass
class Piece:
    """Runs what is not done yet, until the next test would not end in time. Only of types that xdist can send."""

    done: list[str]
    expected_s: dict[str, float]  # of each test, where an earlier run knows
    started: float = field(default_factory=time.time)
    limit_s: float = float("inf")

    @pytest.hookimpl(trylast=True)  # after -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = set(self.done)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
        result = yield
        elapsed = time.time() - self.started
        if nextitem is not None and elapsed + self.expected_s.get(nextitem.nodeid, 0.0) > self.limit_s:
            item.session.shouldstop = f"--gpu-minutes: {elapsed / 60:.1f} minutes"
        return result


class Recorder:
    def __init__(self, path: Path, index: int, config: pytest.Config) -> None:
        self.path, self.index, self.config = path, index, config
        self.kept = path.with_name(f".{path.stem}.partial.json")
        self.partial = why_partial(config)
        option = vars(config.option)
        self.limit_s = 60 * (option["gpu_minutes"] or float("inf"))
        self.workers = option.get("numprocesses") or 0
        self.options = {name: option[name] for name in ("fuzz_examples", "fuzz_seed") if name in option}
        if option["gpu_record_files"]:
            self.options["files"] = sorted(Path(name).as_posix() for name in config.args)
        self.started = self.last_kept = time.monotonic()
        self.of: dict[str, Any] = {}  # what results are of; they can only be joined to others of the same
        self.ids: set[str] = set()  # of all tests
        self.expected_s: dict[str, float] = {}
        self.tests: dict[str, Result] = {}
        self.retried: dict[str, str] = {}  # what failed in an earlier piece and ran again
        self.earlier_s, self.pieces = 0.0, 1
        self.uncollected = ""
        self.outcome = ""

    # ---------------------------------------------------------------------------------------------- what is to be run

    def pytest_sessionstart(self) -> None:
        device, toolchain = describe_device(self.index), describe_toolchain()
        self.of = {"sources": digests(), "options": self.options, "device": device, "toolchain": toolchain}
        if not self.partial:
            for path in (self.path, self.kept):
                self.expected_s |= {test: seconds for test, _, seconds in read(path).get("tests", [])}
            self.take_over(read(self.kept))
        if not self.workers:
            self.config.pluginmanager.register(self.piece())

    def piece(self) -> Piece:
        return Piece(list(self.tests), self.expected_s, limit_s=self.limit_s)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[HANDED] = vars(self.piece())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.uncollected = f"{report.nodeid} cannot be collected"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.ids = {*self.tests, *(item.nodeid for item in session.items)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.ids |= {*self.tests, *ids}

    def take_over(self, earlier: dict[str, Any]) -> None:
        """What earlier pieces of this run showed."""
        if not earlier or any(earlier[name] != self.of[name] for name in ("sources", "options", "toolchain")):
            return
        if earlier["device"]["name"] != self.of["device"]["name"]:
            return
        reasons, properties = earlier["reasons"], earlier["properties"]
        for test, outcome, seconds in earlier["tests"]:
            if outcome in KEPT:
                self.tests[test] = Result(outcome, seconds, reasons.get(test, ""), properties.get(test, {}))
            else:
                self.retried[test] = outcome
        self.retried = earlier["retried"] | self.retried
        self.earlier_s, self.pieces = earlier["duration_s"], earlier["pieces"] + 1

    # ------------------------------------------------------------------------------------------------ while it is run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.tests.setdefault(report.nodeid, Result())
        result.seconds += report.duration
        if report.failed:
            result.outcome = "failed" if report.when == "call" and result.outcome != "error" else "error"
        elif report.skipped:
            result.outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            result.reason = str(getattr(report, "wasxfail", reason)).removeprefix("Skipped: ")
        elif report.when == "call":
            result.outcome = "passed"
        if report.when == "teardown":
            result.properties = joined(report.user_properties)
            if not self.partial and time.monotonic() - self.last_kept > KEEP_EVERY_S:
                self.keep()

    def keep(self) -> None:
        write_atomically(self.kept, as_text(self.record()))
        self.last_kept = time.monotonic()

    # ------------------------------------------------------------------------------------------------------ at its end

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.partial and digests() != self.of["sources"]:
            self.partial = "the sources changed while it ran"
            self.kept.unlink(missing_ok=True)
        if self.partial:
            self.outcome = f"{self.path} left as it was: this run is not a record of all GPU tests ({self.partial})"
            return
        missing = self.ids - self.tests.keys()
        if missing or self.uncollected or not self.ids:
            self.keep()
            done = f"{len(self.ids) - len(missing)} of {len(self.ids)} tests done"
            again = "make fuzz" if "files" in self.options else "make gpu-test"
            self.outcome = f"{self.path} left as it was: {self.uncollected or done}, run {again} again"
            session.exitstatus = session.exitstatus or pytest.ExitCode.INTERRUPTED
            return
        write_atomically(self.path, as_text(self.record()))
        self.kept.unlink(missing_ok=True)
        self.outcome = f"{self.path} written"
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # the piece before had run the last of them
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"gpu record: {self.outcome}")

    def record(self) -> dict[str, Any]:
        tests = {test: result for test, result in sorted(self.tests.items()) if result.outcome}
        counts = Counter(result.outcome for result in tests.values())
        skipped = Counter(result.reason for result in tests.values() if result.outcome == "skipped")
        found = [result.properties for result in tests.values()]
        return {
            **self.of,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "duration_s": round(self.earlier_s + time.monotonic() - self.started, 1),
            "pieces": self.pieces,
            "workers": self.workers,
            "passed": counts["passed"],
            "failed": counts["failed"],
            "errors": counts["error"],
            "xfailed": counts["xfailed"],
            "skipped": sum(skipped.values()),
            "skipped_reasons": dict(sorted(skipped.items())),
            "retried": self.retried,
            "sums": sums(found),
            "defects": {x["defect"]: x.get("caught_by") for x in found if "defect" in x},
            "sanitizers": [x["sanitizer"] for x in found if "sanitizer" in x],
            "reasons": {test: result.reason for test, result in tests.items() if result.reason},
            "properties": {test: result.properties for test, result in tests.items() if result.properties},
            "tests": [[test, result.outcome, round(result.seconds, 3)] for test, result in tests.items()],
        }


def joined(properties: list[tuple[str, Any]]) -> dict[str, Any]:
    """By name; a name that was recorded several times has the list of its values. Only what JSON can hold."""
    found: dict[str, list[Any]] = {}
    for name, value in properties:
        found.setdefault(name, []).append(json.loads(json.dumps(value, default=str)))
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def sums(properties: list[dict[str, Any]]) -> dict[str, int]:
    """The whole numbers that tests recorded, added up by name: "examples" above all."""
    total: Counter[str] = Counter()
    for found in properties:
        for name, value in found.items():
            numbers = value if isinstance(value, list) else [value]
            if all(type(number) is int for number in numbers):
                total[name] += sum(numbers)
    return dict(sorted(total.items()))


# --- what it is of ---------------------------------------------------------------------------------------------------


def digests() -> dict[str, str]:
    """sha256 of "cuda_src", "rtk", "autotune", and of "tests": every file there but records and hidden ones."""
    from rtk.digest import sources_digest

    sha = hashlib.sha256()
    for path in sorted(TESTS.rglob("*")):
        parts = path.relative_to(TESTS).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts) or not path.is_file():
            continue
        if not path.name.endswith(("_record.json", ".pyc")):
            data = path.read_bytes()
            sha.update(f"{'/'.join(parts)}\0{len(data)}\0".encode() + data)
    return {**sources_digest(), "tests": sha.hexdigest()}


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


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """A record, or {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def as_text(record: dict[str, Any]) -> str:
    """Indented JSON with one test a line, so that a diff of two records can be read."""
    long = ("properties", "tests")
    head = json.dumps({name: value for name, value in record.items() if name not in long}, indent=2)
    properties = ",\n".join(f"    {json.dumps(name)}: {json.dumps(x)}" for name, x in record["properties"].items())
    tests = ",\n".join(f"    {json.dumps(test)}" for test in record["tests"])
    return f'{head[:-2]},\n  "properties": {{\n{properties}\n  }},\n  "tests": [\n{tests}\n  ]\n}}\n'


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
