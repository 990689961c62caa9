"""Who served a call of a drop-in: rtk, or torch and why. Counted always, said once per reason to the logger `rtk`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

_at_trace_time: Callable[[Any], Any] = torch.compiler.assume_constant_result
_log = logging.getLogger("rtk")
_lock = threading.Lock()
_counts: dict[str, int] = {"native": 0}


# Compiled, these run when the model is traced: a lock is nothing that a graph could hold.
@_at_trace_time
def count_native() -> None:
    """One more call that rtk's kernel served."""
    with _lock:
        _counts["native"] += 1


@_at_trace_time
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
