"""``rtk cache path | stats | clear``: the folder of compiled kernels."""

from __future__ import annotations

import argparse

from rtk.cache import default_cache
from rtk.cli import console


def run(arguments: argparse.Namespace) -> int:
    cache = default_cache()
    report: dict[str, object] = {"path": str(cache.path)}
    text = str(cache.path)
    if arguments.action == "stats":
        # Only what lies in the folder: hits and misses count one process, and this one has had none.
        stats = cache.stats()
        report.update({name: stats[name] for name in ("entries", "bytes", "max_bytes")})
        held, limit = console.size(stats["bytes"]), console.size(stats["max_bytes"])
        text = f"{cache.path}: {stats['entries']} kernels, {held} of at most {limit}"
    elif arguments.action == "clear":
        report["removed"] = cache.clear()
        text = f"{cache.path}: removed {report['removed']} kernels"
    if arguments.json:
        console.write_json(report)
    else:
        print(text)
    return 0
