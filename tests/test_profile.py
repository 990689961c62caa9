"""`rtk profile` without a GPU: units, the CSV that ncu prints, its command line, its errors, and nothing left behind.

`ncu` here is a script that takes ncu's command line, runs the real target where it matters, and prints what ncu prints.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rtk import driver, shapes
from rtk.benchmarks import profile, profile_report, profile_target
from rtk.cli import profile as cli
from rtk.errors import ArgumentError, RtkError, ToolchainError

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = shapes.parse("b=2,hq=16,sq=4096,d=128,causal")
LEADING = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
LEADING += ["Block Size", "Grid Size", "Device", "CC"]
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"

# From an ncu 2025.3.1 report of the forward kernel on an H200: metric, unit, value as printed with automatic units.
MEASURED = {
    "gpu__time_duration.sum": ("us", "213.312000"),
    "smsp__cycles_elapsed.avg.per_second": ("Ghz", "1.651223"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "76.561659"),
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": ("%", "16.451431"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "40.002742"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "40.750060"),
    "dram__bytes.sum.per_second": ("Gbyte/s", "587.565557"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12.212468"),
    "lts__t_bytes.sum.per_second": ("Tbyte/s", "5.250000"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "51.337515"),
    "lts__t_sector_hit_rate.pct": ("%", "86.357548"),
    "sm__warps_active.avg.per_cycle_active": ("warp", "8.999215"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "14.061274"),
    "launch__registers_per_thread": ("register/thread", "168"),
    "launch__shared_mem_per_block_dynamic": ("Kbyte/block", "163.960000"),
    "launch__shared_mem_per_block_static": ("byte/block", "0"),
    "smsp__inst_executed_op_local_ld.sum": ("inst", "0"),
    "smsp__inst_executed_op_local_st.sum": ("inst", "1,024"),
    _STALL.format("wait"): ("inst", "1.512552"),
    _STALL.format("long_scoreboard"): ("inst", "0.785884"),
    _STALL.format("dispatch_stall"): ("inst", "0.571884"),
    _STALL.format("barrier"): ("inst", "0.403310"),
    _STALL.format("gmma"): ("inst", "0.246693"),
    _STALL.format("math_pipe_throttle"): ("inst", "0.060764"),
    _STALL.format("membar"): ("inst", "0"),
    _STALL.format("selected"): ("inst", "0.999836"),
}
NAME = "attention_fwd_bf16_d128x128_m128n128s2_q64v64_pingpong_dynamic_right"


def raw(*kernels: tuple[str, dict[str, tuple[str, str]]]) -> str:
    """The raw page of a report with these kernels, all with the units of the first."""
    metrics = list(kernels[0][1])
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*LEADING, *metrics])
    writer.writerow([*[""] * len(LEADING), *(kernels[0][1][name][0] for name in metrics)])
    for number, (name, values) in enumerate(kernels):
        leading = [number, 3299, "python3.12", "127.0.0.1", name, 1, 7, "(384, 1, 1)", "(132, 1, 1)", 0, "9.0"]
        writer.writerow([*leading, *(values[metric][1] for metric in metrics)])
    return text.getvalue()


def measured(**changes: str) -> dict[str, tuple[str, str]]:
    """MEASURED with other values, by the part of the metric's name before the first point."""
    return {name: (unit, changes.get(name.partition(".")[0], value)) for name, (unit, value) in MEASURED.items()}


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("ns", 1e-9), ("nsecond", 1e-9), ("us", 1e-6), ("usecond", 1e-6), ("ms", 1e-3), ("msecond", 1e-3),
        ("s", 1), ("second", 1), ("byte", 1), ("Kbyte", 1e3), ("Mbyte", 1e6), ("Gbyte/s", 1e9),
        ("Gbyte/second", 1e9), ("Tbyte/s", 1e12), ("byte/second", 1), ("Kbyte/block", 1e3), ("byte/block", 1),
        ("hz", 1), ("Mhz", 1e6), ("Ghz", 1e9), ("cycle/nsecond", 1e9), ("cycle/usecond", 1e6), ("cycle/s", 1),
        ("%", 1), ("", 1), ("inst", 1), ("warp", 1), ("register/thread", 1), ("inst/cycle", 1), ("Kinst", 1e3),
    ],
)  # fmt: skip
def test_units_are_normalised(unit, expected):
    assert profile_report.factor(unit) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", ["furlong", "Gfurlong/s", "byte/furlong", "/s", "%/Kbyte"])
