"""rtk/errors.py: one form of message, the right bases, and a compile error that shows where."""

from __future__ import annotations

import pickle

import pytest

from rtk.errors import (
    ArgumentError,
    CacheWarning,
    CompileError,
    DriverError,
    RtkError,
    ToolchainError,
    UnsupportedError,
)

UNIT = "\n".join(f"line {n}" for n in range(1, 21))


@pytest.mark.parametrize("kind", [ArgumentError, UnsupportedError])
def test_a_rejection_names_argument_received_accepted_and_hint(kind):
    error = kind("head_dim", 257, "multiples of 8 up to 256", "Pad q and k.")
    assert str(error) == "rtk: head_dim: received 257; accepted: multiples of 8 up to 256. Pad q and k."
    assert (error.argument, error.received, error.accepted) == ("head_dim", 257, "multiples of 8 up to 256")
    assert str(kind("layout", "bdsh", "'bhsd' or 'bshd'")) == (
        "rtk: layout: received bdsh; accepted: 'bhsd' or 'bshd'."
    )  # no hint, no trailing blank


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ArgumentError("a", 1, "2"), (RtkError, ValueError)),
        (UnsupportedError("a", 1, "2", "h"), (RtkError, NotImplementedError)),
        (ToolchainError("no NVRTC", "pip install x"), (RtkError, RuntimeError)),
        (CompileError("bad", UNIT, "k.cu(3): error: no", {"k.cu": UNIT}), (RtkError, RuntimeError)),
        (DriverError("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "at k"), (RtkError, RuntimeError)),
    ],
)
def test_bases_and_pickling(error, bases):
    assert isinstance(error, bases)
    again = pickle.loads(pickle.dumps(error))  # from a worker process to its parent
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_messages_of_toolchain_and_driver_errors():
    assert str(ToolchainError("no NVRTC", "pip install x")) == "rtk: no NVRTC\n  try: pip install x"
    assert str(ToolchainError("no NVRTC")) == "rtk: no NVRTC"
    assert str(DriverError("cuInit", 100, "CUDA_ERROR_NO_DEVICE")) == "rtk: cuInit failed: CUDA_ERROR_NO_DEVICE (100)"
    assert str(DriverError("cuInit", 3, "X", "why")).endswith("X (3): why")
    assert issubclass(CacheWarning, UserWarning)


def test_compile_error_numbers_the_source_around_each_error():
    log = "k.cu(10): error: first\n  line 10\n\nk.cu(10): error: again\nk.cu(20): catastrophic error: last\n"
    text = str(CompileError("cannot compile k", UNIT, log))
    assert ">   10 | line 10" in text and "     6 | line 6" in text and "    14 | line 14" in text
    assert ">   20 | line 20" in text
    assert text.count(">   10 |") == 1  # two errors on a line show it once
    assert text.endswith(log.rstrip())


def test_compile_error_looks_into_the_header_that_failed_and_shows_no_wrong_file():
    headers = {"k.cu": UNIT, "rtk/a.cuh": "one\ntwo\nthree\n"}
    text = str(CompileError("m", UNIT, "rtk/a.cuh(2): error #20: x\nelsewhere.h(3): error: y\n", headers))
    assert ">    2 | two" in text and "rtk/a.cuh, line 2:" in text
    assert "line 3\n" not in text and "elsewhere.h, line 3:" not in text
    assert "elsewhere.h(3): error: y" in text  # in the log all the same


def test_compile_error_survives_odd_logs():
    for log in ("", "k.cu(99999): error: beyond the end", "k.cu(0): error: none", "ptxas fatal : no place at all"):
        assert log in str(CompileError("m", UNIT, log))
    many = "".join(f"k.cu({n}): error: e\n" for n in range(1, 20))
    assert str(CompileError("m", UNIT, many)).count(", line ") == 8
