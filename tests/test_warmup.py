"""rtk.warmup and `rtk warmup`: what calls will ask for lies ready, here or in a folder that goes elsewhere."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import call

from rtk import jit, shapes, toolchain
from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.cache import Cache
from rtk.cli import warmup as command
from rtk.errors import ArgumentError, CacheWarning, ToolchainError
from rtk.jit import Binary, CompileReport
from rtk.kernels.attention_fwd import SPEC
from rtk.warmup import warmup

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL, CAUSAL, WIDE = "hq=8,sq=300,d=64", "hq=8,sq=300,d=64,causal", "b=40,hq=8,sq=300,d=128,dtype=fp16"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_memory", type(jit._memory)())


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of what was compiled; the compiler is made up."""
    names: list[str] = []

    def compile_(source, headers, entry_key, build):
        names.append(source.name)
        report = CompileReport(source.name, 168, 0, 0, 0, 0, (), 1.0, build, False)
        return Binary(source.name, entry_key, f"cubin of {source.text}".encode(), report)

    monkeypatch.setattr(jit, "_compile", compile_)
    monkeypatch.setattr(toolchain, "nvrtc", lambda: toolchain.Nvrtc("/none", "1.2.3", 1, "made up"))
    return names


def chosen(problem):
    return choice.choose(SPEC, problem, gpu_here()).config


def name_of(line: str) -> str:
    return SPEC.label(chosen(shapes.parse(line)))


# --- the function -----------------------------------------------------------------------------------------------------


def test_the_kernels_that_calls_will_ask_for(compiled, tmp_path):
    seen = []
    found = warmup(
        [SMALL, shapes.parse(CAUSAL), {"hq": 8, "sq": 299, "d": 64}, SMALL], progress=lambda *x: seen.append(x)
    )
    assert [kernel.binary.name for kernel in found] == [name_of(SMALL), name_of(CAUSAL)]
    assert found[0].problems == (shapes.parse(SMALL), shapes.parse("hq=8,sq=299,d=64"))  # one kernel, both lengths
    assert all(kernel.stored for kernel in found) and sorted(compiled) == sorted(map(name_of, (SMALL, CAUSAL)))
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
    jit._memory.clear()
    binary = jit.build(SPEC.render(chosen(shapes.parse(SMALL))))  # as a call does, in the same folder
    assert binary.report.from_cache and binary.key == found[0].binary.key
    assert len(compiled) == 2 and len(Cache(tmp_path / "cache").items()) == 2


def test_batch_invariant_calls_may_have_other_kernels(compiled):
    line = "b=40,hq=8,sq=100,d=128"
    problem = shapes.parse(line)
    other = SPEC.label(SPEC.pick(problem.without_batch()))
    assert other != name_of(line), "choose a problem for which the batch matters"
    assert [kernel.binary.name for kernel in warmup([line], batch_invariant=True)] == [other]


def test_problems_without_a_kernel(compiled):
    from dataclasses import replace

    assert warmup([]) == []
    assert warmup([replace(shapes.parse(SMALL), seqlen_k=0)]) == []  # answered without one
    with pytest.raises(ArgumentError, match="float32"):
        warmup([replace(shapes.parse(SMALL), dtype="float32")])
    with pytest.raises(ArgumentError, match="problems: received 3"):
        warmup([3])
    with pytest.raises(ArgumentError, match="d in shape"):
        warmup([{"hq": 8, "sq": 300, "d": 60}])
    with pytest.raises(ArgumentError, match="jobs"):
        warmup([SMALL], jobs=0)
    assert compiled == []


def test_a_folder_that_was_cleared_is_filled_again(compiled):
    from rtk.cache import default_cache

    warmup([SMALL])
    default_cache().clear()
    assert warmup([SMALL])[0].stored and compiled == [name_of(SMALL)]  # this process still had it
    assert len(default_cache().items()) == 1


def test_a_folder_for_a_container(compiled, tmp_path, monkeypatch):
    warmup([SMALL])
    out = tmp_path / "image" / "rtk"
    found = warmup([SMALL, CAUSAL], out=out)
    assert all(kernel.stored for kernel in found)
    assert len(Cache(out).items()) == 2 and len(Cache(tmp_path / "cache").items()) == 1
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert {stat.S_IMODE((out / name).stat().st_mode) for name in os.listdir(out)} == {0o644}
    # Elsewhere: searched first, and only read.
    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    monkeypatch.setenv("RTK_CACHE_DIR", f"{out}{os.pathsep}{tmp_path / 'other'}")
    jit._memory.clear()
    compiled.clear()
    kernels = warmup([SMALL, CAUSAL, WIDE])
    assert [kernel.binary.report.from_cache for kernel in kernels] == [True, True, False]
    assert all(kernel.stored for kernel in kernels) and compiled == [name_of(WIDE)]
    assert {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)} == before
    assert len(Cache(tmp_path / "other").items()) == 1


def test_what_cannot_be_stored_is_said(compiled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="memory only"):
        found = warmup([SMALL], out=tmp_path / "file" / "cache")
    assert [kernel.stored for kernel in found] == [False]
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.warns(CacheWarning, match="written by others"):
        assert [kernel.stored for kernel in warmup([SMALL], out=tmp_path / "open")] == [False]


