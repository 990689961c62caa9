"""What the commands print with: aligned tables, a few colours, progress. Plain text when it is not a terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


def coloured(stream: TextIO) -> bool:
    """Whether to send colour codes: a terminal that is not dumb, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if coloured(stream or sys.stdout) else text


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, indent: str = "  ") -> str:
    """Lines of aligned columns: the first `left` columns flush left, the others, figures, flush right."""
    cells = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        fields = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return (indent + "  ".join(fields)).rstrip()

    return "\n".join([paint(line(cells[0]), "dim"), *map(line, cells[1:])])


def size(count_bytes: float) -> str:
    """A number of bytes for people: 832 B, 14.2 KiB, 3.0 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"


def write_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


class Progress:
    """A line on standard error that is rewritten as work goes on; one line a step where it is not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown = False

    def __call__(self, text: str) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
            self._shown = True
        else:
            print(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
