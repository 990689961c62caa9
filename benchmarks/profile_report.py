"""What Nsight Compute is asked for, and its answer read back: `Kernel`, in units that do not change.

``ncu --import FILE --csv --page raw`` prints one line of metric names, one of units, and one a kernel. Units
depend on the version of ncu and on the values; here times are us, rates GB/s, clocks MHz.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtk.errors import RtkError

_LAST_LINES = 12  # of what a failed process printed

# -------------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Metric:
    """A figure of a profile: `names` are ncu's, first the best; the rest for versions or GPUs that lack it.

    `scale` takes seconds, hertz, bytes, bytes/second and plain numbers to the unit that `key` ends in.
    """

    key: str
    names: tuple[str, ...]
    scale: float = 1.0


_ACTIVE = ".avg.pct_of_peak_sustained_active"
_ELAPSED = ".avg.pct_of_peak_sustained_elapsed"
METRICS = (
    Metric("duration_us", ("gpu__time_duration.sum",), 1e6),
    Metric(
        "sm_mhz", ("smsp__cycles_elapsed.avg.per_second", "sm__cycles_elapsed.avg.per_second"), 1e-6
    ),  # cycles over the time they took
    Metric(
        "tensor_pct", (f"sm__pipe_tensor_cycles_active{_ACTIVE}", f"sm__pipe_tensor_op_hmma_cycles_active{_ACTIVE}")
    ),
    Metric("fma_pct", (f"sm__inst_executed_pipe_fma{_ACTIVE}", f"sm__pipe_fma_cycles_active{_ACTIVE}")),
    Metric("xu_pct", (f"sm__inst_executed_pipe_xu{_ACTIVE}",)),
    Metric("issue_pct", (f"smsp__issue_active{_ACTIVE}", f"sm__inst_issued{_ACTIVE}")),
    Metric("dram_gbps", ("dram__bytes.sum.per_second",), 1e-9),
    Metric("dram_pct", (f"gpu__dram_throughput{_ELAPSED}", f"dram__throughput{_ELAPSED}")),
    Metric("l2_gbps", ("lts__t_bytes.sum.per_second",), 1e-9),
    Metric("l2_pct", (f"lts__throughput{_ELAPSED}",)),
    Metric("l2_hit_pct", ("lts__t_sector_hit_rate.pct",)),
    Metric("warps_per_sm", ("sm__warps_active.avg.per_cycle_active",)),
    Metric("occupancy_pct", (f"sm__warps_active{_ACTIVE}",)),
    Metric("registers_per_thread", ("launch__registers_per_thread",)),
    Metric("shared_dynamic_bytes", ("launch__shared_mem_per_block_dynamic",)),
    Metric("shared_static_bytes", ("launch__shared_mem_per_block_static",)),
    # Counted by the hardware; the smsp__sass_ counters of the same patch the kernel, which takes a slow pass more.
    Metric("local_loads", ("smsp__inst_executed_op_local_ld.sum", "smsp__sass_inst_executed_op_local_ld.sum")),
    Metric("local_stores", ("smsp__inst_executed_op_local_st.sum", "smsp__sass_inst_executed_op_local_st.sum")),
)

# What a warp that cannot issue waits for. `selected` is not here: it issues.
STALLS = {
    "barrier": "the other warps at a block or named barrier",
    "branch_resolving": "the target of a branch",
    "dispatch_stall": "the dispatcher, which holds an issued instruction back",
    "drain": "its last stores to leave, at its end",
    "gmma": "the tensor cores: a wgmma in flight",
    "imc_miss": "a miss in the cache of constants",
    "lg_throttle": "the queue of local and global loads and stores, which is full",
    "long_scoreboard": "data from global or local memory or L2, or an mbarrier (TMA)",
    "math_pipe_throttle": "a math pipe that other warps keep busy",
    "membar": "a memory fence",
    "mio_throttle": "the queue of shared memory, special functions and shuffles, which is full",
    "misc": "something else",
    "no_instruction": "its next instruction: a miss in the instruction cache",
    "not_selected": "its turn: it could issue, another warp did",
    "short_scoreboard": "data from shared memory, a special function or a shuffle",
    "sleeping": "its own sleep: nanosleep, or a suspended mbarrier wait",
    "tex_throttle": "the queue of texture loads, which is full",
    "wait": "the fixed latency of its instruction before",
}
_SELECTED = "selected"


def _stall_metric(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


def wanted(unknown: frozenset[str] = frozenset()) -> list[str]:
    """ncu's names of all that a profile holds, without those that this ncu does not know."""
    best = (next((name for name in metric.names if name not in unknown), None) for metric in METRICS)
    stalls = (_stall_metric(reason) for reason in (*STALLS, _SELECTED))
    return [name for name in best if name is not None] + [name for name in stalls if name not in unknown]


# -------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Stall:
    """Of the time of all warps, the share in % that this reason takes, and what it means."""

    reason: str
    share_pct: float
    meaning: str