# --- the command ------------------------------------------------------------------------------------------------------


def test_shapes_and_files(capsys, compiled, tmp_path):
    (tmp_path / "more.json").write_text(json.dumps([CAUSAL, {"b": 40, "hq": 8, "sq": 300, "d": 128, "dtype": "fp16"}]))
    code, out, err = call(capsys, "warmup", "--shape", SMALL, "--shape", CAUSAL, str(tmp_path / "more.json"))
    assert code == 0
    assert f"{tmp_path / 'cache'}: 3 kernels for 4 problems, 3 compiled in " in out
    assert sorted(compiled) == sorted(map(name_of, (SMALL, CAUSAL, WIDE)))
    lines = err.splitlines()  # one a step where it is not a terminal
    assert [line.partition("] ")[2].partition(" of")[0] for line in lines] == ["1", "2", "3"]
    assert "left" in lines[0] and "left" not in lines[2] and lines[2].startswith("[####")
    jit._memory.clear()
    code, out, err = call(capsys, "warmup", "--shape", SMALL, "--jobs", "1", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["compiled"], report["from_cache"], report["ok"]) == (0, 1, True)
    (kernel,) = report["kernels"]
    assert (kernel["name"], kernel["registers"], kernel["stored"]) == (name_of(SMALL), 168, True)
    assert [shapes.parse(line) for line in kernel["problems"]] == [shapes.parse(SMALL)]


def test_out(capsys, compiled, tmp_path):
    code, out, _ = call(capsys, "warmup", "--shape", SMALL, "--out", str(tmp_path / "filled"))
    assert code == 0 and f"{tmp_path / 'filled'}: 1 kernel for 1 problem" in out
    assert len(Cache(tmp_path / "filled").items()) == 1 and not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore::rtk.errors.CacheWarning")
def test_a_folder_that_cannot_be_filled_is_exit_code_1(capsys, compiled, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = call(capsys, "warmup", "--shape", SMALL, "--out", str(tmp_path / "file" / "x"), "--json")
    assert code == 1 and json.loads(out)["ok"] is False
    assert "1 of 1 kernels could not be stored" in err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "at least one problem"),
        (["--shape", "hq=8,sq=300,d=60"], 2, "d in shape 'hq=8,sq=300,d=60': received 60; accepted: a multiple of 8"),
        (["--shape", "hq=8,sq=300,d=64,depth=3"], 2, "the key 'depth'"),
        (["--shape"], 2, "expected one argument"),
        (["--shape", SMALL, "--jobs", "0"], 2, "0 is not at least 1"),
        (["absent.toml"], 1, "absent.toml: received a file that cannot be read"),
        (["a.txt"], 1, "a.txt"),
    ],
)
def test_a_wrong_command_line_names_what_is_wrong(capsys, compiled, arguments, code, complaint):
    got, out, err = call(capsys, "warmup", *arguments)
    assert (got, out) == (code, "")
    assert complaint in err and "Traceback" not in err
    assert compiled == []


def test_without_nvrtc_it_says_what_to_install(capsys, monkeypatch):
    def absent():
        raise ToolchainError("NVRTC was not found", "pip install nvrtc")

    monkeypatch.setattr(toolchain, "nvrtc", absent)
    assert call(capsys, "warmup", "--shape", SMALL) == (1, "", "rtk: NVRTC was not found\n  try: pip install nvrtc\n")


def test_the_time_that_is_left(monkeypatch):
    lines: list[str] = []
    now = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    bar = command.Bar(lines.append)

    def step(done: int, seconds: float, cached: bool) -> str:
        now[0] += seconds
        report = CompileReport("k", 8, 0, 0, 0, 0, (), 1.0, "1.2.3", cached)
        bar.step(done, 100, Binary("k", "key", b"", report))
        return lines[-1]

    assert step(1, 0.1, True) == "[" + "." * 24 + "] 1 of 100: k"  # nothing is known of the others yet
    assert "2 of 100, about 3 min 16 s left" in step(2, 1.9, False)
    assert "3 of 100, about 1 min 37 s left" in step(3, 0, False)
    for done in range(4, 99):
        step(done, 1, False)
    assert "98 of 100, about 2.0 s left" in lines[-1]
    assert step(100, 0, True) == "[" + "#" * 24 + "] 100 of 100: k"


# --- for real ---------------------------------------------------------------------------------------------------------


def test_a_warmed_process_compiles_nothing(tmp_path):
    """With the real compiler, and without a GPU: one process warms up, the next one has it all."""
    try:
        toolchain.nvrtc()
    except ToolchainError:
        pytest.skip("no NVRTC is installed")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-m", "rtk.cli", "warmup", "--shape", SMALL, "--shape", WIDE, "--json"]
    reports = []
    for _ in range(2):
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    assert [report["compiled"] for report in reports] == [2, 0]
    assert all(kernel["registers"] and kernel["cubin_bytes"] > 1000 for kernel in reports[1]["kernels"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.build(SPEC.render(chosen(shapes.parse(WIDE)))).report.from_cache
