"""Attention forward: the configurations of `cuda_src/attention_fwd.cuh`, which are legal, and which to take."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rtk import shapes
from rtk.arrays import View
from rtk.problem import AttentionProblem
from rtk.spec import SHARED_BYTES_PER_BLOCK, Binding, Bucket, KernelSpec, Operand, TensorMap, TensorOperand, half_steps

_ELEMENT_BYTES = 2
_SWIZZLE_PERIOD_BYTES = 1024  # regions of shared memory start at multiples of the widest swizzle pattern
_BARRIER_BYTES = 16  # a full and an empty mbarrier
_TILE_RING_BYTES = 176
_TURNED_BYTES = 4 * 2048  # of a consumer warpgroup, to turn rows of O in
# Registers of a consumer thread by the number of consumer warpgroups, as setmaxnreg grants them; and how many of them
# addresses, row statistics and the unrolled code need besides the accumulators (found by compiling the whole space).
_CONSUMER_REGISTERS = {1: 232, 2: 232, 3: 160, 4: 112}
_OTHER_REGISTERS = {1: 42, 2: 36, 3: 30, 4: 32}
_L2_SHARE_BYTES = 16 << 20  # K and V of the heads in flight should fit in this much of L2
_USUAL_SM_COUNT = 132  # of H100 and H200: more tiles than this take more than one round
_LOG2_E = 1.4426950408889634

_SAMPLED_BLOCKS = 64
_OPS_PER_SCORE = 3.15  # of the fp32 pipes, fitted: maximum, scaling, sum, and a conversion of two at once
_OPS_OF_SOFTCAP, _OPS_OF_MASK = 4.0, 1.5
_CHECKED_ROWS = 48

STATIC, DYNAMIC = 0, 1  # enum Scheduler
_CONSUMER_ROWS = 64  # of a consumer warpgroup
_BLOCK_NS = range(32, 193, 16)
_STAGES = (2, 4)
_LEAST_BLOCK_N = 64  # smaller ones were never the fastest, nor were four consumers that take turns
_SMALL_STAGE_BYTES = 32 << 10  # of K and V together
_FIRST_BLOCK_NS = (64, 80, 128)  # with these alone the model's picks were as good as with all
_LEAST_SCALE = 2.0**-100


@dataclass(frozen=True)
class AttentionFwdConfig:
    """Constants of one compiled kernel. The first group is free to choose, the second follows from the problem."""

    BLOCK_M: int  # query rows of a block
    BLOCK_N: int  # keys of a tile
    STAGES: int  # K tiles, and V tiles, in flight
    NUM_CONSUMER_WARPGROUPS: int  # of 64 query rows each
    PINGPONG: bool  # consumers take turns at the tensor cores
    SCHEDULER: int  # STATIC or DYNAMIC: see <rtk/scheduler.cuh>
    SLAB_QK: int  # columns of Q and K stored side by side, one swizzle width: 16, 32 or 64
    SLAB_V: int

    HEAD_DIM: int
    HEAD_DIM_V: int
    BF16: bool
    MASK_LEFT: bool
    MASK_RIGHT: bool
    SOFTCAP: bool
    PRESCALE: bool  # softmax_scale below 2^-100, zero or negative: scores are scaled before their maximum is taken
    KV_RANGES: bool  # each sequence has a range of keys of its own


class _TileSchedule(ctypes.Structure):
    _fields_ = (
        ("num_m_blocks", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_heads_total", ctypes.c_int32),
        ("heads_per_group", ctypes.c_int32),
        ("rows_before", ctypes.c_int32),
    )


class _SequenceExtent(ctypes.Structure):
    _fields_ = (
        ("seqlen_q", ctypes.c_int32),
        ("first_key", ctypes.c_int32),
        ("end_key", ctypes.c_int32),
        ("diagonal_left", ctypes.c_int32),
        ("diagonal_right", ctypes.c_int32),
    )


class AttentionFwdParams(ctypes.Structure):
    """`rtk::AttentionFwdParams`, field by field."""

    _fields_ = (
        ("q", TensorMap),
        ("k", TensorMap),
        ("v", TensorMap),
        ("o", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("tile_counter", ctypes.c_uint64),
        ("kv_first", ctypes.c_uint64),
        ("kv_end", ctypes.c_uint64),
        ("o_batch_bytes", ctypes.c_int64),
        ("o_head_bytes", ctypes.c_int64),
        ("o_row_bytes", ctypes.c_int64),
        ("schedule", _TileSchedule),
        ("extent", _SequenceExtent),
        ("heads_per_kv", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _slab(head_dim: int) -> int:
    """The widest slab that wastes no shared memory; narrow ones cost TMA requests, so a little waste is accepted.

    And more of it where rows of an array do not begin at sectors of 32 bytes, of which narrow slabs read twice as many.
    """
    padded = _round_up(head_dim, 16)
    if _round_up(padded, 64) * 7 <= padded * 8 or (head_dim > 64 and head_dim % 16):
        return 64
    return 32 if padded % 32 == 0 else 16


def _tile_bytes(rows: int, head_dim: int, slab: int) -> int:
    return _round_up(rows * _round_up(_round_up(head_dim, 16), slab) * _ELEMENT_BYTES, _SWIZZLE_PERIOD_BYTES)


def _rows_before(problem: AttentionProblem, block_m: Any) -> Any:
    """How many rows the first query block (or each of several sizes) begins before the first query.

    Under a mask on the right it is the one that is not full, because it sees the fewest keys.
    """
    return 0 if problem.window_right is None else -problem.seqlen_q % block_m


@functools.lru_cache(maxsize=256)
def _space(spec: AttentionFwd, specialization: tuple[tuple[str, int | bool], ...]) -> tuple[AttentionFwdConfig, ...]:
    """Every legal config for problems with this specialization; made once, since that takes milliseconds."""
    block_ns = (n for n in _BLOCK_NS if n >= _LEAST_BLOCK_N)
    choices = itertools.product(_CONSUMER_REGISTERS, block_ns, (False, True), (STATIC, DYNAMIC))
    found = (spec.make(dict(specialization), *each) for each in choices)
    return tuple(c for c in found if spec.illegal(c) is None and not (c.NUM_CONSUMER_WARPGROUPS == 4 and c.PINGPONG))


def _usual_stages(specialization: Mapping[str, int | bool], block_n: int) -> int:
    """More of them where a step takes less time than a load; narrower heads than 64 columns load no faster.

    Where both were measured, taking these alone cost 0.2 %.
    """
    columns = sum(max(specialization[name], 64) for name in ("HEAD_DIM", "HEAD_DIM_V"))
    return _STAGES[1] if block_n * columns * _ELEMENT_BYTES <= _SMALL_STAGE_BYTES else _STAGES[0]


class AttentionFwd(KernelSpec[AttentionProblem, AttentionFwdConfig]):
    name = "attention_fwd"
    header = "attention_fwd.cuh"
    parameters = AttentionFwdParams
    programmatic_launch = True

    # ------------------------------------------------------------------------------------------------- the config space

    def config(self, problem: AttentionProblem, **choices: Any) -> AttentionFwdConfig:
        """The picked config with these choices in it. Where BLOCK_M or the number of consumers is chosen the other
        follows; BLOCK_N, unless chosen, is as wide as then fits, and STAGES follows from it."""
        if "NUM_CONSUMER_WARPGROUPS" not in choices and "BLOCK_M" in choices:
            choices["NUM_CONSUMER_WARPGROUPS"] = int(choices["BLOCK_M"]) // _CONSUMER_ROWS
        if "NUM_CONSUMER_WARPGROUPS" in choices:
            consumers = int(choices["NUM_CONSUMER_WARPGROUPS"])
            choices = {"BLOCK_M": _CONSUMER_ROWS * consumers, "PINGPONG": consumers > 1, **choices}
        usual = self.pick(problem)

        def chosen(block_n: int) -> AttentionFwdConfig:
            stages = _usual_stages(self._specialization(problem), block_n)
            return replace(usual, **{"BLOCK_N": block_n, "STAGES": stages, **choices})

        config = chosen(int(choices.get("BLOCK_N", usual.BLOCK_N)))
        while "BLOCK_N" not in choices and self.illegal(config) and config.BLOCK_N > _BLOCK_NS[0]:
            config = chosen(config.BLOCK_N - 16)
        return config

    def make(
        self,
        specialization: Mapping[str, int | bool],
        consumers: int,
        block_n: int,
        pingpong: bool,
        scheduler: int,
    ) -> AttentionFwdConfig:
        """The config of these choices for all problems with this specialization, legal or not."""
        return AttentionFwdConfig(
            BLOCK_M=_CONSUMER_ROWS * consumers,
            BLOCK_N=block_n,
            STAGES=_usual_stages(specialization, block_n),
            NUM_CONSUMER_WARPGROUPS=consumers,
            PINGPONG=pingpong,
            SCHEDULER=scheduler,
            SLAB_QK=_slab(specialization["HEAD_DIM"]),
            SLAB_V=_slab(specialization["HEAD_DIM_V"]),
            **specialization,  # type: ignore[arg-type]
        )

    @staticmethod
    def _specialization(problem: AttentionProblem) -> dict[str, int | bool]:
        return {
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.head_dim_v,
            "BF16": problem.dtype == "bfloat16",
            "MASK_LEFT": problem.window_left is not None,
            "MASK_RIGHT": problem.window_right is not None,
            "SOFTCAP": problem.softcap > 0,
            # The softmax divides by its scale: multiples of the reciprocal must be finite.
            "PRESCALE": problem.softcap == 0 and problem.softmax_scale < _LEAST_SCALE,
            "KV_RANGES": problem.kv_ranges,
        }

    def refusal(self, problem: AttentionProblem, config: AttentionFwdConfig) -> str | None:
        for name, needed in self._specialization(problem).items():
            if getattr(config, name) != needed:
                return f"{name} is {getattr(config, name)}, the call needs {needed}"
        return self.illegal(config)

    def illegal(self, config: AttentionFwdConfig) -> str | None:
        """Why no kernel can be built of this config, or None."""
        consumers = config.NUM_CONSUMER_WARPGROUPS
        if consumers not in _CONSUMER_REGISTERS:
            return f"NUM_CONSUMER_WARPGROUPS is {consumers}, not 1, 2, 3 or 4"
        if config.BLOCK_M != _CONSUMER_ROWS * consumers:
            return f"BLOCK_M is {config.BLOCK_M}, not {_CONSUMER_ROWS} rows for each of {consumers} consumer warpgroups"
        if config.BLOCK_N not in _BLOCK_NS:
            return f"BLOCK_N is {config.BLOCK_N}, not a multiple of 16 from {_BLOCK_NS[0]} to {_BLOCK_NS[-1]}"
        if config.SCHEDULER not in (STATIC, DYNAMIC):
            return f"SCHEDULER is {config.SCHEDULER}, not {STATIC} (static) or {DYNAMIC} (dynamic)"
        if config.STAGES not in _STAGES:
            return f"STAGES is {config.STAGES}, not one of {_STAGES}"
        if config.PINGPONG and consumers == 1:
            return "PINGPONG needs two consumer warpgroups"
        for slab, head_dim in ((config.SLAB_QK, config.HEAD_DIM), (config.SLAB_V, config.HEAD_DIM_V)):
            if slab not in (16, 32, 64) or (slab != 64 and _round_up(head_dim, 16) % slab):
                return f"a slab of {slab} columns does not divide head_dim {head_dim}"
        # O, then S and P together; softcap keeps more of S's values in two forms at a time.
        scores = config.BLOCK_N * (7 if config.SOFTCAP else 6) // 8
        registers = _round_up(config.HEAD_DIM_V, 16) // 2 + scores + _OTHER_REGISTERS[consumers]
        if registers > _CONSUMER_REGISTERS[consumers]:
            return f"about {registers} registers a thread, of {_CONSUMER_REGISTERS[consumers]}"
        if consumers == 3 and max(_round_up(config.HEAD_DIM_V, 16), config.BLOCK_N) > 192:
            # Three consumers leave 128 registers a thread before setmaxnreg, and ptxas fits each wgmma into those.
            return f"HEAD_DIM_V {config.HEAD_DIM_V} with BLOCK_N {config.BLOCK_N} is too wide for three consumers"
        if self.shared_bytes(config) > SHARED_BYTES_PER_BLOCK:
            return f"{self.shared_bytes(config)} bytes of shared memory, of {SHARED_BYTES_PER_BLOCK}"
        return None

    def configs(self, problem: AttentionProblem) -> list[AttentionFwdConfig]:
        return list(_space(self, tuple(self._specialization(problem).items())))

    def first_picks(self, problem: AttentionProblem) -> list[AttentionFwdConfig]:
        usual = self.pick(problem)
        block_ns = {*_FIRST_BLOCK_NS, usual.BLOCK_N}
        return [c for c in self.configs(problem) if c.BLOCK_N in block_ns]

    def pick(self, problem: AttentionProblem) -> AttentionFwdConfig:
        masked = problem.window_left is not None or problem.window_right is not None
        widest = max(problem.head_dim, problem.head_dim_v)
        if widest <= 64:
            consumers, block_n = 3, 128
        elif widest <= 128:
            consumers, block_n = 2, 128 if masked else 176
        else:
            consumers, block_n = 2, 112 if widest <= 192 else 80
        # Query blocks that would be mostly empty rows.
        consumers = min(consumers, max(1, -(-problem.seqlen_q // _CONSUMER_ROWS)))
        pingpong = consumers > 1 and widest <= 128  # from 192 on, the products alone fill the time
        tiles = -(-problem.seqlen_q // (_CONSUMER_ROWS * consumers)) * problem.num_heads_q * problem.batch
        scheduler = DYNAMIC if tiles > _USUAL_SM_COUNT else STATIC
        specialization = self._specialization(problem)
        candidates = (self.make(specialization, consumers, n, pingpong, scheduler) for n in range(block_n, 0, -16))
        return next(config for config in candidates if self.illegal(config) is None)

    def bucket(self, problem: AttentionProblem) -> Bucket:
        kernel = self._specialization(problem)
        exact: dict[str, int | bool | str] = {
            "head_dim": problem.head_dim,
            "head_dim_v": problem.head_dim_v,
            "dtype": problem.dtype,
            "group": problem.heads_per_kv,
            **{name.lower(): kernel[name] for name in ("MASK_LEFT", "MASK_RIGHT", "SOFTCAP", "PRESCALE", "KV_RANGES")},
        }
        sizes = {"seqlen_q": problem.seqlen_q, "seqlen_k": problem.seqlen_k}
        sizes["batch_heads"] = problem.batch * problem.num_heads_q
        if problem.window_left is not None:  # what is visible of a row
            sizes["window"] = min(problem.seqlen_k, problem.window_left + (problem.window_right or 0) + 1)
        return Bucket(tuple(exact.items()), tuple((name, half_steps(size)) for name, size in sizes.items()))

    # -------------------------------------------------------------------------------------------------------- the tuner

    def operands(self, problem: AttentionProblem) -> Mapping[str, Operand]:
        heads, kv_heads = (problem.batch, problem.num_heads_q), (problem.batch, problem.num_heads_kv)
        return {
            "q": Operand((*heads, problem.seqlen_q, problem.head_dim), problem.dtype),
            "k": Operand((*kv_heads, problem.seqlen_k, problem.head_dim), problem.dtype),
            "v": Operand((*kv_heads, problem.seqlen_k, problem.head_dim_v), problem.dtype),
            "o": Operand((*heads, problem.seqlen_q, problem.head_dim_v), problem.dtype, written=True),
            "lse": Operand((*heads, problem.seqlen_q), "float32", written=True, optional=True),
            **{name: Operand((problem.batch,), "int32", optional=True) for name in ("kv_first", "kv_end")},
        }

    def work(self, problem: AttentionProblem, configs: Sequence[AttentionFwdConfig]) -> dict[str, Any]:
        """For rtk.autotune.model: tiles, what a step over BLOCK_N keys needs, and how many steps a tile takes."""
        import numpy as np

        m, n, consumers, pingpong, dynamic = (
            np.array([getattr(config, name) for config in configs], np.float64)
            for name in ("BLOCK_M", "BLOCK_N", "NUM_CONSUMER_WARPGROUPS", "PINGPONG", "SCHEDULER")
        )
        row_blocks = np.ceil(problem.seqlen_q / m)
        # Some query blocks of a head stand for all of them.
        sampled = (np.arange(_SAMPLED_BLOCKS)[:, None] + 0.5) / _SAMPLED_BLOCKS

        def steps_of(rows: Any) -> Any:
            begin = np.floor(sampled * np.ceil(problem.seqlen_q / rows)) * rows - _rows_before(problem, rows)
            first = np.maximum(begin, 0) + problem.diagonal
            last = np.minimum(begin + rows, problem.seqlen_q) + problem.diagonal - 1
            low = np.zeros_like(first) if problem.window_left is None else np.clip(first - problem.window_left, 0, None)
            high = np.full_like(first, problem.seqlen_k - 1)
            if problem.window_right is not None:
                high = np.minimum(high, last + problem.window_right)
            return np.clip(np.floor(high / n) - np.floor(low / n) + 1, 0, None)

        steps, own = steps_of(m), steps_of(np.full_like(m, _CONSUMER_ROWS))
        columns = problem.head_dim + problem.head_dim_v
        masked_sides = (problem.window_left is not None) + (problem.window_right is not None)
        return {
            "tiles": row_blocks * problem.num_heads_q * problem.batch,
            "steps": steps.mean(axis=0),
            "own_steps": np.minimum(own.mean(axis=0), steps.mean(axis=0)),
            "longest": steps.max(axis=0),
            "mma_flop": 2 * m * n * columns,
            "exponentials": m * n,
            "simple_ops": m * n * (_OPS_PER_SCORE + _OPS_OF_SOFTCAP * (problem.softcap > 0)) + m * problem.head_dim_v,
            "l2_bytes": n * columns * _ELEMENT_BYTES,
            "tile_ops": m * n * _OPS_OF_MASK * masked_sides,
            "tile_bytes": m * columns * _ELEMENT_BYTES,
            "team": np.where(consumers > 1, 2 * consumers - 3 + pingpong, 0).astype(np.intp),
            "dynamic": dynamic > 0,
        }

    def verify(self, problem: AttentionProblem, arrays: Mapping[str, Any], results: Mapping[str, Any]) -> str:
        """Rows at the start, in the middle and at the end of the first and the last head, against the definition."""
        from rtk import reference

        for batch, head in {(0, 0), (problem.batch - 1, problem.num_heads_q - 1)}:
            kv_head = head // problem.heads_per_kv
            k, v = (arrays[name]((batch, kv_head, slice(0, problem.seqlen_k))) for name in "kv")
            for start in {0, problem.seqlen_q // 2, max(0, problem.seqlen_q - _CHECKED_ROWS)}:
                rows = slice(start, min(start + _CHECKED_ROWS, problem.seqlen_q))
                exact, _ = reference.attention_fwd(
                    arrays["q"]((batch, head, rows))[None, None],
                    k[None, None],
                    v[None, None],
                    softmax_scale=problem.softmax_scale,
                    softcap=problem.softcap,
                    window_left=problem.window_left,
                    window_right=problem.window_right,
                    diagonal=problem.diagonal + start,
                )
                error = results["o"]((batch, head, rows)) - exact[0, 0]
                allowed = (0.01 if problem.dtype == "bfloat16" else 0.002) * max(float((exact**2).mean()) ** 0.5, 1e-6)
                if not float((error**2).mean()) ** 0.5 <= allowed:
                    return f"rows {rows.start} to {rows.stop - 1} of head {head}, batch {batch}, are wrong"
        return ""

    def describe(self, problem: AttentionProblem) -> str:
        return shapes.describe(problem)

    def sample_problems(self) -> list[AttentionProblem]:
        return _sample_problems()

    def samples(self) -> list[AttentionFwdConfig]:
        return [self.pick(problem) for problem in self.sample_problems()]

    def label(self, config: AttentionFwdConfig) -> str:
        flags = {
            "pingpong": config.PINGPONG,
            "dynamic": config.SCHEDULER == DYNAMIC,
            "left": config.MASK_LEFT,
            "right": config.MASK_RIGHT,
            "softcap": config.SOFTCAP,
            "prescale": config.PRESCALE,
            "ranges": config.KV_RANGES,
        }
        dtype = "bf16" if config.BF16 else "fp16"
        head = f"d{config.HEAD_DIM}x{config.HEAD_DIM_V}"
        tile = f"m{config.BLOCK_M}n{config.BLOCK_N}s{config.STAGES}"
        slabs = f"q{config.SLAB_QK}v{config.SLAB_V}"
        return "_".join([self.name, dtype, head, tile, slabs, *(name for name, on in flags.items() if on)])

    # ------------------------------------------------------------------------------------------------------- the launch

    def threads(self, config: AttentionFwdConfig) -> int:
        return 128 * (config.NUM_CONSUMER_WARPGROUPS + 1)

    def shared_bytes(self, config: AttentionFwdConfig) -> int:
        consumers = config.NUM_CONSUMER_WARPGROUPS
        q = consumers * _tile_bytes(_CONSUMER_ROWS, config.HEAD_DIM, config.SLAB_QK)
        k = _tile_bytes(config.BLOCK_N, config.HEAD_DIM, config.SLAB_QK)
        v = _tile_bytes(config.BLOCK_N, config.HEAD_DIM_V, config.SLAB_V)
        barriers = _BARRIER_BYTES * (consumers + 2 * config.STAGES)
        needed = q + config.STAGES * (k + v) + _round_up(barriers + _TILE_RING_BYTES, 128)
        turned = consumers * _TURNED_BYTES  # only where it is to spare: TurnedArea in the kernel
        return needed + turned if needed + turned <= SHARED_BYTES_PER_BLOCK else needed

    def grid(self, problem: AttentionProblem, config: AttentionFwdConfig, sm_count: int) -> int:
        tiles = -(-problem.seqlen_q // config.BLOCK_M) * problem.num_heads_q * problem.batch
        return min(tiles, max(1, sm_count))

    def bind(self, problem: AttentionProblem, config: AttentionFwdConfig, views: Mapping[str, View]) -> Binding:
        """`views` of q, k, v and o, whatever the layout of the call: (batch, heads, seqlen, head_dim)."""
        params = self.scalars(problem, config)
        batch_stride, head_stride, row_stride, _ = views["o"].strides
        params.o_batch_bytes = _ELEMENT_BYTES * batch_stride
        params.o_head_bytes = _ELEMENT_BYTES * head_stride
        params.o_row_bytes = _ELEMENT_BYTES * row_stride
        # What one TMA request brings of each: (columns, rows).
        boxes = {
            "q": (config.SLAB_QK, _CONSUMER_ROWS),
            "k": (config.SLAB_QK, config.BLOCK_N),
            "v": (config.SLAB_V, config.BLOCK_N),
        }
        return Binding(
            params,
            pointers=("o", "lse", "kv_first", "kv_end"),
            tensors=tuple(
                TensorOperand(name, problem.dtype, views[name].shape[::-1], views[name].strides[::-1], (*box, 1, 1))
                for name, box in boxes.items()
            ),
            counter="tile_counter" if config.SCHEDULER == DYNAMIC else None,
        )

    def scalars(self, problem: AttentionProblem, config: AttentionFwdConfig) -> AttentionFwdParams:
        """The parameters that do not depend on where the arrays are."""
        params = AttentionFwdParams()
        params.schedule.num_m_blocks = -(-problem.seqlen_q // config.BLOCK_M)
        params.schedule.num_heads = problem.num_heads_q
        params.schedule.num_heads_total = problem.num_heads_q * problem.batch
        params.schedule.heads_per_group = self._heads_per_group(problem)
        params.schedule.rows_before = _rows_before(problem, config.BLOCK_M)
        params.extent.seqlen_q = problem.seqlen_q
        params.extent.end_key = problem.seqlen_k
        # Clipped to where every query sees everything or nothing, so that row + diagonal fits 32 bits.
        lowest, highest = -problem.seqlen_q, problem.seqlen_k
        params.extent.diagonal_left = min(max(problem.diagonal - (problem.window_left or 0), lowest), highest)
        params.extent.diagonal_right = min(max(problem.diagonal + (problem.window_right or 0), lowest), highest)
        params.heads_per_kv = problem.heads_per_kv
        params.scale = problem.softmax_scale
        scores_are_scaled = config.SOFTCAP or config.PRESCALE
        params.scale_log2 = _LOG2_E if scores_are_scaled else problem.softmax_scale * _LOG2_E
        params.softcap = problem.softcap
        return params

    @staticmethod
    def _heads_per_group(problem: AttentionProblem) -> int:
        """Heads whose query blocks are interleaved: one where all blocks are equally long, else as many as L2 holds.

        Measured on an H200, causal, head_dim 256, with 1 MiB, 16 MiB and all heads at once: 604, 664 and 664 TFLOP/s at
        seqlen 8192, where one head's blocks are too few to balance; 470, 490 and 369 at 1024, where K and V of all
        heads do not fit.
        """
        if problem.window_right is None:
            return 1
        kv_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * _ELEMENT_BYTES
        kv_heads = problem.num_heads_kv * problem.batch
        groups = -(-kv_heads // max(1, _L2_SHARE_BYTES // max(kv_bytes, 1)))
        # All of about one size: the blocks of a small last one would be too few to balance.
        return -(-kv_heads // groups) * problem.heads_per_kv


SPEC = AttentionFwd()


def _sample_problems() -> list[AttentionProblem]:
    base = AttentionProblem(2, 4, 2, 1024, 1024, 128, 128, "bfloat16", 0.1)
    head_dims = (
        (8, 8),
        (24, 24),
        (64, 64),
        (72, 72),
        (80, 80),
        (96, 96),
        (128, 128),
        (160, 160),
        (192, 192),
        (256, 256),
    )
    pairs = (*head_dims, (192, 128), (64, 256), (128, 64), (40, 200))
    masks: tuple[dict[str, Any], ...] = ({}, {"window_right": 0}, {"window_left": 128, "window_right": 0})
    problems = []
    for index, (head_dim, head_dim_v) in enumerate(pairs):
        dtype = ("bfloat16", "float16")[index % 2]
        for mask in masks:
            problems.append(replace(base, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, **mask))
    problems.append(replace(base, softcap=30.0, window_right=0))
    problems += [replace(base, kv_ranges=True, **mask) for mask in masks]
    problems.append(replace(base, kv_ranges=True, head_dim=64, head_dim_v=64, window_right=0, dtype="float16"))
    problems.append(replace(base, softmax_scale=-0.1, dtype="float16"))
    problems.append(replace(base, softmax_scale=-0.1, head_dim=64, head_dim_v=64, window_right=0))
    problems.append(replace(base, seqlen_q=1, head_dim=64, head_dim_v=64))
    return problems
