"""Calls that rtk must refuse, whatever the library and the device of their arrays.

An entry is (changes, names): what is passed instead of the good call's arguments, and the arguments that the error may
name. NumPy arrays in `changes` become arrays of the library under test; where they need that library to be made,
`changes` is a function of the Maker.
"""

from __future__ import annotations

import decimal
import fractions
from typing import Any
from unittest.mock import Mock

import numpy as np
from bad_calls import INF, NAN, OUT, Changes, K, Maker, Q, Table, V, zeros
from liars import Stranger

from rtk.kernels.attention_fwd import AttentionFwdConfig

EVERYWHERE: Table = {
    # ranks and shapes
    "q 3-d": ({"q": zeros(4, 5, 16)}, "q"),
    "q 5-d": ({"q": zeros(1, 2, 4, 5, 16)}, "q"),
    "q 2-d": ({"q": zeros(5, 16)}, "q"),
    "q 0-d": ({"q": zeros()}, "q"),
    "k 0-d": ({"k": zeros()}, "k"),
    "v 0-d": ({"v": zeros()}, "v"),
    "k 3-d": ({"k": zeros(2, 7, 16)}, "k"),
    "k 5-d": ({"k": zeros(2, 2, 1, 7, 16)}, "k"),
    "v 3-d": ({"v": zeros(2, 7, 24)}, "v"),
    "v 5-d": ({"v": zeros(2, 2, 7, 24, 1)}, "v"),
    "all 3-d": ({"q": zeros(4, 5, 16), "k": zeros(2, 7, 16), "v": zeros(2, 7, 24)}, "q"),
    "batch of q": ({"q": zeros(3, 4, 5, 16)}, "q k"),
    "batch of k": ({"k": zeros(1, 2, 7, 16)}, "k"),
    "batch of k 0": ({"k": zeros(0, 2, 7, 16)}, "k"),
    "batch of v": ({"v": zeros(1, 2, 7, 24)}, "v"),
    "seqlen of v": ({"v": zeros(2, 2, 8, 24)}, "v"),
    "seqlen of v 0": ({"v": zeros(2, 2, 0, 24)}, "v"),
    "seqlen of k": ({"k": zeros(2, 2, 8, 16)}, "v"),
    "heads of v": ({"v": zeros(2, 4, 7, 24)}, "v"),
    "heads of k": ({"k": zeros(2, 4, 7, 16)}, "v"),
    "head_dim of k": ({"k": zeros(2, 2, 7, 24)}, "k"),
    "heads not divisible": ({"k": zeros(2, 3, 7, 16), "v": zeros(2, 3, 7, 24)}, "q k"),
    "heads 5 over 2": ({"q": zeros(2, 5, 5, 16)}, "q k"),
    "more kv heads": ({"k": zeros(2, 8, 7, 16), "v": zeros(2, 8, 7, 24)}, "q k"),
    "no heads in q": ({"q": zeros(2, 0, 5, 16)}, "q"),
    "no kv heads": ({"k": zeros(2, 0, 7, 16), "v": zeros(2, 0, 7, 24)}, "k v"),
    "no heads": ({"q": zeros(2, 0, 5, 16), "k": zeros(2, 0, 7, 16), "v": zeros(2, 0, 7, 24)}, "q k v"),
    "layout mistaken": ({"layout": "bshd"}, "k v q"),
    **{
        f"head_dim {d}": ({"q": zeros(2, 4, 5, d), "k": zeros(2, 2, 7, d)}, "q k")
        for d in (0, 1, 4, 7, 12, 60, 63, 100, 260, 264, 300, 512)
    },
    **{f"head_dim_v {d}": ({"v": zeros(2, 2, 7, d)}, "v") for d in (0, 1, 4, 60, 264, 300)},
    # dtypes
    "dtype of k": ({"k": zeros(*K, dtype=np.float32)}, "k"),
    "dtype of v": ({"v": zeros(*V, dtype=np.float64)}, "v"),
    "dtype of q": ({"q": zeros(*Q, dtype=np.float32)}, "k"),
    "dtype of v int": ({"v": zeros(*V, dtype=np.int32)}, "v"),
    **{
        f"dtype {np.dtype(d)}": ({"q": zeros(*Q, dtype=d), "k": zeros(*K, dtype=d), "v": zeros(*V, dtype=d)}, "q")
        for d in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.bool_, np.complex64)
    },
    # what is no array
    **{
        f"{name} {kind}": ({name: value}, name)
        for name in "qkv"
        for kind, value in (
            ("None", None),
            ("list", [[[[1.0] * 16]]]),
            ("number", 3.0),
            ("text", "x"),
            ("object", object()),
        )
    },
    "q dict": ({"q": {"q": 1}}, "q"),
    "q class": ({"q": np.ndarray}, "q"),
    "q class of strangers": ({"q": Stranger}, "q"),
    "q function": ({"q": zeros}, "q"),
    "q list of arrays": ({"q": [zeros(4, 5, 16), zeros(4, 5, 16)]}, "q"),
    "q scalar of NumPy": ({"q": np.float16(1)}, "q"),
    "q mock": ({"q": Mock()}, "q"),
    "q bytes": ({"q": bytes(64)}, "q"),
    "q memoryview": ({"q": memoryview(bytes(64))}, "q"),
    # windows
    "window not a pair": ({"window_size": 5}, "window_size"),
    "window of none": ({"window_size": ()}, "window_size"),
    "window of one": ({"window_size": (5,)}, "window_size"),
    "window of three": ({"window_size": (1, 2, 3)}, "window_size"),
    "window -5": ({"window_size": (-5, 0)}, "window_size"),
    "window right -2": ({"window_size": (0, -2)}, "window_size"),
    "window both -5": ({"window_size": (-5, -5), "causal": True}, "window_size"),
    "window float": ({"window_size": (1.5, 0)}, "window_size"),
    "window whole floats": ({"window_size": (1.0, 0.0)}, "window_size"),
    "window bools": ({"window_size": (True, False)}, "window_size"),
    "window nan": ({"window_size": (NAN, 0)}, "window_size"),
    "window text": ({"window_size": "12"}, "window_size"),
    "window texts": ({"window_size": ("1", "2")}, "window_size"),
    "window list of lists": ({"window_size": [[1], [2]]}, "window_size"),
    "window dict": ({"window_size": {0: 1, 1: 2}}, "window_size"),
    "window set": ({"window_size": {1, 2}}, "window_size"),
    "window array": ({"window_size": np.array([1, 2])}, "window_size"),
    "window False": ({"window_size": False}, "window_size"),
    # scales and caps
    **{
        f"{name} {kind}": ({name: value}, name)
        for name in ("softmax_scale", "softcap")
        for kind, value in (
            ("nan", NAN),
            ("nan of NumPy", np.float32(NAN)),
            ("inf", INF),
            ("-inf", -INF),
            ("inf of float16", np.float16(INF)),
            ("text", "0.1"),
            ("complex", 1j),
            ("list", [0.1]),
            ("True", True),
            ("True of NumPy", np.True_),
            ("1e300", 1e300),
            ("10**400", 10**400),
            ("1e39", 1e39),
            ("array", np.array(0.1)),
            ("arrays", np.array([0.1, 0.2])),
            ("decimal", decimal.Decimal("0.1")),
            ("fraction", fractions.Fraction(1, 8)),
        )
    },
    "scale times log2(e) too large": ({"softmax_scale": 3e38}, "softmax_scale"),
    "softcap negative": ({"softcap": -1.0}, "softcap"),
    "softcap None": ({"softcap": None}, "softcap"),
    "softcap 0 in float32": ({"softcap": 1e-300}, "softcap"),
    "softcap far below the scale": ({"softcap": 1e-30, "softmax_scale": 1e30}, "softcap"),
    # words
    **{
        f"{name} {value!r}": ({name: value}, name)
        for name, values in (
            ("layout", ("sbhd", "BHSD", "", "bhsd ", b"bhsd", None, 4, ["bhsd"], ("b", "h", "s", "d"))),
            ("causal_align", ("left", "", None, True, ["top-left"])),
            ("causal", ("yes", None, 1, 0, 0.0, (), "top-left")),
            ("return_lse", ("no", None, 1, 0)),
            ("batch_invariant", ("no", None, 1, 0)),
            ("sm_margin", (-1, 1.5, 2.0, None, "2", True, NAN, (1,), 1j)),
        )
        for value in values
    },
    "layout array": ({"layout": np.array("bhsd")}, "layout"),
    "layout arrays": ({"layout": np.array(["bhsd", "bshd"])}, "layout"),
    "align array": ({"causal_align": np.array("top-left")}, "causal_align"),
    "causal array": ({"causal": np.array([True, False])}, "causal"),
    "return_lse array": ({"return_lse": np.array([True, False])}, "return_lse"),
    "margin array": ({"sm_margin": np.array([1])}, "sm_margin"),
    # out
    "out shape": ({"out": zeros(2, 4, 5, 16)}, "out"),
    "out rank": ({"out": zeros(4, 5, 24)}, "out"),
    "out layout": ({"out": zeros(2, 5, 4, 24)}, "out"),
    "out flat": ({"out": zeros(2 * 4 * 5 * 24)}, "out"),
    "out broadcastable": ({"out": zeros(1, 4, 5, 24)}, "out"),
    "out larger": ({"out": zeros(2, 4, 6, 24)}, "out"),
    "out 0-d": ({"out": zeros()}, "out"),
    "out empty": ({"out": zeros(0)}, "out"),
    "out dtype": ({"out": zeros(*OUT, dtype=np.float32)}, "out"),
    "out int": ({"out": zeros(*OUT, dtype=np.int16)}, "out"),
    "out list": ({"out": zeros(*OUT).tolist()}, "out"),
    "out True": ({"out": True}, "out"),
    "out False": ({"out": False}, "out"),
    "out text": ({"out": "out.npy"}, "out"),
    "out stranger": ({"out": Stranger(zeros(*OUT))}, "out"),
    # configs
    **{
        f"config {kind}": ({"config": value}, "config")
        for kind, value in (
            ("text", "fast"),
            ("number", 3),
            ("True", True),
            ("list", [128, 96]),
            ("class", AttentionFwdConfig),
            ("unknown field", {"BLOCK": 64}),
            ("field that is no text", {1: 2}),
            ("illegal", {"BLOCK_M": 100}),
            ("huge", {"BLOCK_N": 1 << 20}),
            ("negative", {"BLOCK_N": -128}),
            ("zero", {"BLOCK_N": 0}),
            ("text for a number", {"BLOCK_N": "128"}),
            ("None for a number", {"BLOCK_M": None}),
            ("inf for a number", {"NUM_CONSUMER_WARPGROUPS": INF}),
            ("float for a number", {"BLOCK_N": 128.0}),
            ("True for a number", {"STAGES": True}),
            ("1 for a bool", {"PINGPONG": 1}),
            ("of another head_dim", {"HEAD_DIM": 72}),
            ("of another dtype", {"BF16": True}),
            ("for a mask", {"MASK_LEFT": True}),
            ("five stages", {"STAGES": 5}),
            ("no consumer", {"NUM_CONSUMER_WARPGROUPS": 0}),
            ("unknown scheduler", {"SCHEDULER": 7}),
        )
    },
}


