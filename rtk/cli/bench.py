"""``rtk bench``: implementations side by side on this GPU, and what people read of it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtk import shapes
from rtk.benchmarks import records, report
from rtk.cli import bench_report, console

_DEFAULT_SUITES = ("paper",)
_ROWS = 12  # of the live table


def run(arguments: argparse.Namespace) -> int:
    action, *rest = arguments.what or ("",)
    problems = list(arguments.shape)
    for file in arguments.file:
        problems += shapes.load(file)
    if action == "report":
        return bench_report.report(rest, arguments.out, arguments.json)
    if action == "compare":
        if len(rest) != 2:
            arguments.parser.error("compare takes two results files or folders: OLD NEW")
        return bench_report.compare(rest[0], rest[1], arguments.json)
    if action == "list":
        if rest:
            arguments.parser.error("list takes nothing more")
        return _list(arguments.json)
    return _measure(arguments, problems)


def _list(as_json: bool) -> int:
    from rtk.benchmarks import peers, suites

    found, absent = peers.present()
    if as_json:
        suites_found = {
            suite.name: {"title": suite.title, "cells": len(suite.cells)} for suite in suites.known().values()
        }
        console.write_json({"suites": suites_found, "present": list(found), "absent": absent})
        return 0
    rows = [(suite.name, str(len(suite.cells)), suite.title) for suite in suites.known().values()]
    print(console.table(("suite", "cells", "what"), rows, left=3))
    print()
    rows = [(name, "yes", "") for name in found] + [(name, "no", reason[:90]) for name, reason in absent.items()]
    print(console.table(("implementation", "here", "why not"), rows, left=3))
    return 0


def _measure(arguments: argparse.Namespace, problems: Sequence[Any]) -> int:
    from rtk import driver
    from rtk.benchmarks import run as runner
    from rtk.benchmarks import suites

    if not arguments.json:  # now, and not when nine minutes have been measured
        for module in ("rich", "matplotlib", "jinja2"):
            report.need(module)
    chosen = [suites.find(name) for name in arguments.what or (() if problems else _DEFAULT_SUITES)]
    if problems:
        chosen.append(runner.own_suite(problems))
    impls = [name.strip() for name in arguments.impl.split(",")] if arguments.impl else None
    folder = Path(arguments.out or "rtk-bench") / folder_of(driver.device_properties(runner.gpu()).name)
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes = []
    for suite in chosen:
        with Live(quiet=arguments.json) as live:
            options = {"impls": impls, "rounds": arguments.rounds, "deadline": deadline, "fresh": arguments.fresh}
            outcomes.append(runner.run(suite, folder, live, **options))
        if not outcomes[-1].whole:
            break
    whole = len(outcomes) == len(chosen) and outcomes[-1].whole
    if arguments.json:
        results = {outcome.path.name: {"meta": outcome.meta, "records": outcome.records} for outcome in outcomes}
        console.write_json({"folder": str(folder), "whole": whole, "results": results})
    else:
        from rtk.benchmarks.report import table

        for outcome in outcomes:
            table.show(records.Run(outcome.meta, outcome.records, outcome.path))
    if not whole:
        last = outcomes[-1]
        left = f"{last.done} of {last.total} cells of {last.meta['suite']} are done"
        print(f"rtk: {left}: the same command goes on from there", file=sys.stderr)
        return 1
    if not arguments.json:
        bench_report.draw(report.in_order(records.read_all([folder])), folder)
        print(f"results, tables, plots and report.html: {folder}")
    return 0


def folder_of(gpu: str) -> str:
    """A folder's name for a GPU: "h200" of "NVIDIA H200", "h100" of "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    models = [word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)]
    return models[0] if models else "-".join(words) or "gpu"


class Live:
    """What is seen of a run: the latest cells, a bar and the time that is left; lines where no one watches."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._rows: list[tuple[str, dict[str, str]]] = []
        self._impls: list[str] = []
        self._screen: Any = None

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen is not None:
            self._screen.stop()

    def started(self, suite: Any, meta: dict[str, Any], done: Sequence[dict[str, Any]]) -> None:
        self._impls = [name for name in meta["versions"] if name not in ("torch", "nvrtc", "python", "cupy")]
        if self._quiet:
            return
        for name, reason in meta["absent"].items():
            print(f"not here: {name}: {reason[:100]}", file=sys.stderr)
        if not sys.stderr.isatty():
            print(f"{suite.name}: {suite.title}, {len(suite.cells)} cells on {meta['gpu']}", file=sys.stderr)
            return
        from rich.console import Console
        from rich.live import Live as Screen
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns)
        before = len(records.cells(done))
        self._task = self._progress.add_task(suite.title, total=len(suite.cells), completed=before)
        self._screen = Screen(self._progress, console=Console(stderr=True), refresh_per_second=4)
        self._screen.start()

    def measured(self, found: Sequence[dict[str, Any]], done: int, total: int) -> None:
        if self._quiet or not found:
            return
        (label,) = set(records.labels([records.cell_key(found[0])]).values())
        shown = {record["impl"]: _figure(record) for record in found}
        if self._screen is None:
            figures = "  ".join(f"{name} {figure}" for name, figure in shown.items())
            print(f"[{done}/{total}] {label}: {figures}", file=sys.stderr)
            return
        self._rows.append((label, shown))
        self._progress.update(self._task, completed=done)
        self._screen.update(self._drawn())

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, header_style="dim")
        table.add_column("problem")
        for name in self._impls:
            table.add_column(name, justify="right")
        for label, shown in self._rows[-_ROWS:]:
            table.add_row(label, *(shown.get(name, "") for name in self._impls))
        return Group(table, self._progress)


def _figure(record: dict[str, Any]) -> str:
    """What a record shows in one word."""
    if record.get("error"):
        return "–"
    for key, unit in (("cpu_us", "µs CPU"), ("first_call_ms", "ms")):
        if record.get(key) is not None:
            return f"{record[key]:.1f} {unit}"
    if record.get("us") is not None:
        return f"{record['tflops']:.0f}" if record["us"] >= 100 else f"{record['us']:.1f} µs"
    return f"{record.get('rms_error') or float('nan'):.2e}"
