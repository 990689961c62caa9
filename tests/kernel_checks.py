"""Small checks of the attention kernel, each of one thing: tests run them on the real sources, and on planted defects.

    python tests/kernel_checks.py NAME ...     # prints one JSON line a check: {"check": ..., "failure": null or text}

Needs torch and a Hopper GPU. In a process of its own, because a defect may hang a kernel or end its context.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import yardstick

Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def _on_gpu(host: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16).cuda()


def _compare(
    *,
    batch: int = 1,
    heads_q: int = 2,
    heads_kv: int = 2,
    seqlen_q: int = 512,
    seqlen_k: int = 512,
    head_dim: int = 64,
    kind: str = "normal",
    edges: tuple[int, ...] | None = None,
    lse_only: bool = False,
    config: dict[str, int] | None = None,
    **options: Any,
) -> None:
    """One call into a poisoned output, against float64."""
    import torch

    import rtk

    shape = {"batch": batch, "heads_q": heads_q, "heads_kv": heads_kv, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    dims = {"head_dim": head_dim, "head_dim_v": head_dim}
    rng = np.random.default_rng(0)
    q, k, v = map(_on_gpu, yardstick.make_inputs(kind, **shape, **dims, dtype="bfloat16", rng=rng, edges=edges))
    poisoned = torch.full((batch, heads_q, seqlen_q, head_dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    out, lse = rtk.attention(q, k, v, out=poisoned, return_lse=True, config=config, **options)
    ref, ref_lse = yardstick.attention_f64(q, k, v, **options)
    if not lse_only:
        yardstick.check(out, ref, yardstick.plain(q, k, v, **options), "bfloat16")
    yardstick.check_lse(lse, ref_lse)


@check
def full() -> None:
    """Keys enough for the ring of stages to come round several times."""
    _compare(seqlen_k=2048)


@check
def ragged_keys() -> None:
    """The last tile of keys is partly beyond the sequence."""
    _compare(seqlen_q=300, seqlen_k=777)


@check
def ragged_rows() -> None:
    """The last rows of a block that is not full are written, and the first."""
    for rows in (1, 63, 65, 129, 200):
        _compare(seqlen_q=rows, seqlen_k=300)


@check
def causal_edge() -> None:
    _compare(kind="index", edges=(0, 1), causal=True)
    _compare(kind="index", edges=(0, 1), seqlen_q=300, seqlen_k=300, head_dim=128, causal=True)


@check
def window_edges() -> None:
    _compare(kind="index", edges=(-101, -100, 50, 51), window_size=(100, 50))
    _compare(kind="index", edges=(-101, -100, 0), head_dim=128, window_size=(100, 0))


@check
def grouped_heads() -> None:
    _compare(heads_q=6, heads_kv=2)


@check
def log_sum_exp() -> None:
    _compare(lse_only=True)


@check
def softcap() -> None:
    _compare(softcap=5.0)


@check
def ranges() -> None:
    """Batches padded on the left, on the right and on both sides, with and without a causal mask."""
    import torch

    first = torch.tensor([0, 1, 130, 300], dtype=torch.int32, device="cuda")
    end = torch.tensor([512, 129, 400, 301], dtype=torch.int32, device="cuda")
    for kv_range in ((first, end), (first, None), (None, end)):
        for causal in (False, True):
            _compare(batch=4, kv_range=kv_range, causal=causal)


@check
def late_maximum() -> None:
    """Peaks anywhere in the row: what was accumulated before the peak is rescaled."""
    _compare(kind="peaked", seqlen_k=2048)
    _compare(kind="peaked", seqlen_k=2048, head_dim=128)


@check
def rising_below_zero() -> None:
    """Half the rows: scores that are all negative, and 40 larger every 64 keys, in all more than P's type can hold. As
    integers of their bits they would stand in the opposite order."""
    import torch

    import rtk

    torch.manual_seed(0)
    q = (1 + torch.rand(1, 2, 256, 64, device="cuda")).to(torch.bfloat16)
    q[:, :, torch.arange(256) % 16 < 8] = 0
    below = 3.5 * (1 + torch.arange(1024, device="cuda") // 64)[:, None]
    k = (-below * (1 + 0.01 * torch.rand(1, 2, 1024, 64, device="cuda"))).to(torch.bfloat16)
    v = torch.randn(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16)
    out, lse = rtk.attention(q, k, v, return_lse=True)
    ref, ref_lse = yardstick.attention_f64(q, k, v)
    yardstick.check(out, ref, yardstick.plain(q, k, v), "bfloat16")
    yardstick.check_lse(lse, ref_lse)


@check
def maxima_below_zero() -> None:
    """Rows whose scores lie anywhere from 0 to -140, in both types: a maximum may be taken a little too high."""
    import torch

    import rtk

    for dtype in ("bfloat16", "float16"):
        torch.manual_seed(0)
        q = torch.linspace(0, 16, 512, device="cuda").to(getattr(torch, dtype))[:, None].repeat(1, 1, 1, 64)
        k, v = (f(1, 1, 512, 64, device="cuda", dtype=q.dtype) for f in (torch.rand, torch.randn))
        k = -(1 + 0.1 * k)
        out, lse = rtk.attention(q, k, v, return_lse=True)
        ref, ref_lse = yardstick.attention_f64(q, k, v)
        yardstick.check(out, ref, yardstick.plain(q, k, v), dtype)
        yardstick.check_lse(lse, ref_lse)


@check
def other_rows_change_nothing() -> None:
    """Not a bit of a row, whether or not the maxima of other rows in its warp have to be raised."""
    import torch

    import rtk

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    steep = torch.arange(2048) % 16 == 5  # each warp has one such row
    found = []
    for value in (0, 100):
        q[:, :, steep] = value
        out, lse = rtk.attention(q, k, v, return_lse=True)
        found.append((out[:, :, ~steep], lse[:, :, ~steep]))
    (out, lse), (expected, expected_lse) = found
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@check
def long_rows() -> None:
    """A thousand tiles whose scores all lie near 50: what each tile leaves of a rounding error adds up."""
    import torch

    import rtk

    torch.manual_seed(0)
    q = (2.5 + 0.3 * torch.randn(1, 1, 64, 64, device="cuda")).to(torch.bfloat16)
    k = (2.5 + 0.02 * torch.randn(1, 1, 131072, 64, device="cuda")).to(torch.bfloat16)
    v = torch.randn(1, 1, 131072, 64, device="cuda", dtype=torch.bfloat16)
    _, lse = rtk.attention(q, k, v, return_lse=True)
    _, ref_lse = yardstick.attention_f64(q, k, v)
    yardstick.check_lse(lse, ref_lse, atol=5e-5, rtol=1e-6)


@check
def all_head_dims() -> None:
    """One of each slab width, and rows of O turned in shared memory and not, so that columns are where they belong."""
    for head_dim in (24, 80, 96, 128, 256):
        _compare(head_dim=head_dim, seqlen_q=200, seqlen_k=200)
    _compare(head_dim=256, seqlen_q=200, seqlen_k=200, config={"BLOCK_N": 80, "NUM_CONSUMER_WARPGROUPS": 2})


@check
def many_tiles() -> None:
    """Blocks take several tiles, longest first, in groups of heads of which the last is not full."""
    _compare(batch=5, heads_q=11, heads_kv=11, seqlen_q=1024, seqlen_k=1024, head_dim=128, causal=True)
    _compare(batch=3, heads_q=24, heads_kv=24, seqlen_q=1024, seqlen_k=1024)


@check
def the_same_bits() -> None:
    """Any order of events gives the same bits: of one call many times, while blocks take many tiles."""
    import torch

    import rtk

    q, k, v = (torch.randn(2, 24, 700, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    first = rtk.attention(q, k, v, causal=True)
    for _ in range(20):
        again = torch.full_like(first, float("nan"))
        rtk.attention(q, k, v, causal=True, out=again)
        assert torch.equal(first.view(torch.int16), again.view(torch.int16)), "two runs of one call differ"


@check
def calls_in_a_row() -> None:
    """Each call reads what the last one wrote, and writes what it read: in a graph, without pauses, the same bits."""
    import torch

    import rtk

    torch.manual_seed(0)
    first, *v = (torch.randn(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(9))
    k = [30 * x.flip(2) for x in v]  # scores far apart, so that no two results are alike
    arrays = [first.clone(), torch.empty_like(first)]

    def chain(pause: Callable[[], None]) -> None:
        for turn in range(40):
            rtk.attention(arrays[turn % 2], k[turn % 8], v[turn % 8], out=arrays[1 - turn % 2])
            pause()

    chain(torch.cuda.synchronize)
    expected = arrays[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arrays[0].copy_(first)
        chain(lambda: None)
    for _ in range(5):
        graph.replay()
        assert torch.equal(arrays[0], expected), "a call did not wait for the one before"


@check
def teams_agree() -> None:
    """How many consumers there are, how far they may be ahead of each other and who gets which tile changes no bit."""
    import torch

    import rtk

    masks: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"window_size": (150, 20)})
    ways = ((2, 0, False), (2, 1, True), (4, 0, False))  # STAGES, SCHEDULER, PINGPONG
    for head_dim, options in (*((64, mask) for mask in masks), (128, masks[1])):
        q, k, v = (torch.randn(2, 18, 700, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        expected = None
        for consumers, way in itertools.product((1, 2, 3, 4), ways):
            if consumers == 4 and head_dim > 64:
                continue  # no kernel has so many registers
            choices = dict(zip(("STAGES", "SCHEDULER", "PINGPONG"), way, strict=True))
            config = {"BLOCK_N": 64, "NUM_CONSUMER_WARPGROUPS": consumers, **choices}
            config["PINGPONG"] &= consumers > 1
            out = torch.full_like(q, float("nan"))
            rtk.attention(q, k, v, out=out, config=config, **options)
            expected = out if expected is None else expected
            assert torch.equal(out, expected), f"head_dim {head_dim}, {options}, {config}: other bits"


@check
def counters_are_left_at_zero() -> None:
    """A launch leaves its counter at zero: the next one with it, a replay of a graph, gives the same bits."""
    import torch

    import rtk

    q, k, v = (torch.randn(2, 40, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = rtk.attention(q, k, v, causal=True, config={"SCHEDULER": 1})
    out, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rtk.attention(q, k, v, causal=True, config={"SCHEDULER": 1}, out=out)
    for turn in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected), f"replay {turn} differs"


@check
def other_addresses() -> None:
    """The same shape with other tensors: the plan is reused, the addresses are not."""
    _compare()
    _compare(kind="outliers")
    _compare(kind="peaked")


@check
def far_offsets() -> None:
    """Heads more than 2^31 bytes apart, in q and in the output."""
    import torch

    import rtk

    head_stride = (1 << 30) + 4096  # elements of two bytes
    room = torch.empty(2 * head_stride + (1 << 20), dtype=torch.bfloat16, device="cuda")
    shape, strides = (1, 3, 200, 64), (1, head_stride, 64, 1)
    q = room.as_strided(shape, strides)
    q.copy_(torch.randn(shape, device="cuda"))
    k, v = (torch.randn(1, 3, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = rtk.attention(q.contiguous(), k, v)
    out = torch.empty_like(room).as_strided(shape, strides)
    rtk.attention(q, k, v, out=out)
    assert torch.equal(out.contiguous(), expected), "a result depends on how far apart heads are"


def main() -> None:
    for name in sys.argv[1:] or list(CHECKS):
        failure = None
        try:
            CHECKS[name]()
        except Exception as error:  # an assertion, or a context that a defect has ended
            failure = f"{type(error).__name__}: {error}".strip()[:400]
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
