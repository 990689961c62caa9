"""What a test of a bad call needs: arrays of a library on a device, and the check that the call was refused.

Used by the tests on the CPU and on the GPU. The calls themselves stand in bad_call_table.py and bad_call_libraries.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from liars import Stranger

import rtk
from rtk.errors import ArgumentError, RtkError, UnsupportedError

Changes = dict[str, Any]
Table = dict[str, tuple["Changes | Callable[[Maker], Changes]", str]]

NAN, INF = float("nan"), float("inf")
Q, K, V, OUT = (2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 24), (2, 4, 5, 24)
POISON = 7.0  # what an output holds before, and after a call that was refused


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


def good_arrays() -> dict[str, np.ndarray]:
    """The good call that each bad one differs from. float16, which both the CPU and the GPU take."""
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in (("q", Q), ("k", K), ("v", V))}


class Maker:
    """Makes the arrays of a call: of one library, on one device."""

    def __init__(self, name: str, module: Any, device: Any = "cpu") -> None:
        self.name, self.module, self.device = name, module, device
        self.on_gpu = name == "cupy" or (name == "torch" and module.device(device).type == "cuda")

    def of(self, x: np.ndarray) -> Any:
        if self.name == "torch":
            return self.module.from_numpy(x).to(self.device)
        if self.name == "cupy":
            with self.device:
                return self.module.asarray(x)
        return x

    def call(self) -> dict[str, Any]:
        """The arguments of the good call, made anew."""
        return {name: self.of(x) for name, x in good_arrays().items()}

    def strangers(self) -> dict[str, Any]:
        """The same of a library that rtk does not know."""
        return {name: Stranger(x) for name, x in self.call().items()}

    def poisoned(self) -> Any:
        return self.of(np.full(OUT, POISON, np.float16))

    def bits(self, x: Any) -> bytes | None:
        """What is in an array; None for what is no plain array."""
        if self.name == "torch":
            plain = type(x) is self.module.Tensor and x.layout is self.module.strided and x.device.type != "meta"
            if not plain or x.is_nested or x.is_quantized or x.numel() > 1 << 20 or x.untyped_storage().nbytes() == 0:
                return None
            return bytes(x.detach().resolve_neg().cpu().reshape(-1).view(self.module.uint8).numpy().tobytes())
        if not issubclass(type(x), (np.ndarray, self.module.ndarray)) or x.size > 1 << 20 or x.dtype == object:
            return None
        if isinstance(x, self.module.ndarray) and self.on_gpu and not x.data.ptr:
            return None
        return bytes((x if self.on_gpu else np.asarray(x)).tobytes())


def refused(arguments: dict[str, Any], names: str, function: Any = None) -> RtkError:
    """Asserts that the call is refused by the right class of error, whose text names one of the arguments."""
    with pytest.raises(RtkError) as caught:
        (function or rtk.attention)(**arguments)
    error = caught.value
    assert isinstance(error, (ArgumentError, UnsupportedError)), repr(error)
    text = str(error)
    assert error.argument in names.split(), text
    assert f"{error.argument}: received" in text, text
    assert "accepted: " in text, text
    assert len(text) < 1000, "an error is read by people"
    return error


def changed_arguments(make: Maker, changes: Changes | Callable[[Maker], Changes]) -> Changes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its prototypes
        made = changes(make) if callable(changes) else changes
        wanted = (*"qkv", "out") if isinstance(changes, dict) else ()
        return {name: make.of(x) if name in wanted and isinstance(x, np.ndarray) else x for name, x in made.items()}


class Check:
    """The good call and its result; and the test of a bad one."""

    def __init__(self, make: Maker) -> None:
        self.make = make
        self.result = make.bits(rtk.attention(**make.call()))

    def __call__(self, changes: Changes, names: str, *, strangers: bool = False) -> None:
        """Refused before anything is launched; nothing is written; and the next good call gives the same bits."""
        make = self.make
        arguments = make.strangers() if strangers else make.call() | {"out": make.poisoned()}
        arguments |= changes
        before = {name: make.bits(x) for name, x in arguments.items() if name in (*"qkv", "out")}
        counts = rtk.stats()
        refused(arguments, names)
        after = rtk.stats()
        for name in ("launches", "plans", "cpu_calls", "inputs_copied", "outputs_copied"):
            assert after[name] == counts[name], f"{name} was counted for a call that was refused"
        assert {name: make.bits(arguments[name]) for name in before} == before, "an array was written to"
        out = make.poisoned()
        rtk.attention(**make.call(), out=out)
        assert make.bits(out) == self.result, "the next good call is not good"
