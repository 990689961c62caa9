"""rtk.attention with a fault, to see which property of the fuzzing notices. They wrap the CPU path."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import emulated
import numpy as np
from yardstick import is_torch

import rtk

Attention = Callable[..., Any]
# name -> (the property that must catch it, what makes the faulty function)
FAULTS: dict[str, tuple[str, Callable[[], Attention]]] = {}


def fault(caught_by: str) -> Callable[[Callable[[], Attention]], Callable[[], Attention]]:
    def add(make: Callable[[], Attention]) -> Callable[[], Attention]:
        FAULTS[make.__name__] = (caught_by, make)
        return make

    return add


def changing(change: Callable[..., tuple[Any, Any, Any]], base: Attention = rtk.attention) -> Attention:
    """`change(q, k, v, options)` gives other arrays, and may change the options."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return base(*change(q, k, v, options), **options)

    return attention


def _axes(options: dict[str, Any]) -> tuple[int, int]:
    """Of heads and of positions."""
    return (1, 2) if options["layout"] == "bhsd" else (2, 1)


def _cut(x: Any, axis: int, keys: slice) -> Any:
    return x[(slice(None),) * axis + (keys,)]


def _take(x: Any, axis: int, indices: list[int]) -> Any:
    return x[(slice(None),) * axis + (indices,)]


def _heads(x: Any, options: dict[str, Any]) -> int:
    return int(x.shape[_axes(options)[0]])


