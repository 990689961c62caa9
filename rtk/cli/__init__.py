"""The command line: ``rtk demo``, ``doctor``, ``warmup``, ``cache``, ``autotune``, ``bench``, ``profile``.

Exit codes: 0 the command did all it says, 1 it did not (the reason is printed), 2 the command line was wrong,
130 it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import rtk
from rtk.cli import profile
from rtk.errors import ArgumentError, RtkError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: the arguments after the program's name, None for sys.argv. Returns the exit code."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            return int(arguments.run(arguments))
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is met where it can be handled
    except RtkError as error:
        if os.environ.get("RTK_DEBUG") == "1":
            raise
        text = str(error)
        print(text if text.startswith("rtk:") else f"rtk: {text}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"rtk: not enough memory for this: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rtk: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rtk doctor | head`: not an error, and no second complaint while Python shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rtk", description="Hopper attention, compiled for the shape in hand.")
    parser.add_argument("--version", action="version", version=f"rtk {rtk.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="compute attention here, verify it against float64, and show the kernels",
        description="With a Hopper GPU: compile, run, verify and time attention. Without one: run the CPU path on a "
        "smaller input, verify it, and compile the Hopper kernels all the same.",
    )
    demo.add_argument("--batch", type=_positive, help="sequences (GPU: 4, CPU: 1)")
    demo.add_argument("--heads", type=_positive, help="query heads, and key/value heads (GPU: 16, CPU: 12)")
    demo.add_argument("--seqlen", type=_positive, help="tokens in a sequence (GPU: 4096, CPU: 1024)")
    demo.add_argument("--head-dim", type=_head_dim, help="a multiple of 8, at most 256 (GPU: 128, CPU: 64)")
    demo.add_argument("--cpu", action="store_true", help="do what a machine without a GPU does")
    demo.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, what is missing, and the command that mends it",
        description="Checks everything the GPU path needs. Exit code 0 only when that path can run.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    doctor.set_defaults(run=_doctor)

    warmup = commands.add_parser(
        "warmup",
        help="compile ahead the kernels that a list of problems will need",
        description="Compiles the kernels of these problems into the cache folder, in parallel; needs no GPU. A SHAPE "
        "has keys such as b=4,hq=32,hk=8,sq=4096,sk=4096,d=128,dv=128,dtype=bf16,causal,window=1024:0,softcap=30, of "
        "which hq, sq and d must be there. A FILE, .toml or .json, has a list `problems` of shapes, as such lines or "
        "as tables of such keys.",
    )
    warmup.add_argument("files", nargs="*", metavar="FILE", help="problems in TOML or JSON")
    warmup.add_argument("--shape", action="append", default=[], type=_shape, metavar="SHAPE", help="one problem")
    warmup.add_argument("--out", metavar="FOLDER", help="fill this folder, for all users to read, as for a container")
    warmup.add_argument("--jobs", type=_positive, metavar="N", help="compiles at a time (one per usable CPU)")
    warmup.add_argument("--batch-invariant", action="store_true", help="for calls with batch_invariant=True")
    warmup.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    warmup.set_defaults(run=_warmup, parser=warmup)

    cache = commands.add_parser(
        "cache",
        help="the folder of compiled kernels: show, path, prune, verify, clear",
        description="show: how many kernels, how large, and the last used. path: where. prune: delete the least "
        "recently used until the rest is within a size. verify: read every entry; exit code 1 while any is bad. clear: "
        "delete them all.",
    )
    actions = ["show", "path", "prune", "verify", "clear"]
    cache.add_argument("action", nargs="?", default="show", choices=actions, help="what to do (show)")
    cache.add_argument("--limit", type=_count, default=10, metavar="N", help="show: kernels to list (10)")
    cache.add_argument("--max-bytes", type=_size, metavar="SIZE", help="prune: 500M, 2GiB (the cache's own bound)")
    cache.add_argument("--fix", action="store_true", help="verify: delete what is bad")
    cache.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    cache.set_defaults(run=_cache, parser=cache)

    bench = commands.add_parser(
        "bench",
        help="time attention beside its peers on this GPU; report and compare what was recorded",
        description="Measures suites of problems (`rtk bench list` names them; paper where none is named), or problems "
        "of your own, with every implementation that is here, and writes FOLDER/<gpu>/<suite>.json, and without "
        "--json tables, plots and one HTML report. A run ends before --minutes are over; the same command goes on "
        "where it ended. "
        "`rtk bench report PATH ...` redraws from results files or folders, without a GPU; `rtk bench compare OLD NEW` "
        "says what changed, with exit code 1 where rtk got slower.",
    )
    bench.add_argument("what", nargs="*", metavar="SUITE", help="suites; or: list, report PATH ..., compare OLD NEW")
    bench.add_argument("--shape", action="append", default=[], type=_shape, metavar="SHAPE", help="a problem of yours")
    bench.add_argument("--file", action="append", default=[], metavar="FILE", help="problems in TOML or JSON")
    bench.add_argument("--impl", metavar="NAMES", help="only these implementations, separated by commas")
    bench.add_argument("--rounds", type=_positive, metavar="N", help="turns of each implementation (the suite's own)")
    bench.add_argument("--minutes", type=_minutes, default=9.0, metavar="M", help="end before M minutes (%(default)g)")
    bench.add_argument("--fresh", action="store_true", help="begin anew, not where an earlier run ended")
    bench.add_argument("--out", metavar="FOLDER", help="where results go (rtk-bench), or the report (beside them)")
    bench.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    bench.set_defaults(run=_bench, parser=bench)

    autotune = commands.add_parser(
        "autotune",
        help="find the fastest configuration of your problems, and carry what was found about",
        description="run: tune problems on this GPU (--shape, files of them, suites of rtk bench, --recorded); what is "
        "stored already is left, and a run that ended goes on. list: every stored choice. show --shape SHAPE: what "
        "such a call gets, and why. explain --shape SHAPE: the model's estimate beside each measured time. verify: "
        "time stored choices again. export FILE, import FILE: choices carried to another machine. clear: forget them.",
    )
    actions = ["run", "list", "show", "explain", "verify", "export", "import", "clear"]
    autotune.add_argument("action", choices=actions, help="what to do")
    autotune.add_argument("names", nargs="*", metavar="FILE|SUITE", help="run: problems; export, import: a file")
    autotune.add_argument("--shape", action="append", default=[], type=_shape, metavar="SHAPE", help="a problem")
    autotune.add_argument("--recorded", action="store_true", help="run: the problems that RTK_AUTOTUNE=record noted")
    autotune.add_argument("--minutes", type=_minutes, default=9.0, metavar="M", help="run: end before (%(default)g)")
    autotune.add_argument("--exhaustive", action="store_true", help="run: the whole space, not the model's best")
    autotune.add_argument("--again", action="store_true", help="run: what is stored already, too")
    autotune.add_argument("--gpus", default="0", metavar="LIST", help="run: all, or numbers such as 0,1 (%(default)s)")
    autotune.add_argument("--gpu", metavar="WORD", help="only choices of GPUs with this in their name")
    autotune.add_argument("--limit", type=_count, default=10, metavar="N", help="show, explain: lines (10)")
    autotune.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    autotune.set_defaults(run=_autotune, parser=autotune)

    profile.add_parser(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _head_dim(text: str) -> int:
    value = _positive(text)
    if value % 8 or value > 256:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8 up to 256")
    return value


def _size(text: str) -> int:
    from rtk.cli import cache

    try:
        return cache.size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 2GiB") from None


def _shape(text: str) -> Any:
    from rtk import shapes

    try:
        return shapes.parse(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("rtk: ")) from None


# Each command is imported only when it runs: `rtk --help` answers at once.


def _demo(arguments: argparse.Namespace) -> int:
    from rtk.cli import demo

    return demo.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from rtk.cli import doctor

    return doctor.run(arguments)


def _warmup(arguments: argparse.Namespace) -> int:
    from rtk.cli import warmup

    return warmup.run(arguments)


def _cache(arguments: argparse.Namespace) -> int:
    from rtk.cli import cache

    return cache.run(arguments)


def _autotune(arguments: argparse.Namespace) -> int:
    from rtk.cli import autotune

    return autotune.run(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from rtk.cli import bench

    return bench.run(arguments)
