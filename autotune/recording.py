"""The problems that a program really asks for, noted as it runs: for tuning, warming up or benchmarking them later.

With `RTK_AUTOTUNE=record` every process appends what is new to it to `recorded_shapes.txt` in the cache folder;
`record_shapes` collects what calls within it ask for. `rtk warmup` and `rtk bench --file` take the files of both.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from rtk import forks, shapes
from rtk.cache import default_cache
from rtk.errors import CacheWarning
from rtk.problem import AttentionProblem

NAME = "recorded_shapes.txt"


class Recording:
    """Problems of rtk.attention, each once, in the order in which calls first asked for them."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    @property
    def lines(self) -> list[str]:
        """As `rtk warmup --shape` takes them."""
        return list(self._found)

    @property
    def problems(self) -> list[AttentionProblem]:
        return [shapes.parse(line) for line in self._found]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file of problems, as `rtk warmup FILE` and `rtk bench --file FILE` take it."""
        Path(path).write_text(json.dumps({"problems": self.lines}, indent=1) + "\n", encoding="utf-8")

    def _add(self, line: str) -> None:
        self._found.setdefault(line)


_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_open: list[Recording] = []
_noted: set[tuple[str, str]] = set()  # (file, line) that this process has written


@contextlib.contextmanager
def record_shapes() -> Iterator[Recording]:
    """Collects the problems of calls within, of every thread.

    with rtk.record_shapes() as recording: …; recording.save("shapes.json")
    """
    recording = Recording()
    with _lock:
        _open.append(recording)
    try:
        yield recording
    finally:
        with _lock:
            _open.remove(recording)


def seen(problem: AttentionProblem) -> None:
    """Every call of rtk.attention on a GPU tells its problem; it costs a look at an empty list where nobody records."""
    if _open:
        line = shapes.describe(problem)
        with _lock:
            for recording in _open:
                recording._add(line)


def note(problem: AttentionProblem) -> None:
    """Append a problem to the file of this cache folder, once a process. A folder that refuses is one warning."""
    path, line = default_cache().path / NAME, shapes.describe(problem)
    if (str(path), line) in _noted:
        return
    _noted.add((str(path), line))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())  # one write: lines of several processes do not mix
    except OSError as error:
        warnings.warn(f"the problems of this process cannot be noted in {path}: {error}", CacheWarning, stacklevel=2)
