"""The tables of a run: built once, as text, for the terminal (rich), Markdown and HTML alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rtk.benchmarks import records
from rtk.benchmarks.records import Ratio, Record, Run
from rtk.benchmarks.report import NAMES, floor, milliseconds, name, need, ordered, standing, warnings

__all__ = ["Sheet", "detail", "ratio_text", "sheets", "show"]

_NONE = "–"
_FILE_WIDTH = 220  # columns, where no terminal says how many there are
_OPTIONAL = ("rtk spread", "bound", "rtk of ceiling", "best peer")  # columns, the first to go first


@dataclass(frozen=True)
class Sheet:
    """One table: its first `left` columns are words, the others figures. `note` says what the figures are."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    left: int = 1
    warnings: list[str] = field(default_factory=list)


def sheets(run: Run) -> list[Sheet]:
    """The tables of a run, a row per cell and a column per implementation, in what its suite is about."""
    makers: dict[str, Callable[[Run], list[Sheet]]] = {
        "small": lambda run: [_times(run)],
        "long": lambda run: [_throughput(run), _memory(run)],
        "coldstart": lambda run: [_coldstart(run)],
        "overhead": lambda run: [_overhead(run)],
        "accuracy": lambda run: [_accuracy(run)],
    }
    make = makers.get(run.suite)
    found = [sheet for sheet in (make(run) if make else [_throughput(run)]) if sheet.rows]
    if found:
        found[0].warnings.extend(warnings(run))
    return found


def detail(run: Run) -> Sheet:
    """Every record that has a time, a row each: time, spread, throughput, floor."""
    names, cells = _names(run), records.cells(run.records)
    header = [
        "problem",
        "implementation",
        "µs",
        "spread",
        "TFLOP/s",
        "of ceiling",
        "floor µs",
        "bound by",
        "vs best peer",
    ]
    rows = []
    for record in records.measured(run.records):
        bound = floor(record, run.meta)
        cell = cells[records.cell_key(record)] if record["impl"] == records.RTK else {}
        rows.append(
            [
                names[records.cell_key(record)],
                name(record["impl"]),
                _number(records.cost(record), 2),
                _percent(records.spread(record)),
                _number(record.get("tflops")),
                _percent(record.get("ceiling_share")),
                _number(bound[1], 2) if bound else _NONE,
                bound[0] if bound else _NONE,
                _versus(cell),
            ]
        )
    return Sheet("All times", header, rows, left=2)


def ratio_text(ratio: Ratio | None) -> str:
    """A ratio with its quartiles, "1.042 (1.038–1.047)"; ties say so, "tie 0.997 (0.990–1.004)"."""
    if ratio is None:
        return _NONE
    tie = "tie " if ratio.verdict == "tie" else ""
    return f"{tie}{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def show(run: Run, console: Any = None) -> None:
    """Print a run's tables. console: a rich Console; one on standard output where there is none.

    ToolchainError where rich is missing.
    """
    console = console or _console()
    text = need("rich.text").Text
    for sheet in sheets(run):
        console.print(_fitting(sheet, f"{run.gpu}: {sheet.title}", console))
        if sheet.note:
            console.print(text(sheet.note, style="dim"))
        for warning in sheet.warnings:
            console.print(text(warning, style="bold red" if warning.startswith("IMPOSSIBLE") else "yellow"))
    total = standing(run.records)
    if total:
        console.print(text(f"rtk against the best peer of each cell: {total}"))
    console.print()


