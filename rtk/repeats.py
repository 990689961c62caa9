"""The shortest way from a call of rtk.attention that was made before to the driver.

A call that a kernel has served is remembered by all that steered it: shapes, strides, dtypes, devices and options. The
next one like it takes what is left to do: addresses, memory for the results, and the launch. Nothing is checked that
the first one's check did not settle, and whatever is not as usual (an address that TMA cannot read, another current
device, a mode of torch's that wants to see the call) goes the long way, through rtk.ops.
"""

from __future__ import annotations

from typing import Any, Protocol

from rtk import counters, driver, zeroed
from rtk.autotune import choice, recording
from rtk.launch import PLANS_REMEMBERED, Plan, Recent

ARRAYS = ("q", "k", "v", "o", "lse", "kv_first", "kv_end")  # whose addresses a launch takes
ALIGNMENT = 16  # TMA reads from multiples of so many bytes


class Known:
    """A call that can be repeated: its plan, and what its results are."""

    __slots__ = ("device", "like_q", "lse_shape", "o_shape", "plan", "stamp")

    def __init__(
        self, plan: Plan, o_shape: tuple[int, ...], lse_shape: tuple[int, ...], like_q: bool, stamp: object
    ) -> None:
        assert plan.arrays == ARRAYS
        self.plan, self.device = plan, plan.device
        self.o_shape, self.lse_shape, self.like_q = o_shape, lse_shape, like_q
        self.stamp = stamp  # choice.stamp() from before the plan was chosen


class Kind(Protocol):
    """What the arrays of one library can tell and do quickly."""

    def key(self, q: Any, k: Any, v: Any) -> tuple[Any, ...] | None:
        """Shapes, strides, dtypes and devices; None where the call is to go the long way."""

    def call(self, known: Known, q: Any, k: Any, v: Any, return_lse: bool) -> Any:
        """The call's result; None where it is to go the long way."""

    def run(self, known: Known, q: Any, k: Any, v: Any, out: Any, lse: Any, return_lse: bool) -> Any:
        """The call's result, in new memory where `out` or `lse` is None; all is trusted."""


kinds: dict[type, Kind] = {}  # by the exact type of q; a library's comes in with its first call on a GPU
_known: Recent[Any, Known] = Recent(PLANS_REMEMBERED)


def usual(
    causal: Any,
    causal_align: Any,
    window_size: Any,
    softmax_scale: Any,
    softcap: Any,
    layout: Any,
    return_lse: Any,
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


def find(key: Any) -> Known | None:
    """What is remembered of the call, if it would still be served in the same way."""
    known = _known.get(key)
    if known is None or known.stamp is not choice.stamp() or recording._open:
        return None
    return known


def remember(key: Any, known: Known) -> None:
    _known.put(key, known)


def forget() -> None:
    """As if no call had been made."""
    _known.clear()


def learn(library: Any) -> None:
    """From now on calls with this library's arrays may be repeated."""
    kind = kind_of(library)
    if library.name == "torch":
        kinds.update(dict.fromkeys((library.torch.Tensor, library.torch.nn.Parameter), kind))
    else:
        kinds[library.cupy.ndarray] = kind


def kind_of(library: Any) -> Kind:
    """The kind of torch's arrays, or of CuPy's."""
    if library.name == "torch":
        from rtk.torch.quick import TorchKind

        return TorchKind()
    return CupyKind(library.cupy)


class CupyKind:
    def __init__(self, cupy: Any) -> None:
        self._ndarray = cupy.ndarray
        self._float32 = cupy.dtype("float32")
        self._device = cupy.cuda.runtime.getDevice
        self._stream = cupy.cuda.get_current_stream
        self._on = cupy.cuda.Device

    def key(self, q: Any, k: Any, v: Any) -> tuple[Any, ...] | None:
        if type(k) is not self._ndarray or type(v) is not self._ndarray:
            return None
        shapes = (q.shape, q.strides, k.shape, k.strides, v.shape, v.strides)
        return (*shapes, q.dtype, k.dtype, v.dtype, q.data.device_id, k.data.device_id, v.data.device_id)

    def call(self, known: Known, q: Any, k: Any, v: Any, return_lse: bool) -> Any:
        q_at, k_at, v_at = q.data.ptr, k.data.ptr, v.data.ptr
        if (q_at | k_at | v_at) % ALIGNMENT or self._device() != known.device:
            return None
        return self.run(known, q, k, v, None, None, return_lse)

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
        plan.launch((q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr, lse_at, 0, 0), stream, counter, here=True)
        counters.count_repeat()
        return (out, lse) if return_lse else out
