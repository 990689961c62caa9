"""``rtk autotune``: the stored choices of configurations, looked at and carried about."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rtk import driver, kernels, shapes, toolchain
from rtk.autotune import choice, exchange, manage, search, session
from rtk.autotune.keys import Choice, Gpu, Place, digest, gpu_here
from rtk.autotune.store import Store
from rtk.cache import default_cache
from rtk.cli import console
from rtk.errors import ArgumentError
from rtk.kernels.attention_fwd import SPEC
from rtk.spec import config_fields

# What each action looks at; anything else would be passed over in silence.
_OPTIONS = {
    "run": ("names", "shape", "recorded", "minutes", "exhaustive", "again", "gpus"),
    "list": ("gpu",),
    "show": ("shape", "limit"),
    "explain": ("shape", "limit"),
    "verify": ("gpu",),
    "export": ("names", "gpu"),
    "import": ("names", "gpu"),
    "clear": ("gpu",),
}


def _check_options(arguments: argparse.Namespace) -> None:
    for name in ("names", "shape", "recorded", "minutes", "exhaustive", "again", "gpus", "gpu", "limit"):
        given = getattr(arguments, name)
        if given != arguments.parser.get_default(name) and given != [] and name not in _OPTIONS[arguments.action]:
            called = f"{given[0]!r}" if name == "names" else f"--{name}"
            taken = ", ".join("FILE" if each == "names" else f"--{each}" for each in _OPTIONS[arguments.action])
            arguments.parser.error(f"{arguments.action} takes no {called}; it takes {taken}")


def run(arguments: argparse.Namespace) -> int:
    _check_options(arguments)
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
    with console.Progress(quiet=arguments.json) as progress:
        watcher = _Watcher(progress)
        try:
            summary = manage.run(
                problems,
                devices=_devices(arguments.gpus),
                exhaustive=arguments.exhaustive,
                again=arguments.again,
                minutes=arguments.minutes,
                watcher=watcher,
            )
        except KeyboardInterrupt:
            done = _count(sum(found.stored for found in watcher.done))
            print(f"rtk: interrupted: {done} stored; the same command goes on", file=sys.stderr)
            return 130
    if arguments.json:
        console.write_json(_report(summary))
    else:
        _print_summary(summary)
    for failed in summary.failed:
        print(f"rtk: not tuned: {shapes.describe(failed.problem)}: {failed.error}", file=sys.stderr)
    if summary.left:
        print(f"rtk: {len(summary.left)} problems are left: the same command goes on from there", file=sys.stderr)
    whole = not summary.left and not summary.failed and all(found.stored for found in summary.tuned)
    return 0 if whole else 1


def _report(summary: session.Summary) -> dict[str, Any]:
    return {
        "folder": str(Store().folder),
        "known": summary.known,
        "left": [shapes.describe(problem) for problem in summary.left],
        "failed": [{"shape": shapes.describe(each.problem), "error": str(each.error)} for each in summary.failed],
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


def _print_summary(summary: session.Summary) -> None:
    rows = [
        (t.choice.problem, _fields(t.choice.config), f"{t.choice.us:.1f}", f"{t.gain:.3f}", f"{t.seconds:.1f}")
        for t in summary.tuned
    ]
    if rows:
        print(console.table(("problem", "config", "us", "over first pick", "s"), rows, left=2))
    known = f"{_count(len(summary.tuned))} stored, {summary.known} known before"
    print(f"{known}; {_mean_gain(summary.tuned):.3f} times the first pick's speed")


def _mean_gain(tuned: Sequence[search.Tuned]) -> float:
    return statistics.geometric_mean(found.gain for found in tuned) if tuned else 1.0


def _verify(arguments: argparse.Namespace) -> int:
    """Times stored choices again."""
    found = manage.verify(arguments.gpu)
    slower = sum(each.slower for each in found)
    rows = [
        (each.choice.problem, *(f"{us:.1f}" for us in (each.choice.us, each.us, each.pick_us)), _state(each.choice))
        for each in found
    ]
    if arguments.json:
        names = ("problem", "us", "us_now", "pick_us_now", "state")
        console.write_json({"choices": [dict(zip(names, row, strict=True)) for row in rows], "slower": slower})
    else:
        print(console.table(("problem", "us then", "us now", "first pick now", "state"), rows, left=1))
        print(f"{_count(len(rows))}, {slower} of them slower than the first pick by now")
    return 1 if slower else 0


def _explain(arguments: argparse.Namespace) -> int:
    """The model's estimate beside the measured time of every candidate of one shape."""
    if len(arguments.shape) != 1:
        arguments.parser.error("explain needs one --shape SHAPE")
    found = manage.explain(arguments.shape[0])
    config = found.chosen.config
    if arguments.json:
        console.write_json(
            {
                "gpu": found.gpu.to_json(),
                "mode": choice.current_mode(),
                "shape": shapes.describe(found.problem),
                "label": SPEC.label(config),
                "origin": found.chosen.origin,
                "configs": [
                    {"config": config_fields(each.config), "us": each.us, "estimate_us": each.estimate_us}
                    for each in found.candidates
                ],
            }
        )
        return 0
    print(f"{shapes.describe(found.problem)} on {_named(found.gpu)}: {SPEC.label(config)}\n  {_why(found.chosen)}")
    rows = [
        (
            _fields(config_fields(each.config)),
            f"{each.us:.1f}" if each.us else "-",
            f"{each.estimate_us:.1f}",
            "<" * (each.config == config),
        )
        for place, each in enumerate(found.candidates)
        if place < arguments.limit or each.config == config
    ]
    print(console.table(("config", "us", "estimate", ""), rows))
    timed = [each for each in found.candidates if each.us is not None]
    print(f"  {len(timed)} of {len(found.candidates)} configs were timed")
    if timed:
        print(f"  {_margin(config, timed)}")
    return 0


