"""Physical floors of an attention forward: times that no kernel on this card can go below. See docs/limits.md.

Three units can each be the bound: the tensor cores (`wgmma`), the special-function units (`exp`: one exponential per
visible score) and the memory (`memory`). They work side by side, so the floor of a call is the largest of the three.
Standard library only; times are in µs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "EXP_PER_SM_CLOCK",
    "FLOP_PER_SM_CLOCK",
    "bytes_moved",
    "exp_rate",
    "floors",
    "flop",
    "impossible",
    "intensity",
    "largest",
    "tensor_peak_tflops",
    "tflops",
    "visible_flop",
    "visible_scores",
]

EXP_PER_SM_CLOCK = 16  # Hopper: 4 special-function units (MUFU) in each quarter of an SM
FLOP_PER_SM_CLOCK = 4096  # Hopper, dense bfloat16 and float16: 512 multiply-adds a clock in each quarter of an SM
_BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_FORWARD = "attention_fwd"
_NEEDED = ("batch", "heads_q", "seqlen_q", "seqlen_k", "head_dim")


def visible_scores(
    seqlen_q: int, seqlen_k: int, causal: bool = False, window: Any = None, align: str | None = None
) -> int:
    """How many (query, key) pairs one head computes: exact, with the diagonal at the bottom right as in FlashAttention.

    Query i stands at key i + seqlen_k - seqlen_q; where align is "top-left", at key i. window: None, or (left, right),
    keys seen on each side of it, None or -1 where unbounded; causal bounds the right side by 0.
    """
    left, right = window or (None, None)
    left = None if left is None or left < 0 else left
    right = None if right is None or right < 0 else right
    if causal:
        right = 0
    diagonal = 0 if align == "top-left" else seqlen_k - seqlen_q
    upto = seqlen_q * seqlen_k if right is None else _clipped_sum(diagonal + right + 1, seqlen_q, seqlen_k)
    before = 0 if left is None else _clipped_sum(diagonal - left, seqlen_q, seqlen_k)
    return upto - before


def _clipped_sum(start: int, count: int, bound: int) -> int:
    """The sum of min(max(x, 0), bound) over the `count` integers x from `start` on."""

    def below(end: int) -> int:  # the sum over x from 0 to end - 1
        end = max(end, 0)
        rising = min(end, bound + 1)
        return rising * (rising - 1) // 2 + (end - rising) * bound

    return below(start + count) - below(start)


def flop(record: Mapping[str, Any]) -> float:
    """FLOP of the two products by the usual convention, which `tflops` follows: two per multiply-add, half if causal.

    Half whatever the lengths are; a window counts what it lets through.
    """
    pairs = float(record["seqlen_q"] * record["seqlen_k"])
    if record.get("window"):
        pairs = float(_visible(record))
    elif record.get("causal"):
        pairs *= 0.5
    return pairs * _flop_per_score(record)


def visible_flop(record: Mapping[str, Any]) -> float:
    """FLOP that cannot be left out: those of the visible scores, exactly. What the floors count.

    A kernel computes whole tiles, and so somewhat more.
    """
    return float(_visible(record) * _flop_per_score(record))


def tflops(record: Mapping[str, Any], us: float) -> float:
    """TFLOP/s of a forward that took `us`, by the usual convention (see flop())."""
    return flop(record) / us / 1e6


def bytes_moved(record: Mapping[str, Any]) -> float:
    """Bytes of Q, K, V and O, each once. The log-sum-exp, 4 bytes a query, is not counted."""
    head_dim, head_dim_v = record["head_dim"], _head_dim_v(record)
    heads_kv = record.get("heads_kv") or record["heads_q"]
    queries = record["heads_q"] * record["seqlen_q"] * (head_dim + head_dim_v)
    keys = heads_kv * record["seqlen_k"] * (head_dim + head_dim_v)
    return float(record["batch"] * (queries + keys) * _BYTES.get(str(record.get("dtype")), 2))


def intensity(record: Mapping[str, Any]) -> float:
    """FLOP (by the usual convention) per byte of Q, K, V and O: where a problem stands on a roofline."""
    return flop(record) / bytes_moved(record)


def exp_rate(device: Mapping[str, Any]) -> float:
    """Exponentials a second that the special-function units can do at the card's highest clock."""
    return float(EXP_PER_SM_CLOCK * device["sm_count"] * device["max_sm_mhz"] * 1e6)


