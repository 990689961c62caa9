"""``rtk autotune``: the stored choices of configurations, looked at and carried about."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rtk import driver, kernels, shapes, toolchain
from rtk.autotune import choice, exchange, model, search, session
from rtk.autotune.keys import USUAL_GPU, Choice, Gpu, Place, digest
from rtk.autotune.store import Store
from rtk.cache import default_cache
from rtk.cli import console
from rtk.errors import ArgumentError, ToolchainError
from rtk.kernels.attention_fwd import SPEC
from rtk.spec import config_fields


def run(arguments: argparse.Namespace) -> int:
    actions = {
        "run": _run,
        "list": _list,
        "show": _show,
        "explain": _explain,
        "verify": _verify,
        "export": _export,
        "import": _import,
        "clear": _clear,
    }
    return actions[arguments.action](arguments)


def _run(arguments: argparse.Namespace) -> int:
    problems = _problems(arguments)
    deadline = time.monotonic() + 60 * arguments.minutes
    with console.Progress(quiet=arguments.json) as progress:
        watcher = _Watcher(progress)
        try:
            summary = session.run(
                problems,
                _device(),
                watcher,
                candidates=None if arguments.exhaustive else search.CANDIDATES,
                deadline=deadline,
                again=arguments.again,
            )
        except KeyboardInterrupt:
            print(f"rtk: interrupted: {_count(len(watcher.done))} stored; the same command goes on", file=sys.stderr)
            return 130
    report = {
        "folder": str(Store().folder),
        "known": summary.known,
        "left": [shapes.describe(problem) for problem in summary.left],
        "tuned": [
            {
                "shape": found.choice.problem,
                "config": found.choice.config,
                "us": found.choice.us,
                "pick_us": found.pick_us,
                "candidates": len(found.timings),
                "seconds": round(found.seconds, 2),
                "stored": found.stored,
            }
            for found in summary.tuned
        ],
    }
    if arguments.json:
        console.write_json(report)
    else:
        rows = [
            (t.choice.problem, _fields(t.choice.config), f"{t.choice.us:.1f}", f"{t.gain:.3f}", f"{t.seconds:.1f}")
            for t in summary.tuned
        ]
        if rows:
            print(console.table(("problem", "config", "us", "over first pick", "s"), rows, left=2))
        gain = math.exp(statistics.fmean(math.log(t.gain) for t in summary.tuned)) if summary.tuned else 1.0
        known = f"{summary.known} known before"
        print(f"{_count(len(summary.tuned))} stored, {known}; {gain:.3f} times the first pick's speed")
    if summary.left:
        print(f"rtk: {len(summary.left)} problems are left: the same command goes on from there", file=sys.stderr)
    return 1 if summary.left or not all(found.stored for found in summary.tuned) else 0


def _verify(arguments: argparse.Namespace) -> int:
    """Times stored choices again."""
    rows, slower = [], 0
    for stored, now, pick in session.verify(_matching(Store().choices(), arguments.gpu), _device()):
        slower += now > pick * _SLOWER
        rows.append((stored.problem, f"{stored.us:.1f}", f"{now:.1f}", f"{pick:.1f}", _state(stored)))
    if arguments.json:
        names = ("problem", "us", "us_now", "pick_us_now", "state")
        console.write_json({"choices": [dict(zip(names, row, strict=True)) for row in rows], "slower": slower})
    else:
        print(console.table(("problem", "us then", "us now", "first pick now", "state"), rows, left=1))
        print(f"{_count(len(rows))}, {slower} of them slower than the first pick by now")
    return 1 if slower else 0


_SLOWER = 1.02


def _explain(arguments: argparse.Namespace) -> int:
    """The model's estimate beside the measured time of every candidate of one shape."""
    if len(arguments.shape) != 1:
        arguments.parser.error("explain needs one --shape SHAPE")
    (problem,) = arguments.shape
    gpu = Gpu.of(0) if driver.available() else USUAL_GPU
    timings = {tuple(sorted(t.config.items())): t for t in Store().timings(Place.of(SPEC, problem, gpu))}
    space = SPEC.configs(problem)
    estimates = model.estimate_us(SPEC, problem, space, model.Machine(sm_count=gpu.sm_count))
    found = choice.choose(SPEC, problem, gpu)
    rows = []
    for config, estimate in zip(space, estimates, strict=True):
        timed = timings.get(tuple(sorted(config_fields(config).items())))
        rows.append((timed.us if timed else None, float(estimate), config))
    rows.sort(key=lambda row: (row[0] is None, row[0] or row[1]))
    if arguments.json:
        console.write_json(
            {
                "shape": shapes.describe(problem),
                "label": SPEC.label(found.config),
                "origin": found.origin,
                "configs": [
                    {"config": config_fields(config), "us": us, "estimate_us": round(estimate, 3)}
                    for us, estimate, config in rows
                ],
            }
        )
        return 0
    print(f"{shapes.describe(problem)} on {gpu.name}: {SPEC.label(found.config)}\n  {_why(found)}")
    shown = [
        (_fields(config_fields(config)), f"{us:.1f}" if us else "-", f"{estimate:.1f}", "<" * (config == found.config))
        for us, estimate, config in rows[: arguments.limit]
    ]
    print(console.table(("config", "us", "estimate", ""), shown))
    print(f"  {len(timings)} of {len(space)} configs were timed")
    return 0