def _margin(config: Any, timed: Sequence[manage.Candidate]) -> str:
    """Why it was chosen: what it differs in from the best of the others, and by how much it is faster."""
    ours = next((each for each in timed if each.config == config), None)
    other = next((each for each in timed if each.config != config), None)
    if ours is None or other is None or ours.us is None or other.us is None:
        return "it was not timed here" if ours is None else "no other was timed"
    mine, its = config_fields(ours.config), config_fields(other.config)
    differ = ", ".join(f"{name} {int(mine[name])}, not {int(its[name])}" for name in mine if mine[name] != its[name])
    said = f"it is {other.us / ours.us:.3f} times as fast as the best of the others, from which it differs in: {differ}"
    return f"{said}; the model expected {other.estimate_us / ours.estimate_us:.3f}"


def _named(gpu: Gpu) -> str:
    return gpu.name if driver.available() else f"{gpu.name}, assumed, since no GPU is here"


class _Watcher(session.Watcher):
    """A line that is rewritten as problems are tuned, with the time that is left."""

    def __init__(self, progress: console.Progress) -> None:
        self._progress, self._begun = progress, time.monotonic()
        self._head, self._failed = "", 0
        self.done: list[search.Tuned] = []

    def begun(self, problem: Any, number: int, total: int) -> None:
        spent, ended = time.monotonic() - self._begun, len(self.done) + self._failed
        left = f", about {spent / ended * (total - ended):.0f} s left" if ended else ""
        self._head = f"[{number}/{total}{left}] {shapes.describe(problem)}"
        self._progress(self._head)

    def step(self, said: str) -> None:
        self._progress(f"{self._head}: {said}")

    def tuned(self, found: search.Tuned, number: int, total: int) -> None:
        self.done.append(found)
        gains = f"{found.gain:.3f} times the first pick's speed, {_mean_gain(self.done):.3f} so far"
        self._progress(f"[{number}/{total}] {found.choice.problem}: {found.choice.us:.1f} us, {gains}")

    def failed(self, found: session.Failed, number: int, total: int) -> None:
        self._failed += 1
        self._progress(f"[{number}/{total}] {shapes.describe(found.problem)}: {found.error}")


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


def _devices(text: str) -> list[int]:
    """Of --gpus: "all", or numbers with commas between them."""
    if text == "all":
        return list(range(driver.device_count() if driver.available() else 0))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError("--gpus", text, "all, or GPUs' numbers such as 0,1") from None


def _list(arguments: argparse.Namespace) -> int:
    found = [(found, _state(found)) for found in _ordered(manage.stored(arguments.gpu))]
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
    gpu = gpu_here()
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
        print(f"{shapes.describe(problem)} on {_named(gpu)}: {SPEC.label(found.config)}")
        print(f"  {_why(found)}")
        for timed in timings[: arguments.limit]:
            print(f"  {timed.us:10.1f} us  {_fields(timed.config)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    path = _file(arguments)
    count = manage.export(path, arguments.gpu)
    return _told(arguments, {"file": str(path), "choices": count}, f"{path}: {_count(count)}")


def _import(arguments: argparse.Namespace) -> int:
    path, folder = _file(arguments), Store().folder
    found, kept = manage.import_(path, arguments.gpu)
    usable = sum(_state(each) != "other sources" for each in found)
    said = f"{folder}: {_count(kept)} of {path}, {usable} of them of this version's kernels"
    _told(arguments, {"folder": str(folder), "choices": kept, "of_these_sources": usable}, said)
    if kept < len(found):
        print(f"rtk: {len(found) - kept} of {len(found)} choices could not be stored in {folder}", file=sys.stderr)
    return 0 if kept == len(found) else 1


def _clear(arguments: argparse.Namespace) -> int:
    folder, gone = Store().folder, manage.clear(arguments.gpu)
    return _told(arguments, {"folder": str(folder), "removed": gone}, f"{folder}: {_count(gone)} removed")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _file(arguments: argparse.Namespace) -> Path:
    if len(arguments.names) != 1:
        arguments.parser.error(f"{arguments.action} needs a FILE")
    return Path(arguments.names[0])


def _ordered(found: Iterable[Choice]) -> list[Choice]:
    return sorted(found, key=lambda each: each.place.columns())


def _state(found: Choice) -> str:
    """Whether a choice is of today's kernel, and of the NVRTC here."""
    sources = {spec.name: digest(spec) for spec in kernels.SPECS}
    if sources.get(found.place.kernel) != found.place.sources:
        return "other sources"
    here = toolchain.nvrtc().build if toolchain.find_nvrtc() else ""
    if found.nvrtc and here and found.nvrtc != here:
        return "other NVRTC"
    return "other driver" if found.driver and search.driver_here() not in ("", found.driver) else "current"


_WITHOUT_CHOICE = {
    "model": "the cost model's pick: nothing is stored for such a problem",
    "pick": "the kernel's own pick: RTK_AUTOTUNE is off",
}


def _why(found: choice.Chosen) -> str:
    if found.choice is None:
        return _WITHOUT_CHOICE[found.origin]
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
