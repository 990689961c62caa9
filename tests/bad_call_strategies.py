"""Random calls that rtk must refuse, for hypothesis: something wrong about the arrays, some options, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bad_calls import INF, NAN, POISON, Maker
from hypothesis import strategies as st

FIELDS = ("BLOCK_M", "BLOCK_N", "STAGES", "NUM_CONSUMER_WARPGROUPS", "PINGPONG", "SCHEDULER", "HEAD_DIM", "BF16")


@dataclass(frozen=True)
class BadCall:
    """Arguments by name, NumPy arrays still in NumPy; and the arguments that the error may name."""

    arguments: dict[str, Any]
    names: frozenset[str]

    def made(self, make: Maker) -> dict[str, Any]:
        return {
            name: make.of(x) if isinstance(x, np.ndarray) and name in (*"qkv", "out") else x
            for name, x in self.arguments.items()
        }


# --- values of every kind --------------------------------------------------------------------------------------------

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([NAN, INF, -INF, 1e300, 1e-320, -0.0, 3.4e38]),
    st.complex_numbers(),
    st.text(max_size=6),
    st.binary(max_size=6),
    st.sampled_from(["bhsd", "bshd", "top-left", "bottom-right", "causal", "auto"]),
    st.sampled_from([np.float32(0.5), np.float16(NAN), np.int8(-5), np.uint64(2**63), np.True_, np.str_("bhsd")]),
    st.sampled_from([..., NotImplemented, int, object(), range(2), len, np.float32, Exception("no")]),
)
junk = st.one_of(
    _scalars,
    st.lists(_scalars, max_size=3),
    st.tuples(_scalars, _scalars),
    st.dictionaries(st.text(max_size=3), _scalars, max_size=2),
    st.sets(st.integers(), max_size=3),
    st.lists(st.integers(0, 3), max_size=3).map(np.array),
)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, (bool, np.bool_))


def _integer(x: Any) -> bool:
    return _number(x) and isinstance(x, (int, np.integer))


def _side(x: Any) -> bool:
    return x is None or (_integer(x) and x >= -1)


# What might be good after all; the tests draw everything else. (Written apart from rtk's own checks, and wider.)
MAYBE_GOOD = {
    "causal": lambda x: isinstance(x, (bool, np.bool_)),
    "return_lse": lambda x: isinstance(x, (bool, np.bool_)),
    "batch_invariant": lambda x: isinstance(x, (bool, np.bool_)),
    "causal_align": lambda x: isinstance(x, str) and x in ("top-left", "bottom-right"),
    "layout": lambda x: isinstance(x, str) and x in ("bhsd", "bshd"),
    "window_size": lambda x: x is None or (isinstance(x, (tuple, list)) and len(x) == 2 and all(map(_side, x))),
    "softmax_scale": lambda x: x is None or (_number(x) and abs(float_of(x)) < 2.4e38),
    "softcap": lambda x: _number(x) and 0 <= float_of(x) < INF,
    "sm_margin": lambda x: _integer(x) and x >= 0,
    "config": lambda x: x is None or (isinstance(x, dict) and not x),
    "out": lambda x: x is None,
}


def float_of(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:
        return INF


def bad_option(name: str) -> st.SearchStrategy[Any]:
    wrong = junk.filter(lambda x: not MAYBE_GOOD[name](x))
    if name == "config":
        values = _scalars.filter(lambda x: not isinstance(x, (int, np.integer)))
        return st.one_of(wrong, st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
    if name == "window_size":
        side = st.one_of(st.integers(-(10**20), -2), _scalars.filter(lambda x: not _side(x)))
        return st.one_of(wrong, st.tuples(side, st.none()), st.tuples(st.integers(0, 9), side).map(list))
    return wrong


# --- calls -----------------------------------------------------------------------------------------------------------


@st.composite
def good_shapes(draw: Any) -> dict[str, list[int]]:
    batch, kv_heads, group = (draw(st.integers(1, n)) for n in (3, 3, 3))
    seqlen_q, seqlen_k = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    head_dim, head_dim_v = (8 * draw(st.integers(1, 5)) for _ in range(2))
    return {
        "q": [batch, kv_heads * group, seqlen_q, head_dim],
        "k": [batch, kv_heads, seqlen_k, head_dim],
        "v": [batch, kv_heads, seqlen_k, head_dim_v],
    }


def _break_shapes(draw: Any, shapes: dict[str, list[int]]) -> frozenset[str]:
    """Makes one thing wrong about the shapes; says what the error may name."""
    kind = draw(st.sampled_from(["rank", "size", "heads", "head_dim", "head_dim_v", "zero heads"]))
    if kind == "rank":
        name = draw(st.sampled_from("qkv"))
        rank = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 32]))
        shapes[name] = (shapes[name] + [1] * rank)[:rank]
        return frozenset(name)
    if kind == "size":  # k's head_dim, and what k and v must share, with q and with each other
        name, axis = draw(st.sampled_from([("k", 0), ("k", 3), ("k", 1), ("k", 2), ("v", 0), ("v", 1), ("v", 2)]))
        shapes[name][axis] = draw(st.integers(0, 20).filter(lambda n: n != shapes[name][axis]))
        return frozenset("qkv")
    if kind == "heads":
        shapes["k"][1] = shapes["v"][1] = draw(st.integers(2, 9))
        shapes["q"][1] = shapes["k"][1] * draw(st.integers(0, 3)) + draw(st.integers(1, shapes["k"][1] - 1))
        return frozenset("qk")
    if kind == "zero heads":
        names = draw(st.sampled_from(["q", "kv", "qkv"]))
        for name in names:
            shapes[name][1] = 0
        return frozenset("qkv")
    wrong = st.one_of(st.sampled_from([0, 60, 300, 264, 512]), st.integers(1, 400).filter(lambda d: d % 8 or d > 256))
    for name in "qk" if kind == "head_dim" else "v":
        shapes[name][3] = draw(wrong) if name != "k" else shapes["q"][3]
    return frozenset("qk" if kind == "head_dim" else "v")


@st.composite
def bad_calls(draw: Any) -> BadCall:
    shapes = draw(good_shapes())
    wrong = draw(st.sampled_from(["options", "shapes", "dtypes", "objects", "out", "shapes and options"]))
    names: frozenset[str] = frozenset()
    if "shapes" in wrong:
        names |= _break_shapes(draw, shapes)
    dtypes = dict.fromkeys("qkv", "float16")
    if wrong == "dtypes":
        changed = draw(st.sampled_from(["q", "k", "v", "kv", "qkv"]))
        taken = ["int8", "int64", "uint8", "bool", "complex64", *(["float32", "float64"] if changed != "qkv" else [])]
        dtypes |= dict.fromkeys(changed, draw(st.sampled_from(taken)))
        names |= frozenset("qkv")
    arguments: dict[str, Any] = {name: np.ones(shape, dtypes[name]) for name, shape in shapes.items()}
    if wrong == "objects":
        # An array instead of an object: of a shape that no argument has.
        for name in draw(st.sets(st.sampled_from("qkv"), min_size=1)):
            arguments[name] = draw(junk)
            names |= frozenset("qkv")  # a bad array also disagrees with the good ones
    if wrong == "out":
        shape = [*shapes["q"][:3], shapes["v"][3]]
        axis = draw(st.integers(0, 3))
        shape[axis] = draw(st.integers(0, 20).filter(lambda n: n != shape[axis]))
        arguments["out"] = draw(st.one_of(bad_option("out"), st.just(np.full(shape, POISON, np.float16))))
        names |= {"out"}
    if "options" in wrong:
        for name in draw(st.sets(st.sampled_from(sorted(set(MAYBE_GOOD) - {"out"})), min_size=1, max_size=3)):
            arguments[name] = draw(bad_option(name))
            names |= {name}
    return BadCall(arguments, names)