def test_a_unit_that_is_not_known_has_no_factor(unit):
    assert profile_report.factor(unit) is None


@given(
    st.floats(1e-6, 1e15),
    st.sampled_from(["byte/s", "Kbyte/s", "Mbyte/s", "Gbyte/s", "Tbyte/s", "Mbyte/ms", "Kbyte/us", "byte/ns"]),
)
def test_a_rate_is_the_same_in_any_unit(rate, unit):
    """A value in bytes/second, printed in another unit with thousands separated, is read as what it was."""
    printed = f"{rate / profile_report.factor(unit):,.12f}"
    text = raw(("k", {"dram__bytes.sum.per_second": (unit, printed)}))
    tolerance = 1e-12 * profile_report.factor(unit) * 1e-9  # the digits that were printed
    found = profile_report.parse(text)[0].figures["dram_gbps"]
    assert found == pytest.approx(rate * 1e-9, rel=1e-9, abs=tolerance)


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_unit_and_no_value_breaks_the_parser(unit, value):
    kernel = profile_report.parse(raw(("k", {"gpu__time_duration.sum": (unit, value)})))[0]
    duration = kernel.figures["duration_us"]
    assert duration is None or isinstance(duration, float)


@pytest.mark.parametrize("text", ["n/a", "", "nan", "inf", "(!) n/a", "-"])
def test_what_is_no_number_is_none(text):
    assert profile_report.number(text) is None


# --- the raw page ----------------------------------------------------------------------------------------------------


def test_a_real_row():
    (kernel,) = profile_report.parse(raw((NAME, MEASURED)))
    assert (kernel.name, kernel.grid, kernel.block) == (NAME, "(132, 1, 1)", "(384, 1, 1)")
    figures = kernel.figures
    assert figures["duration_us"] == pytest.approx(213.312)
    assert figures["sm_mhz"] == pytest.approx(1651.223)
    assert figures["dram_gbps"] == pytest.approx(587.565557)
    assert figures["l2_gbps"] == pytest.approx(5250)
    assert figures["shared_dynamic_bytes"] == pytest.approx(163_960)
    assert (figures["registers_per_thread"], figures["local_loads"], figures["local_stores"]) == (168, 0, 1024)
    assert None not in figures.values()
    reasons = [stall.reason for stall in kernel.stalls]
    assert reasons[:3] == ["wait", "long_scoreboard", "dispatch_stall"]
    assert "membar" not in reasons and "selected" not in reasons  # nothing waits there; that one is no wait
    total = sum(float(value) for name, (_, value) in MEASURED.items() if "stalled" in name)
    assert kernel.stalls[0].share_pct == pytest.approx(100 * 1.512552 / total)
    assert _STALL.format("drain") in kernel.missing  # not in this report


def test_lines_of_ncu_around_the_table_are_no_kernels():
    text = f"==PROF== Loaded\n\n{raw((NAME, MEASURED))}==WARNING== something, with, commas\n"
    assert len(profile_report.parse(text)) == 1


def test_a_value_that_is_not_available_is_none_and_named():
    (kernel,) = profile_report.parse(raw((NAME, measured(lts__t_sector_hit_rate="n/a"))))
    assert kernel.figures["l2_hit_pct"] is None
    assert "lts__t_sector_hit_rate.pct" in kernel.missing


def test_a_value_in_a_unit_that_is_not_known_is_none_and_named():
    (kernel,) = profile_report.parse(raw((NAME, {**MEASURED, "gpu__time_duration.sum": ("fortnight", "2")})))
    assert kernel.figures["duration_us"] is None
    assert "gpu__time_duration.sum" in kernel.missing


def test_the_longest_kernel_is_chosen_and_its_share_told():
    short, long = measured(gpu__time_duration="20"), measured(gpu__time_duration="1,180")
    kernels = profile_report.parse(raw(("void fill<int, 4>(int)", short), (NAME, long), ("combine", short)))
    chosen, share = profile_report.choose(kernels)
    assert chosen.name == NAME
    assert share == pytest.approx(100 * 1180 / 1220)
    chosen, share = profile_report.choose(kernels, r"fill<\w+, 4>")
    assert chosen.name == "void fill<int, 4>(int)"
    assert share == pytest.approx(100 * 20 / 1220)


