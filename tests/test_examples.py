"""The examples run, here on the CPU and briefly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: object, folder: Path) -> str:
    """What an example prints, run as a user would."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_train_gpt(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    files = {"--out": tmp_path / "loss.png", "--json": tmp_path / "loss.json"}
    options = [part for option in files.items() for part in option]
    said = run("train_gpt.py", "--steps", 3, "--device", "cpu", *options, folder=tmp_path)
    assert "3/3" in said and "by no more than chance" in said
    assert files["--out"].read_bytes().startswith(b"\x89PNG")
    record = json.loads(files["--json"].read_text())
    assert record["steps"] == 3 and record["seed"] == 0
    ours, theirs, other = record["losses"].values()
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(ours) == 3 and ours[0] != other[0]
    assert 4 < ours[0] < 7  # ln 256 is 5.5
