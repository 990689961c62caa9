"""Attention problems as people write them: `b=4,hq=32,hk=8,sq=4096,d=128,dtype=bf16,causal`, or files of such.

| key | meaning | default |
| --- | --- | --- |
| b | batch | 1 |
| hq, hk | heads of q; of k and v | none; as hq |
| sq, sk | lengths of q; of k and v | none; as sq |
| d, dv | head_dim of q and k; of v | none; as d |
| dtype | bf16 or fp16 | bf16 |
| causal | alone, or true or false | false |
| align | bottom-right or top-left: where the diagonal lies | bottom-right |
| window | left:right, keys seen on each side; empty is unbounded | : |
| ranges | alone, or true or false: each sequence has a range of keys of its own (kv_range) | false |
| softcap, scale | numbers, as of rtk.attention | 0; 1/sqrt(d) |
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtk.errors import ArgumentError, ToolchainError, UnsupportedError
from rtk.problem import ALIGNMENTS, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, AttentionProblem, attention_problem

__all__ = ["describe", "load", "parse", "problem"]

_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "f16": "float16", "float16": "float16"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_FLAGS = ("causal", "ranges")
_UNBOUNDED = ("", "none", "-1")
_MAX_LENGTH = (1 << 30) - 1


def parse(text: str) -> AttentionProblem:
    """The problem that a line such as "hq=32,sq=4096,d=128,causal" spells. ArgumentError names the key at fault."""
    where = f"shape {text!r}"
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key:
            raise ArgumentError(where, f"the part {part!r}", "parts KEY=VALUE, separated by commas")
        if key in fields:
            raise ArgumentError(f"{key} in {where}", "it twice", "each key once")
        if not equals and key in _KEYS and key not in _FLAGS:
            raise ArgumentError(f"{key} in {where}", "no value", f"{key}=VALUE: {_accepted(key)}")
        fields[key] = value if equals else True
    return problem(fields, where)


def problem(fields: Mapping[str, Any], where: str = "shape") -> AttentionProblem:
    """The problem of these keys, with values as text or as numbers and bools; `where` names it in errors."""
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in _KEYS:
            raise ArgumentError(where, f"the key {key!r}", ", ".join(_KEYS))
        try:
            values[key] = _KEYS[key][0](value)
        except (ValueError, TypeError):
            raise ArgumentError(f"{key} in {where}", value, _accepted(key)) from None
    for key in ("hq", "sq", "d"):
        if key not in values:
            raise ArgumentError(f"{key} in {where}", "nothing", _accepted(key))
    heads_q, seqlen_q, head_dim = values["hq"], values["sq"], values["d"]
    heads_kv, seqlen_k, head_dim_v = values.get("hk", heads_q), values.get("sk", seqlen_q), values.get("dv", head_dim)
    if heads_q % heads_kv:
        raise ArgumentError(f"hq in {where}", heads_q, f"a multiple of hk, {heads_kv}")
    batch = values.get("b", 1)
    try:
        found = attention_problem(
            (batch, heads_q, seqlen_q, head_dim),
            (batch, heads_kv, seqlen_k, head_dim),
            (batch, heads_kv, seqlen_k, head_dim_v),
            values.get("dtype", "bfloat16"),
            causal=values.get("causal", False),
            causal_align=values.get("align", ALIGNMENTS[0]),
            window_size=values.get("window"),
            softmax_scale=values.get("scale"),
            softcap=values.get("softcap", 0.0),
            layout="bhsd",
        )
        return replace(found, kv_ranges=values.get("ranges", False))
    except (ArgumentError, UnsupportedError) as error:  # each is right by itself, but not together
        key = {"softmax_scale": "scale", "window_size": "window"}.get(error.argument, error.argument)
        name = f"{key} in {where}" if key in _KEYS else where
        raise ArgumentError(name, error.received, error.accepted, error.hint) from None


def describe(problem: AttentionProblem) -> str:
    """The line that parse() reads as this problem, without what is default."""
    p = problem
    parts = [f"b={p.batch}", f"hq={p.num_heads_q}", f"hk={p.num_heads_kv}", f"sq={p.seqlen_q}", f"sk={p.seqlen_k}"]
    parts += [f"d={p.head_dim}", f"dv={p.head_dim_v}", f"dtype={'bf16' if p.dtype == 'bfloat16' else 'fp16'}"]
    if (p.window_left, p.window_right) == (None, 0):
        parts.append("causal")
    elif (p.window_left, p.window_right) != (None, None):
        left, right = ("" if side is None else str(side) for side in (p.window_left, p.window_right))
        parts.append(f"window={left}:{right}")
    if p.diagonal != p.seqlen_k - p.seqlen_q:
        parts.append("align=top-left")
    if p.kv_ranges:
        parts.append("ranges")
    if p.softcap:
        parts.append(f"softcap={p.softcap!r}")
    if p.softmax_scale != 1.0 / math.sqrt(p.head_dim):
        parts.append(f"scale={p.softmax_scale!r}")
    return ",".join(parts)


# ---------------------------------------------------------------------------------------------------------------- files


def load(path: str | os.PathLike[str]) -> list[AttentionProblem]:
    """The problems in a .toml or .json file: under `problems`, a list of tables of keys, or of lines for parse().

    A JSON file may be the list itself, and a .txt file has a line for each. ArgumentError names the file, the problem's
    number and the key at fault.
    """
    path = Path(path)
    contents = _contents(path)
    found = contents.get("problems") if isinstance(contents, dict) else contents
    if not isinstance(found, list) or (isinstance(contents, dict) and len(contents) != 1):
        raise ArgumentError(str(path), _kind(contents), "a list `problems`, and nothing else")
    if not found:
        raise ArgumentError(str(path), "no problems", "at least one")
    problems = []
    for number, item in enumerate(found, 1):
        where = f"{path}, problem {number}"
        if isinstance(item, str):
            try:
                problems.append(parse(item))
            except ArgumentError as error:
                raise ArgumentError(f"{where}: {error.argument}", error.received, error.accepted, error.hint) from None
        elif isinstance(item, dict):
            problems.append(problem(item, where))
        else:
            raise ArgumentError(where, item, "a table of keys, or a line such as 'hq=32,sq=4096,d=128'")
    return problems


def _contents(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(str(path), f"a file that cannot be read: {error}", "a .toml or .json file") from None
    reader: Callable[[str], Any] = json.loads
    if path.suffix == ".toml":
        try:
            import tomllib
        except ModuleNotFoundError:
            raise ToolchainError(f"{path}: reading TOML needs Python 3.11", "write it as JSON") from None
        reader = tomllib.loads
    elif path.suffix == ".txt":
        return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    elif path.suffix != ".json":
        raise ArgumentError(str(path), f"a name that ends in {path.suffix!r}", ".toml, .json or .txt")
    try:
        return reader(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(str(path), f"what cannot be read: {error}", f"{path.suffix[1:].upper()}") from None


def _kind(contents: Any) -> str:
    if isinstance(contents, dict):
        return f"the keys {sorted(contents)}"
    return f"a {type(contents).__name__}"


# --------------------------------------------------------------------------------------------------------------- values


def _count(value: Any) -> int:
    number = int(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= _MAX_LENGTH:
        raise ValueError
    return number


def _head_dim(value: Any) -> int:
    number = _count(value)
    if number % HEAD_DIM_MULTIPLE or number > MAX_HEAD_DIM:
        raise ValueError
    return number


def _dtype(value: Any) -> str:
    name = _DTYPES.get(value)
    if name is None:
        raise ValueError
    return name


def _bool(value: Any) -> bool:
    found = value if isinstance(value, bool) else _BOOLS.get(value)
    if found is None:
        raise ValueError
    return found


def _align(value: Any) -> str:
    if value not in ALIGNMENTS:
        raise ValueError
    return str(value)


def _window(value: Any) -> tuple[int | None, int | None]:
    sides = value.split(":") if isinstance(value, str) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        raise ValueError
    left, right = sides
    return _side(left), _side(right)


def _side(value: Any) -> int | None:
    if value is None or str(value).strip() in _UNBOUNDED:
        return None
    number = int(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError
    return number


def _real(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _not_negative(value: Any) -> float:
    number = _real(value)
    if number < 0:
        raise ValueError
    return number


_LENGTH = "an integer from 1 to 2**30 - 1"
_HEAD_DIM = f"a multiple of {HEAD_DIM_MULTIPLE} from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
_KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "b": (_count, _LENGTH),
    "hq": (_count, _LENGTH),
    "hk": (_count, _LENGTH),
    "sq": (_count, _LENGTH),
    "sk": (_count, _LENGTH),
    "d": (_head_dim, _HEAD_DIM),
    "dv": (_head_dim, _HEAD_DIM),
    "dtype": (_dtype, "bf16 or fp16"),
    "causal": (_bool, "true or false"),
    "align": (_align, " or ".join(ALIGNMENTS)),
    "window": (_window, "LEFT:RIGHT, integers of at least 0, each empty where unbounded"),
    "ranges": (_bool, "true or false"),
    "softcap": (_not_negative, "0 for none, or a positive number"),
    "scale": (_real, "a number"),
}


def _accepted(key: str) -> str:
    return _KEYS[key][1]