class NoHash:
    def __hash__(self) -> int:
        raise RuntimeError("no hash")


class NoEquality:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no ==")

    __hash__ = object.__hash__


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


OPTIONS = (
    "causal",
    "causal_align",
    "window_size",
    "softmax_scale",
    "softcap",
    "layout",
    "return_lse",
    "out",
    "config",
    "batch_invariant",
    "sm_margin",
)
EVERYWHERE |= {
    f"{name} {kind.__name__}": ({name: kind()}, name)
    for name in (*OPTIONS, "q", "k", "v")
    for kind in (NoHash, NoEquality, NoRepr)
}
# Objects of the library itself where a number or a word is wanted; out over an input; mixtures with NumPy.
EVERYWHERE |= {
    f"{name} of the library": (lambda make, name=name: {name: make.of(np.ones(2))}, name)
    for name in OPTIONS
    if name != "out"
}
EVERYWHERE |= {
    "out is q": (
        lambda make: dict.fromkeys(("q", "out"), make.of(zeros(*Q))) | {"v": make.of(zeros(2, 2, 7, 16))},
        "out",
    ),
    "out over part of q": (lambda make: _overlapping(make, "q"), "out"),
    "out over part of k": (lambda make: _overlapping(make, "k"), "out"),
    "out over part of v": (lambda make: _overlapping(make, "v"), "out"),
    "out of one row": (lambda make: {"out": broadcast(make, zeros(2, 4, 1, 24), OUT)}, "out"),
    "out of one head": (lambda make: {"out": broadcast(make, zeros(2, 1, 5, 24), OUT)}, "out"),
    "q too long": (lambda make: {"q": broadcast(make, zeros(1, 1, 1, 16), (2, 4, 1 << 30, 16))}, "q"),
    "k too long": (lambda make: {"k": broadcast(make, zeros(1, 1, 1, 16), (2, 2, 1 << 31, 16))}, "k v"),
    "q of too many rows": (lambda make: {**_vast(make, 1 << 20), "out": None}, "q"),
    "a result larger than memory": (lambda make: {**_vast(make, 8000), "out": None}, "q"),
}


