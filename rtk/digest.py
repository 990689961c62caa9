"""What a recorded result carries: a digest of the code, by which it is of this code or stale, and when it was made."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["folder_digest", "sources_digest", "timestamp"]

_SUFFIXES = (".py", ".cuh", ".json")
_LINKED = ("autotune", "benchmarks", "cuda_src")  # stand inside rtk/, as links or (installed) as folders


def sources_digest() -> dict[str, str]:
    """sha256 (hex) of the code under each of "cuda_src", "rtk" and "autotune".

    Over sorted relative paths and contents of the .py, .cuh and .json files; the same in a clone and when installed.
    A folder that is not there has the digest of nothing.
    """
    package = Path(__file__).resolve().parent
    return {
        "cuda_src": _digest(package / "cuda_src"),
        "rtk": _digest(package, skip=_LINKED),
        "autotune": _digest(package / "autotune"),
    }


def timestamp() -> str:
    """Now, in UTC, to the second (ISO 8601)."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def folder_digest(name: str) -> str:
    """sha256 (hex) of the code in a folder of the package, "benchmarks" for one; recorded results are no code."""
    return _digest(Path(__file__).resolve().parent / name, skip=("results",))


def _digest(folder: Path, skip: tuple[str, ...] = ()) -> str:
    sha = hashlib.sha256()
    for name in sorted(_files(folder, skip)):
        data = (folder / name).read_bytes()
        sha.update(f"{name}\0{len(data)}\0".encode())
        sha.update(data)
    return sha.hexdigest()


def _files(folder: Path, skip: tuple[str, ...]) -> Iterator[str]:
    """Relative paths, with forward slashes, of the code files below `folder`; `skip` names top-level subfolders."""
    for where, folders, files in os.walk(folder):
        top = Path(where) == folder
        folders[:] = [f for f in folders if f != "__pycache__" and not f.startswith(".") and not (top and f in skip)]
        for file in files:
            if file.endswith(_SUFFIXES) and not file.startswith("."):
                yield (Path(where) / file).relative_to(folder).as_posix()
