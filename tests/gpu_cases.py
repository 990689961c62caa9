"""What the GPU tests share: arrays of each library, cases, and the judgement of a result."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from yardstick import DTYPES, attention_f64, check, check_lse, make_inputs, plain, to_f64

import rtk
from rtk import jit
from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import attention_problem

GUARD = 7.0  # what memory around an output holds before and after

# --- arrays of the libraries -----------------------------------------------------------------------------------------


class TorchArrays:
    name = "torch"

    def __init__(self, gpu: Any, index: int | None = None) -> None:
        self.module = gpu.torch
        self.device = self.module.device("cuda", gpu.index if index is None else index)

    def of(self, x: np.ndarray) -> Any:
        if x.dtype == DTYPES["bfloat16"]:
            return self.module.from_numpy(x.view(np.int16)).to(self.device).view(self.module.bfloat16)
        return self.module.from_numpy(x).to(self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return self.module.full(shape, value, dtype=getattr(self.module, dtype), device=self.device)

    def bits(self, x: Any) -> Any:
        return x.view(self.module.int16 if x.dtype.itemsize == 2 else self.module.int32)

    def fill(self, x: Any, value: float) -> None:
        x.fill_(value)

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.expand(shape)

    def synchronize(self) -> None:
        self.module.cuda.synchronize(self.device)


class CupyArrays:
    name = "cupy"

    def __init__(self, gpu: Any, index: int | None = None) -> None:
        self.module = gpu.cupy
        self.device = self.module.cuda.Device(gpu.index if index is None else index)

    def of(self, x: np.ndarray) -> Any:
        with self.device:
            return self.module.asarray(x)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        return self.of(np.full(shape, value, DTYPES[dtype]))

    def bits(self, x: Any) -> Any:
        return x.view(np.int16 if x.dtype.itemsize == 2 else np.int32)

    def fill(self, x: Any, value: float) -> None:
        # As integers: not every operation of CuPy knows bfloat16.
        self.bits(x)[...] = int(np.array(value, x.dtype).view(np.int16))

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        return self.module.broadcast_to(x, shape)

    def synchronize(self) -> None:
        self.device.synchronize()


def arrays_of(gpu: Any, name: str, index: int | None = None) -> Any:
    if getattr(gpu, name) is None:
        pytest.skip(f"no {name} that can use the GPU")
    return (TorchArrays if name == "torch" else CupyArrays)(gpu, index)


def same_bits(library: Any, a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((library.bits(a) == library.bits(b)).all())


def counted(word: str) -> int:
    """How much rtk.stats() counts under names with this word: "cop" for copies, "launch" for launches."""
    counts = [count for name, count in rtk.stats().items() if word in name]
    assert counts, f"rtk.stats() counts nothing like {word!r}"
    return sum(counts)


# --- cases -----------------------------------------------------------------------------------------------------------


_MASK = re.compile(r"(causal)?-?(tl)?-?(?:w(\d*)\.(\d*))?")


def mask_options(mask: str) -> dict[str, Any]:
    """The options of rtk.attention that a mask's name spells, as "full", "causal-tl", "w17.5" or "causal-w64.".

    Both ways to say unbounded occur: -1 on the left, None on the right.
    """
    found = _MASK.fullmatch("" if mask == "full" else mask)
    assert found, f"not a mask: {mask!r}"
    causal, top_left, left, right = found.groups()
    options: dict[str, Any] = {"causal": True} if causal else {}
    if top_left:
        options["causal_align"] = "top-left"
    if left is not None:
        options["window_size"] = (int(left) if left else -1, int(right) if right else None)
    return options


@dataclass(frozen=True)
class Case:
    """A call without what does not change its answer. `mask` is spelt as mask_options reads it."""

    dims: tuple[int, int] = (64, 64)  # head_dim, head_dim_v
    mask: str = "full"
    lengths: tuple[int, int] = (129, 300)  # seqlen_q, seqlen_k
    kind: str = "normal"
    heads: tuple[int, int] = (4, 2)  # of q, of k and v
    dtype: str = "bfloat16"
    layout: str = "bhsd"
    softcap: float = 0.0
    scale: float | None = None
    batch: int = 2

    def __str__(self) -> str:
        sizes = (("d", self.dims), ("s", self.lengths), ("h", self.heads))
        parts = [self.dtype, self.mask, *(f"{letter}{a}x{b}" for letter, (a, b) in sizes)]
        parts += [f"b{self.batch}", self.layout, self.kind]
        parts += [f"cap{self.softcap:g}"] * bool(self.softcap) + [f"scale{self.scale}"] * (self.scale is not None)
        return "-".join(parts)

    def edges(self) -> tuple[int, ...]:
        """Where the mask begins and ends: the first key that query 0 sees and the one before, the last and the next."""
        options = mask_options(self.mask)
        offset = self.lengths[1] - self.lengths[0] if options.get("causal_align") != "top-left" else 0
        left, right = options.get("window_size") or (None, None)
        edges = [offset, offset + 1]
        edges += [offset - left - 1, offset - left] if left not in (None, -1) else []
        edges += [offset + right, offset + right + 1] if right not in (None, -1) else []
        return tuple(edges)

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """q, k and v in NumPy, in the case's layout. Peaks stand where the mask begins and ends."""
        arrays = make_inputs(
            self.kind,
            batch=self.batch,
            heads_q=self.heads[0],
            heads_kv=self.heads[1],
            seqlen_q=self.lengths[0],
            seqlen_k=self.lengths[1],
            head_dim=self.dims[0],
            head_dim_v=self.dims[1],
            dtype=self.dtype,
            rng=np.random.default_rng(seed),
            edges=self.edges(),
        )
        return [x if self.layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]

    def options(self) -> dict[str, Any]:
        return mask_options(self.mask) | {"softcap": self.softcap, "softmax_scale": self.scale, "layout": self.layout}

    def o_shape(self) -> tuple[int, int, int, int]:
        shape = (self.batch, self.heads[0], self.lengths[0], self.dims[1])
        return shape if self.layout == "bhsd" else (shape[0], shape[2], shape[1], shape[3])

    def problem(self) -> Any:
        def shape(heads: int, seqlen: int, dim: int) -> tuple[int, int, int, int]:
            return (self.batch, heads, seqlen, dim) if self.layout == "bhsd" else (self.batch, seqlen, heads, dim)

        defaults: dict[str, Any] = {"causal": False, "causal_align": "bottom-right", "window_size": None}
        return attention_problem(
            shape(self.heads[0], self.lengths[0], self.dims[0]),
            shape(self.heads[1], self.lengths[1], self.dims[0]),
            shape(self.heads[1], self.lengths[1], self.dims[1]),
            self.dtype,
            **(defaults | self.options()),
        )