def broadcast(make: Maker, x: np.ndarray, shape: tuple[int, ...]) -> Any:
    """A view that repeats x, as many elements as `shape` says in the memory of a few."""
    if make.name == "torch":
        return make.of(x).expand(shape)
    if make.name == "cupy":
        return make.module.broadcast_to(make.of(x), shape)
    # Of a writable array as well, where NumPy's broadcast_to would be read-only.
    strides = tuple(0 if a != b else s for a, b, s in zip(x.shape, shape, x.strides, strict=True))
    return np.lib.stride_tricks.as_strided(x, shape, strides)


def _vast(make: Maker, seqlen: int) -> Changes:
    """Terabytes of elements in the memory of one row."""
    batch = 1 << 21
    q = broadcast(make, zeros(1, 1, 1, 256), (batch, 4, seqlen, 256))
    return {"q": q, **{name: broadcast(make, zeros(1, 1, 1, 256), (batch, 2, 7, 256)) for name in "kv"}}


def _overlapping(make: Maker, name: str) -> Changes:
    """Rows are written while others are still read."""
    room = make.of(zeros(2, 4, 7, 32))
    views = {"q": room[:, :4, :5, :16], "k": room[:, :2, :, 8:24], "v": room[:, 2:, :, :24]}
    return {name: views[name], "out": room[:, :, :5, :24]}
