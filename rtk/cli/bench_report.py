"""``rtk bench report`` and ``rtk bench compare``: from results files to what people read. Neither needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rtk.benchmarks import records
from rtk.benchmarks.records import Run
from rtk.cli import console
from rtk.errors import ArgumentError

__all__ = ["compare", "report"]


def report(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None, json: bool = False
) -> int:
    """Print the tables of these results files, or folders of them, and write report.md, report.html and PNGs.

    out: the folder to write into; None for the one in which the first file lies. With `json` one JSON object, the names
    of the files written and where rtk stands, is printed instead. Returns 0; ArgumentError for a file that is no
    results file, ToolchainError for a library that is missing, before anything is written.
    """
    from rtk.benchmarks.report import in_order, need, standing, table, warnings

    runs = in_order(_one_per_suite(records.read_all(paths)))
    if not json:
        need("rich")
    folder = Path(out) if out is not None else _folder_of(runs)
    written = draw(runs, folder)
    if json:
        totals = {run.suite: standing(run.records) for run in runs}
        suites = {suite: asdict(total) if total else None for suite, total in totals.items()}
        said = {run.suite: warnings(run) for run in runs}
        console.write_json({"written": list(map(str, written)), "suites": suites, "warnings": said})
        return 0
    for run in runs:
        table.show(run)
    print(f"wrote {len(written)} files; open {folder / 'report.html'}")
    return 0


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write report.md, report.html and the PNGs of these runs, one a suite, into a folder; returns what was written."""
    from rtk.benchmarks.report import html, markdown, need, plots

    for module in ("matplotlib", "jinja2"):
        need(module)
    drawn = {run.suite: list(plots.draw(run).items()) for run in runs}
    files: dict[str, bytes] = {f"{name}.png": png for images in drawn.values() for name, png in images}
    beside = [(suite, f"{name}.png") for suite, images in drawn.items() for name, _ in images]
    files["report.md"] = markdown.render(runs, beside).encode()
    files["report.html"] = html.render(runs, drawn).encode()
    return _write(folder, files)


def compare(old: str | os.PathLike[str], new: str | os.PathLike[str], json: bool = False) -> int:
    """Compare two results files, or two folders of them. Returns 1 where rtk became slower beyond noise, else 0.

    ArgumentError for a file that is no results file, and where the two have no time of the same problem in common.
    """
    from rtk.benchmarks.report.compare import compare as compared

    found = compared(records.read_all([old]), records.read_all([new]))
    if not found.changes:
        raise ArgumentError(f"{old} and {new}", "no time of the same problem in both", "two runs of one suite")
    if json:
        console.write_json(found.to_json())
    else:
        print(found.text())
    return 1 if found.regressions else 0


def _one_per_suite(runs: list[Run]) -> list[Run]:
    """Names of plots and sections are suites: two files of one suite would overwrite each other."""
    seen: dict[str, Run] = {}
    for run in runs:
        if run.suite in seen:
            received = f"the suite {run.suite!r} in {seen[run.suite].path} and in {run.path}"
            raise ArgumentError("results", received, "each suite once; `rtk bench compare` sets two runs side by side")
        seen[run.suite] = run
    return runs


def _folder_of(runs: Sequence[Run]) -> Path:
    path = runs[0].path
    return path.parent if path is not None else Path()


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
    except OSError as error:
        raise ArgumentError(str(folder), f"what cannot be written: {error}", "a folder that can be written") from None
    return [folder / name for name in files]
