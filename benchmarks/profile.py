"""One kernel of one call under Nsight Compute (``ncu``): found, run, read back, in units that do not change.

The profiled process is ``rtk.benchmarks.profile_target``. ncu writes a report, the report is read back as CSV (one line
of metric names, one of units, one a kernel), and the longest kernel of the call becomes a `Profile`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rtk
from rtk import driver, shapes
from rtk.benchmarks.profile_report import Kernel, choose, last_lines, parse, wanted
from rtk.errors import RtkError, ToolchainError
from rtk.problem import AttentionProblem

TIMEOUT_S = 600.0
_GRACE_S = 5.0  # between asking ncu to end and killing it: it removes its own temporary files
_ATTEMPTS = 4  # runs, of which all but the last may be told that a metric is not known
_INSTALLED = (  # where installers put ncu, besides PATH and $CUDA_HOME
    "/usr/local/cuda*/bin/ncu",
    "/usr/local/cuda*/nsight-compute-*/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
)


@dataclass(frozen=True)
class Profile:
    """The profiled kernel of one call, and how much of the call's GPU time it was."""

    impl: str
    shape: str
    config: dict[str, int | bool]
    gpu: str
    ncu: str
    kernel: Kernel
    kernels: int
    kernel_share_pct: float | None
    report: str | None  # the .ncu-rep that was kept

    def to_json(self) -> dict[str, Any]:
        """For a program: the kernel's figures stand at the top, next to what was profiled."""
        found = asdict(self)
        kernel = found.pop("kernel")
        figures = kernel.pop("figures")
        return {**found, "kernel": kernel.pop("name"), **kernel, **figures}


# ------------------------------------------------------------------------------------------------------------- the tool


def find() -> str:
    """The path of ncu: on PATH, under $CUDA_HOME, or where installers put it, newest first. ToolchainError without."""
    on_path = shutil.which("ncu")
    if on_path:
        return on_path
    patterns = [f"{home}/{tail}" for home in _cuda_homes() for tail in ("bin/ncu", "nsight-compute-*/ncu")]
    for pattern in (*patterns, *_INSTALLED):
        for path in sorted(glob.glob(pattern), key=_version, reverse=True):
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
    hint = "apt install cuda-nsight-compute-13-0 (NVIDIA's repository), or conda install -c nvidia nsight-compute;"
    raise ToolchainError("Nsight Compute's command ncu is not installed", f"{hint} or put the folder of ncu on PATH")


