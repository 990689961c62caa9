"""Attention forward beside its peers at seqlen 8192, the accuracy of each, and what a cold start costs.

    RTK_BENCH_FA3=/path/to/fa3.so python -m rtk.benchmarks.forward --out benchmarks/results/h200/forward.json

The cells are FlashAttention-3's: bf16, batch * seqlen 16384, heads * head_dim 2048. Every implementation is compared
with float64 before it is timed. TFLOP/s count half the products under a causal mask.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rtk import digest, driver, toolchain
from rtk.benchmarks import peers, timing

TOKENS, MODEL_DIM, SEQLEN = 16384, 2048, 8192
CELLS = [(head_dim, causal) for head_dim in (64, 128, 256) for causal in (False, True)]
CHECKED_ROWS = 64  # a head, from its start, middle and end
MAX_RMS_ERROR = 0.01  # bf16 stays near 0.002: an implementation beyond this computes something else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("forward.json"), help="the JSON file to write (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    found, absent = peers.present()
    records = [record for cell in CELLS for record in _cell(*cell, found, arguments.rounds)]
    records += _cold_start()
    result = {"meta": _meta(absent), "records": records}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _inputs(head_dim: int, dtype: Any) -> list[Any]:
    import torch

    shape = (TOKENS // SEQLEN, MODEL_DIM // head_dim, SEQLEN, head_dim)
    return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3)]


def _cell(head_dim: int, causal: bool, found: dict[str, peers.Peer], rounds: int) -> Iterator[dict[str, Any]]:
    import torch

    q, k, v = _inputs(head_dim, torch.bfloat16)
    calls = {name: peer(q, k, v, causal) for name, peer in found.items()}
    errors = {name: _rms_error(call(), q, k, v, causal) for name, call in calls.items()}
    times = timing.interleaved({name: call for name, call in calls.items() if errors[name] < MAX_RMS_ERROR}, rounds)
    flop = 4 * q.numel() * SEQLEN * (0.5 if causal else 1.0)
    best_peer = max((flop / t.us for name, t in times.items() if name != "rtk"), default=math.nan)
    for name, rms in errors.items():
        measured = times.get(name)
        yield {
            "suite": "forward",
            "op": "attention_fwd",
            "impl": name,
            "dtype": "bfloat16",
            "batch": q.shape[0],
            "heads_q": q.shape[1],
            "heads_kv": q.shape[1],
            "seqlen_q": SEQLEN,
            "seqlen_k": SEQLEN,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "causal": causal,
            "us": measured and round(measured.us, 2),
            "us_q1": measured and round(measured.us_q1, 2),
            "us_q3": measured and round(measured.us_q3, 2),
            "tflops": measured and round(flop / measured.us / 1e6, 1),
            "rms_error": rms,
            "error": None if measured else f"RMS error {rms:.3g}: not timed",
        }
        if measured:
            ratio = f"{flop / measured.us / best_peer:.3f} of the best peer" if name == "rtk" else ""
            label = f"d{head_dim} {'causal' if causal else 'full':6s} {name:6s}"
            print(f"{label} {flop / measured.us / 1e6:6.1f} TFLOP/s  rms {rms:.3e}  {ratio}", flush=True)


def _rms_error(o: Any, q: Any, k: Any, v: Any, causal: bool) -> float:
    """RMS of o - float64 over RMS of float64, on sampled rows of every head."""
    import torch

    torch.cuda.synchronize()
    square_error, square = 0.0, 0.0
    for first in (0, SEQLEN // 2, SEQLEN - CHECKED_ROWS):
        rows = slice(first, first + CHECKED_ROWS)
        scores = q[:, :, rows].double() @ k.double().transpose(2, 3) / math.sqrt(q.shape[-1])
        if causal:
            row = torch.arange(first, first + CHECKED_ROWS, device=q.device)[:, None]
            scores.masked_fill_(torch.arange(SEQLEN, device=q.device) > row, -math.inf)
        exact = scores.softmax(-1) @ v.double()
        square_error += float((o[:, :, rows].double() - exact).square().sum())
        square += float(exact.square().sum())
    return math.sqrt(square_error / square)


def _cold_start() -> Iterator[dict[str, Any]]:
    """Compiling one kernel with an empty cache, and loading it from disk: each in a process that did nothing before."""
    for head_dim, causal in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            runs = [_in_new_process(head_dim, causal, Path(folder) / str(i)) for i in range(3)]
            loads = [_in_new_process(head_dim, causal, Path(folder) / str(i)) for i in range(3)]
        assert not any(run["from_cache"] for run in runs) and all(run["from_cache"] for run in loads)
        record = {
            "suite": "coldstart",
            "op": "attention_fwd",
            "impl": "rtk",
            "dtype": "bfloat16",
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "causal": causal,
            "compile_ms": round(statistics.median(run["build_ms"] for run in runs), 1),
            "load_ms": round(statistics.median(run["build_ms"] for run in loads), 3),
            "module_load_ms": round(statistics.median(run["module_load_ms"] for run in loads), 3),
            "problems": runs[0]["problems"],
        }
        print(
            {name: record[name] for name in ("head_dim", "causal", "compile_ms", "load_ms", "module_load_ms")},
            flush=True,
        )
        yield record


def _in_new_process(head_dim: int, causal: bool, cache: Path) -> dict[str, Any]:
    """What `python -m rtk.benchmarks.coldstart` measured with this cache folder."""
    command = [sys.executable, "-m", "rtk.benchmarks.coldstart", str(head_dim), "causal" if causal else "full"]
    environment = {**os.environ, "RTK_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _gemm_tflops() -> float:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / timing.interleaved({"gemm": lambda: torch.matmul(a, b, out=out)})["gemm"].us / 1e6


def _meta(absent: dict[str, str]) -> dict[str, Any]:
    import torch

    device = driver.device_properties(torch.cuda.current_device())
    return {
        "gpu": device.name,
        "uuid": device.uuid,
        "driver_cuda": ".".join(map(str, toolchain.driver_version() or ())),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "nvrtc": toolchain.nvrtc().build,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sources": digest.sources_digest(),
        "absent": absent,
        "gemm_bf16_tflops": round(_gemm_tflops(), 1),
        "method": "CUDA graph replays, implementations interleaved in rounds, medians; N(0, 1) inputs",
    }


if __name__ == "__main__":
    main()
