"""A prepared call that its caller holds: `p = rtk.plan(q, k, v, causal=True)`, then `p(q, k, v, out)` ever again."""

from __future__ import annotations

from typing import Any

from rtk import arrays, ops, repeats
from rtk.errors import ArgumentError
from rtk.operands import view_of


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
            o = library.result(q, v.shape[-1])
            self._like["out"] = _place(library.view(o, "out"))

    def __call__(self, q: Any, k: Any, v: Any, out: Any = None, lse: Any = None, *, check: bool = False) -> Any:
        """The result of the call, as rtk.attention returns it, on the caller's current stream.

        Args:
            q, k, v: arrays that lie as those the plan was made with. That is trusted: others give wrong results or end
                the CUDA context. Nothing is differentiated.
            out: the result's memory, that lies as what the plan returns without it; trusted too. None is new memory.
            lse: the same for the log-sum-exp, float32, of a plan with return_lse.
            check: look at the arrays first, and raise ArgumentError where one is not what the plan was made for.
        """
        if check:
            self._check(q, k, v, out)
        if self._known is None:  # on the CPU, or without elements: there is nothing to prepare
            from rtk import api

            return api.attention(q, k, v, **self._options, out=out)
        return self._kind.run(self._known, q, k, v, out, lse, self._return_lse)

    def _check(self, q: Any, k: Any, v: Any, out: Any) -> None:
        given = {"q": q, "k": k, "v": v} | ({} if out is None or self._known is None else {"out": out})
        for name, x in given.items():
            if arrays.library_of(x) is not self._library:
                accepted = f"an array of {self._library.name}, as the plan was made for"
                raise ArgumentError(name, f"an object of type {type(x).__name__}", accepted)
            view = view_of(self._library, x, name)
            if _place(view) != self._like[name]:
                raise ArgumentError(name, _said(_place(view)), f"{_said(self._like[name])}, as the plan was made for")
            if view.pointer % repeats.ALIGNMENT and self._known is not None:
                raise ArgumentError(name, f"an array at address {view.pointer:#x}", "a multiple of 16 bytes")


def _place(view: arrays.View) -> tuple[Any, ...]:
    return view.shape, view.strides, view.dtype, view.device


def _said(place: tuple[Any, ...]) -> str:
    shape, strides, dtype, device = place
    return f"shape {shape}, strides {strides}, {dtype} on {'the CPU' if device is None else f'cuda:{device}'}"
