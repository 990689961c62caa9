"""``rtk demo``: attention computed here, checked here, and the kernels behind it. With a GPU, and without one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import rtk
from rtk import jit
from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.cli import console, onboard, verify
from rtk.errors import ToolchainError
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import AttentionProblem, attention_problem


@dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    seqlen: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, seqlen, head_dim)"""
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    def problem(self, dtype: str, causal: bool) -> AttentionProblem:
        mask: dict[str, Any] = {"causal": causal, "causal_align": "bottom-right", "window_size": None}
        rest: dict[str, Any] = {"softmax_scale": None, "softcap": 0.0, "layout": "bhsd"}
        return attention_problem(self.shape, self.shape, self.shape, dtype, **mask, **rest)

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.heads} heads, {self.seqlen} tokens, head_dim {self.head_dim}"


ON_GPU = Size(batch=4, heads=16, seqlen=4096, head_dim=128)  # a layer of a GPT-3-sized model
ON_CPU = Size(batch=1, heads=12, seqlen=1024, head_dim=64)  # a layer of GPT-2 small
CASES = [("bfloat16", False), ("bfloat16", True), ("float16", False), ("float16", True)]
CPU_CASES = [("bfloat16", True), ("float16", True), ("float32", False)]


def run(arguments: argparse.Namespace) -> int:
    with console.Progress(quiet=arguments.json) as progress:
        device, why = (None, "--cpu was given") if arguments.cpu else onboard.find()
        if device is not None:
            report = _gpu(_sized(ON_GPU, arguments), device, progress)
        else:
            report = _cpu(arguments, why, progress)
    if arguments.json:
        console.write_json(report)
    else:
        _print(report)
    return 0 if report["ok"] else 1


def _sized(default: Size, arguments: argparse.Namespace) -> Size:
    return Size(**{name: getattr(arguments, name) or value for name, value in asdict(default).items()})


# --- the two ways ----------------------------------------------------------------------------------------------------


def _gpu(size: Size, device: Any, progress: console.Progress) -> dict[str, Any]:
    progress("loading an array library")
    library = onboard.arrays(device.ordinal)
    kernels = _compile([size.problem(*case) for case in CASES], progress)
    progress("measuring the GEMM ceiling")
    ceilings = {dtype: onboard.gemm_ceiling(library, dtype) for dtype in ("bfloat16", "float16")}
    results = []
    for dtype, causal in CASES:
        progress(f"running {dtype} {_mask(causal)}")
        results.append(_measure(library, size, dtype, causal, ceilings[dtype][0]))
    return {
        "rtk": rtk.__version__,
        "mode": "gpu",
        "device": device.name,
        "arrays": library.name,
        "size": asdict(size),
        "kernels": kernels,
        "gemm_tflops": {dtype: tflops for dtype, (tflops, _) in ceilings.items()},
        "results": results,
        "not_done": [f"{dtype} GEMM ceiling: {reason}" for dtype, (_, reason) in ceilings.items() if reason],
        "ok": all(result["right"] for result in results) and all(kernel["clean"] for kernel in kernels),
    }


def _cpu(arguments: argparse.Namespace, why: str, progress: console.Progress) -> dict[str, Any]:
    size = _sized(ON_CPU, arguments)
    results = []
    for dtype, causal in CPU_CASES:
        progress(f"running {dtype} {_mask(causal)} on the CPU")
        q, k, v = (onboard.random(size.shape, dtype, seed) for seed in range(3))
        rtk.attention(q[:, :1, :64], k[:, :1, :64], v[:, :1, :64])  # imports, and BLAS starting its threads
        start = time.perf_counter()
        o = rtk.attention(q, k, v, causal=causal)
        ms = (time.perf_counter() - start) * 1e3
        progress(f"verifying {dtype} {_mask(causal)}")
        heads = [(q[b, h], k[b, h], v[b, h], o[b, h]) for b in range(size.batch) for h in range(size.heads)]
        results.append(_result(dtype, causal, ms, verify.judge(heads, causal=causal, tiles_each=size.seqlen)))
    not_done = [f"launching and timing the kernels: {why}"]
    try:
        sizes = {_sized(ON_CPU, arguments), _sized(ON_GPU, arguments)}
        ordered = sorted(sizes, key=lambda size: size.head_dim)
        kernels = _compile([size.problem(*case) for size in ordered for case in CASES], progress)
    except ToolchainError as error:
        kernels = []
        not_done.append(f"compiling the kernels: {str(error).removeprefix('rtk: ')}")
    right = all(result["right"] for result in results)
    return {
        "rtk": rtk.__version__,
        "mode": "cpu",
        "device": None,
        "arrays": "NumPy",
        "size": asdict(size),
        "kernels": kernels,
        "gemm_tflops": {},
        "results": results,
        "not_done": not_done,
        "ok": right and bool(kernels) and all(kernel["clean"] for kernel in kernels),
    }


def _compile(problems: Sequence[AttentionProblem], progress: console.Progress) -> list[dict[str, Any]]:
    chosen = (choice.choose(SPEC, problem, gpu_here()).config for problem in problems)
    configs = {SPEC.label(config): config for config in chosen}
    sources = [SPEC.render(config) for config in configs.values()]

    def compiled(done: int, total: int, binary: jit.Binary) -> None:
        progress(f"compiled {done} of {total}: {binary.name}, {_how(binary.report)}")

    progress(f"compiling {len(sources)} kernels for sm_90a")
    binaries = jit.build_many(sources, progress=compiled)
    return [
        {
            **binary.report.to_json(),
            "shared_bytes": SPEC.shared_bytes(config),
            "cubin_bytes": len(binary.cubin),
            "clean": binary.report.clean,
            "problems": binary.report.problems(),
        }
        for binary, config in zip(binaries, configs.values(), strict=True)
    ]


