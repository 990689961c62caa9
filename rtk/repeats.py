"""The shortest way from a call of rtk.attention that was made before to the driver.

A call that a kernel has served is remembered by all that steered it: shapes, strides, dtypes, devices and options. The
next one like it takes what is left to do: addresses, memory for the results, and the launch. Nothing is checked that
the first one's check did not settle, and whatever is not as usual (an address that TMA cannot read, a mode of torch's
that wants to see the call) goes the long way, through rtk.ops.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

from rtk import counters, driver, zeroed
from rtk.arrays import View
from rtk.autotune import choice, recording
from rtk.launch import PLANS_REMEMBERED, MisalignedError, Plan, Recent

ARRAYS = ("q", "k", "v", "o", "lse", "kv_first", "kv_end")  # whose addresses a launch takes


class Known:
    """A call that can be repeated: its plan, and how its results lie."""

    __slots__ = ("device", "lse_shape", "o_shape", "o_strides", "plan", "stamp")

    def __init__(self, plan: Plan, o: View, lse_shape: tuple[int, ...], stamp: object) -> None:
        assert plan.arrays == ARRAYS
        self.plan, self.device = plan, plan.device
        self.o_shape, self.o_strides, self.lse_shape = o.shape, o.strides, lse_shape
        self.stamp = stamp  # choice.stamp() from before the plan was chosen


class Kind(Protocol):
    """What the arrays of one library can tell and do quickly."""

    def find(self, q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> tuple[Known | None, Any]:
        """What is remembered of the call, and the key to remember it by if it is not; (None, None) where it never is.

        `options` in the order of `usual`.
        """

    def run(self, known: Known, q: Any, k: Any, v: Any, out: Any, lse: Any, return_lse: bool) -> Any:
        """The call's result, in new memory where `out` or `lse` is None; all is trusted.

        Raises MisalignedError, before anything is launched, for an address that TMA cannot read.
        """

    def forget(self) -> None: ...


kinds: dict[type, Kind] = {}  # by the exact type of q; a library's comes in with its first call on a GPU
_known: Recent[Any, Known] = Recent(PLANS_REMEMBERED)


def usual(
    return_lse: Any,
    causal: Any,
    causal_align: Any,
    window_size: Any,
    softmax_scale: Any,
    softcap: Any,
    layout: Any,
    batch_invariant: Any,
    sm_margin: Any,
) -> bool:
    """Whether options are of the very types that a key tells apart: True equals 1, and 1 is no bool."""
    return (
        (causal is False or causal is True)
        and type(softcap) is float
        and (softmax_scale is None or type(softmax_scale) is float)
        and (return_lse is False or return_lse is True)
        and (batch_invariant is False or batch_invariant is True)
        and type(causal_align) is type(layout) is str
        and type(sm_margin) is int
        and (window_size is None or _usual_window(window_size))
    )


def _usual_window(window_size: Any) -> bool:
    return (
        type(window_size) is tuple
        and len(window_size) == 2
        and all(side is None or type(side) is int for side in window_size)
    )


def repeat(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> tuple[Any, Any]:
    """(the call's result, None) where the call was made before, else (None, the key to remember it by, if any).

    `options` in the order of `usual`. Not for what torch.compile traces.
    """
    kind = kinds.get(type(q))
    if kind is None:
        return None, None
    known, key = kind.find(q, k, v, options)
    if known is not None:
        try:
            return kind.run(known, q, k, v, None, None, options[0]), None
        except MisalignedError:  # it is copied, on the long way
            pass
    return None, key


def find(key: Any) -> Known | None:
    """What is remembered of the call, if it would still be served in the same way."""
    known = _known.get(key)
    return known if known is not None and is_current(known) else None


def is_current(known: Known) -> bool:
    """Whether the call would still be served in the same way, and nobody records it."""
    return known.stamp is choice.stamp() and not recording._open


def remember(key: Any, known: Known) -> None:
    _known.put(key, known)


def forget() -> None:
    """As if no call had been made."""
    _known.clear()
    for kind in kinds.values():
        kind.forget()


def learn(library: Any) -> None:
    """From now on calls with this library's arrays may be repeated, if it is torch or CuPy."""
    if library.name == "torch" and library.torch.Tensor not in kinds:
        kinds.update(dict.fromkeys((library.torch.Tensor, library.torch.nn.Parameter), kind_of(library)))
    elif library.name == "cupy" and library.cupy.ndarray not in kinds:
        kinds[library.cupy.ndarray] = kind_of(library)


def kind_of(library: Any) -> Kind:
    """The kind of torch's arrays, or of CuPy's."""
    if library.name == "torch":
        from rtk.torch.quick import TorchKind

        return TorchKind()
    return CupyKind(library.cupy)


def _unknown(array: Any) -> bool:
    return False


class CupyKind:
    def __init__(self, cupy: Any) -> None:
        self._ndarray = cupy.ndarray
        # Most arrays have no gaps, which is quicker to ask than what their strides are.
        self._dense = operator.attrgetter("_c_contiguous") if hasattr(cupy.ndarray, "_c_contiguous") else _unknown
        self._float32 = cupy.dtype("float32")
        self._device = cupy.cuda.runtime.getDevice
        self._stream = cupy.cuda.get_current_stream
        self._on = cupy.cuda.Device

    def find(self, q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> tuple[Known | None, Any]:
        if type(k) is not self._ndarray or type(v) is not self._ndarray or not usual(*options):
            return None, None
        dense = self._dense
        key = (
            q.shape, dense(q) or q.strides, q.dtype, q.data.device_id,
            k.shape, dense(k) or k.strides, k.dtype, k.data.device_id,
            v.shape, dense(v) or v.strides, v.dtype, v.data.device_id, options,
        )  # fmt: skip
        return find(key), key

    def forget(self) -> None:
        pass

    def run(self, known: Known, q: Any, k: Any, v: Any, out: Any, lse: Any, return_lse: bool) -> Any:
        plan, here = known.plan, self._device() == known.device
        if not here:
            with self._on(known.device):
                return self.run(known, q, k, v, out, lse, return_lse)
        stream = self._stream().ptr
        if out is None:
            out = self._ndarray(known.o_shape, q.dtype)
        if return_lse and lse is None:
            lse = self._ndarray(known.lse_shape, self._float32)
        counter = zeroed.word(known.device, stream != 0 and driver.is_capturing(stream)) if plan.counts else None
        lse_at = lse.data.ptr if return_lse else 0
        plan.launch((q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr, lse_at, 0, 0), stream, counter, here)
        counters.count_repeat()
        return (out, lse) if return_lse else out
