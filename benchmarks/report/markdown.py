"""A run as Markdown: its tables, what must be known of them, and its plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rtk.benchmarks.records import Run
from rtk.benchmarks.report import name, standing
from rtk.benchmarks.report.table import Sheet, sheets

__all__ = ["render", "table"]


def table(sheet: Sheet) -> str:
    """A sheet as a Markdown table, without its title and notes."""
    lines = [_row(sheet.header), _row(["---" if i < sheet.left else "---:" for i in range(len(sheet.header))])]
    return "\n".join(lines + [_row(row) for row in sheet.rows])


def render(runs: Iterable[Run], plots: Sequence[tuple[str, str]] = ()) -> str:
    """The page of these runs. plots: (suite, file name) of PNGs beside it."""
    parts = ["# Benchmarks"]
    for run in runs:
        meta = run.meta
        versions = ", ".join(f"{key} {value}" for key, value in (meta.get("versions") or {}).items() if value)
        parts.append(f"## {run.suite}: {meta.get('title') or run.suite}")
        parts.append(f"{run.gpu}, driver {meta.get('driver', '?')}, {meta.get('date', '?')}. {versions}.")
        parts += [f"Not there: {name(impl)} ({_text(reason)})." for impl, reason in (meta.get("absent") or {}).items()]
        total = standing(run.records)
        if total:
            parts.append(f"rtk against the best peer of each cell: {total}.")
        parts += [f"![{run.suite}]({file})" for suite, file in plots if suite == run.suite]
        for sheet in sheets(run):
            parts += [f"### {sheet.title}", table(sheet), sheet.note]
            parts.append("\n".join(f"- {_text(warning)}" for warning in sheet.warnings))
        if meta.get("method"):
            parts.append(f"Method: {meta['method']}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(words: object) -> str:
    """Words of a run, an error say, as text: Markdown takes < for the beginning of a tag."""
    return " ".join(str(words).split()).replace("&", "&amp;").replace("<", "&lt;")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