class _Watcher:
    """A line that is rewritten as problems are tuned, with the time that is left."""

    def __init__(self, progress: console.Progress) -> None:
        self._progress, self._begun = progress, time.monotonic()
        self._head = ""
        self.done: list[search.Tuned] = []

    def begun(self, problem: Any, number: int, total: int) -> None:
        spent = time.monotonic() - self._begun
        left = f", about {spent / (number - 1) * (total - number + 1):.0f} s left" if number > 1 else ""
        self._head = f"[{number}/{total}{left}] {shapes.describe(problem)}"
        self._progress(self._head)

    def step(self, said: str) -> None:
        self._progress(f"{self._head}: {said}")

    def tuned(self, found: search.Tuned, number: int, total: int) -> None:
        self.done.append(found)
        self._progress(f"{self._head}: {found.choice.us:.1f} us, {found.gain:.3f} times the first pick's speed")


def _problems(arguments: argparse.Namespace) -> list[Any]:
    """Of --shape, of files, of suites of benchmarks, and of what was recorded."""
    from rtk.autotune import recording

    found = list(arguments.shape)
    for name in arguments.names:
        found += shapes.load(name) if Path(name).suffix else _suite(name)
    if arguments.recorded:
        found += shapes.load(default_cache().path / recording.NAME)
    if not found:
        arguments.parser.error("name problems: --shape SHAPE, a FILE of them, a suite of rtk bench, or --recorded")
    return found


def _suite(name: str) -> list[Any]:
    from rtk.benchmarks import suites

    return [cell.problem for cell in suites.find(name).cells if cell.op == SPEC.name]


