"""The plots of a run as PNGs: throughput, roofline, cold start, small problems, memory.

One colour and one marker per implementation, the same in every plot, told apart by the colour-blind too (Okabe and
Ito).
The background is white, so that they are readable on a dark page as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

from rtk.benchmarks import floors, records
from rtk.benchmarks.records import Record, Run
from rtk.benchmarks.report import milliseconds, name, need, ordered

__all__ = ["draw"]

_COLOURS = {
    "rtk": "#D55E00",
    "fa3": "#0072B2",
    "fa4": "#56B4E9",
    "cudnn": "#009E73",
    "fa2": "#E69F00",
    "sdpa": "#CC79A7",
    "flex": "#7F7F7F",
    "flashinfer": "#8C6D1F",
    "xformers": "#332288",
}
_MARKERS = {"rtk": "o", "fa3": "s", "fa4": "D", "cudnn": "^", "fa2": "v", "sdpa": "P", "flex": "X", "flashinfer": "<"}
_STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "grid.color": "#E4E4E4",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}
_DPI = 130
_LEAST_BYTES = 4096  # where a logarithmic axis of memory begins: no memory at all must be somewhere on it
_SHADES = 128  # colours of a PNG: enough for lines and text, a third of the size


def draw(run: Run) -> dict[str, bytes]:
    """{name: PNG} of what this run can show; empty where it holds nothing to draw.

    ToolchainError where matplotlib is missing.
    """
    makers: dict[str, list[Callable[[Run], Any]]] = {
        "small": [_small],
        "long": [_memory, _throughput],
        "coldstart": [_coldstart],
        "overhead": [],
        "accuracy": [],
    }
    need("matplotlib").use("Agg")  # draws without a display
    plt, found = need("matplotlib.pyplot"), {}
    with plt.rc_context(_STYLE):
        for make in makers.get(run.suite, [_throughput, _roofline]):
            figure = make(run)
            if figure is not None:
                found[f"{run.suite}-{make.__name__.strip('_')}"] = _png(figure)
                plt.close(figure)
    return found


def _png(figure: Any) -> bytes:
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    image = need("PIL.Image").open(raw).convert("RGB")  # Pillow is part of matplotlib's own needs
    image.quantize(_SHADES, dither=0).save(small, format="png", optimize=True)
    return small.getvalue()


# ------------------------------------------------------------------------------------------------ throughput and memory


def _throughput(run: Run) -> Any:
    """TFLOP/s against seqlen, a panel per head_dim and mask, with the matrix product's ceiling."""
    figure = _lines(run, "tflops", "TFLOP/s", float)
    if figure is None:
        return None
    ceiling = (run.meta.get("ceilings") or {}).get("bf16_tflops")
    tops = [record["tflops"] for record in run.records if record.get("tflops")]
    for index, axes in enumerate(figure.axes):
        axes.set_ylim(0, 1.12 * max([*tops, ceiling or 0]))
        if ceiling:
            axes.axhline(ceiling, color="#444444", linestyle=(0, (5, 3)), linewidth=1)
            if index == 0:
                axes.text(0.02, ceiling * 1.015, f"matrix product {ceiling:.0f}", transform=_mixed(axes), fontsize=8)
    return figure


def _memory(run: Run) -> Any:
    """Peak extra memory against seqlen, both logarithmic; nothing is drawn as a page, 4 KiB."""
    figure = _lines(
        run,
        "peak_extra_bytes",
        "peak extra memory, MiB (4 KiB or more)",
        lambda count: max(count, _LEAST_BYTES) / 2**20,
    )
    for axes in figure.axes if figure is not None else ():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(need("matplotlib.ticker").StrMethodFormatter("{x:,g}"))
    return figure


