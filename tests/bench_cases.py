"""Made-up but plausible results for the tests of the reports: a folder of every suite, from a fixed seed."""

from __future__ import annotations

import copy
import random
import statistics

from rtk.benchmarks import floors, records

DEVICE = {"sm_count": 132, "max_sm_mhz": 1980, "l2_bytes": 62914560, "memory_bytes": 150 << 30}
CEILINGS = {"bf16_tflops": 744.1, "fp8_tflops": 1255.0, "copy_gbps": 4300.0}
# TFLOP/s at length, for head_dim 64, 128, 256
SPEED = {
    "rtk": (560, 690, 735),
    "fa3": (552, 678, 742),
    "fa4": (548, 660, 700),
    "cudnn": (470, 640, 668),
    "fa2": (290, 320, 285),
}
SUITES = ("paper", "small", "long", "coldstart", "overhead", "accuracy")


def meta(suite):
    return {
        "schema": 1,
        "suite": suite,
        "title": {
            "paper": "Attention forward, batch × seqlen 16384",
            "small": "Small problems",
            "long": "Long sequences",
            "coldstart": "Cold start",
            "overhead": "Overhead of a call",
            "accuracy": "Accuracy against float64",
        }.get(suite, suite),
        "gpu": "NVIDIA H200",
        "uuid": "GPU-00000000",
        "driver": "580.159.04",
        "cuda": "13.0",
        "versions": {
            "rtk": "0.4.0",
            "torch": "2.11.0",
            "cudnn": "9.19.0",
            "nvrtc": "13.0.88",
            "fa3": "3.0.0",
            "fa2": "2.8",
        },
        "sources": {"cuda_src": "19620d0028ef873089f24e2ad2fa2c917e0f65690ba35acdd39a3b4203b84f5c"},
        "date": "2026-11-21T11:42:14+00:00",
        "duration_s": 512.3,
        "pieces": 1,
        "rounds": 25,
        "method": "CUDA graph replays, implementations taking turns, medians; N(0, 1) inputs",
        "absent": {"flashinfer": "not installed <here>", "xformers": "not installed"},
        "ceilings": dict(CEILINGS),
        "device": dict(DEVICE),
        "clocks": {
            "sm_mhz": {"min": 1320, "median": 1530, "max": 1980},
            "power_w": {"min": 310.5, "median": 695.2, "max": 701.0},
            "temperature_c": {"min": 41, "median": 58, "max": 63},
        },
    }


def problem(suite, **changes):
    record = {"suite": suite, "op": "attention_fwd", "impl": "rtk", "dtype": "bfloat16", "batch": 2, "heads_q": 16}
    record |= {"heads_kv": 16, "seqlen_q": 8192, "seqlen_k": 8192, "head_dim": 128, "head_dim_v": 128, "causal": False}
    return record | {"window": None, "softcap": None, "error": None} | changes


def timed(record, us, rng, rounds=25, noise=0.006):
    """The record with times around `us`, and what follows from them."""
    times = [round(us * (1 + rng.gauss(0, noise)), 3) for _ in range(rounds)]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    rate = floors.tflops(record, median)
    return record | {
        "us": round(median, 3),
        "us_q1": round(q1, 3),
        "us_q3": round(q3, 3),
        "us_rounds": times,
        "rounds": rounds,
        "timing": "graph",
        "tflops": round(rate, 1),
        "ceiling_share": round(rate / CEILINGS["bf16_tflops"], 4),
        "floor_us": floors.floors(record, CEILINGS, DEVICE),
        "sm_mhz": 1530,
        "power_w": 695.0,
        "temperature_c": 58,
        "rms_error": 0.0023,
        "max_error": 0.02,
    }


