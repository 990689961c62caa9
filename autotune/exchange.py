"""Choices as a JSON file, to be carried to another machine: what `rtk autotune export` writes and what ships with rtk.

{"schema": 1, "choices": [{"kernel": …, "sources": …, "gpu": {…}, "exact": {…}, "sizes": {…}, "config": {…}, …}, …]}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rtk.autotune.keys import WORDS, Choice, Gpu, Place, bucket_of, config_of_json, time_of_json
from rtk.errors import ArgumentError

SCHEMA = 1
_ACCEPTED = "a file that `rtk autotune export` wrote"


def render(choices: Iterable[Choice]) -> str:
    """The file of these choices, one to a line, in an order that does not depend on when they were made."""
    rows = sorted((row(choice) for choice in choices), key=lambda each: json.dumps(each, sort_keys=True))
    lines = ",\n".join(f"  {json.dumps(each)}" for each in rows)
    return f'{{\n "schema": {SCHEMA},\n "choices": [\n{lines}\n ]\n}}\n'


def read(path: str | os.PathLike[str]) -> list[Choice]:
    """The choices in a file. ArgumentError names it and what is wrong."""
    path = Path(path)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(str(path), f"what cannot be read: {error}", _ACCEPTED) from None
    return parse(contents, str(path))


def parse(contents: Any, where: str) -> list[Choice]:
    """The choices in such an object; `where` names it in errors."""
    found = []
    for number, row in enumerate(rows(contents, where), 1):
        try:
            found.append(choice_of(row))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ArgumentError) as error:
            received = f"choice {number}, which is none: {type(error).__name__}: {error}"
            raise ArgumentError(where, received, _ACCEPTED) from None
    return found


def rows(contents: Any, where: str) -> list[Any]:
    """What choice_of() makes choices of."""
    if not isinstance(contents, dict) or not isinstance(contents.get("choices"), list):
        raise ArgumentError(where, "no list `choices`", _ACCEPTED)
    if contents.get("schema") != SCHEMA:
        raise ArgumentError(where, f"schema {contents.get('schema')!r}", f"schema {SCHEMA}")
    found: list[Any] = contents["choices"]
    return found


def row(choice: Choice) -> dict[str, Any]:
    place = choice.place
    return {
        "kernel": place.kernel,
        "sources": place.sources,
        "gpu": place.gpu.to_json(),
        "exact": dict(place.bucket.exact),
        "sizes": dict(place.bucket.sizes),
        "config": choice.config,
        "us": choice.us,
        **{name: getattr(choice, name) for name in WORDS},
    }


def choice_of(row: Any) -> Choice:
    """The inverse of row()."""
    place = Place(
        str(row["kernel"]), str(row["sources"]), Gpu.from_json(row["gpu"]), bucket_of(row["exact"], row["sizes"])
    )
    words = {name: str(row.get(name, "")) for name in WORDS}
    json.dumps([place.columns(), words], ensure_ascii=False).encode()  # a ValueError for half a character
    return Choice(place, config_of_json(row["config"]), us=time_of_json(row["us"]), **words)