def _cuda_homes() -> list[str]:
    return [glob.escape(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _version(path: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path)]


def command(ncu: str, metrics: Sequence[str], report: str, target: Sequence[str]) -> list[str]:
    """The command line that profiles `target` between its profiler calls, at the clocks that users get."""
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"]
    return [ncu, *options, "--metrics", ",".join(metrics), "--force-overwrite", "--export", report, *target]


def target(impl: str, problem: AttentionProblem, config: Mapping[str, int | bool]) -> list[str]:
    """The process that makes the one call."""
    shape = shapes.describe(problem)
    pins = ["--config", ",".join(f"{key}={value}" for key, value in config.items())] if config else []
    return [sys.executable, "-m", "rtk.benchmarks.profile_target", "--impl", impl, "--shape", shape, *pins]


def profile(
    problem: AttentionProblem,
    impl: str = "rtk",
    *,
    config: Mapping[str, int | bool] | None = None,
    kernel: str | None = None,
    export: str | os.PathLike[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Profile:
    """Profiles one call of `impl` on inputs N(0, 1) of this problem.

    `config`: pins for impl "rtk"; `kernel`: a regular expression that chooses by name instead of by duration; `export`:
    where to keep the report (.ncu-rep is added); `timeout_s` is for everything. Raises ToolchainError where ncu, a GPU
    or the permission to read counters is missing, RtkError where the call failed or launched nothing, or time ran out.
    Whatever happens, no process and no temporary file stays.
    """
    keep = _kept(export)
    if not driver.available():
        raise ToolchainError("no GPU to profile on: no NVIDIA driver answers, or it shows no GPU", "rtk doctor")
    ncu = find()
    deadline = time.monotonic() + timeout_s
    with _signals_unwind(), tempfile.TemporaryDirectory(prefix="rtk-profile-") as folder:
        report = os.path.join(folder, "profile.ncu-rep")
        _capture(ncu, report, target(impl, problem, dict(config or {})), deadline)
        if keep is not None:
            _copy(report, keep)
        reading = [ncu, "--import", report, "--csv", "--page", "raw", "--print-units", "base"]
        code, printed = _run(reading, folder, deadline)
        if code:
            raise RtkError(f"ncu could not read its own report back (exit code {code}):\n{last_lines(printed)}")
    kernels = parse(printed)
    chosen, share = choose(kernels, kernel)
    return Profile(
        impl=impl,
        shape=shapes.describe(problem),
        config=dict(config or {}),
        gpu=driver.device_properties(0).name,
        ncu=ncu,
        kernel=chosen,
        kernels=len(kernels),
        kernel_share_pct=share,
        report=None if keep is None else str(keep),
    )


def _kept(export: str | os.PathLike[str] | None) -> Path | None:
    """Where the report goes; refused now and not after the run where that folder is not there."""
    if export is None:
        return None
    path = Path(export)
    path = path if path.suffix == ".ncu-rep" else path.with_name(f"{path.name}.ncu-rep")
    if not path.parent.is_dir():
        raise RtkError(f"cannot keep the report at {path}: there is no folder {path.parent}")
    return path


def _copy(report: str, keep: Path) -> None:
    try:
        shutil.copyfile(report, keep)
    except OSError as error:
        raise RtkError(f"cannot keep the report at {keep}: {error.strerror}") from error


def _capture(ncu: str, report: str, call: Sequence[str], deadline: float) -> None:
    """Writes the report. An ncu that does not know one of them is asked again for the rest."""
    unknown: frozenset[str] = frozenset()
    for _ in range(_ATTEMPTS):
        asked = wanted(unknown)
        code, printed = _run(command(ncu, asked, report, call), os.path.dirname(report), deadline)
        refused = _refused(printed, asked)
        if not refused:
            break
        unknown |= refused
    _check(code, printed, os.path.exists(report))


def _refused(printed: str, asked: Sequence[str]) -> frozenset[str]:
    """The metrics that ncu says it does not know: `Failed to find metric regex:^dram__bytes\\.sum(...)$`."""
    lines = [line.replace("\\", "") for line in printed.splitlines() if "Failed to find metric" in line]
    bases = [match for line in lines for match in re.findall(r"\w+__\w+", line)]
    return frozenset(name for name in asked if name.partition(".")[0] in bases)


_NOT_PERMITTED = (
    "run as root; or let every user: put `options nvidia NVreg_RestrictProfilingToAdminUsers=0` into a file in "
    "/etc/modprobe.d and reboot; in a container also start it with --cap-add=SYS_ADMIN. "
    "https://developer.nvidia.com/ERR_NVGPUCTRPERM"
)


def _check(code: int, printed: str, reported: bool) -> None:
    """Raises for what went wrong in a profiling run, the most telling reason first."""
    if "ERR_NVGPUCTRPERM" in printed:
        raise ToolchainError("this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)", _NOT_PERMITTED)
    if "driver resource was unavailable" in printed:
        hint = "end other profilers; `dcgmi profile --pause` while this runs"
        raise ToolchainError("another tool, such as DCGM, holds the GPU's performance counters", hint)
    errors = [line for line in printed.splitlines() if line.startswith("==ERROR==")]
    failed = re.search(r"application returned an error code \((-?\d+)\)", printed)
    if failed and len(errors) == 1:  # ncu ends the process itself when profiling fails, and then says why as well
        raise RtkError(f"the profiled process failed (exit code {failed[1]}):\n{last_lines(printed)}")
    if code or errors:
        raise RtkError(f"ncu failed (exit code {code}):\n{last_lines(printed, own=True)}")
    if not reported:
        choose([])


# ---------------------------------------------------------------------------------------------------------- the process


def _run(arguments: Sequence[str], folder: str, deadline: float) -> tuple[int, str]:
    """(exit code, all that was printed). The process leads a group of its own, which does not outlive this call."""
    printed = os.path.join(folder, "printed")
    with open(printed, "wb") as output:  # a file: a pipe can fill up, and a grandchild can hold it open
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RtkError(f"{_name(arguments)} was not done in time:\n{last_lines(_read(printed))}") from None
        finally:
            _end(process)
    return code, _read(printed)


def _environment() -> dict[str, str]:
    """Numbers with points, and the rtk of this process for the target too, also where it is a checkout."""
    environment = {**os.environ, "LC_ALL": "C"}
    package = str(Path(rtk.__file__).absolute().parents[1])
    if package != sysconfig.get_path("purelib"):  # which on PYTHONPATH would come before the standard library
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return environment


def _name(arguments: Sequence[str]) -> str:
    return "reading the report" if "--import" in arguments else "profiling"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the process's group to end, then kills what is left of it."""
    try:
        if process.poll() is None:
            _signal(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
    finally:  # also when interrupted once more
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does, through what cleans up; where handlers can be set."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    try:
        before = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