def paper(rng):
    for dim_index, head_dim in enumerate((64, 128, 256)):
        for causal in (False, True):
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                for impl, speeds in SPEED.items():
                    record = problem("paper", impl=impl, head_dim=head_dim, head_dim_v=head_dim, causal=causal)
                    record |= {"batch": 16384 // seqlen, "heads_q": 2048 // head_dim, "heads_kv": 2048 // head_dim}
                    record |= {"seqlen_q": seqlen, "seqlen_k": seqlen}
                    if impl == "fa4" and head_dim == 256:
                        yield record | {"us": None, "error": "head_dim 256 is not supported"}
                        continue
                    speed = speeds[dim_index] * seqlen / (seqlen + (900 if causal else 180))
                    yield timed(record, floors.flop(record) / speed / 1e6, rng)


def small(rng):
    for batch, heads, seqlen, head_dim in ((16, 96, 512, 64), (1, 16, 4096, 128), (4, 32, 1024, 128), (1, 8, 512, 64)):
        for impl, speeds in SPEED.items():
            record = problem("small", impl=impl, batch=batch, heads_q=heads, heads_kv=heads, head_dim=head_dim)
            record |= {"head_dim_v": head_dim, "seqlen_q": seqlen, "seqlen_k": seqlen}
            us = 4 + floors.flop(record) / (0.6 * speeds[0]) / 1e6
            yield timed(record, us, rng)


def long(rng):
    for seqlen in (16384, 65536, 262144, 1048576):
        for impl in ("rtk", "fa3", "cudnn", "sdpa"):
            shape = {"batch": 1, "heads_q": 8, "heads_kv": 8, "seqlen_q": seqlen, "seqlen_k": seqlen, "causal": True}
            record = problem("long", impl=impl, **shape)
            if impl == "sdpa" and seqlen > 100000:
                yield record | {"us": None, "error": "out of memory"}
                continue
            speed = SPEED.get(impl, (0, 60))[1]
            extra = {"rtk": 4 * 132, "sdpa": 8 * seqlen * seqlen}.get(impl, 32 * seqlen)
            yield timed(record, floors.flop(record) / speed / 1e6, rng) | {"peak_extra_bytes": extra}


def coldstart(rng):
    for impl, scale in (("rtk", 1.0), ("fa3", 0.8), ("flex", 9.0), ("fa4", 14.0)):
        values = {"import_ms": 240 * scale, "first_call_ms": 480 * scale, "disk_call_ms": 4.1 * scale}
        yield problem("coldstart", impl=impl, us=None) | values | {"second_call_ms": 0.03 + rng.random() / 100}


def overhead(rng):
    for seqlen in (128, 1024):
        for impl in ("rtk", "fa3", "sdpa"):
            cpu = {"rtk": 7.5, "fa3": 21.0, "sdpa": 9.0}[impl] * rng.uniform(0.98, 1.02)
            yield problem("overhead", impl=impl, us=None, seqlen_q=seqlen, seqlen_k=seqlen, cpu_us=cpu)


def accuracy(rng):
    for dtype in ("bfloat16", "float16"):
        for impl in ("rtk", "fa3", "cudnn"):
            error = (0.0023 if dtype == "bfloat16" else 0.0003) * rng.uniform(0.9, 1.1)
            yield problem("accuracy", impl=impl, us=None, dtype=dtype, rms_error=error, max_error=9 * error)


def run(suite, seed=0):
    """(meta, records) of a suite, the same every time."""
    makers = {"paper": paper, "small": small, "long": long, "coldstart": coldstart, "overhead": overhead}
    return meta(suite), list(makers.get(suite, accuracy)(random.Random(f"{suite} {seed}")))


def fill(folder, seed=0):
    """Write every suite into this folder."""
    for suite in SUITES:
        records.write(folder / f"{suite}.json", *run(suite, seed))
    return folder


def slower(found, factor, impls=("rtk",)):
    """The records, those of these implementations with all times multiplied."""
    found = copy.deepcopy(found)
    for record in found:
        if record["impl"] in impls and record.get("us"):
            for key in ("us", "us_q1", "us_q3"):
                record[key] *= factor
            record["us_rounds"] = [us * factor for us in record["us_rounds"]]
    return found