def tensor_peak_tflops(device: Mapping[str, Any], dtype: str = "bfloat16") -> float:
    """TFLOP/s of the tensor cores at the highest clock, never waiting; fp8 doubles it. No kernel gets there."""
    each = FLOP_PER_SM_CLOCK * (2 if _BYTES.get(dtype) == 1 else 1)
    return float(each * device["sm_count"] * device["max_sm_mhz"] / 1e6)


def floors(record: Mapping[str, Any], ceilings: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, float]:
    """{"wgmma", "exp", "memory"}: the least µs that each unit needs for this attention forward.

    wgmma: the visible scores' products at the matrix product's measured speed, ceilings["bf16_tflops"], for an fp8
    record ["fp8_tflops"]. exp: one exponential per visible score at 16 per SM and clock, at device["max_sm_mhz"] on
    device["sm_count"] SMs. memory: bytes_moved() at the speed of a copy, ceilings["copy_gbps"] (10^9 bytes read or
    written a second). One whose ceiling is not known is left out; a record that is no attention forward has none.
    """
    if record.get("op") != _FORWARD or any(not record.get(key) for key in _NEEDED):
        return {}
    found: dict[str, float] = {}
    ceiling = ceilings.get("fp8_tflops" if _BYTES.get(str(record.get("dtype"))) == 1 else "bf16_tflops")
    if ceiling:
        found["wgmma"] = visible_flop(record) / ceiling / 1e6
    if device.get("sm_count") and device.get("max_sm_mhz"):
        found["exp"] = record["batch"] * record["heads_q"] * _visible(record) / exp_rate(device) * 1e6
    if ceilings.get("copy_gbps"):
        found["memory"] = bytes_moved(record) / ceilings["copy_gbps"] / 1e3
    return found


def largest(found: Mapping[str, float]) -> tuple[str, float] | None:
    """The floor that binds: its name and µs; None of none."""
    return max(found.items(), key=lambda item: item[1], default=None)


def impossible(record: Mapping[str, Any], meta: Mapping[str, Any]) -> str | None:
    """Why this time of an attention forward cannot be, as one sentence; None where nothing says so.

    The bounds here are harder than floors(): the tensor cores at the highest clock and never waiting, not at the matrix
    product's speed, which a cooler or less busy card may exceed; and memory only where Q, K, V and O do not fit into
    the level-2 cache, since repeated calls may find them there.
    """
    us, device = record.get("us"), meta.get("device") or {}
    if not us or record.get("error") or not device.get("sm_count") or not device.get("max_sm_mhz"):
        return None
    copy_gbps = (meta.get("ceilings") or {}).get("copy_gbps")
    peak = tensor_peak_tflops(device, str(record.get("dtype")))
    bounds = floors(record, {"bf16_tflops": peak, "fp8_tflops": peak, "copy_gbps": copy_gbps}, device)
    if not bounds:
        return None
    if us < bounds["wgmma"]:
        rate = visible_flop(record) / us / 1e6
        return (
            f"{us:,.1f} µs would be {rate:,.0f} TFLOP/s, and the tensor cores of {device['sm_count']} SMs at "
            f"{device['max_sm_mhz']:,.0f} MHz do at most {peak:,.0f}: not all of the work was done or waited for"
        )
    if us < bounds["exp"]:
        return (
            f"{us:,.1f} µs is less than the {bounds['exp']:,.1f} µs that one exponential per score takes in the "
            f"special-function units: unless part of them is computed elsewhere, not all of the work was done"
        )
    if us < bounds.get("memory", 0.0) and bytes_moved(record) > device.get("l2_bytes", float("inf")):
        rate = bytes_moved(record) / us / 1e3
        return f"{us:,.1f} µs would move Q, K, V and O at {rate:,.0f} GB/s; a copy here reaches {copy_gbps:,.0f}"
    return None


def _visible(record: Mapping[str, Any]) -> int:
    """Visible scores of one head."""
    causal, window = bool(record.get("causal")), record.get("window")
    return visible_scores(record["seqlen_q"], record["seqlen_k"], causal, window, record.get("align"))


def _flop_per_score(record: Mapping[str, Any]) -> int:
    """FLOP of all heads for one score of each: the products with K and with V."""
    return int(2 * record["batch"] * record["heads_q"] * (record["head_dim"] + _head_dim_v(record)))


def _head_dim_v(record: Mapping[str, Any]) -> int:
    return int(record.get("head_dim_v") or record["head_dim"])
