"""Who served a call of a drop-in: rtk, or torch and why. Counted always, said once per reason to the logger `rtk`."""

from __future__ import annotations

import logging
import threading
from typing import Any

from rtk import forks

_log = logging.getLogger("rtk")
_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_counts: dict[str, int] = {"native": 0}


def at_trace_time(function: Any) -> Any:
    """torch.compiler.assume_constant_result, which would import torch's compiler: a trace keeps what the call gave."""
    function._dynamo_marked_constant = True
    return function


# A lock is nothing that a graph could hold.
@at_trace_time
def count_native() -> None:
    """One more call that rtk's kernel served."""
    with _lock:
        _counts["native"] += 1


@at_trace_time
def count_fallback(reason: str) -> None:
    """One more call that was handed to torch, for a reason: a few words, the same for all calls it holds for."""
    name = f"fallback: {reason}"
    with _lock:
        first = name not in _counts
        _counts[name] = _counts.get(name, 0) + 1
    if first:
        _log.warning("attention goes to torch's own implementation: %s (said once; rtk.torch.stats() counts)", reason)


def stats() -> dict[str, int]:
    """Calls of the drop-ins since the process began, or since reset_stats(): "native", and "fallback: <reason>" each.

    A compiled model counts when it is traced, not when it runs.
    """
    with _lock:
        return dict(_counts)


def reset_stats() -> None:
    """Counts from zero again. Reasons are logged once more."""
    with _lock:
        _counts.clear()
        _counts["native"] = 0