def _lines(run: Run, key: str, label: str, scale: Callable[[float], float]) -> Any:
    """A panel per head_dim (column) and mask (row), a line per implementation, against seqlen."""
    measured = [record for record in run.records if record.get(key) is not None and not record.get("error")]
    found = _square([record for record in measured if record.get("seqlen_k") and record.get("head_dim")])
    if not found:
        return None
    columns = sorted({record["head_dim"] for record in found})
    rows = sorted({bool(record.get("causal")) for record in found})
    figure, grid = _panels(len(rows), len(columns), 2.7 if len(rows) > 1 else 3.0, sharey=True)
    for (row, causal), (column, head_dim) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
        axes = grid[row][column]
        here = [r for r in found if r["head_dim"] == head_dim and bool(r.get("causal")) == causal]
        for impl in reversed(ordered(record["impl"] for record in here)):  # rtk last, on top
            points = sorted((r["seqlen_k"], scale(r[key])) for r in here if r["impl"] == impl)
            axes.plot(*zip(*points, strict=True), **_line(impl))
        axes.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
        _seqlens(axes, sorted({r["seqlen_k"] for r in found}))
        if row == len(rows) - 1:
            axes.set_xlabel("seqlen")
        if column == 0:
            axes.set_ylabel(label)
    _finish(figure, run, ordered(record["impl"] for record in found))
    return figure


def _square(found: list[Record]) -> list[Record]:
    """One record per line and seqlen: bfloat16, plain masks; of several batches or heads the first."""
    kept: dict[tuple[Any, ...], Record] = {}
    for r in found:
        if r.get("dtype", "bfloat16") == "bfloat16" and not r.get("window") and not r.get("softcap"):
            kept.setdefault((r["impl"], r["head_dim"], bool(r.get("causal")), r["seqlen_k"]), r)
    return list(kept.values())


# ------------------------------------------------------------------------------------------------------------- roofline


