"""The figures of the README, from recorded results: `python -m rtk.benchmarks.report.readme RESULTS_DIR README.md`.

Rewrites what stands between `<!-- bench: begin -->` and `<!-- bench: end -->`; with --check only says whether it would.
Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rtk.benchmarks import records
from rtk.benchmarks.records import Record, Run
from rtk.benchmarks.report import in_order, name, standing
from rtk.errors import ArgumentError, RtkError

__all__ = ["block", "main", "updated"]

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
SEQLEN = 8192
IMPLS = ("rtk", "fa3", "fa4", "cudnn", "fa2")


def block(folder: str | os.PathLike[str], beside: str | os.PathLike[str] = ".") -> str:
    """What stands between the markers, for the results in this folder; links are relative to the folder `beside`.

    ArgumentError where there is no paper.json, or no problem of seqlen 8192 in it.
    """
    folder = Path(folder)
    paper = records.read(folder / "paper.json")
    link = Path(os.path.relpath(folder, beside)).as_posix()
    lines = [_caption(paper), "", *_table(paper), ""]
    lines.append(f"Recorded in [{link}]({link}), with clocks and versions. rtk against the best peer of each problem:")
    lines.append("")
    for run in in_order(records.read_all([folder])):
        total = standing(run.records)
        if total:
            title = str(run.meta.get("title") or run.suite)
            lines.append(f"- {run.suite} ({title}; {total.cells} problems): {total}.")
    return "\n".join(lines)


def updated(text: str, new: str, where: str = "README.md") -> str:
    """The page with this block between its markers. ArgumentError where they do not stand there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ArgumentError(where, "a page without a place for the figures", f"one {BEGIN}, and below it one {END}")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{new}\n{END}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the page is (or was made) what the results say; 1 with --check when not, and on errors."""
    parser = argparse.ArgumentParser(prog="python -m rtk.benchmarks.report.readme", description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS_DIR", help="a folder with paper.json and others")
    parser.add_argument("page", type=Path, metavar="README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where it is out of date")
    arguments = parser.parse_args(argv)
    try:
        old = arguments.page.read_text(encoding="utf-8")
        new = updated(old, block(arguments.results, arguments.page.parent), str(arguments.page))
    except (RtkError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if old == new:
        return 0
    if arguments.check:
        print(f"{arguments.page}: its figures are not those in {arguments.results}", file=sys.stderr)
        return 1
    arguments.page.write_text(new, encoding="utf-8")
    return 0


def _caption(paper: Run) -> str:
    return f"TFLOP/s on an {paper.gpu}, attention forward, bfloat16, seqlen {SEQLEN}, all in one run:"


def _table(paper: Run) -> list[str]:
    found: dict[tuple[int, bool], dict[str, Record]] = {}
    for record in paper.records:
        if _shown(record):
            found.setdefault((record["head_dim"], bool(record.get("causal"))), {}).setdefault(record["impl"], record)
    if not found:
        accepted = f"bfloat16 problems of seqlen {SEQLEN}"
        raise ArgumentError(str(paper.path or "paper.json"), "no figures for the README", accepted)
    impls = [impl for impl in IMPLS if any(impl in cell for cell in found.values())]
    lines = [_row(["head_dim", "mask", *map(name, impls)]), _row(["---"] * (2 + len(impls)))]
    for (head_dim, causal), cell in sorted(found.items()):
        figures = [f"{cell[impl]['tflops']:.0f}" if impl in cell else "–" for impl in impls]
        lines.append(_row([str(head_dim), "causal" if causal else "full", *figures]))
    return lines


def _shown(record: Record) -> bool:
    plain = not record.get("window") and not record.get("softcap") and not record.get("variant")
    square = record.get("seqlen_q") == record.get("seqlen_k") == SEQLEN and record.get("op") == "attention_fwd"
    right = plain and square and record.get("dtype") == "bfloat16" and record.get("heads_q") == record.get("heads_kv")
    return right and bool(record.get("tflops")) and bool(record.get("head_dim"))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