def covering(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows in which every pair of values of every two factors occurs.

    The first two factors are crossed in full; a row's other values are those that bring the most new pairs, of these
    the least used ones.
    """
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for (a, b) in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    used = {(name, i): 0 for name in names for i in range(len(factors[name]))}

    def pairs(row: dict[str, int], name: str, i: int) -> set[Any]:
        found = {
            ((a, x), (name, i)) if names.index(a) < names.index(name) else ((name, i), (a, x)) for a, x in row.items()
        }
        return found & missing

    def filled(row: dict[str, int]) -> dict[str, Any]:
        for name in names:
            if name not in row:
                values = range(len(factors[name]))
                row[name] = max(values, key=lambda i, name=name: (len(pairs(row, name, i)), -used[name, i]))  # type: ignore[misc]
        missing.difference_update(((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2))
        for item in row.items():
            used[item] += 1
        return {name: factors[name][i] for name, i in row.items()}

    crossed = itertools.product(range(len(factors[names[0]])), range(len(factors[names[1]])))
    rows = [filled({names[0]: x, names[1]: y}) for x, y in crossed]
    while missing:
        rows.append(filled(dict(min(missing))))
    return rows


def truth(gpu: Any, arrays: list[np.ndarray], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(o, lse, plain) of NumPy inputs; computed on the GPU where torch is there."""
    if gpu.torch is not None:
        arrays = [TorchArrays(gpu).of(x) for x in arrays]
    o, lse = attention_f64(*arrays, **options)
    return to_f64(o), to_f64(lse), to_f64(plain(*arrays, **options))


def judge(gpu: Any, got: tuple[Any, Any], case: Case, arrays: list[np.ndarray], label: str = "") -> None:
    o64, lse64, ordinary = truth(gpu, arrays, case.options())
    label = f"{case} {label}".strip()
    check(got[0], o64, ordinary, case.dtype, layout=case.layout, label=label)
    check_lse(got[1], lse64, label=label)


def build(cases: list[Case], configs: list[Any] | None = None) -> None:
    """Compiles the cases' kernels in parallel; what a call would compile on its own, one after another."""
    configs = configs or [choice.choose(SPEC, case.problem(), gpu_here()).config for case in cases]
    sources = {source.name: source for source in map(SPEC.render, configs)}
    jit.build_many(list(sources.values()))
