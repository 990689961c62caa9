"""``rtk warmup``: kernels compiled ahead, for problems named on the command line or in files."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rtk import jit, shapes, warmup
from rtk.cache import default_cache
from rtk.cli import console

_BAR_CHARACTERS = 24


def run(arguments: argparse.Namespace) -> int:
    problems = list(arguments.shape)
    for file in arguments.files:
        problems += shapes.load(file)
    if not problems:
        arguments.parser.error("name at least one problem: --shape SHAPE, or a file of them")
    started = time.monotonic()
    with console.Progress(quiet=arguments.json) as progress:
        bar = Bar(progress)
        found = warmup.warmup(
            problems,
            out=arguments.out,
            jobs=arguments.jobs,
            batch_invariant=arguments.batch_invariant,
            progress=bar.step,
        )
    folder = arguments.out or str(default_cache().path)
    compiled = sum(not kernel.binary.report.from_cache for kernel in found)
    report = {
        "folder": folder,
        "problems": len(problems),
        "compiled": compiled,
        "from_cache": len(found) - compiled,
        "seconds": round(time.monotonic() - started, 3),
        "kernels": [_as_json(kernel) for kernel in found],
        "ok": all(kernel.stored for kernel in found),
    }
    if arguments.json:
        console.write_json(report)
    else:
        count = f"{len(found)} kernel{'s' * (len(found) != 1)} for {len(problems)} problem{'s' * (len(problems) != 1)}"
        print(f"{folder}: {count}, {compiled} compiled in {_duration(time.monotonic() - started)}, the rest were there")
    lost = sum(not kernel.stored for kernel in found)
    if lost:
        print(f"rtk: {lost} of {len(found)} kernels could not be stored in {folder}", file=sys.stderr)
    return 0 if report["ok"] else 1


def _as_json(kernel: warmup.Warmed) -> dict[str, Any]:
    return {
        **kernel.binary.report.to_json(),
        "key": kernel.binary.key,
        "cubin_bytes": len(kernel.binary.cubin),
        "stored": kernel.stored,
        "problems": [shapes.describe(problem) for problem in kernel.problems],
    }


class Bar:
    """How far it is, and how long the rest will take: at the pace of what had to be compiled so far."""

    def __init__(self, progress: console.Progress) -> None:
        self._progress = progress
        self._started = time.monotonic()
        self._compiled = 0

    def step(self, done: int, total: int, binary: jit.Binary) -> None:
        self._compiled += not binary.report.from_cache
        filled = _BAR_CHARACTERS * done // total
        line = f"[{'#' * filled}{'.' * (_BAR_CHARACTERS - filled)}] {done} of {total}"
        if self._compiled and done < total:
            left_s = (time.monotonic() - self._started) / self._compiled * (total - done)
            line += f", about {_duration(left_s)} left"
        self._progress(f"{line}: {binary.name}")


def _duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min 20 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
