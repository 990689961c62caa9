"""Results files: reading, writing, merging, grouping into cells, and comparing within a cell. Standard library only.

A results file is one JSON object, {"meta": {...}, "records": [...]}: one record per cell and implementation. A cell is
one problem, everything about a record but who computed it. Times are in µs unless a key says otherwise.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rtk.benchmarks import schema
from rtk.benchmarks.schema import SCHEMA
from rtk.errors import ArgumentError

RTK = "rtk"
# One kernel, timed under two names in one run (cuDNN as `cudnn` and as torch's own choice, `sdpa`), differed by at
# most 0.7% in a cell of the recorded `paper`: no smaller difference is a fact about a kernel. (By up to 3% in cells of
# `long` and `small`, and there the quartiles said so.)
RESOLUTION = 0.01
# CPU time of a call depends on the host's clock, its caches and what else it does, far more than a GPU's time does.
HOST_RESOLUTION = 0.10

CELL_KEYS = (
    "suite",
    "op",
    "dtype",
    "batch",
    "heads_q",
    "heads_kv",
    "seqlen_q",
    "seqlen_k",
    "head_dim",
    "head_dim_v",
    "causal",
    "window",
    "softcap",
    "softmax_scale",
    "align",
    "variant",
)
OWN = "own"  # what else names the problem of an operation, as an object: the size of its pages, for one
# The time that a suite is about. Suites of other things (errors, one-off milliseconds) have none that can be compared.
_METRICS: dict[str, str | None] = {"overhead": "cpu_us", "coldstart": None, "accuracy": None}
_ACCEPTED = "a results file, as `rtk bench` writes it"

# What every record has, null where it does not apply, in this order.
RECORD_KEYS = (
    *CELL_KEYS[:2],
    "impl",
    *CELL_KEYS[2:],
    *("us", "us_q1", "us_q3", "tflops", "ceiling_share", "floor_us", "rounds", "timing"),
    *("rms_error", "max_error", "sm_mhz", "power_w", "temperature_c", "error"),
)

Record = dict[str, Any]
Cell = tuple[Any, ...]
Verdict = Literal["faster", "tie", "slower"]


@dataclass(frozen=True)
class Run:
    """One results file: what was measured where, and the records. `path` is where it was read from."""

    meta: dict[str, Any]
    records: list[Record]
    path: Path | None = None

    @property
    def suite(self) -> str:
        return str(self.meta.get("suite", "?"))

    @property
    def gpu(self) -> str:
        return str(self.meta.get("gpu", "?"))


# -------------------------------------------------------------------------------------------------- reading and writing


def read(path: str | os.PathLike[str]) -> Run:
    """The run in a results file. ArgumentError names the file and what is wrong with it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArgumentError(str(path), "a name with no file", _ACCEPTED) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(str(path), f"what cannot be read: {error}", _ACCEPTED) from None
    try:
        contents = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(str(path), f"what is not JSON: {error}", _ACCEPTED) from None
    wrong = schema.wrong(contents)
    if wrong:
        raise ArgumentError(str(path), f"a file that is none: {wrong}", _ACCEPTED)
    meta = contents["meta"]
    if meta["schema"] > SCHEMA:
        hint = "A newer rtk wrote it; this one is too old to read it."
        raise ArgumentError(str(path), f"schema {meta['schema']}", f"schemas up to {SCHEMA}", hint)
    return Run(meta, contents["records"], path)


