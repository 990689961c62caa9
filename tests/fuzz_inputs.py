"""Inputs of the fuzzed calls, made where they are used: of a seed, by integer arithmetic, the same on every device.

The kinds are those of yardstick.make_inputs, which takes tens of milliseconds for what the kernel does in one.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from fuzz_calls import Call

_STREAMS = {"q": 1, "k": 2, "v": 3, "outliers": 4, "peaks": 5, "steps": 6, "use": 7, "permutation": 8}


def bits(device: Any, seed: int, stream: str, count: int) -> Any:
    """`count` int64 of 64 mixed bits (after Steele, Lea, Flood, "Fast splittable generators", 2014)."""
    torch = sys.modules["torch"]
    start = (seed * 1_000_003 + _STREAMS[stream]) * 0x1_0000_0001 % (1 << 62)
    z = (torch.arange(count, dtype=torch.int64, device=device) + start) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def below(device: Any, seed: int, stream: str, shape: tuple[int, ...], limit: int) -> Any:
    """Integers from 0 to limit - 1."""
    return ((bits(device, seed, stream, math.prod(shape)) >> 8) & 0xFFFFFFFF).reshape(shape) % limit


def normal(device: Any, seed: int, stream: str, shape: tuple[int, ...]) -> Any:
    """Nearly N(0, 1), float32: the sum of four uniform numbers of 16 bits, which is exact."""
    z = bits(device, seed, stream, math.prod(shape))
    total = (z & 0xFFFF) + ((z >> 16) & 0xFFFF) + ((z >> 32) & 0xFFFF) + ((z >> 48) & 0xFFFF)
    return ((total - 2 * 0xFFFF).float() * (math.sqrt(3) / 65536)).reshape(shape)


def make(call: Call, device: Any) -> list[Any]:
    """q, k and v as tensors in bhsd, before anything is planted in them."""
    torch = sys.modules["torch"]
    kind, seed = call.case.kind, call.seed
    q, k, v = (normal(device, seed, name, call.shape(name)) for name in "qkv")
    if kind == "outliers":
        for name, x in (("q", q), ("k", k), ("v", v)):
            rare = below(device, seed + 17 * "qkv".index(name), "outliers", tuple(x.shape), 1000) == 0
            x += torch.where(rare, 10 * normal(device, seed + 1, name, tuple(x.shape)), torch.zeros_like(x))
    if kind == "constant":
        q, k, v = (torch.full_like(x, value) for x, value in ((q, 0.5), (k, 0.25), (v, 1 + seed % 7 / 8)))
    if kind in ("peaked", "index") and call.case.lengths[1]:
        head_dim = call.case.dims[0]
        k = k * (math.sqrt(head_dim) / torch.linalg.vector_norm(k, dim=-1, keepdim=True))
        q = _take_keys(k, _peaks(call, device), call.case.heads[0] // call.case.heads[1])
        q = q * (32 * max(1.0, math.sqrt(64 / head_dim)) / math.sqrt(head_dim))
    if kind == "index":
        v = _index_values(call, device)
    return [
        _with_repeats(call, name, x.to(getattr(torch, call.case.dtype)))
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]


def _peaks(call: Call, device: Any) -> Any:
    torch = sys.modules["torch"]
    seqlen_q, seqlen_k = call.case.lengths
    shape = call.shape("q")[:3]
    steps = torch.tensor(call.case.edges(), device=device)
    anywhere = below(device, call.seed, "peaks", shape, seqlen_k)
    at_edge = torch.arange(seqlen_q, device=device) + steps[below(device, call.seed, "steps", shape, len(steps))]
    use = (below(device, call.seed, "use", shape, 2) == 0) & (at_edge >= 0) & (at_edge < seqlen_k)
    return torch.where(use, at_edge, anywhere)


def _take_keys(k: Any, peaks: Any, group: int) -> Any:
    torch = sys.modules["torch"]
    batch, heads, _ = peaks.shape
    b, h = (torch.arange(n, device=k.device) for n in (batch, heads))
    return k[b[:, None, None], h[None, :, None] // group, peaks]


def _index_values(call: Call, device: Any) -> Any:
    """Channel c holds digit c mod n of the key's index in base 4, moved on by head and batch; exact in 16 bits."""
    torch = sys.modules["torch"]
    b, h, j, c = torch.meshgrid(*(torch.arange(n, device=device) for n in call.shape("v")), indexing="ij")
    digits = max(1, math.ceil(math.log(max(call.case.lengths[1], 2), 4)))
    digit = (j // 4 ** (c % digits) + h + 2 * b) % 4
    return (digit - 1.5) * (1 + (c // digits) % 4 / 4)


def _with_repeats(call: Call, name: str, x: Any) -> Any:
    """Along dimensions of stride 0 all elements are one."""
    for axis in getattr(call, name).repeats:
        axis = axis if call.case.layout == "bhsd" or axis in (0, 3) else 3 - axis
        if x.shape[axis]:
            x = x.narrow(axis, 0, 1).expand(x.shape)
    return x.contiguous()


def planted(call: Call, arrays: list[Any]) -> list[Any]:
    arrays = [x.clone() for x in arrays]
    for plant in call.plants:
        arrays["qkv".index(plant.array)][plant.place] = float(plant.value)
    return arrays
