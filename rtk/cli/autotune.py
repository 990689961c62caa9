"""``rtk autotune``: the stored choices of configurations, looked at and carried about."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rtk import driver, kernels, shapes, toolchain
from rtk.autotune import choice, exchange
from rtk.autotune.keys import USUAL_GPU, Choice, Gpu, Place, digest
from rtk.autotune.store import Store
from rtk.cli import console
from rtk.errors import ArgumentError
from rtk.kernels.attention_fwd import SPEC


def run(arguments: argparse.Namespace) -> int:
    actions = {"list": _list, "show": _show, "export": _export, "import": _import, "clear": _clear}
    return actions[arguments.action](arguments)


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
    if arguments.file is None:
        arguments.parser.error(f"{arguments.action} needs a FILE")
    return Path(arguments.file)


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