def read_all(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The runs of these files, and of the results files among the *.json in these folders, in the order of their names.

    In a folder, JSON without `schema` in a `meta` is something else's and left out; a file that is named must be one.
    ArgumentError where a file cannot be read, and where nothing was found.
    """
    runs: list[Run] = []
    for path in map(Path, paths):
        found = [file for file in sorted(path.glob("*.json")) if _is_ours(file)] if path.is_dir() else [path]
        if not found:
            raise ArgumentError(str(path), "a folder without results", "results files, or a folder of them")
        runs += [read(file) for file in found]
    if not runs:
        raise ArgumentError("paths", "none", "results files, or a folder of them")
    return runs


def write(path: str | os.PathLike[str], meta: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Write a results file so that a reader sees the old one or the new one, whole. Makes its folder.

    ArgumentError where read() would not take it back: no schema or suite, or a number that is not finite. OSError where
    the folder cannot be written.
    """
    path = Path(path)
    contents = {"meta": dict(meta), "records": [dict(record) for record in records]}
    try:
        text = json.dumps(contents, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            str(path), f"what JSON cannot hold: {error}", "finite numbers, text, lists, dicts"
        ) from None
    wrong = schema.wrong(contents)
    if wrong:
        raise ArgumentError(str(path), wrong, _ACCEPTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def whole(record: Mapping[str, Any]) -> Record:
    """The record with all of RECORD_KEYS, and then what else it has."""
    return {key: record.get(key) for key in RECORD_KEYS} | dict(record)


def merge(*lists: Iterable[Record]) -> list[Record]:
    """One record per cell and implementation: the last one, in the place of the first."""
    found: dict[tuple[Cell, Any], Record] = {}
    for records in lists:
        for record in records:
            found[cell_key(record), record.get("impl")] = record
    return list(found.values())


def _is_ours(path: Path) -> bool:
    """Whether read() should look at this file of a folder: what cannot be parsed is not passed over in silence."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(contents, dict) and isinstance(contents.get("meta"), dict) and "schema" in contents["meta"]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------------------------------------------------------- cells


def cell_key(record: Mapping[str, Any]) -> Cell:
    """The problem of a record: the values of CELL_KEYS and OWN, with one spelling for no window and for no softcap."""
    values = {key: _frozen(record.get(key)) for key in (*CELL_KEYS, OWN)}
    if values["window"] in ((None, None), (-1, -1)):
        values["window"] = None
    values["softcap"] = values["softcap"] or None
    return tuple(values.values())


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return value


def cells(records: Iterable[Record]) -> dict[Cell, dict[str, Record]]:
    """{cell: {impl: record}}, both in the order in which they first appear; the last record of an impl wins."""
    found: dict[Cell, dict[str, Record]] = {}
    for record in records:
        found.setdefault(cell_key(record), {})[str(record.get("impl"))] = record
    return found


def labels(problems: Iterable[Cell]) -> dict[Cell, str]:
    """A short name for each cell, for people, as "d128 causal seqlen 8192"; "b16 h96 s4096 d128" in the suite `small`.

    Where two cells would be called the same, what tells them apart is added.
    """
    fields = {cell: dict(zip((*CELL_KEYS, OWN), cell, strict=True)) for cell in problems}
    names = {cell: _short(field) for cell, field in fields.items()}
    for part in (_batch_heads, _head_dim_v, _dtype, _softcap, _scale, _align, _own, _op, _suite):
        groups: dict[str, list[Cell]] = {}
        for cell, name in names.items():
            groups.setdefault(name, []).append(cell)
        for group in groups.values():
            if len({part(fields[cell]) for cell in group}) > 1:
                for cell in group:
                    names[cell] = f"{names[cell]} {part(fields[cell])}".strip()
    return names


def _short(field: Mapping[str, Any]) -> str:
    if field["head_dim"] is None:
        return str(field["variant"] or field["op"] or field["suite"])
    mask = _mask(field)
    lengths = _pair(field["seqlen_q"], field["seqlen_k"])
    if field["suite"] == "small":
        parts = [_batch_heads(field), f"s{lengths}", f"d{field['head_dim']}", "" if mask == "full" else mask]
    else:
        parts = [f"d{field['head_dim']}", mask, f"seqlen {lengths}"]
    return " ".join(str(part) for part in (*parts, field["variant"]) if part)


def _mask(field: Mapping[str, Any]) -> str:
    window = ""
    if field["window"] is not None:
        left, right = ("" if side is None or side < 0 else side for side in field["window"])
        window = f"window {left}:{right}"
    return " ".join(part for part in ("causal" if field["causal"] else "", window) if part) or "full"


def _pair(first: Any, second: Any) -> str:
    return f"{first}" if second is None or first == second else f"{first}:{second}"


def _batch_heads(field: Mapping[str, Any]) -> str:
    return f"b{field['batch']} h{_pair(field['heads_q'], field['heads_kv'])}"


def _head_dim_v(field: Mapping[str, Any]) -> str:
    return f"dv{field['head_dim_v']}"


def _dtype(field: Mapping[str, Any]) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}.get(field["dtype"], str(field["dtype"]))


def _softcap(field: Mapping[str, Any]) -> str:
    return f"softcap {field['softcap']:g}" if field["softcap"] else ""


def _scale(field: Mapping[str, Any]) -> str:
    return f"scale {field['softmax_scale']:g}" if field["softmax_scale"] is not None else ""


def _align(field: Mapping[str, Any]) -> str:
    return str(field["align"] or "")


def _own(field: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in field[OWN] or ())


def _op(field: Mapping[str, Any]) -> str:
    return str(field["op"])


def _suite(field: Mapping[str, Any]) -> str:
    return str(field["suite"])


# ------------------------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class Ratio:
    """How many times as fast A is as B (> 1: A is faster), with the quartiles of what was seen."""

    value: float
    low: float
    high: float
    resolution: float = RESOLUTION

    @property
    def verdict(self) -> Verdict:
        """What can be said of A. Symmetric: A is faster than B exactly when B is slower than A."""
        small = max(self.value, 1.0 / self.value) < 1.0 + self.resolution
        if small or self.low <= 1.0 <= self.high:
            return "tie"
        return "faster" if self.value > 1.0 else "slower"

    def over(self, drift: float) -> Ratio:
        """This ratio with a common factor taken out, as the clock that everything ran faster by."""
        return Ratio(self.value / drift, self.low / drift, self.high / drift, self.resolution)


def metric(record: Mapping[str, Any]) -> str | None:
    """The key of the time that this record's suite is about, in µs; None where it is about no such time."""
    return _METRICS.get(str(record.get("suite")), "us")


def cost(record: Mapping[str, Any]) -> float | None:
    """The time of a record in µs: `us`, in the suite `overhead` `cpu_us`. None where it has none."""
    key = metric(record)
    value = record.get(key) if key else None
    return float(value) if value and value > 0 and not record.get("error") else None


def measured(records: Iterable[Record]) -> list[Record]:
    """The records that have a time."""
    return [record for record in records if cost(record) is not None]


def spread(record: Mapping[str, Any]) -> float | None:
    """The distance of the quartiles as a share of the median; None where the record lacks them."""
    key, value = metric(record), cost(record)
    first, third = record.get(f"{key}_q1"), record.get(f"{key}_q3")
    return None if value is None or first is None or third is None else (third - first) / value


def ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> Ratio | None:
    """How many times as fast a is as b, two records of one cell of one run; None where either has no time.

    The implementations of a cell take turns, so the rounds are paired: the median and the quartiles of the rounds'
    ratios, taken of their logarithms so that ratio(a, b) is 1 / ratio(b, a). Without rounds, ratio_of_medians().
    """
    key = metric(a)
    ours, theirs = (_rounds(record, key) for record in (a, b))
    if cost(a) is None or cost(b) is None or metric(b) != key:
        return None
    if not ours or len(ours) != len(theirs):
        return ratio_of_medians(a, b)
    logs = sorted(math.log(y / x) for x, y in zip(ours, theirs, strict=True))
    low, high = _quantile(logs, 0.25), _quantile(logs, 0.75)
    return Ratio(math.exp(statistics.median(logs)), math.exp(low), math.exp(high), _resolution(key))


def ratio_of_medians(a: Mapping[str, Any], b: Mapping[str, Any]) -> Ratio | None:
    """As ratio(), for records of different runs: nothing pairs their rounds.

    The quartile distances of both, as logarithms, are added as independent errors are: the root of the sum of squares.
    """
    key, ours, theirs = metric(a), cost(a), cost(b)
    if ours is None or theirs is None or metric(b) != key:
        return None
    centre = math.log(theirs / ours)
    slower, faster = _distances(a, key, ours), _distances(b, key, theirs)
    low, high = math.hypot(slower[1], faster[0]), math.hypot(slower[0], faster[1])
    return Ratio(math.exp(centre), math.exp(centre - low), math.exp(centre + high), _resolution(key))


def verdict(a: Mapping[str, Any], b: Mapping[str, Any]) -> Verdict | None:
    """Whether a is faster than b in their cell, slower, or neither can be said ("tie"); None without two times."""
    found = ratio(a, b)
    return found.verdict if found else None


def best_peer(cell: Mapping[str, Record]) -> Record | None:
    """The fastest record of a cell that is not rtk's, by its median; None where there is none with a time."""
    peers = measured(record for impl, record in cell.items() if impl != RTK)
    return min(peers, key=lambda record: cost(record) or math.inf, default=None)


def _resolution(key: str | None) -> float:
    return HOST_RESOLUTION if key == "cpu_us" else RESOLUTION


def _rounds(record: Mapping[str, Any], key: str | None) -> list[float]:
    rounds = record.get(f"{key}_rounds")
    usable = isinstance(rounds, list) and all(isinstance(us, (int, float)) and us > 0 for us in rounds)
    return list(rounds) if usable and rounds else []


def _distances(record: Mapping[str, Any], key: str | None, value: float) -> tuple[float, float]:
    """Logarithmic distances from the median of a record down to its first quartile and up to its third; 0 if absent."""
    first, third = record.get(f"{key}_q1") or value, record.get(f"{key}_q3") or value
    return max(0.0, math.log(value / first)), max(0.0, math.log(third / value))


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
