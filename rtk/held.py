"""A prepared call that its caller holds: `p = rtk.plan(q, k, v, causal=True)`, then `p(q, k, v, out)` ever again."""

from __future__ import annotations

import itertools
from typing import Any

from rtk import arrays, ops, repeats, tma
from rtk.errors import ArgumentError
from rtk.operands import overlap, view_of
from rtk.problem import to_bhsd


class AttentionPlan:
    """One call of rtk.attention, prepared: the kernel chosen, compiled and loaded, its parameters filled in.

    Made by `rtk.plan`. It serves arrays that lie as those it was made with: of the same library, shapes, strides, dtype
    and device, at addresses that are multiples of 16 bytes. Threads and streams may share it, and a CUDA graph may
    capture it. What is tuned or stored later does not change it.
    """

    def __init__(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> None:
        library = arrays.library_of(q)
        if library is None:
            raise ArgumentError("q", f"an object of type {type(q).__name__}", "an array of CuPy, torch or NumPy")
        self._library, self._options = library, options
        self._return_lse = options["return_lse"]
        self._known = ops.prepare(q, k, v, **options)
        self._like = {name: _place(library.view(x, name)) for name, x in (("q", q), ("k", k), ("v", v))}
        if self._known is not None:
            self._kind = repeats.kind_of(library)
        self._like["out"] = _place(library.view(library.result(q, v.shape[-1]), "out"))
        self._like["lse"] = self._place_of_lse()

    def _place_of_lse(self) -> tuple[Any, ...]:
        """(batch, heads, seqlen_q) without gaps."""
        shape, _, dtype, device = self._like["q"]
        batch, heads, rows, _ = to_bhsd(shape, self._options["layout"])
        return (batch, heads, rows), (heads * rows, rows, 1), "float64" if dtype == "float64" else "float32", device

    def __call__(self, q: Any, k: Any, v: Any, out: Any = None, lse: Any = None, *, check: bool = False) -> Any:
        """The result of the call, as rtk.attention returns it, on the caller's current stream.

        Args:
            q, k, v: arrays that lie as those the plan was made with. That is trusted: others give wrong results or end
                the CUDA context. Nothing is differentiated.
            out: the result's memory, that lies as what the plan returns without it; trusted too. None is new memory.
            lse: the same for the log-sum-exp, float32, of a plan with return_lse.
            check: look at the arrays first, and raise ArgumentError where one is not what the plan was made for.
        """
        if lse is not None and not self._return_lse:
            raise ArgumentError("lse", "an array", "None, of a plan without return_lse")
        if check:
            self._check(q, k, v, out, lse)
        if self._known is None:  # on the CPU, or without elements: there is nothing to prepare
            from rtk import api

            result = api.attention(q, k, v, **self._options, out=out)
            if lse is not None:
                self._library.assign(lse, result[1])
                result = result[0], lse
            return result
        return self._kind.run(self._known, q, k, v, out, lse, self._return_lse)

    def _check(self, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        given = {"q": q, "k": k, "v": v} | {name: x for name, x in (("out", out), ("lse", lse)) if x is not None}
        views: dict[str, arrays.View] = {}
        for name, x in given.items():
            if arrays.library_of(x) is not self._library:
                accepted = f"an array of {self._library.name}, as the plan was made for"
                raise ArgumentError(name, f"an object of type {type(x).__name__}", accepted)
            view = views[name] = view_of(self._library, x, name)
            if _place(view) != self._like[name]:
                raise ArgumentError(name, _said(_place(view)), f"{_said(self._like[name])}, as the plan was made for")
            if view.pointer % tma.STRIDE_MULTIPLE_BYTES and self._known is not None:
                raise ArgumentError(name, f"an array at address {view.pointer:#x}", "a multiple of 16 bytes")
        for result, other in itertools.product(("out", "lse"), views):
            if result in views and result != other and overlap(views[result], views[other]):
                raise ArgumentError(result, f"memory that {other} has a part in", "memory that no other array shares")


def _place(view: arrays.View) -> tuple[Any, ...]:
    return view.shape, view.strides, view.dtype, view.device


def _said(place: tuple[Any, ...]) -> str:
    shape, strides, dtype, device = place
    return f"shape {shape}, strides {strides}, {dtype} on {'the CPU' if device is None else f'cuda:{device}'}"
