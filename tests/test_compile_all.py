"""tests/compile_all.py: what `make compile-all` keeps, goes on with, and says. Nothing is compiled here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compile_all
import config_space
import pytest

from rtk.errors import CompileError, ToolchainError
from rtk.kernels.attention_fwd import SPEC

DIMS = ["--head-dim", "256", "--mask", "both"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what would have been compiled."""
    try:
        compile_all.toolchain.nvrtc()
    except ToolchainError as error:
        pytest.skip(str(error))
    labels: list[str] = []

    def compile_one(config: Any, key: str, cache: Any) -> dict[str, Any]:
        labels.append(SPEC.label(config))
        problems = [f"{labels[-1]}: spills 8 bytes"] if "n80" in labels[-1] else []
        return {"key": key, "label": labels[-1], "ms": 1, "problems": problems}

    monkeypatch.setattr(compile_all, "compile_one", compile_one)
    return labels


def run(report: Path, *more: str) -> int:
    return compile_all.main([*DIMS, "--jobs", "2", "--report", str(report), *more])


def test_all_is_compiled_once_and_problems_are_told(
    compiled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "build" / "report.jsonl"
    assert run(report) == 1
    space = list(config_space.whole(dims=((256, 256),), masks=("both",)))
    assert sorted(compiled) == sorted(SPEC.label(config) for config in space)
    wrong = [label for label in compiled if "n80" in label]
    assert wrong
    assert f"{len(space)} configs compiled, {len(wrong)} of them with problems; 0 left" in capsys.readouterr().out
    compiled.clear()
    assert run(report) == 1  # what was wrong stays wrong until the sources change
    assert not compiled
    assert wrong[0] in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(compiled: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    assert run(report, "--minutes", "0") == 3
    assert not compiled
    run(report)
    lines = report.read_text().splitlines()
    report.write_text("\n".join(lines[:10]) + "\n" + lines[10][:40])  # the last line was being written
    known = {json.loads(line)["label"] for line in lines[:10]}
    compiled.clear()
    run(report)
    assert len(compiled) == len(lines) - 10
    assert not known & set(compiled)


def test_another_compiler_begins_anew(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.jsonl"
    run(report)
    count = len(compiled)
    monkeypatch.setattr(compile_all.toolchain, "nvrtc", lambda: type("Nvrtc", (), {"build": "99.0.1"}))
    run(report)
    assert len(compiled) == 2 * count


def test_parts_of_the_space(compiled: list[str], tmp_path: Path) -> None:
    run(tmp_path / "report.jsonl", "--head-dim", "192x128", "--dtype", "float16")
    assert {label.split("_")[2] for label in compiled} == {"fp16"}
    assert {label.split("_")[3] for label in compiled} == {"d256x256", "d192x128"}


def test_the_whole_space_has_everything() -> None:
    space = list(config_space.whole(dims=((64, 64), (64, 256))))
    assert {config.BF16 for config in space} == {True, False}
    assert {(config.MASK_LEFT, config.MASK_RIGHT) for config in space} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert any(config.SOFTCAP for config in space) and any(config.PRESCALE for config in space)


def test_what_does_not_compile_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise CompileError("no", "source", "k.cu(1): error: no")

    monkeypatch.setattr(compile_all.jit, "build", build)
    config = SPEC.pick(config_space.problem((64, 64)))
    entry = compile_all.compile_one(config, "key", None)  # type: ignore[arg-type]
    assert entry["problems"] == [f"{SPEC.label(config)}: k.cu(1): error: no"]