def _result(answer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    return answer if options["return_lse"] else (answer, None)


# --- the answer ------------------------------------------------------------------------------------------------------


@fault("equals_the_reference")
def drops_the_causal_mask() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        options.pop("causal", None)
        return q, k, v

    return changing(change)


@fault("equals_the_reference")
def causal_edge_off_by_one() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        if options.pop("causal", False):
            left, right = options.get("window_size") or (None, None)
            options["window_size"] = (left, 1 if right in (None, -1) else min(1, right))
        return q, k, v

    return changing(change)


@fault("equals_the_reference")
def window_one_key_wider() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        left, right = options.get("window_size") or (None, None)
        if left not in (None, -1):
            options["window_size"] = (left + 1, right)
        return q, k, v

    return changing(change)


@fault("equals_the_reference")
def forgets_the_last_key() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        axis = _axes(options)[1]
        if options.get("causal") or options.get("window_size") or k.shape[axis] < 2:
            return q, k, v
        return q, _cut(k, axis, slice(0, -1)), _cut(v, axis, slice(0, -1))

    return changing(change)


@fault("equals_the_reference")
def lse_in_base_2() -> Attention:
    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        o, lse = _result(rtk.attention(q, k, v, **options), options)
        return o if lse is None else (o, lse / math.log(2))

    return attention


@fault("ones_give_one")
def sum_of_a_few_keys_too_many() -> Attention:
    """As if what lies beyond the last key, up to the end of a tile, had scores of 0."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        o, lse = _result(rtk.attention(q, k, v, **(options | {"return_lse": True})), options | {"return_lse": True})
        beyond = -k.shape[_axes(options)[1]] % 16
        lse64 = np.asarray(lse, np.float64)
        with np.errstate(all="ignore"):
            factor = 1 / (1 + beyond * np.exp(-lse64))
        factor = np.where(np.isneginf(lse64), 0, factor)[..., None]
        if options["layout"] == "bshd":
            factor = factor.swapaxes(1, 2)
        if is_torch(o):
            import torch

            o.copy_(o.double() * torch.from_numpy(factor))
        else:
            o[...] = (o.astype(np.float64) * factor).astype(o.dtype)
        return (o, lse) if options["return_lse"] else o

    return attention


# --- heads, keys, sequences ------------------------------------------------------------------------------------------


@fault("grouped_heads_equal_repeated_ones")
def wrong_head() -> Attention:
    """Query head h with key head h % heads_kv."""

    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        heads = [h % _heads(k, options) for h in range(_heads(q, options))]
        axis = _axes(options)[0]
        return q, _take(k, axis, heads), _take(v, axis, heads)

    return changing(change)


@fault("permuted_keys_change_nothing")
def first_key_counts_twice() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        axis = _axes(options)[1]
        if options.get("causal") or options.get("window_size") or not k.shape[axis]:
            return q, k, v
        keys = [0, *range(k.shape[axis])]
        return q, _take(k, axis, keys), _take(v, axis, keys)

    return changing(change)


@fault("permuted_heads_and_sequences_permute_the_answer")
def first_head_is_scaled_otherwise() -> Attention:
    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        q = q.clone() if is_torch(q) else q.copy()
        _cut(q[:1], _axes(options)[0], slice(0, 1))[...] *= 2
        return q, k, v

    return changing(change)


@fault("parts_of_the_keys_merge_into_the_whole")
def lse_of_the_scores_without_scale() -> Attention:
    """The answer is right; what merging needs is not."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        o, lse = _result(rtk.attention(q, k, v, **options), options)
        return o if lse is None else (o, lse * 0.99)

    return attention


@fault("a_sequence_alone_gives_the_bits_it_gives_in_a_batch")
def tiles_chosen_by_the_batch() -> Attention:
    """Other tiles for a single sequence: right, but for the last bit."""

    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        if q.shape[0] == 1:
            options["config"] = {"BLOCK_N": 32, "NUM_CONSUMER_WARPGROUPS": 1, "PINGPONG": False}
        return q, k, v

    return changing(change, emulated.attention)


# --- memory ----------------------------------------------------------------------------------------------------------


@fault("memory_is_left_alone")
def writes_beyond_out() -> Attention:
    """One row more than there is."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        answer = rtk.attention(q, k, v, **options)
        out = options.get("out")
        if out is not None and 0 not in out.shape:
            place = tuple(size - 1 for size in out.shape)
            if is_torch(out):
                last = out.storage_offset() + sum(i * s for i, s in zip(place, out.stride(), strict=True))
                out.as_strided((1,), (1,), last + 1).fill_(0)
            else:
                np.lib.stride_tricks.as_strided(out[place[:3]][place[3] :], (2,), (2,))[1] = 0
        return answer

    return attention


@fault("memory_is_left_alone")
def modifies_an_input() -> Attention:
    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        answer = rtk.attention(q, k, v, **options)
        if 0 not in v.shape:
            v[-1, -1, -1] = v[-1, -1, -1] * 0
        return answer

    return attention


@fault("memory_is_left_alone")
def last_row_is_not_written() -> Attention:
    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        answer, lse = _result(rtk.attention(q, k, v, **options), options)
        if out is not None:
            cut = (slice(None),) * _axes(options)[1] + (slice(0, -1),)
            out[cut] = answer[cut]
            answer = out
        return (answer, lse) if options["return_lse"] else answer

    return attention


@fault("strides_and_layout_change_no_bit")
def takes_every_array_for_contiguous() -> Attention:
    def flat(x: Any) -> Any:
        if 0 in x.shape:
            return x
        if is_torch(x):
            wanted = x.contiguous().stride()
            return x.as_strided(x.shape, wanted)
        wanted = np.empty(x.shape, x.dtype).strides
        return np.lib.stride_tricks.as_strided(x, x.shape, wanted)

    return changing(lambda q, k, v, options: (flat(q) if _inside(q) else q, k, v))


def _inside(x: Any) -> bool:
    """Whether reading x as if it were contiguous stays within the memory that the fuzzing gave it."""
    strides = x.stride() if is_torch(x) else [s // 2 for s in x.strides]
    span = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return bool(min(strides) > 0 and span + 1 >= math.prod(x.shape))


# --- the same bits ---------------------------------------------------------------------------------------------------


@fault("repeats_give_the_same_bits")
def every_other_call_sums_in_another_order() -> Attention:
    calls = [0]

    def change(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            options["config"] = {"BLOCK_N": 48, "NUM_CONSUMER_WARPGROUPS": 1, "PINGPONG": False}
        return q, k, v

    return changing(change, emulated.attention)


@fault("threads_and_streams_do_not_disturb_each_other")
def one_parameter_block_for_all_threads() -> Attention:
    block: dict[str, Any] = {}

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        block["call"] = (q, k, v), options
        time.sleep(0.01)  # as while a kernel is loaded; long enough for another thread on a busy machine
        arrays, options = block["call"]
        return rtk.attention(*arrays, **options)

    return attention


@fault("sessions")
def answers_of_a_call_that_looked_alike() -> Attention:
    """A table keyed by shapes alone."""
    table: dict[Any, dict[str, Any]] = {}

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        meaning = ("causal", "causal_align", "window_size", "softmax_scale", "softcap")
        known = table.setdefault(tuple(q.shape), {name: options[name] for name in meaning if name in options})
        return rtk.attention(q, k, v, **({n: x for n, x in options.items() if n not in meaning} | known))

    return attention


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@fault("nan_and_inf_reach_who_sees_them")
def nan_becomes_zero() -> Attention:
    def clean(x: Any) -> Any:
        if is_torch(x):
            return x.nan_to_num(nan=0.0)
        return np.where(np.isnan(x), np.zeros_like(x), x)

    return changing(lambda q, k, v, options: (q, k, clean(v)))


@fault("nan_and_inf_reach_who_sees_them")
def masked_values_reach_every_query() -> Attention:
    """0 * NaN over all keys, not those of the tile alone."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        answer = rtk.attention(q, k, v, **options)
        o, _ = _result(answer, options)
        if bool((v != v).any()) and o.shape[-1]:
            o[:, :, :, :] = o + float("nan")
        return answer

    return attention
