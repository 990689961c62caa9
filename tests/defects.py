"""Planted defects: small changes of the real sources, each of which a named check must catch.

`old` stands exactly once in the file. A defect of ordering need not show in a run where everything is on time, so it is
built with random delays at barriers.
"""

from __future__ import annotations

from dataclasses import dataclass

KERNEL = "cuda_src/attention_fwd.cuh"


@dataclass(frozen=True)
class Defect:
    name: str
    file: str
    old: str
    new: str
    caught_by: str  # a function of tests/kernel_checks.py
    delays: bool = False


DEFECTS = (
    Defect(
        "no wait for V",
        KERNEL,
        '        wait_full(shared.v_ring, v, "v full");\n        multiply_pv();\n        pass_turn();',
        "        multiply_pv();\n        pass_turn();",
        "the_same_bits",
        delays=True,
    ),
    Defect(
        "V handed back by the first warp",
        KERNEL,
        "shared.v_ring.init(T::WARPS)",
        "shared.v_ring.init(1)",
        "the_same_bits",
        delays=True,
    ),
    Defect(
        "Q handed back by the first warp",
        KERNEL,
        "ring.init(WARPGROUP_SIZE / WARP_SIZE)",
        "ring.init(1)",
        "many_tiles",
        delays=True,
    ),
    Defect(
        "wrong phase of the ring",
        "cuda_src/rtk/pipeline.cuh",
        "            stage = 0;\n            phase ^= 1;",
        "            stage = 0;",
        "full",
    ),
    Defect(
        "swapped stage",
        KERNEL,
        "shared_address(shared.v[v.stage])",
        "shared_address(shared.v[Config::STAGES - 1 - v.stage])",
        "full",
    ),
    Defect(
        "causal edge off by one",
        "cuda_src/rtk/mask.cuh",
        "row + 8 * r + extent.diagonal_right + 1 - column",
        "row + 8 * r + extent.diagonal_right + 2 - column",
        "causal_edge",
    ),
    Defect(
        "window off by one",
        "cuda_src/rtk/mask.cuh",
        "int begin = row + 8 * r + extent.diagonal_left - column;",
        "int begin = row + 8 * r + extent.diagonal_left + 1 - column;",
        "window_edges",
    ),
    Defect(
        "a masked tile taken for clear",
        "cuda_src/rtk/mask.cuh",
        "max(0, first_row + extent.diagonal_right + 1) / N",
        "max(0, first_row + extent.diagonal_right + N) / N",
        "causal_edge",
    ),
    Defect(
        "keys beyond the sequence counted",
        "cuda_src/rtk/mask.cuh",
        "int end = extent.end_key - column;",
        "int end = extent.end_key + 8 - column;",
        "ragged_keys",
    ),
    Defect(
        "another sequence's padding",
        "cuda_src/rtk/mask.cuh",
        "load_global(kv_end + batch)",
        "load_global(kv_end)",
        "ranges",
    ),
    Defect(
        "padding on the left only skipped by tiles",
        "cuda_src/rtk/mask.cuh",
        "first_clear = extent.first_key;",
        "first_clear = extent.first_key / N * N;",
        "ranges",
    ),
    Defect(
        "a counter that is not left at zero",
        "cuda_src/rtk/scheduler.cuh",
        "atomicInc(counter, num_tiles - 1)",
        "atomicAdd(counter, 1u)",
        "counters_are_left_at_zero",
    ),
    Defect("dropped rescale of O", KERNEL, "        if (softmax.raised) rescale();\n", "", "late_maximum"),
    Defect(
        "correction from a rounded offset",
        "cuda_src/rtk/softmax.cuh",
        "exp2_approx((previous - finite_max) * scale_log2)",
        "exp2_approx(previous * scale_log2 - offset[row])",
        "other_rows_change_nothing",
    ),
    Defect(
        "a maximum left where P overflows",
        KERNEL,
        "Config::BF16 ? 16 : 12",
        "300",
        "rising_below_zero",
    ),
    Defect(
        "limits of half the rows not looked at",
        "cuda_src/rtk/softmax.cuh",
        "(largest_bits(scores, 0) > limit[0]) | (largest_bits(scores, 1) > limit[1])",
        "largest_bits(scores, 0) > limit[0]",
        "rising_below_zero",
    ),
    Defect(
        "limits below zero compared by their bits",
        "cuda_src/rtk/softmax.cuh",
        "beyond >= 0.0f ? __float_as_int(beyond) : 0x80000000",
        "__float_as_int(beyond)",
        "rising_below_zero",
    ),
    Defect(
        "a maximum taken higher than P's type can hold",
        KERNEL,
        "Config::BF16 ? 32 : 0",
        "200",
        "maxima_below_zero",
    ),
    Defect(
        "last KV tile of a consumer's rows not seen",
        "cuda_src/rtk/mask.cuh",
        "first_row <= last_row ? ceil_div_rt(visible, N) : 0",
        "first_row <= last_row ? visible / N : 0",
        "causal_edge",
    ),
    Defect(
        "row sum not corrected",
        "cuda_src/rtk/softmax.cuh",
        "        row_sum[row] *= correction[row];\n",
        "",
        "late_maximum",
    ),
    Defect(
        "maximum over half a row",
        "cuda_src/rtk/softmax.cuh",
        "    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));",
        "    return x;",
        "late_maximum",
    ),
    Defect(
        "row sum of one thread of four", "cuda_src/rtk/softmax.cuh", "quad_sum(row_sum[row])", "row_sum[row]", "full"
    ),
    Defect(
        "wrong KV head", KERNEL, "tile.head / params.heads_per_kv", "tile.head % params.heads_per_kv", "grouped_heads"
    ),
    Defect(
        "LSE in base 2",
        "cuda_src/rtk/softmax.cuh",
        "(row_max[row] * scale_log2 + log2_approx(sum)) * LN_2",
        "(row_max[row] * scale_log2 + log2_approx(sum))",
        "log_sum_exp",
    ),
    Defect(
        "unwritten last row",
        KERNEL,
        "static_cast<u32>(first + row) < static_cast<u32>(params.extent.seqlen_q)",
        "static_cast<u32>(first + row) < static_cast<u32>(params.extent.seqlen_q - 1)",
        "ragged_rows",
    ),
    Defect(
        "32-bit offset of the output",
        KERNEL,
        "tile.head * params.o_head_bytes",
        "static_cast<int>(tile.head * params.o_head_bytes)",
        "far_offsets",
    ),
    Defect(
        "columns exchanged in the epilogue",
        "cuda_src/rtk/epilogue.cuh",
        "TurnedRows::address(turned, lane % 16, lane / 16)",
        "TurnedRows::address(turned, lane % 16, 1 - lane / 16)",
        "all_head_dims",
    ),
    Defect(
        "columns exchanged where rows of O are not turned in shared memory",
        "cuda_src/rtk/epilogue.cuh",
        "const bool upper = threadIdx.x & step;",
        "const bool upper = !(threadIdx.x & step);",
        "all_head_dims",
    ),
    Defect(
        "O of the block before left in the accumulators",
        KERNEL,
        "        softmax.reset();\n#pragma unroll\n        for (int i = 0; i < O_COUNT; ++i) o[i] = 0.0f;\n",
        "        softmax.reset();\n",
        "many_tiles",
    ),
    Defect(
        "last group of heads taken for full",
        "cuda_src/rtk/scheduler.cuh",
        "const int heads = min(heads_per_group, num_heads_total - first_head);",
        "const int heads = heads_per_group;",
        "many_tiles",
    ),
    Defect(
        "no wait for the kernel before",
        "cuda_src/rtk/ptx.cuh",
        '    asm volatile("griddepcontrol.wait;" ::: "memory");\n',
        "",
        "calls_in_a_row",
    ),
    Defect(
        "stale tensor map",
        "rtk/launch.py",
        "key = (self._number, address)",
        "key = (self._number, 0)",
        "other_addresses",
    ),
    Defect(
        "softcap without its inner scale",
        KERNEL,
        "params.scale / params.softcap * 2.0f * LOG2_E",
        "params.scale * 2.0f * LOG2_E",
        "softcap",
    ),
)