def _roofline(run: Run) -> Any:
    """TFLOP/s against FLOP per byte, under the slope of the copy's bandwidth and the matrix product's roof."""
    ceilings = run.meta.get("ceilings") or {}
    roof, bandwidth = ceilings.get("bf16_tflops"), ceilings.get("copy_gbps")
    found = [record for record in records.measured(run.records) if record.get("tflops") and record.get("head_dim")]
    if not found or not roof or not bandwidth:
        return None
    figure, grid = _panels(1, 1, 3.9)
    axes = grid[0][0]
    knee = roof * 1e3 / bandwidth  # FLOP per byte
    spots = [(floors.intensity(record), record["tflops"], record["impl"]) for record in found]
    left, right = min(knee / 8, min(x for x, _, _ in spots) / 2), max(knee * 4, max(x for x, _, _ in spots) * 2)
    axes.plot([left, knee, right], [left * bandwidth / 1e3, roof, roof], color="#444444", linewidth=1.4)
    for impl in reversed(ordered(impl for _, _, impl in spots)):
        x, y = zip(*((x, y) for x, y, other in spots if other == impl), strict=True)
        style = _line(impl) | {"linestyle": "none", "markersize": 6, "alpha": 0.8}
        axes.plot(x, y, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    lowest = min(y for _, y, _ in spots)
    axes.set_ylim(min(lowest * 0.7, roof / 8), roof * 1.5)
    axes.text(right * 0.95, roof * 1.06, f"matrix product {roof:.0f} TFLOP/s", ha="right", fontsize=8.5)
    start = max(left, axes.get_ylim()[0] * 1e3 / bandwidth) * 1.25
    axes.text(start * 1.06, start * bandwidth / 1e3, f"copy {bandwidth:,.0f} GB/s", va="top", fontsize=8.5)
    plain = need("matplotlib.ticker").StrMethodFormatter("{x:,g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(need("matplotlib.ticker").NullFormatter())
    axes.set_yticks([tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if lowest * 0.6 < tick < roof * 1.5])
    axes.set_xlabel("FLOP per byte of Q, K, V and O")
    axes.set_ylabel("TFLOP/s")
    _finish(figure, run, ordered(impl for _, _, impl in spots))
    return figure


# ----------------------------------------------------------------------------------------------------------------- bars


def _small(run: Run) -> Any:
    """µs per head of q, a group of bars per problem."""
    groups: dict[str, dict[str, float]] = {}
    names = records.labels(records.cells(run.records))
    for key, cell in records.cells(run.records).items():
        timed = {
            i: (records.cost(r) or 0.0) / r["heads_q"] for i, r in cell.items() if records.cost(r) and r.get("heads_q")
        }
        if timed:
            groups[names[key]] = timed
    return _bars(run, groups, "µs per head", "{:.2f}".format) if groups else None


def _coldstart(run: Run) -> Any:
    """ms until a fresh process has its first result: nothing cached, and from the disk cache."""
    keys = {"first_call_ms": "first call", "disk_call_ms": "first call, from disk", "second_call_ms": "second call"}
    many = len(records.cells(run.records)) > 1
    names = records.labels(records.cells(run.records))
    groups: dict[str, dict[str, float]] = {}
    for record in run.records:
        for key, words in keys.items():
            if record.get(key):
                where = f"{words}, {names[records.cell_key(record)]}" if many else words
                groups.setdefault(where, {})[record["impl"]] = record[key]
    return _bars(run, groups, "ms", milliseconds, log=True) if groups else None


def _bars(
    run: Run, groups: dict[str, dict[str, float]], label: str, text: Callable[[float], str], *, log: bool = False
) -> Any:
    """Horizontal bars: a group per problem, a bar per implementation, each with its figure."""
    impls = ordered(impl for group in groups.values() for impl in group)
    lines = sum(len(group) + 0.8 for group in groups.values())
    figure, grid = _panels(1, 1, 1.1 + 0.17 * lines)
    axes, top, ticks = grid[0][0], 0.0, []
    for group in groups.values():
        shown = [impl for impl in impls if impl in group]
        for index, impl in enumerate(shown):
            axes.barh(top + index, group[impl], height=0.86, color=_COLOURS.get(impl, "#444444"))
            axes.annotate(
                text(group[impl]),
                (group[impl], top + index),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                fontweight="bold" if impl == records.RTK else "normal",
            )
        ticks.append(top + (len(shown) - 1) / 2)
        top += len(shown) + 0.8
    axes.set_yticks(ticks, list(groups), fontsize=9)
    axes.set_ylim(top - 0.8, -0.8)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(need("matplotlib.ticker").StrMethodFormatter("{x:,g}"))
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    _finish(figure, run, impls, bars=True)
    return figure


# ------------------------------------------------------------------------------------------------------- what all share


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as a README's text, and its axes by row and column. height: inches of a row."""
    pyplot = need("matplotlib.pyplot")
    size = (9.2, height * rows + 0.6)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    return figure, grid


def _finish(figure: Any, run: Run, impls: Iterable[str], *, bars: bool = False) -> None:
    """The title, and one legend for the whole figure, in the order of the tables."""
    if bars:
        patch = need("matplotlib.patches").Patch
        handles = [patch(color=_COLOURS.get(impl, "#444444"), label=name(impl)) for impl in impls]
    else:
        line = need("matplotlib.lines").Line2D
        handles = [line([], [], **_line(impl)) for impl in impls]
    figure.suptitle(f"{run.meta.get('title') or run.suite} – {run.gpu}", fontsize=12, fontweight="bold")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=9)


def _line(impl: str) -> dict[str, Any]:
    ours = impl == records.RTK
    return {
        "label": name(impl),
        "color": _COLOURS.get(impl, "#444444"),
        "marker": _MARKERS.get(impl, "d"),
        "linewidth": 2.4 if ours else 1.4,
        "markersize": 5.5 if ours else 4.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _seqlens(axes: Any, lengths: list[int]) -> None:
    """A logarithmic axis with the lengths that were measured, as 512, 1k, 2k."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, list(map(_length, lengths)), fontsize=8.5)
    axes.minorticks_off()


def _length(count: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def _mixed(axes: Any) -> Any:
    """Coordinates whose x is a share of the axes and whose y is data."""
    return axes.get_yaxis_transform()