def _how(report: jit.CompileReport) -> str:
    return "from the cache" if report.from_cache else f"{report.compile_ms:.0f} ms"


def _measure(library: onboard.Arrays, size: Size, dtype: str, causal: bool, ceiling: float | None) -> dict[str, Any]:
    host = [onboard.random(size.shape, dtype, seed) for seed in range(3)]
    q, k, v = map(library.put, host)
    o = rtk.attention(q, k, v, causal=causal)
    corners = sorted({(0, 0), (size.batch // 2, size.heads // 2), (size.batch - 1, size.heads - 1)})
    heads = [(*(x[corner] for x in host), library.get(o[corner])) for corner in corners]
    verdict = verify.judge(heads, causal=causal, tiles_each=4)
    result = _result(dtype, causal, library.median_ms(lambda: rtk.attention(q, k, v, causal=causal)), verdict)
    flop = size.problem(dtype, causal).flop()
    result["tflops"] = flop / result["ms"] / 1e9
    result["of_gemm"] = result["tflops"] / ceiling if ceiling else None
    sdpa = library.sdpa(q, k, v, causal)
    if sdpa is not None:
        result["sdpa_ms"] = library.median_ms(sdpa)
        result["sdpa_tflops"] = flop / result["sdpa_ms"] / 1e9
    return result


def _result(dtype: str, causal: bool, ms: float, verdict: verify.Verdict) -> dict[str, Any]:
    return {"dtype": dtype, "causal": causal, "ms": ms, **asdict(verdict), "right": verdict.right}


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


# --- the text --------------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    on_gpu = report["mode"] == "gpu"
    where = f"{report['device']}, arrays from {report['arrays']}" if on_gpu else "the CPU path (NumPy)"
    print(f"rtk {report['rtk']} demo on {where}\n")
    print(f"Attention: {Size(**report['size'])}")
    print((_gpu_table if on_gpu else _cpu_table)(report["results"]))
    rows = sum(result["rows"] for result in report["results"])
    wrong = [f"{result['dtype']} {_mask(result['causal'])}" for result in report["results"] if not result["right"]]
    if wrong:
        print(console.paint(f"  WRONG against float64: {', '.join(wrong)}", "red"))
    else:
        print(console.paint(f"  verified: {rows} rows against float64, every tile within the tolerance", "green"))
    for dtype, tflops in report["gemm_tflops"].items():
        if tflops:
            print(f"  GEMM ceiling measured here, {dtype}: {tflops:.0f} TFLOP/s")
    if report["kernels"]:
        print(f"\nHopper kernels (sm_90a), compiled by NVRTC {report['kernels'][0]['nvrtc']}")
        print(_kernel_table(report["kernels"]))
        for problem in [problem for kernel in report["kernels"] for problem in kernel["problems"]]:
            print(console.paint(f"  {problem}", "red"))
    if report["not_done"]:
        print()
        for item in report["not_done"]:
            print(f"Not done: {item}")
        print("`rtk doctor` says what this machine has, what is missing, and the command that mends it.")


def _gpu_table(results: list[dict[str, Any]]) -> str:
    header = ["dtype", "mask", "ms", "TFLOP/s", "of GEMM", "SDPA ms", "TFLOP/s", "max error", "rms error"]
    rows = [
        [
            result["dtype"],
            _mask(result["causal"]),
            f"{result['ms']:.3f}",
            f"{result['tflops']:.0f}",
            f"{result['of_gemm']:.0%}" if result["of_gemm"] else "-",
            f"{result['sdpa_ms']:.3f}" if "sdpa_ms" in result else "-",
            f"{result['sdpa_tflops']:.0f}" if "sdpa_ms" in result else "-",
            f"{result['max_error']:.1e}",
            f"{result['rms_error']:.1e}",
        ]
        for result in results
    ]
    return console.table(header, rows, left=2)


def _cpu_table(results: list[dict[str, Any]]) -> str:
    header = ["dtype", "mask", "ms", "max error", "rms error", "of tolerance"]
    rows = [
        [
            result["dtype"],
            _mask(result["causal"]),
            f"{result['ms']:.0f}",
            f"{result['max_error']:.1e}",
            f"{result['rms_error']:.1e}",
            f"{result['used']:.0%}",
        ]
        for result in results
    ]
    return console.table(header, rows, left=2)


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    header = ["kernel", "registers", "stack", "spills", "shared", "cubin", "compile"]
    rows = [
        [
            kernel["name"],
            str(kernel["registers"]),
            f"{kernel['stack_bytes']} B",
            f"{kernel['spill_store_bytes'] + kernel['spill_load_bytes']} B",
            console.size(kernel["shared_bytes"] + kernel["smem_static_bytes"]),
            console.size(kernel["cubin_bytes"]),
            "cached" if kernel["from_cache"] else f"{kernel['compile_ms']:.0f} ms",
        ]
        for kernel in kernels
    ]
    return console.table(header, rows)
