"""What a fork must not cut in two.

A forked child inherits the locks of threads it does not have. Python's own are made new (`new_in_child`, beside each of
them), but those inside NVRTC cannot be: a child forked in the midst of a compile hangs in its own first one. So
a fork waits for the compiles under way, about a second at most.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from rtk.errors import ToolchainError

_WAIT_S = 60.0


def new_in_child(namespace: dict[str, Any], name: str) -> None:
    """The lock of that name is another one in a forked child: the thread that held it there may not exist."""

    def renew() -> None:
        namespace[name] = threading.Lock()

    os.register_at_fork(after_in_child=renew)


_changed = threading.Condition()
_inside: dict[int, int] = {}  # thread -> how many uninterrupted() it is in
_forking = False
_cut = False  # in a child: its parent forked although a thread was inside


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No fork happens while another thread is in here; one under way is waited for before entering."""
    if _cut:
        hint = 'start processes with spawn: multiprocessing.set_start_method("spawn")'
        raise ToolchainError("this process was forked in the midst of a compile and cannot compile", hint)
    me = threading.get_ident()
    with _changed:
        while _forking and me not in _inside:
            _changed.wait()
        _inside[me] = _inside.get(me, 0) + 1
    try:
        yield
    finally:
        with _changed:
            _inside[me] -= 1
            if not _inside[me]:
                del _inside[me]
            _changed.notify_all()


def _others_inside() -> bool:
    return bool(_inside.keys() - {threading.get_ident()})


def _before_fork() -> None:
    global _forking
    with _changed:
        while _forking:  # by another thread
            _changed.wait()
        _forking = True
        _changed.wait_for(lambda: not _others_inside(), _WAIT_S)


def _in_parent() -> None:
    global _forking
    with _changed:
        _forking = False
        _changed.notify_all()


def _in_child() -> None:
    global _changed, _forking, _cut
    _cut = _cut or _others_inside()
    _changed, _forking = threading.Condition(), False
    _inside.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