@dataclass(frozen=True)
class Kernel:
    """One launch as ncu recorded it. `figures` by the keys of METRICS, None where ncu had no number."""

    name: str
    grid: str
    block: str
    figures: dict[str, float | None]
    stalls: tuple[Stall, ...]  # the largest share first
    missing: tuple[str, ...]  # ncu's names of figures without a number


# ------------------------------------------------------------------------------------------------------------ numbers

_TIMES = {"s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6, "ns": 1e-9}
_TIMES |= {"nsecond": 1e-9}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}  # ncu's are decimal for bytes too
_PREFIXED = re.compile(r"([kmgtp]?)(byte|hz|cycle|inst|sector|warp|thread|register|block)s?", re.IGNORECASE)


def factor(unit: str) -> float | None:
    """What a number in one of ncu's units is multiplied by to be in seconds, hertz, bytes, bytes/second, % or a count.

    None for a unit that is not known: a number of unknown size is worth less than none.
    """
    over, slash, under = unit.strip().partition("/")
    if over in ("", "%"):
        return 1.0 if not slash else None
    upper = _one_unit(over)
    lower = _one_unit(under) if slash else 1.0
    return None if upper is None or lower is None else upper / lower


def _one_unit(unit: str) -> float | None:
    unit = unit.strip()
    if unit in _TIMES:
        return _TIMES[unit]
    matched = _PREFIXED.fullmatch(unit)
    return _PREFIXES[matched[1].lower()] if matched else None


def number(text: str) -> float | None:
    """A number as ncu prints it, thousands separated by commas; None for n/a, nan and whatever is no number."""
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse(text: str) -> list[Kernel]:
    """The kernels in what ``ncu --import FILE --csv --page raw`` printed, in the order they ran.

    RtkError where it is not such CSV; a report without kernels is an empty list.
    """
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(('"ID"', "ID,"))), None)
    if start is None:
        if "No kernels were profiled" in text or not text.strip():
            return []
        raise RtkError(f"ncu printed no table of metrics:\n{last_lines(text)}")
    header, *rows = [row for row in csv.reader(io.StringIO("".join(lines[start:]))) if row]
    units, launches = (rows[0], rows[1:]) if rows else ([], [])
    found = []
    for row in launches:
        if len(row) == len(header) == len(units) and number(row[0]) is not None:  # not a line of ncu's own in between
            found.append(_kernel(dict(zip(header, zip(row, units, strict=True), strict=True))))
    return found


def _kernel(cells: Mapping[str, tuple[str, str]]) -> Kernel:
    values = {name: value for name, cell in cells.items() if (value := _value(*cell)) is not None}
    figures: dict[str, float | None] = {}
    for metric in METRICS:
        base = next((values[name] for name in metric.names if name in values), None)
        figures[metric.key] = None if base is None else base * metric.scale
    found = {reason: values[_stall_metric(reason)] for reason in STALLS if _stall_metric(reason) in values}
    absent = (metric.names[0] for metric in METRICS if figures[metric.key] is None)
    total = sum(found.values()) + values.get(_stall_metric(_SELECTED), 0.0)
    stalls = [Stall(reason, 100.0 * value / total, STALLS[reason]) for reason, value in found.items() if value > 0]
    return Kernel(
        name=cells.get("Kernel Name", ("?", ""))[0],
        grid=cells.get("Grid Size", ("", ""))[0],
        block=cells.get("Block Size", ("", ""))[0],
        figures=figures,
        stalls=tuple(sorted(stalls, key=lambda stall: -stall.share_pct)),
        missing=(*absent, *(_stall_metric(reason) for reason in STALLS if reason not in found)),
    )


def _value(text: str, unit: str) -> float | None:
    value, scale = number(text), factor(unit)
    return None if value is None or scale is None else value * scale


def choose(kernels: Sequence[Kernel], pattern: str | None = None) -> tuple[Kernel, float | None]:
    """The kernel that took longest, of those whose name `pattern` is found in, and its share in % of the time of all.

    RtkError where there is none. The share is None where a duration is missing.
    """
    if not kernels:
        raise RtkError(
            "ncu found no kernel in the call: nothing was launched on the GPU between the profiler's start and stop"
        )
    matching = [kernel for kernel in kernels if pattern is None or re.search(pattern, kernel.name)]
    if not matching:
        names = "\n".join(f"  {name}" for name in dict.fromkeys(kernel.name for kernel in kernels))
        raise RtkError(f"no kernel of the call matches {pattern!r}. Its kernels:\n{names}")
    longest = max(matching, key=lambda kernel: kernel.figures["duration_us"] or 0.0)
    durations = [kernel.figures["duration_us"] for kernel in kernels]
    total = sum(duration for duration in durations if duration is not None)
    own = longest.figures["duration_us"]
    return longest, None if own is None or None in durations or not total else 100.0 * own / total


def last_lines(printed: str, own: bool = False) -> str:
    """The end of what was printed; `own`: with what ncu says itself, else only where there is nothing else."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    theirs = [line for line in lines if not line.startswith("==")]
    shown = lines if own or not theirs else theirs
    return "\n".join(f"  {line}" for line in shown[-_LAST_LINES:]) or "  (it printed nothing)"
