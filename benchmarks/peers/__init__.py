"""Implementations to be measured side by side, ours among them: a module each, behind one signature.

A module of this package with a list `PEERS` takes part; nothing else has to be told. A peer that is not installed, or
that cannot serve a problem, says why.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from rtk.benchmarks.peers.base import CannotRun, Peer, Prepared
from rtk.errors import ArgumentError

__all__ = ["CannotRun", "Peer", "Prepared", "known", "prepared", "present", "reason_of"]

_LEAST_SHAPE = "b=1,hq=2,sq=128,d=64"


@functools.cache
def known() -> dict[str, Peer]:
    """Every peer by name, ours first and the others in the order of their modules."""
    found: list[Peer] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", [])
    found.sort(key=lambda peer: peer.name != "rtk")
    return {peer.name: peer for peer in found}


def present(names: Iterable[str] | None = None) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that answer here, and the reason for each that does not; of all of them, or of these names.

    Raises ArgumentError for a name that nothing has.
    """
    wanted = list(known()) if names is None else list(names)
    for name in wanted:
        if name not in known():
            raise ArgumentError("impl", name, ", ".join(known()))
    found, absent = {}, {}
    for name in wanted:
        try:
            known()[name].load()
            found[name] = known()[name]
        except Exception as error:  # each library fails in its own way
            absent[name] = reason_of(error)
    return found, absent


def prepared(impl: str, problem: Any, q: Any, k: Any, v: Any, *, config: Any = None) -> Callable[[], Any]:
    """A call without arguments of attention forward on these torch tensors in (batch, heads, seqlen, head_dim).

    `config` pins fields of a kernel's configuration, for impl "rtk". Raises ArgumentError for an unknown impl,
    CannotRun where it is not installed or does not serve the problem.
    """
    found, absent = present([impl])
    if impl not in found:
        raise CannotRun(absent[impl])
    options = {"config": dict(config)} if config else {}
    return found[impl].prepare("attention_fwd", problem, (q, k, v), **options).entered()


def reason_of(error: BaseException) -> str:
    """One line that says why something did not run."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, CannotRun) and text else f"{type(error).__name__}: {text}".rstrip(": ")
