"""Choices and timings in a file a place: for folders where SQLite's locks cannot be trusted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtk import entries
from rtk.autotune import locks
from rtk.autotune.backend import BUSY_S, CHOICE, LOCK, NO_ROW, SCHEMA, check_owner, choice_of, readable, text_of
from rtk.autotune.keys import Choice, Place, Timed


class FilesBackend:
    """A file a place, replaced whole. Two that tune one place at once: the last one's choice stays, as in SQLite."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, choice: Choice, timings: Sequence[Timed]) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._path(choice.place)
        with locks.held(self._folder.parent / LOCK, path.name, BUSY_S):  # reading and writing are one step
            newer = {text_of(timed.config): timed for timed in (*self.timings(choice.place), *timings)}
            contents = {
                "schema": SCHEMA,
                "place": choice.place.columns(),
                **{name: getattr(choice, name) for name in CHOICE},
                "timings": [asdict(timed) for timed in newer.values()],
            }
            entries.write(str(path), json.dumps(contents).encode(), 0o600)

    def choices(self) -> Iterator[Choice]:
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.json")):
            found = self._read(path)
            if found is not None:
                with contextlib.suppress(*NO_ROW):
                    yield choice_of(found["place"], found)

    def timings(self, place: Place) -> list[Timed]:
        found = self._read(self._path(place)) or {}
        return readable(found.get("timings", []))

    def remove(self, place: Place) -> None:
        self._path(place).unlink(missing_ok=True)

    def _path(self, place: Place) -> Path:
        name = hashlib.sha256("\0".join(place.columns()).encode()).hexdigest()
        return self._folder / f"{name[:32]}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            check_owner(path)
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None