def test_a_name_that_no_kernel_has_is_refused_with_those_there_are():
    kernels = profile_report.parse(raw((NAME, MEASURED), ("combine", MEASURED)))
    with pytest.raises(RtkError, match=r"(?s)no kernel of the call matches 'split'.*combine"):
        profile_report.choose(kernels, "split")


def test_a_share_needs_every_duration():
    kernels = profile_report.parse(raw((NAME, MEASURED), ("combine", measured(gpu__time_duration="n/a"))))
    assert profile_report.choose(kernels)[1] is None


def test_no_kernel_is_an_error_that_says_so():
    assert profile_report.parse("==WARNING== No kernels were profiled.\n") == []
    with pytest.raises(RtkError, match="found no kernel"):
        profile_report.choose([])


def test_what_is_no_table_is_shown():
    with pytest.raises(RtkError, match="report is of a newer version"):
        profile_report.parse("==ERROR== The report is of a newer version\n")


# --- the command line ------------------------------------------------------------------------------------------------


def test_every_figure_is_asked_for_once():
    names = profile_report.wanted()
    assert len(names) == len(set(names)) == len(profile_report.METRICS) + len(profile_report.STALLS) + 1
    assert set(MEASURED) <= set(names)


def test_the_second_name_stands_in_for_a_metric_that_is_not_known():
    first, second = next(metric.names for metric in profile_report.METRICS if metric.key == "tensor_pct")
    names = profile_report.wanted(frozenset([first]))
    assert first not in names and second in names
    kernel = profile_report.parse(raw(("k", {second: ("%", "42")})))[0]
    assert kernel.figures["tensor_pct"] == 42 and first not in kernel.missing


def test_the_command_of_a_profile():
    call = profile.target("rtk", PROBLEM, {"BLOCK_M": 128, "PINGPONG": True})
    assert call[:3] == [sys.executable, "-m", "rtk.benchmarks.profile_target"]
    words = profile.command("/opt/ncu", ["a.sum", "b.pct"], "/tmp/r.ncu-rep", call)
    assert words[0] == "/opt/ncu" and words[-len(call) :] == call
    options = words[1 : -len(call)]
    for option, value in {
        "--clock-control": "none",
        "--profile-from-start": "off",
        "--metrics": "a.sum,b.pct",
        "--export": "/tmp/r.ncu-rep",
    }.items():
        assert options[options.index(option) + 1] == value


def test_the_target_reads_what_it_is_told():
    call = profile.target("rtk", PROBLEM, {"BLOCK_M": 128, "PINGPONG": False})
    assert shapes.parse(call[call.index("--shape") + 1]) == PROBLEM
    assert profile_target.pins(call[call.index("--config") + 1]) == {"BLOCK_M": 128, "PINGPONG": False}


@pytest.mark.parametrize("text", ["BLOCK_M", "BLOCK_M=big", "=3", "A=1,A=2", "A=-1", "A B=1"])
def test_pins_that_are_none_are_refused(text):
    with pytest.raises(ArgumentError, match="config"):
        profile_target.pins(text)


# --- finding ncu -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No ncu on PATH, under CUDA_HOME or where installers put it."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(profile, "_INSTALLED", (f"{tmp_path}/opt/*/ncu",))


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_without_ncu_the_error_says_how_to_get_it(nowhere):
    with pytest.raises(ToolchainError, match=r"(?s)ncu is not installed.*try: .*PATH"):
        profile.find()


def test_ncu_is_found_newest_first_then_cuda_home_then_path(nowhere, tmp_path, monkeypatch):
    executable(tmp_path / "opt/2024.9.1/ncu")
    newest = executable(tmp_path / "opt/2024.10.0/ncu")
    (tmp_path / "opt/2026.1.0/ncu").mkdir(parents=True)  # a folder is no program
    assert profile.find() == str(newest)
    at_home = executable(tmp_path / "cuda[13]/bin/ncu")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda[13]"))
    assert profile.find() == str(at_home)
    on_path = executable(tmp_path / "empty/ncu")
    assert profile.find() == str(on_path)


# --- runs ------------------------------------------------------------------------------------------------------------

