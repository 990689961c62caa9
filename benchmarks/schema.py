"""What a results file must look like to be read: checked once, so that who draws or compares need not ask again."""

from __future__ import annotations

import re
from typing import Any

SCHEMA = 1
_NUMBERS = (
    *("us", "us_q1", "us_q3", "cpu_us", "cpu_us_q1", "cpu_us_q3", "tflops", "ceiling_share", "rms_error", "max_error"),
    *("peak_extra_bytes", "softcap", "softmax_scale", "import_ms", "first_call_ms", "disk_call_ms", "second_call_ms"),
)
_POSITIVE = ("us", "us_q1", "us_q3", "cpu_us", "cpu_us_q1", "cpu_us_q3")
META_OBJECTS = ("versions", "absent", "device", "ceilings", "clocks")  # of `meta`, where they are
_SUITE = re.compile(r"\w[\w.-]*")
_SIZES = ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")


def wrong(contents: Any) -> str:
    """What keeps this from being a results file; "" when nothing does."""
    if not isinstance(contents, dict) or not isinstance(contents.get("meta"), dict):
        return "no object `meta`"
    schema = contents["meta"].get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        return "no `schema` in `meta`"
    if schema > SCHEMA:  # what else it must hold is the newer schema's business
        return ""
    if not isinstance(contents.get("records"), list):
        return "no list `records`"
    said = _wrong_meta(contents["meta"])
    for number, record in enumerate(contents["records"], 1):
        said = said or _wrong_record(record, f"record {number}")
    return said


def _wrong_meta(meta: dict[str, Any]) -> str:
    if not isinstance(meta.get("suite"), str) or not _SUITE.fullmatch(meta["suite"]):
        return "no `suite` in `meta`, of letters, digits, dots and dashes"
    for key in META_OBJECTS:
        if not isinstance(meta.get(key) or {}, dict):
            return f"`{key}` in `meta` is no object"
    for key in ("ceilings", "device"):
        if not all(map(_is_number_or_none, (meta.get(key) or {}).values())):
            return f"`{key}` in `meta` holds what is no number"
    return ""


def _wrong_record(record: Any, where: str) -> str:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("suite", "impl")):
        return f"{where} names no suite and impl"
    for key in _NUMBERS:
        if not _is_number_or_none(record.get(key)):
            return f"`{key}` of {where} is no number: {record[key]!r}"
    for key in _POSITIVE:
        if record.get(key) is not None and not record[key] > 0:
            return f"`{key}` of {where} is not positive: {record[key]!r}"
    for key in _SIZES:
        if record.get(key) is not None and type(record[key]) is not int:
            return f"`{key}` of {where} is no integer: {record[key]!r}"
        if record.get("op") == "attention_fwd" and record.get(key) is None:
            return f"{where} has no `{key}`"
    bounds, rounds = record.get("floor_us") or {}, record.get("us_rounds") or []
    if not isinstance(bounds, dict) or not all(map(_is_number_or_none, bounds.values())):
        return f"`floor_us` of {where} is no object of numbers"
    if not isinstance(rounds, list) or not all(_is_number_or_none(us) and us and us > 0 for us in rounds):
        return f"`us_rounds` of {where} is no list of times"
    return "" if _is_window(record.get("window")) else f"`window` of {where} is no pair: {record['window']!r}"


def _is_window(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else None
    return value is None or (sides is not None and all(side is None or type(side) is int for side in sides))


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
