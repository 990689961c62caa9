"""``rtk profile``: one kernel under Nsight Compute, as a table that people can read."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from rtk.errors import ArgumentError

if TYPE_CHECKING:  # the modules behind are loaded only when the command runs: `rtk --help` answers at once
    from rtk.benchmarks.profile import Profile
    from rtk.benchmarks.profile_report import Kernel

_STALLS = 5  # reasons shown
_NAME_CHARACTERS = 100  # of a kernel's name: templates make them long
_NONE = "-"


def add_parser(commands: Any) -> None:
    """Adds the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "profile",
        help="one kernel under Nsight Compute: pipes, memory, occupancy, spills, what warps wait for",
        description="Runs Nsight Compute (ncu) on one call, at the clocks that users get, and shows where the time of "
        "its longest kernel goes. Needs a GPU, ncu, torch, and the permission to read performance counters. A SHAPE is "
        "that of `rtk warmup`.",
    )
    parser.add_argument("--shape", required=True, type=_shape, metavar="SHAPE", help="b=2,hq=16,sq=8192,d=128,causal")
    parser.add_argument("--impl", default="rtk", metavar="IMPL", help="rtk, fa3, cudnn, ... as in rtk bench (rtk)")
    parser.add_argument("--config", type=_pins, metavar="PINS", help="rtk only: BLOCK_M=128,BLOCK_N=128,...")
    parser.add_argument("--kernel", type=_regex, metavar="REGEX", help="the longest kernel whose name matches")
    parser.add_argument("--export", metavar="FILE", help="keep the report, FILE.ncu-rep, for Nsight Compute's window")
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give up after (600)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Profiles and prints. Returns 0; RtkError where there is no profile."""
    from rtk.benchmarks import profile
    from rtk.cli import console

    if arguments.config and arguments.impl != "rtk":
        arguments.parser.error("--config goes with --impl rtk")
    with console.Progress(quiet=arguments.json) as progress:
        progress(f"profiling {arguments.impl}: the kernel is replayed a few times, once for each group of counters")
        found = profile.profile(
            arguments.shape,
            arguments.impl,
            config=arguments.config,
            kernel=arguments.kernel,
            export=arguments.export,
            timeout_s=arguments.timeout or profile.TIMEOUT_S,
        )
    if arguments.json:
        console.write_json(found.to_json())
    else:
        print("\n".join(lines(found)))
    return 0


def lines(found: Profile) -> list[str]:
    """The profile for people."""
    from rtk.cli import console

    kernel = found.kernel
    pins = "".join(f" {key}={value}" for key, value in found.config.items())
    name = kernel.name if len(kernel.name) <= _NAME_CHARACTERS else f"{kernel.name[:_NAME_CHARACTERS]}..."
    shown = [f"{found.impl}{pins} on {found.gpu}: {found.shape}", f"{name}, grid {kernel.grid}, block {kernel.block}"]
    if found.kernels > 1:
        share = "" if found.kernel_share_pct is None else f", {found.kernel_share_pct:.1f} % of their time"
        shown.append(f"one of {found.kernels} kernels in the call{share}")
    shown += ["", console.table(("", "", "% of peak"), _rows(kernel))]
    stalls = [(stall.reason.replace("_", " "), f"{stall.share_pct:.1f} %", stall.meaning) for stall in kernel.stalls]
    if stalls:
        width = max(len(reason) for reason, _, _ in stalls[:_STALLS])
        shown += ["", "Warps that do not issue wait for (share of all warps' time)"]
        shown += [f"  {reason:{width}}  {share:>6}  {meaning}" for reason, share, meaning in stalls[:_STALLS]]
    if kernel.missing:
        shown += ["", f"This ncu had no number for: {', '.join(kernel.missing)}"]
    if found.report:
        shown += ["", f"Report: {found.report}"]
    return shown


def _rows(kernel: Kernel) -> list[tuple[str, str, str]]:
    def figure(key: str, unit: str = "", digits: int = 1) -> str:
        value = kernel.figures[key]
        return _NONE if value is None else f"{value:,.{digits}f}{' ' * bool(unit)}{unit}"

    return [
        ("duration", figure("duration_us", "us"), ""),
        ("SM clock", figure("sm_mhz", "MHz", 0), ""),
        ("tensor cores", "", figure("tensor_pct")),
        ("FMA pipe", "", figure("fma_pct")),
        ("special functions (exp2)", "", figure("xu_pct")),
        ("issue slots", "", figure("issue_pct")),
        ("DRAM", figure("dram_gbps", "GB/s", 0), figure("dram_pct")),
        ("L2", figure("l2_gbps", "GB/s", 0), figure("l2_pct")),
        ("L2 hit rate", figure("l2_hit_pct", "%"), ""),
        ("warps per SM", figure("warps_per_sm"), figure("occupancy_pct")),
        ("registers per thread", figure("registers_per_thread", digits=0), ""),
        ("shared memory per block", _shared(kernel), ""),
        ("spills", _spills(kernel), ""),
    ]


def _shared(kernel: Kernel) -> str:
    from rtk.cli import console

    parts = [kernel.figures[key] for key in ("shared_dynamic_bytes", "shared_static_bytes")]
    known = [part for part in parts if part is not None]
    return console.size(sum(known)) if known else _NONE


def _spills(kernel: Kernel) -> str:
    loads, stores = kernel.figures["local_loads"], kernel.figures["local_stores"]
    if loads is None or stores is None:
        return _NONE
    return "none" if loads == stores == 0 else f"{loads:,.0f} loads, {stores:,.0f} stores"


# ----------------------------------------------------------------------------------------------------------- arguments


def _shape(text: str) -> Any:
    from rtk import shapes

    return _checked(shapes.parse, text)


def _pins(text: str) -> Any:
    from rtk.benchmarks import profile_target

    return _checked(profile_target.pins, text)


def _checked(reader: Any, text: str) -> Any:
    try:
        return reader(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("rtk: ")) from None


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
