"""``rtk cache``: the folders of compiled kernels: what is in them, whether it is whole, and removing it."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

from rtk.cache import Cache, Entry, Item
from rtk.cli import console
from rtk.errors import CacheWarning


def run(arguments: argparse.Namespace) -> int:
    for flag, value, action in (("--fix", arguments.fix, "verify"), ("--max-bytes", arguments.max_bytes, "prune")):
        if value is not None and value is not False and arguments.action != action:
            arguments.parser.error(f"{flag} goes with `rtk cache {action}`")
    with warnings.catch_warnings(record=True) as caught:  # trouble with a folder is part of the answer
        warnings.simplefilter("always", CacheWarning)
        report, lines = _ACTIONS[arguments.action](Cache(), arguments)
    troubles = [str(warning.message).removeprefix("rtk: ") for warning in caught]
    report["troubles"] = troubles
    if arguments.json:
        console.write_json(report)
    else:
        print("\n".join([*lines, *troubles]))
    return 0 if report.pop("ok", True) and not troubles else 1


Answer = tuple[dict[str, Any], list[str]]  # for programs, and for people


def _path(cache: Cache, arguments: argparse.Namespace) -> Answer:
    read_only = [str(folder) for folder in cache.read_only]
    return {"path": str(cache.path), "read_only": read_only}, [str(cache.path)]


def _show(cache: Cache, arguments: argparse.Namespace) -> Answer:
    items = cache.items()
    folders = [_folder(str(folder), items, True) for folder in cache.read_only]
    folders.append(_folder(str(cache.path), items, False))
    own = folders[-1]
    newest = [_kernel(item, cache.check(item)) for item in items[: arguments.limit]]
    report = {
        "path": str(cache.path),
        "entries": own["entries"],
        "bytes": own["bytes"],
        "max_bytes": cache.max_bytes,
        "folders": folders,
        "newest": newest,
    }
    lines = []
    for folder in folders:
        limit = ", only read" if folder["read_only"] else f" of at most {console.size(cache.max_bytes)}"
        lines.append(f"{folder['path']}: {_count(folder['entries'])}, {console.size(folder['bytes'])}{limit}")
    if newest:
        header = ("kernel, last used first", "size", "used", "registers", "NVRTC")
        rows = [
            (k["name"], console.size(k["bytes"]), f"{_age(k['age_s'])} ago", str(k["registers"]), k["nvrtc"])
            for k in newest
        ]
        lines += ["", console.table(header, rows)]
    return report, lines


def _prune(cache: Cache, arguments: argparse.Namespace) -> Answer:
    before = cache.stats()
    cache.prune(arguments.max_bytes)
    after = cache.stats()
    removed, freed = before["entries"] - after["entries"], before["bytes"] - after["bytes"]
    report = {"path": str(cache.path), "removed": removed, "freed_bytes": freed}
    report |= {"entries": after["entries"], "bytes": after["bytes"]}
    left = f"{_count(after['entries'])} left, {console.size(after['bytes'])}"
    return report, [f"{cache.path}: removed {_count(removed)}, {console.size(freed)}; {left}"]


def _verify(cache: Cache, arguments: argparse.Namespace) -> Answer:
    bad, good = [], 0
    for item in cache.items():
        found = cache.check(item)
        if isinstance(found, Entry):
            good += 1
        else:
            removed = arguments.fix and cache.discard(item)
            bad.append({"path": item.path, "trouble": found, "removed": removed})
    swept = cache.sweep() if arguments.fix else 0
    left = sum(not entry["removed"] for entry in bad)
    lines = [f"{entry['path']}: {entry['trouble']}{'; removed' * bool(entry['removed'])}" for entry in bad]
    lines.append(f"{_count(good)} whole, {len(bad)} not{'; `rtk cache verify --fix` removes those' * (left > 0)}")
    return {"path": str(cache.path), "good": good, "bad": bad, "swept": swept, "ok": left == 0}, lines


def _clear(cache: Cache, arguments: argparse.Namespace) -> Answer:
    removed = cache.clear()
    return {"path": str(cache.path), "removed": removed}, [f"{cache.path}: removed {_count(removed)}"]


_ACTIONS = {"show": _show, "path": _path, "prune": _prune, "verify": _verify, "clear": _clear}


def _folder(path: str, items: Sequence[Item], read_only: bool) -> dict[str, Any]:
    mine = [item for item in items if os.path.dirname(item.path) == path]
    return {"path": path, "read_only": read_only, "entries": len(mine), "bytes": sum(item.bytes for item in mine)}


def _kernel(item: Item, found: Entry | str) -> dict[str, Any]:
    meta = found.meta if isinstance(found, Entry) else {}
    return {
        "name": str(meta.get("name", found if isinstance(found, str) else "?")),
        "key": item.key,
        "bytes": item.bytes,
        "age_s": round(max(0.0, time.time() - item.used), 1),
        "registers": meta.get("registers", "?"),
        "nvrtc": str(meta.get("nvrtc", "?")),
        "read_only": item.read_only,
        "good": isinstance(found, Entry),
    }


def _count(kernels: int) -> str:
    return "1 kernel" if kernels == 1 else f"{kernels} kernels"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(text: str) -> int:
    """Bytes of "1000000", "500M" or "1.5 GiB" (units of 1024). ValueError for anything else."""
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = 1
    if digits and digits[-1] in "KMGT":
        factor = 1024 ** ("KMGT".index(digits[-1]) + 1)
        digits = digits[:-1]
    count = float(digits)
    if not 0 <= count * factor < float("inf"):
        raise ValueError
    return int(count * factor)
