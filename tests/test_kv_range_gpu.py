"""kv_range on the GPU: ranges that lie anyhow to tiles and masks, against float64; without a wait for the device."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest
from gpu_cases import Case, arrays_of, same_bits, truth
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from yardstick import check, check_lse

import rtk
from rtk import driver, zeroed

pytestmark = pytest.mark.gpu

CASES = [
    Case(dims=dims, mask=mask, lengths=lengths, dtype=dtype, batch=5, layout=layout, softcap=softcap)
    for dims, mask, lengths, dtype, layout, softcap in (
        ((64, 64), "full", (129, 1000), "bfloat16", "bhsd", 0.0),
        ((64, 64), "causal", (777, 777), "float16", "bshd", 0.0),
        ((128, 128), "full", (1, 2000), "float16", "bhsd", 0.0),
        ((128, 128), "causal", (1000, 1000), "bfloat16", "bshd", 0.0),
        ((128, 128), "causal-tl", (300, 900), "bfloat16", "bhsd", 0.0),
        ((96, 96), "causal-w100.", (800, 800), "bfloat16", "bhsd", 0.0),
        ((256, 256), "causal", (500, 700), "bfloat16", "bhsd", 30.0),
        ((256, 256), "w300.100", (600, 600), "float16", "bhsd", 0.0),
        ((192, 128), "full", (400, 999), "bfloat16", "bhsd", 0.0),
    )
]


def bounds(seqlen: int) -> st.SearchStrategy[int]:
    return st.integers(0, seqlen) | st.sampled_from([0, 1, 63, 64, 127, 128, 129, seqlen - 1, seqlen, -5, 2**31 - 1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(gpu: Any, any_library: Any, case: Case) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        rows = st.lists(bounds(case.lengths[1]), min_size=case.batch, max_size=case.batch)
        first, end = (data.draw(st.none() | rows.map(lambda x: np.array(x, np.int32))) for _ in range(2))
        config = {"SCHEDULER": data.draw(st.integers(0, 1))}
        host = case.inputs()
        kv_range = tuple(None if x is None else any_library.of(x) for x in (first, end))
        out = any_library.full(case.o_shape(), float("nan"), case.dtype)
        options = case.options() | {"kv_range": kv_range, "config": config}
        o, lse = rtk.attention(*map(any_library.of, host), **options, out=out, return_lse=True)
        o64, lse64, ordinary = truth(gpu, host, case.options() | {"kv_range": (first, end)})
        check(o, o64, ordinary, case.dtype, layout=case.layout, label=f"{case} {first} {end}")
        check_lse(lse, lse64, label=f"{case} {first} {end}")

    run()


def test_no_wait_and_new_contents_in_a_graph(gpu: Any) -> None:
    """The numbers are read when the kernel runs: a graph's replay takes those of its time."""
    library = arrays_of(gpu, "torch")
    torch = library.module
    case = dataclasses.replace(CASES[0], batch=3)
    q, k, v = (library.of(x) for x in case.inputs())
    end = torch.full((3,), 1000, dtype=torch.int32, device=q.device)
    out = rtk.attention(q, k, v, kv_range=(None, end))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rtk.attention(q, k, v, kv_range=(None, end), out=out)
    for lengths in ([1, 500, 1000], [64, 0, 999]):
        end.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert same_bits(library, out, rtk.attention(q, k, v, kv_range=(None, end)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        rtk.attention(q, k, v, kv_range=(None, end))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counters_are_left_at_zero(gpu: Any) -> None:
    """Whatever ran before: the words of the dynamic scheduler are all zero when nothing runs."""
    library = arrays_of(gpu, "torch")
    torch = library.module
    for case in CASES:
        rtk.attention(*(library.of(x) for x in case.inputs()), **case.options(), config={"SCHEDULER": 1})
    torch.cuda.synchronize()
    words = zeroed._words[gpu.index]
    used = bytearray(4 * 1000)
    target = (ctypes.c_char * len(used)).from_buffer(used)
    driver.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(words.ring), ctypes.c_size_t(len(used)))
    assert words.passing() >= words.ring + 4 * len(CASES) and not any(used)
