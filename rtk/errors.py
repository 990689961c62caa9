"""The exceptions rtk raises. Each says what was asked, what was received and what would have been accepted."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "ArgumentError",
    "CacheWarning",
    "CompileError",
    "DriverError",
    "RtkError",
    "ToolchainError",
    "UnsupportedError",
]

_CONTEXT_LINES = 4  # source lines shown on each side of an error
_MAX_SHOWN = 200  # characters of a value that was refused
_MAX_EXCERPTS = 8  # a broken template can fail in a hundred places; the first few name the cause


class RtkError(Exception):
    """The base of every exception that rtk raises on purpose."""


def _shown(received: object) -> str:
    """What was received, in a few words: an object that cannot show itself must not hide the error."""
    if isinstance(received, str):
        return received
    kind = type(received).__name__
    try:
        if hasattr(received, "shape") and hasattr(received, "dtype"):  # showing elements would wait for a GPU
            return f"an object of type {kind}, shape {tuple(received.shape)}, dtype {received.dtype}"
        text = repr(received)
    except Exception:
        return f"an object of type {kind}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _Rejection(RtkError):
    """A rejected argument: the fields stay readable, and the message has one form everywhere."""

    def __init__(self, argument: str, received: object, accepted: str, hint: str = "") -> None:
        super().__init__(argument, received, accepted, hint)  # args as given, so that pickling works
        self.argument = argument
        self.received = received
        self.accepted = accepted
        self.hint = hint

    def __str__(self) -> str:
        text = f"rtk: {self.argument}: received {_shown(self.received)}; accepted: {self.accepted}."
        return f"{text} {self.hint}" if self.hint else text


class ArgumentError(_Rejection, ValueError):
    """A value, shape, dtype or device that is wrong for any build and any GPU."""


class UnsupportedError(_Rejection, NotImplementedError):
    """A sensible wish that this build or this GPU cannot serve; raised before anything is launched."""


class ToolchainError(RtkError, RuntimeError):
    """NVRTC, CuPy or the driver is missing or too old. `hint` is the command that mends it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"rtk: {self.message}\n  try: {self.hint}" if self.hint else f"rtk: {self.message}"


class DriverError(RtkError, RuntimeError):
    """A CUDA driver call failed: `call` returned `code`, which the driver calls `name`."""

    def __init__(self, call: str, code: int, name: str, detail: str = "") -> None:
        super().__init__(call, code, name, detail)
        self.call = call
        self.code = code
        self.name = name
        self.detail = detail

    def __str__(self) -> str:
        text = f"rtk: {self.call} failed: {self.name} ({self.code})"
        return f"{text}: {self.detail}" if self.detail else text


class CompileError(RtkError, RuntimeError):
    """NVRTC refused a source.

    `source` is the rendered unit, `log` all that NVRTC said, `headers` the texts that `log` can point into, by the name
    it has for them (without it, every place is taken to be in `source`). str() shows numbered source around each error,
    in the unit or the header it happened in, and then the whole of `log`.
    """

    def __init__(self, message: str, source: str, log: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, source, log, dict(headers or {}))
        self.message = message
        self.source = source
        self.log = log
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        parts = [f"rtk: {self.message}", *self._excerpts()]
        if self.log.strip():
            parts.append("log:\n" + self.log.rstrip())
        return "\n\n".join(parts)

    def _excerpts(self) -> list[str]:
        excerpts: list[str] = []
        for file, line in _error_places(self.log)[:_MAX_EXCERPTS]:
            text = (self.headers.get(file, "") if self.headers else self.source).splitlines()
            if not 1 <= line <= len(text):
                continue  # generated, or another file's: the log below still has it
            first, last = max(1, line - _CONTEXT_LINES), min(len(text), line + _CONTEXT_LINES)
            shown = (f"{'>' if n == line else ' '}{n:5d} | {text[n - 1]}" for n in range(first, last + 1))
            excerpts.append("\n".join([f"{file}, line {line}:", *shown]))
        return excerpts


class CacheWarning(UserWarning):
    """The cubin cache could not be used, or an entry in it was damaged; rtk goes on without it."""


# NVRTC writes `file(12): error: text`, `file(12): catastrophic error: text` and `file(12): error #20: text`.
_ERROR_PLACE = re.compile(r"^(?P<file>[^\n(]+)\((?P<line>\d+)\): (?:\w+ )?error\b", re.MULTILINE)


def _error_places(log: str) -> list[tuple[str, int]]:
    """(file, line) of each error in NVRTC's log, in order, each once."""
    return list(dict.fromkeys((m["file"], int(m["line"])) for m in _ERROR_PLACE.finditer(log)))