FAKE = """#!{python}
import json, os, subprocess, sys, time
mode, words = os.environ["FAKE_NCU"], sys.argv[1:]
if "--import" in words:
    assert os.path.exists(words[words.index("--import") + 1])
    print("==WARNING== a line before the table")
    print(open({answer!r}).read(), end="")
    sys.exit(0)
metrics = words[words.index("--metrics") + 1].split(",")
report, call = words[words.index("--export") + 1], words[words.index("--export") + 2:]
print("==PROF== Connected to process 4242 (/usr/bin/python3)")
if mode == "denied":
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters "
          "on the target device 0.")
    sys.exit(1)
if mode == "busy":
    print("==ERROR== Profiling failed because a driver resource was unavailable. Ensure that no other tool (like DCGM) "
          "is concurrently collecting profiling data.")
    print("==ERROR== The application returned an error code (9).")
    sys.exit(9)
if mode == "target":  # the real one, which cannot run here
    done = subprocess.run(call)
    print("==PROF== Disconnected from process 4242")
    print(f"==ERROR== The application returned an error code ({{done.returncode}}).")
    print("==WARNING== No kernels were profiled.")
    sys.exit(done.returncode)
if mode == "none":
    print("==PROF== Disconnected from process 4242\\n==WARNING== No kernels were profiled.")
    sys.exit(0)
if mode == "old" and "smsp__issue_active.avg.pct_of_peak_sustained_active" in metrics:
    name = r"smsp__issue_active\\.avg\\.pct_of_peak_sustained_active"
    print(f"==ERROR== Failed to find metric regex:^{{name}}" + r"(\\.(sum|min))?$")
    print('==ERROR== Failed to profile "attention_fwd" in process 4242')
    print("==ERROR== The application returned an error code (9).")
    sys.exit(9)
if mode == "hang":
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    print("the last words", flush=True)
    time.sleep(600)
open(report, "w").write(",".join(metrics))
print(f"==PROF== Report: {{report}}")
"""


@pytest.fixture
def ncu(nowhere, tmp_path, monkeypatch):
    """A function that sets what the script does, and temporary files in a folder that can be looked at."""
    answer, pids = tmp_path / "answer.csv", tmp_path / "pids"
    answer.write_text(raw((NAME, MEASURED)))
    script = FAKE.format(python=sys.executable, answer=str(answer), pids=str(pids))
    executable(tmp_path / "empty/ncu", script)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "device_properties", lambda ordinal: SimpleNamespace(name="NVIDIA H200"))
    monkeypatch.setattr(profile, "_GRACE_S", 0.2)
    yield SimpleNamespace(
        does=lambda mode: monkeypatch.setenv("FAKE_NCU", mode),
        answer=answer,
        pids=pids,
        temporary=tmp_path / "temporary",
    )
    assert os.listdir(tmp_path / "temporary") == []