def _device() -> int:
    if not driver.available():
        raise ToolchainError("tuning needs a GPU", "run it where `rtk doctor` is content")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    found = [(found, _state(found)) for found in _ordered(Store().choices())]
    if arguments.json:
        choices = [{**exchange.row(each), "state": state} for each, state in found]
        console.write_json({"folder": str(Store().folder), "choices": choices})
        return 0
    if not found:
        print(f"{Store().folder}: no stored choices; `rtk autotune import FILE` brings some")
        return 0
    header = ("GPU", "problem", "config", "us", "state")
    rows = [
        (c.place.gpu.name, c.problem or _text(c.place), _fields(c.config), f"{c.us:.1f}", state) for c, state in found
    ]
    print(console.table(header, rows, left=3))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    """What calls of these shapes get, and why."""
    if not arguments.shape:
        arguments.parser.error("show needs --shape SHAPE")
    gpu = Gpu.of(0) if driver.available() else USUAL_GPU
    shown = []
    for problem in arguments.shape:
        found = choice.choose(SPEC, problem, gpu)
        timings = sorted(Store().timings(Place.of(SPEC, problem, gpu)), key=lambda timed: timed.us)
        shown.append((problem, found, timings))
    if arguments.json:
        console.write_json(
            {
                "gpu": gpu.to_json(),
                "mode": choice.current_mode(),
                "shapes": [
                    {
                        "shape": shapes.describe(problem),
                        "label": SPEC.label(found.config),
                        "origin": found.origin,
                        "timings": [{"config": timed.config, "us": timed.us} for timed in timings],
                    }
                    for problem, found, timings in shown
                ],
            }
        )
        return 0
    for problem, found, timings in shown:
        print(f"{shapes.describe(problem)} on {gpu.name}: {SPEC.label(found.config)}")
        print(f"  {_why(found)}")
        for timed in timings[: arguments.limit]:
            print(f"  {timed.us:10.1f} us  {_fields(timed.config)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    path = _file(arguments)
    found = _matching(Store().choices(), arguments.gpu)
    text = exchange.render(found)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(str(path), f"what cannot be written: {error}", "a file that can") from None
    return _told(arguments, {"file": str(path), "choices": len(found)}, f"{path}: {_count(len(found))}")


def _import(arguments: argparse.Namespace) -> int:
    path = _file(arguments)
    found = _matching(exchange.read(path), arguments.gpu)
    store = Store()
    kept = sum(store.put(each) for each in found)
    usable = sum(_state(each) != "other sources" for each in found)
    said = f"{store.folder}: {_count(kept)} of {path}, {usable} of them of this version's kernels"
    _told(arguments, {"folder": str(store.folder), "choices": kept, "of_these_sources": usable}, said)
    if kept < len(found):
        lost = f"{len(found) - kept} of {len(found)}"
        print(f"rtk: {lost} choices could not be stored in {store.folder}", file=sys.stderr)
    return 0 if kept == len(found) else 1


def _clear(arguments: argparse.Namespace) -> int:
    store = Store()
    gone = store.remove(each.place for each in _matching(store.choices(), arguments.gpu))
    return _told(arguments, {"folder": str(store.folder), "removed": gone}, f"{store.folder}: {_count(gone)} removed")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _file(arguments: argparse.Namespace) -> Path:
    if len(arguments.names) != 1:
        arguments.parser.error(f"{arguments.action} needs a FILE")
    return Path(arguments.names[0])


def _matching(found: Iterable[Choice], gpu: str | None) -> list[Choice]:
    """Those of a GPU whose name has this word in it."""
    return [each for each in found if gpu is None or gpu.lower() in each.place.gpu.name.lower()]


def _ordered(found: Iterable[Choice]) -> list[Choice]:
    return sorted(found, key=lambda each: each.place.columns())


def _state(found: Choice) -> str:
    """Whether a choice is of today's kernel, and of the NVRTC here."""
    sources = {spec.name: digest(spec) for spec in kernels.SPECS}
    if sources.get(found.place.kernel) != found.place.sources:
        return "other sources"
    here = toolchain.nvrtc().build if toolchain.find_nvrtc() else ""
    return "other NVRTC" if found.nvrtc and here and found.nvrtc != here else "current"


def _why(found: choice.Chosen) -> str:
    if found.choice is None:
        return "the kernel's first pick: nothing is stored for such a problem"
    where = {
        "stored": "stored here",
        "shipped": "shipped with rtk",
        "neighbour": f"stored for its neighbour {found.choice.problem or _text(found.choice.place)}",
    }[found.origin]
    when = f" ({found.choice.date})" if found.choice.date else ""
    return f"{where}: {found.choice.us:.1f} us when it was timed{when}"


def _text(place: Place) -> str:
    return " ".join(f"{name}={value}" for name, value in (*place.bucket.exact, *place.bucket.sizes))


_FREE = ("BLOCK_M", "BLOCK_N", "STAGES", "NUM_CONSUMER_WARPGROUPS", "PINGPONG", "SCHEDULER")


def _fields(config: dict[str, int | bool]) -> str:
    """What was free to choose; all of a config that has no such fields, as of another kernel."""
    free = {name: value for name, value in config.items() if name in _FREE} or config
    return " ".join(f"{name}={int(value)}" for name, value in free.items())


def _count(number: int) -> str:
    return f"{number} choice{'s' * (number != 1)}"


def _told(arguments: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    if arguments.json:
        console.write_json(report)
    else:
        print(text)
    return 0
