"""rtk in place of torch's scaled_dot_product_attention, for a whole program or a block of it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from rtk import forks
from rtk.torch import sdpa

_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")
_depth = 0
_before: Any = None


def patch() -> None:
    """torch.nn.functional.scaled_dot_product_attention is rtk's from now on, in every thread.

    May be called again; as many unpatch() undo it. Code that took the function by `from torch.nn.functional import
    scaled_dot_product_attention` before keeps what it took.
    """
    global _depth, _before
    with _lock:
        _depth += 1
        if _depth == 1:
            _before = torch.nn.functional.scaled_dot_product_attention
            torch.nn.functional.scaled_dot_product_attention = sdpa.scaled_dot_product_attention


def unpatch() -> None:
    """Undoes one patch(); the last one gives torch its function back. Without a patch() before it does nothing."""
    global _depth, _before
    with _lock:
        if _depth == 0:
            return
        _depth -= 1
        if _depth:
            return
        if torch.nn.functional.scaled_dot_product_attention is sdpa.scaled_dot_product_attention:
            torch.nn.functional.scaled_dot_product_attention = _before
        else:
            text = "rtk: scaled_dot_product_attention was replaced by somebody else since patch(), and is left as it is"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        _before = None


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """patch() for the block. Blocks of several threads may overlap: the last to end gives torch its function back."""
    patch()
    try:
        yield
    finally:
        unpatch()
