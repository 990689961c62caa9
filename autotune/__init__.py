"""Which configuration serves a problem: choices that were measured, where they are kept, and how they are found.

A call takes a stored choice of its bucket, or of a neighbour, or else the cost model's pick (`choice`). Nothing is ever
timed beside a user's work unless `run`, `rtk autotune run` or RTK_AUTOTUNE=tune ask for it. What the command
`rtk autotune` does, the functions here do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtk.autotune.choice import freeze as freeze
    from rtk.autotune.choice import reload as reload
    from rtk.autotune.choice import using as using
    from rtk.autotune.manage import clear as clear
    from rtk.autotune.manage import explain as explain
    from rtk.autotune.manage import export as export
    from rtk.autotune.manage import import_ as import_
    from rtk.autotune.manage import run as run
    from rtk.autotune.manage import stored as stored
    from rtk.autotune.manage import verify as verify
    from rtk.autotune.recording import record_shapes as record_shapes

_HOME = {
    **dict.fromkeys(("freeze", "reload", "using"), "choice"),
    **dict.fromkeys(("clear", "explain", "export", "import_", "run", "stored", "verify"), "manage"),
    "record_shapes": "recording",
}

__all__ = [
    "clear",
    "explain",
    "export",
    "freeze",
    "import_",
    "record_shapes",
    "reload",
    "run",
    "stored",
    "using",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rtk.autotune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rtk.autotune.{_HOME[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
