"""Compiles the whole config space of the attention kernel and lists every config that spills or does not compile.

    make compile-all                                  # 80,000 configs: about 14 hours of one core
    make compile-all ARGS="--head-dim 128 --head-dim 64x256 --mask both"

Each result is a line of the report, keyed by all that went into it: a run that was stopped goes on where it was, and
after a change only what changed is compiled again. RTK_NVRTC names another compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import config_space  # noqa: E402

from rtk import jit, toolchain  # noqa: E402
from rtk.cache import Cache  # noqa: E402
from rtk.errors import CompileError  # noqa: E402
from rtk.kernels.attention_fwd import SPEC  # noqa: E402

_CACHE_BYTES = 64 << 20  # cubins are not what is wanted here
_SHOW_EVERY_S = 2.0


def dims(text: str) -> tuple[int, int]:
    """ "128" or "192x128"."""
    q, _, v = text.partition("x")
    return int(q), int(v or q)


def read(report: Path) -> dict[str, dict[str, Any]]:
    """The lines of an earlier run, by key. The last may have been cut off."""
    found = {}
    if report.exists():
        for line in report.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry
            except (ValueError, KeyError):
                continue
    return found


def compile_one(config: Any, key: str, cache: Cache) -> dict[str, Any]:
    try:
        report = jit.build(SPEC.render(config), cache=cache).report
        problems, ms = report.problems(), round(report.compile_ms)
    except CompileError as error:
        problems, ms = [f"{SPEC.label(config)}: {error.log.strip() or error.message}"], 0
    return {"key": key, "label": SPEC.label(config), "ms": ms, "problems": problems}


def compile_all(
    configs: Iterable[Any], report: Path, jobs: int, limit_s: float = float("inf")
) -> tuple[list[dict[str, Any]], int]:
    """(what the report has for these configs, how many are still to compile once the time is up)."""
    build = toolchain.nvrtc().build
    keys = {jit.key(SPEC.render(config), build): config for config in configs}
    known = read(report)
    done = [known[key] for key in keys if key in known]
    waiting = [(key, config) for key, config in keys.items() if key not in known]
    print(f"NVRTC {build}: {len(keys)} configs, {len(done)} of them in {report}; {jobs} jobs", flush=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    started = shown = time.monotonic()

    def work(folder: str) -> Iterator[dict[str, Any]]:
        cache = Cache(folder, max_bytes=_CACHE_BYTES)

        def one(task: tuple[str, Any]) -> dict[str, Any] | None:
            return compile_one(task[1], task[0], cache) if time.monotonic() - started < limit_s else None

        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield from (entry for entry in pool.map(one, waiting) if entry is not None)
            except BaseException:  # Ctrl-C too: what is compiled now is finished, nothing else begun
                pool.shutdown(cancel_futures=True)
                raise

    with tempfile.TemporaryDirectory() as folder, report.open("a") as file:
        for count, entry in enumerate(work(folder), 1):
            file.write(json.dumps(entry) + "\n")
            done.append(entry)
            if entry["problems"]:
                print(*entry["problems"], sep="\n", flush=True)
            elapsed = time.monotonic() - started
            if time.monotonic() - shown > _SHOW_EVERY_S:
                file.flush()
                shown = time.monotonic()
                left_s = elapsed / count * (len(waiting) - count)
                print(f"{len(done)} of {len(keys)}, about {left_s / 60:.0f} minutes left", flush=True)
    return done, len(keys) - len(done)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile the whole config space", allow_abbrev=False)
    parser.add_argument("--head-dim", type=dims, action="append", default=[], metavar="D or DxDV")
    parser.add_argument("--mask", choices=config_space.MASKS, action="append", default=[])
    parser.add_argument("--dtype", choices=config_space.DTYPES, action="append", default=[], help="default: by turns")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the next run goes on")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "compile-all.jsonl")
    chosen = parser.parse_args(arguments)
    configs = config_space.whole(tuple(chosen.head_dim), tuple(chosen.mask), tuple(chosen.dtype))
    done, left = compile_all(configs, chosen.report, chosen.jobs, 60 * chosen.minutes)
    wrong = [entry for entry in done if entry["problems"]]
    print(f"\n{len(done)} configs compiled, {len(wrong)} of them with problems; {left} left")
    for entry in wrong:
        print(*entry["problems"], sep="\n")
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