def _console() -> Any:
    """On standard output; as wide as a table needs where that is no terminal."""
    return need("rich.console").Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def _fitting(sheet: Sheet, title: str, console: Any) -> Any:
    """A rich table, without what can be done without where the console is too narrow for all of it."""
    measured = need("rich.measure").Measurement.get
    left_out: set[str] = set()
    for column in ("", *_OPTIONAL):
        left_out.add(column)
        table = _rich_table(sheet, title, left_out)
        if measured(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
    return table


def _rich_table(sheet: Sheet, title: str, left_out: set[str]) -> Any:
    text = need("rich.text").Text
    box = need("rich.box").SIMPLE_HEAD
    table = need("rich.table").Table(
        title=text(title), title_justify="left", title_style="bold", box=box, pad_edge=False, padding=(0, 1)
    )
    kept = [index for index, column in enumerate(sheet.header) if column not in left_out]
    for index in kept:
        justify = "left" if index < sheet.left else "right"
        table.add_column(text(_short(sheet.header[index])), justify=justify, no_wrap=True)
    for row in sheet.rows:
        table.add_row(*(text(_short(row[index]), style=_style(row[index])) for index in kept))
    return table


def _short(text: str) -> str:
    """With the short names of implementations: a terminal has no room for the long ones."""
    for short, long in NAMES.items():
        if text.startswith(long):
            return short + text[len(long) :]
    return text


def _style(cell: str) -> str:
    return {"error": "yellow", "tie": "dim"}.get(cell.partition(" ")[0], "")


# ----------------------------------------------------------------------------------------------------------- the sheets


def _throughput(run: Run) -> Sheet:
    note = "TFLOP/s, causal counts half. vs best peer: ratio of speeds over the rounds, with its quartiles."
    return _timed(run, "TFLOP/s", lambda record: _number(record.get("tflops")), note)


def _times(run: Run) -> Sheet:
    def text(record: Record) -> str:
        us, heads = records.cost(record) or 0.0, record.get("heads_q")
        return f"{us:.1f} ({us / heads:.3f})" if heads else f"{us:.1f}"

    return _timed(run, "µs", text, "µs of a call, in brackets per head of q (all of the batch together).")


def _timed(run: Run, unit: str, text: Callable[[Record], str], note: str) -> Sheet:
    """A column per implementation, and how rtk stands: share of the ceiling, ratio, spread, share of the floor."""
    timed = {str(record["impl"]) for record in run.records if records.cost(record) or record.get("error")}
    impls, names = ordered(timed), _names(run)
    header = ["problem", *map(name, impls), "rtk of ceiling", "rtk vs best peer", "best peer", "rtk spread", "bound"]
    rows = []
    for key, cell in records.cells(run.records).items():
        if not any(impl in cell for impl in impls):
            continue
        ours, peer = cell.get(records.RTK, {}), records.best_peer(cell)
        rows.append(
            [
                names[key],
                *(_cell(cell.get(impl), text) for impl in impls),
                _percent(ours.get("ceiling_share")),
                _versus(cell),
                name(peer["impl"]) if peer else _NONE,
                _percent(records.spread(ours)),
                _bound(ours, run),
            ]
        )
    note += " spread: distance of the quartiles. bound: the floor that binds, and its share of rtk's time."
    return Sheet(f"{run.meta.get('title') or run.suite} ({unit})", header, rows, note)


def _memory(run: Run) -> Sheet:
    note = "Peak of device memory during a call beyond its inputs; the result is among it."
    return _pivot(run, "peak extra memory", "peak_extra_bytes", _bytes, note)


def _overhead(run: Run) -> Sheet:
    return _pivot(run, "CPU time of a call", "cpu_us", lambda us: f"{us:.2f}", "µs of CPU time until a call returns.")


def _accuracy(run: Run) -> Sheet:
    keys = [("rms_error", "RMS"), ("max_error", "max")]
    impls, names = ordered(str(record["impl"]) for record in run.records), _names(run)
    header = ["problem", *(f"{name(impl)} {word}" for impl in impls for _, word in keys)]
    rows = []
    for key, cell in records.cells(run.records).items():
        fields = [_field(cell.get(impl), key, _error) for impl in impls for key, _ in keys]
        rows.append([names[key], *fields])
    note = "Errors against float64, as a share of the RMS of the float64 result."
    return Sheet(str(run.meta.get("title") or run.suite), header, rows, note)


def _coldstart(run: Run) -> Sheet:
    keys = {
        "import_ms": "import",
        "first_call_ms": "first call",
        "disk_call_ms": "from disk",
        "second_call_ms": "second",
    }
    names = _names(run)
    header = ["problem", "implementation", *keys.values()]
    rows = [
        [names[records.cell_key(r)], name(r["impl"]), *(_field(r, key, milliseconds) for key in keys)]
        for r in run.records
    ]
    note = (
        "ms in a fresh process: importing the library, the first call with nothing compiled or cached, the first call "
        "of a process that finds the disk cache filled, and the call after it."
    )
    return Sheet(f"{run.meta.get('title') or run.suite} (ms)", header, rows, note, left=2)


def _pivot(run: Run, what: str, key: str, text: Callable[[float], str], note: str) -> Sheet:
    impls = ordered(str(r["impl"]) for r in run.records if r.get(key) is not None or r.get("error"))
    names = _names(run)
    rows = [
        [names[cell_key], *(_field(cell.get(impl), key, text) for impl in impls)]
        for cell_key, cell in records.cells(run.records).items()
        if any(record.get(key) is not None for record in cell.values())
    ]
    return Sheet(f"{run.meta.get('title') or run.suite}: {what}", ["problem", *map(name, impls)], rows, note)


# ------------------------------------------------------------------------------------------------------------ the cells


def _names(run: Run) -> dict[records.Cell, str]:
    return records.labels(records.cells(run.records))


def _cell(record: Record | None, text: Callable[[Record], str]) -> str:
    if record is None:
        return _NONE
    if record.get("error"):
        return "error"
    return text(record) if records.cost(record) else _NONE


def _field(record: Record | None, key: str, text: Callable[[float], str]) -> str:
    if record is not None and record.get(key) is not None:
        return text(record[key])
    return "error" if record is not None and record.get("error") else _NONE


def _versus(cell: Mapping[str, Record]) -> str:
    ours, peer = cell.get(records.RTK), records.best_peer(cell)
    return ratio_text(records.ratio(ours, peer)) if ours and peer else _NONE


def _bound(record: Mapping[str, Any], run: Run) -> str:
    found, us = floor(record, run.meta), record.get("us")
    return f"{found[0]} {found[1] / us:.0%}" if found and us else _NONE


def _number(value: float | None, digits: int = 0) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.1%}"


def _error(value: float) -> str:
    return f"{value:.2e}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