def gone(pids: Path) -> bool:
    """Whether none of them runs: who was killed may take a moment to end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(alive(int(pid)) for pid in pids.read_text().split()):
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_profile_and_its_report(ncu, tmp_path):
    ncu.does("well")
    found = profile.profile(PROBLEM, config={"BLOCK_M": 128}, export=tmp_path / "kept")
    assert (found.gpu, found.kernels, found.kernel_share_pct) == ("NVIDIA H200", 1, 100)
    assert found.kernel.figures["tensor_pct"] == pytest.approx(76.561659)
    assert found.report == str(tmp_path / "kept.ncu-rep")
    assert Path(found.report).read_text() == ",".join(profile_report.wanted())
    whole = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert whole["kernel"] == NAME and whole["sm_mhz"] == pytest.approx(1651.223)
    assert whole["stalls"][0]["reason"] == "wait" and whole["config"] == {"BLOCK_M": 128}


def test_a_metric_that_this_ncu_does_not_know_is_left_out_and_named(ncu, tmp_path):
    ncu.does("old")
    unknown = "smsp__issue_active.avg.pct_of_peak_sustained_active"
    ncu.answer.write_text(raw((NAME, {name: cell for name, cell in MEASURED.items() if name != unknown})))
    found = profile.profile(PROBLEM, export=tmp_path / "kept.ncu-rep")
    asked = (tmp_path / "kept.ncu-rep").read_text().split(",")
    assert unknown not in asked and "sm__inst_issued.avg.pct_of_peak_sustained_active" in asked
    assert found.kernel.figures["issue_pct"] is None and unknown in found.kernel.missing


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("denied", "(?s)may not read .*NVreg_RestrictProfilingToAdminUsers=0.*SYS_ADMIN"),
        ("busy", "(?s)DCGM.*dcgmi profile --pause"),
        ("none", "found no kernel in the call"),
    ],
)
def test_what_can_go_wrong_says_what_to_do(ncu, mode, says):
    ncu.does(mode)
    with pytest.raises(RtkError, match=says):
        profile.profile(PROBLEM)


def test_a_target_that_fails_shows_its_last_lines(ncu):
    pytest.importorskip("torch")
    if driver.__dict__["device_count"] and __import__("torch").cuda.is_available():
        pytest.skip("the target can run here")
    ncu.does("target")
    with pytest.raises(RtkError, match=r"(?s)the profiled process failed \(exit code 1\):.*torch with CUDA") as caught:
        profile.profile(PROBLEM)
    assert "==" not in str(caught.value)


def test_without_a_gpu_nothing_is_run(nowhere, monkeypatch):
    monkeypatch.setattr(driver, "available", lambda: False)
    with pytest.raises(ToolchainError, match=r"(?s)no GPU to profile on.*rtk doctor"):
        profile.profile(PROBLEM)


def test_a_report_that_has_no_place_is_refused_before_anything_runs(nowhere, tmp_path):
    with pytest.raises(RtkError, match="there is no folder"):
        profile.profile(PROBLEM, export=tmp_path / "missing" / "kept")


# --- nothing stays ---------------------------------------------------------------------------------------------------


def test_a_timeout_ends_the_whole_group_and_removes_the_folder(ncu):
    ncu.does("hang")
    with pytest.raises(RtkError, match=r"(?s)profiling was not done in time.*the last words"):
        profile.profile(PROBLEM, timeout_s=2.0)
    assert gone(ncu.pids)


INTERRUPTED = """
import sys
from rtk import driver, shapes
from rtk.benchmarks import profile
driver.available = lambda: True
profile._GRACE_S = 0.2
try:
    profile.profile(shapes.parse("hq=1,sq=64,d=64"))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_whole_group_and_removes_the_folder(ncu, signum, code):
    ncu.does("hang")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (ncu.pids.exists() and ncu.pids.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert os.listdir(ncu.temporary)  # so that its absence later means something
        process.send_signal(signum)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
    assert gone(ncu.pids)


# --- what is printed -------------------------------------------------------------------------------------------------


def command(capsys, *words):
    """(exit code, standard output, standard error) of `rtk profile`."""
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    try:
        arguments = parser.parse_args(["profile", *words])
        code = arguments.run(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_table(ncu, capsys):
    ncu.does("well")
    ncu.answer.write_text(
        raw((NAME, measured(lts__t_sector_hit_rate="n/a")), ("fill", measured(gpu__time_duration="2")))
    )
    code, out, _ = command(capsys, "--shape", "b=2,hq=16,sq=4096,d=128,causal", "--config", "BLOCK_M=128")
    assert code == 0
    lines = {line.rpartition("  ")[0].strip(): line.split() for line in out.splitlines()}
    rows = {line[2:27].strip(): line.split() for line in out.splitlines()}
    assert rows["duration"][-2:] == ["213.3", "us"]
    assert rows["tensor cores"][-1] == "76.6"
    assert rows["DRAM"][-3:] == ["588", "GB/s", "12.2"]
    assert rows["L2 hit rate"][-1] == "-"
    assert "one of 2 kernels in the call, 99.1 % of their time" in out
    assert "0 loads, 1,024 stores" in out and "160.1 KiB" in out and "rtk BLOCK_M=128 on NVIDIA H200" in out
    assert "wait " in out and "the fixed latency" in out and "math pipe throttle" not in out  # the sixth
    assert "no number for: lts__t_sector_hit_rate.pct" in out
    assert lines


def test_json_is_one_object_and_nothing_else(ncu, capsys):
    ncu.does("well")
    code, out, err = command(capsys, "--shape", "hq=16,sq=4096,d=128", "--impl", "cudnn", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["impl"] == "cudnn" and found["duration_us"] == pytest.approx(213.312)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "--shape"),
        (["--shape", "hq=16"], "sq in shape"),
        (["--shape", "hq=1,sq=64,d=64", "--kernel", "("], "no regular expression"),
        (["--shape", "hq=1,sq=64,d=64", "--config", "BLOCK_M"], "KEY=VALUE"),
        (["--shape", "hq=1,sq=64,d=64", "--impl", "fa3", "--config", "BLOCK_M=64"], "--config goes with --impl rtk"),
        (["--shape", "hq=1,sq=64,d=64", "--timeout", "0"], "positive"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys, words, complaint):
    code, out, err = command(capsys, *words)
    assert (code, out) == (2, "") and complaint in err
