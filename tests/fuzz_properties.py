"""What holds for every attention call, as functions that raise AssertionError where it does not.

Each is named, takes a Bench and the calls that were drawn, and has its share of the examples. "The same bits" is what
the GPU promises. The NumPy path sums in another order where a matrix has another shape or a value is no number: it is
held to the rule of the yardstick there.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz_bench import Answer, Bench, assert_same
from fuzz_calls import Call
from fuzz_inputs import below, make
from hypothesis import strategies as st
from strategies import calls
from yardstick import allowance, check, check_lse, visible_keys, worst_of_tiles

Check = Callable[[Bench, tuple[Call, ...]], None]
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half the distance of numbers just above 1


@dataclass(frozen=True)
class Property:
    name: str
    share: float  # of all examples
    draw: Any  # arguments of strategies.calls
    check: Check
    how_many: tuple[int, int] = (1, 1)  # calls in an example

    def examples(self, budget: int | None = None) -> st.SearchStrategy[tuple[Call, ...]]:
        one = calls(**(self.draw | ({} if budget is None else {"budget": budget})))
        return st.lists(one, min_size=self.how_many[0], max_size=self.how_many[1]).map(tuple)


PROPERTIES: dict[str, Property] = {}


def prop(share: float, how_many: tuple[int, int] = (1, 1), **draw: Any) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        PROPERTIES[function.__name__] = Property(function.__name__, share, draw, function, how_many)
        return function

    return add


# --- the answer ------------------------------------------------------------------------------------------------------


@prop(7, empty=True)
def equals_the_reference(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    inputs = bench.inputs(call)
    bench.judge(call, bench.run(call, inputs), inputs)


@prop(2, empty=True, out=True, lse=None)
def memory_is_left_alone(bench: Bench, calls: tuple[Call, ...]) -> None:
    """Inputs, what lies around them, and what lies around `out` (Bench.run looks); and all of `out` is written."""
    (call,) = calls
    assert bool(bench.torch.isfinite(bench.run(call).o).all()), "not all of out was written"


@prop(1)
def ones_give_one(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    q, k, v = bench.inputs(call)
    answer = bench.run(call, [q, k, bench.torch.ones_like(v)])
    sees = _seen(bench, call).any(-1)[:, None]
    unit = UNIT[call.case.dtype]
    # Each probability is rounded once, the result once; a float16 below 2^-14 keeps fewer bits.
    tolerance = 2.1 * unit + (call.case.lengths[1] * 2.0**-24 if call.case.dtype == "float16" else 0)
    error = (answer.o.double() - sees.double()).abs()
    worst = error.max().item()
    assert worst <= tolerance, f"values of 1 give {1 - worst:.6g} or {1 + worst:.6g}, {tolerance:.3g} is rounding"
    assert not bool((error * ~sees).any()), "a query that sees no key is not 0"


# --- the same thing said otherwise -----------------------------------------------------------------------------------


@prop(1, unmasked=True)
def permuted_keys_change_nothing(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    q, k, v = inputs = bench.inputs(call)
    order = _permutation(bench, call, call.case.lengths[1])
    bench.judge(call, bench.run(call, [q, k[:, :, order], v[:, :, order]]), inputs)


@prop(1)
def permuted_heads_and_sequences_permute_the_answer(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    heads_q, heads_kv = call.case.heads
    group = heads_q // heads_kv
    sequences, heads_k = (_permutation(bench, call, n) for n in (call.case.batch, heads_kv))
    heads = (heads_k[:, None] * group + bench.torch.arange(group, device=bench.device)).flatten()
    inputs = bench.inputs(call)
    moved = [x[sequences][:, which] for x, which in zip(inputs, (heads, heads_k, heads_k), strict=True)]
    expected = Answer(*(x[sequences][:, heads] for x in bench.run(call, inputs)))
    assert_same(bench.run(call, moved), expected, "heads and sequences in another order")


@prop(1, min_group=2)
def grouped_heads_equal_repeated_ones(bench: Bench, calls: tuple[Call, ...]) -> None:
    """To the bit, where both run with one configuration."""
    (call,) = calls
    q, k, v = inputs = bench.inputs(call)
    heads_q, heads_kv = call.case.heads
    wide = call.pinned().in_order().changed(case={"heads": (heads_q, heads_q)})
    repeated = bench.run(wide, [q, *(x.repeat_interleave(heads_q // heads_kv, 1) for x in (k, v))])
    grouped = bench.run(call.pinned(), inputs)
    if bench.exact:
        assert_same(grouped, repeated, "each query head with a copy of its key head")
    for answer in (grouped, repeated):
        bench.judge(call, answer, inputs)


@prop(1.5, unmasked=True)
def parts_of_the_keys_merge_into_the_whole(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    q, k, v = inputs = bench.inputs(call)
    torch = bench.torch
    at = call.choice % (call.case.lengths[1] + 1)
    parts, bound, unit = [], 0.0, UNIT[call.case.dtype]
    for keys in (slice(0, at), slice(at, None)):
        part = [q, k[:, :, keys], v[:, :, keys]]
        answer = bench.run(call.changed(case={"lengths": (q.shape[2], part[1].shape[2])}), part)
        o64, _, ordinary = bench.truth(call, part)
        bound = bound + allowance(o64, ordinary, call.case.dtype) + unit * worst_of_tiles(o64.abs())
        parts.append((answer.o.double(), answer.lse.double()))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (lse - total).exp()[..., None] for o, lse in parts)
    # What an error of the two log-sum-exps moves from one part to the other.
    slack = 2e-4 + 1e-5 * total.abs().max().item()
    bound = bound + slack * worst_of_tiles((parts[0][0] - parts[1][0]).abs())
    o64, lse64, ordinary = bench.truth(call, inputs)
    whole = bench.run(call, inputs)
    check_lse(total, lse64, atol=4e-4, rtol=2e-5)
    check_lse(total, whole.lse.double(), atol=8e-4, rtol=4e-5)
    whole_bound = bound + allowance(o64, ordinary, call.case.dtype) + unit * worst_of_tiles(o64.abs())
    for name, other, allowed in (("the definition", o64, bound), ("the whole", whole.o.double(), whole_bound)):
        excess = (worst_of_tiles((merged - other).abs()) - allowed).max().item()
        assert excess <= 0, f"keys split at {at} and merged differ from {name} by {excess:.4g} more than rounding"


@prop(2.5, empty=True)
def strides_and_layout_change_no_bit(bench: Bench, calls: tuple[Call, ...]) -> None:
    (call,) = calls
    inputs = bench.inputs(call)
    other = {"layout": "bshd" if call.case.layout == "bhsd" else "bhsd"}
    plain = call.in_order().changed(case=other, stream="default")
    assert_same(bench.run(call, inputs), bench.run(plain, inputs), "contiguous arrays in the other layout")


# --- the same bits ---------------------------------------------------------------------------------------------------


@prop(1)
def repeats_give_the_same_bits(bench: Bench, calls: tuple[Call, ...]) -> None:
    """Again; on the other stream; with other multiprocessors; after a call with other values; in another library."""
    (call,) = calls
    inputs = bench.inputs(call)
    first = bench.run(call, inputs)
    assert_same(bench.run(call, inputs), first, "a repeat")
    elsewhere = call.changed(stream="side" if call.stream == "default" else "default", sm_margin=call.sm_margin + 3)
    assert_same(bench.run(elsewhere, inputs), first, "the other stream, and fewer multiprocessors")
    bench.run(call, [x.flip(2) for x in inputs])
    other = call.changed(library="torch" if call.library == "cupy" else "cupy")
    assert_same(bench.run(other, inputs), first, "the other library")


@prop(1.5, batch_invariant=True, min_batch=2)
def a_sequence_alone_gives_the_bits_it_gives_in_a_batch(bench: Bench, calls: tuple[Call, ...]) -> None:
    call = _apart(calls[0])
    inputs = make(call, bench.device)
    one = call.choice % call.case.batch
    sequence = slice(one, one + 1)
    expected = Answer(*(x[sequence] for x in bench.run(call, inputs)))
    alone = bench.run(call.changed(case={"batch": 1}), [x[sequence] for x in inputs])
    assert_same(alone, expected, f"sequence {one} alone")
    for x in inputs:
        x[:one] = float("nan")
        x[one + 1 :] = float("nan")
    beside = Answer(*(x[sequence] for x in bench.run(call, inputs)))
    assert_same(beside, expected, f"sequence {one} beside others")


@prop(0.5, (2, 4), budget=1 << 19)
def threads_and_streams_do_not_disturb_each_other(bench: Bench, calls: tuple[Call, ...]) -> None:
    expected = [bench.run(call) for call in calls]
    bench.synchronize()
    begin = threading.Barrier(len(calls))
    wrong: list[str] = []

    def work(call: Call, answer: Answer) -> None:
        try:
            bench.enter_thread()
            inputs = bench.inputs(call)
            begin.wait(60)
            for _ in range(3):
                assert_same(bench.run(call, inputs), answer, "in a thread, beside others")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
            begin.abort()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong.sort(key=lambda text: text.startswith("BrokenBarrierError"))
    assert not wrong, wrong[0]


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@prop(2, plants=True)
def nan_and_inf_reach_who_sees_them(bench: Bench, calls: tuple[Call, ...]) -> None:
    """A planted value reaches the queries that attend to it, as the definition says.

    A masked one may reach queries of the same block whose tiles hold it, and nobody else is changed by a bit.
    """
    call = _apart(calls[0].pinned())
    torch, case = bench.torch, call.case
    clean_inputs = make(call, bench.device)
    inputs = bench.inputs(call)
    inputs[2] = clean_inputs[2]  # q and k only: what a value does is simple, and said below
    o64, lse64, ordinary = bench.truth(call, inputs)
    clean, got = bench.run(call, clean_inputs), bench.run(call)
    seen = _seen(bench, call)
    near = _shares_a_tile(bench, call, seen)
    group = case.heads[0] // case.heads[1]

    rows = torch.zeros(call.shape("o")[:3], dtype=torch.bool, device=bench.device)
    touched, loose_rows = rows.clone(), rows.clone()  # may change at all; may be anything, for the mask
    loose = torch.zeros(call.shape("o"), dtype=torch.bool, device=bench.device)
    ruined = loose.clone()
    for plant in call.plants:
        b, h, position, channel = plant.place
        heads = slice(h * group, (h + 1) * group)
        if plant.array == "q":
            touched[b, h, position] = True
            continue
        touched[b, heads] |= near[:, position]
        if plant.array == "k":
            loose_rows[b, heads] |= near[:, position] & ~seen[:, position]
        else:
            loose[b, heads, :, channel] |= near[:, position] & ~seen[:, position]
            ruined[b, heads, :, channel] |= seen[:, position]
    same = Answer(torch.where(touched[..., None], clean.o, got.o), torch.where(touched, clean.lse, got.lse))
    if bench.exact:
        assert_same(same, clean, "queries that neither see what is planted nor share its tile")
    free = loose | ruined | loose_rows[..., None]
    # All of a row's scores may be -Inf: then no weight carries a value.
    ruined &= ~(loose_rows | lse64.isneginf())[..., None]
    assert not bool((ruined & got.o.isfinite()).any()), "a NaN or Inf value does not show where it is attended to"
    filler = torch.where(o64.isfinite(), o64, torch.zeros_like(o64)).to(got.o.dtype)
    check(torch.where(free, filler, got.o), torch.where(free, filler.double(), o64), ordinary, case.dtype)
    check_lse(torch.where(loose_rows, lse64.float(), got.lse), lse64)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _seen(bench: Bench, call: Call) -> Any:
    """(seqlen_q, seqlen_k) bool."""
    return bench.torch.from_numpy(visible_keys(*call.case.lengths, **call.mask())).to(bench.device)


def _shares_a_tile(bench: Bench, call: Call, seen: Any) -> Any:
    """(seqlen_q, seqlen_k) bool: does a query of the same block see a key of the same tile?"""
    torch = bench.torch
    config, (seqlen_q, seqlen_k) = call.config(), call.case.lengths
    missing = -seqlen_q % config.BLOCK_M  # of a block that is not full: the first under a right mask, else the last
    before, behind = (missing, 0) if config.MASK_RIGHT else (0, missing)
    padded = torch.nn.functional.pad(seen.float(), (0, -seqlen_k % config.BLOCK_N, before, behind))
    tiles = padded.reshape(-1, config.BLOCK_M, padded.shape[1] // config.BLOCK_N, config.BLOCK_N).amax((1, 3)) > 0
    wide = tiles.repeat_interleave(config.BLOCK_M, 0).repeat_interleave(config.BLOCK_N, 1)
    return wide[before : before + seqlen_q, :seqlen_k]


def _permutation(bench: Bench, call: Call, size: int) -> Any:
    return below(bench.device, call.seed + call.choice, "permutation", (size,), 1 << 30).argsort(stable=True)


def _apart(call: Call) -> Call:
    """The same call, but for arrays that hold one element at several places: where a single one is to be changed."""
    q, k, v = (dataclasses.replace(placement, repeats=()) for placement in (call.q, call.k, call.v))
    return call.changed(q=q, k=k, v=v)
