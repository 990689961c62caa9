"""What rtk is worth to a program in torch: CPU time of a call, and a model's tokens a second.

    python -m rtk.benchmarks.in_torch OUT.json [--layers 8]

A run is added to those in OUT.json: hosts differ, and what a call costs is told beside what torch's own costs there.
CPU time is the median over rounds of the time in which a loop of calls returns, results and all, while the GPU is kept
behind; the model is a stack of Llama-8B's blocks with random weights in bfloat16, forward, whose attention goes through
torch's scaled_dot_product_attention, as torch chooses, as cuDNN's, and patched.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rtk
import rtk.torch
from rtk import digest, driver
from rtk.benchmarks import timing

_ROUNDS, _CALLS = 31, 200  # of the CPU's time; so many calls fit a stream's queue
_WIDTH, _HEADS, _HEADS_KV, _MLP = 4096, 32, 8, 14336  # Llama 3, 8B
_TOKENS = (4096, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    import torch

    properties = driver.device_properties(torch.cuda.current_device())
    result = {
        "gpu": properties.name,
        "uuid": properties.uuid,
        "torch": torch.__version__,
        "sources": digest.sources_digest(),
        "date": digest.timestamp(),
        "cpu_us": cpu_us(),
        "tokens_per_s": {str(tokens): tokens_per_s(tokens, given.layers) for tokens in _TOKENS},
        "layers": given.layers,
    }
    runs = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    given.out.write_text(json.dumps({"runs": [*runs, result]}, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("cpu_us", "tokens_per_s")}, indent=1))


# --- CPU time --------------------------------------------------------------------------------------------------------


def cpu_us() -> dict[str, dict[str, float]]:
    """{problem: {way: microseconds}}; on problems whose scheduler is static and dynamic."""
    return {
        "b=1,hq=8,sq=512,d=64": _cpu_us((1, 8, 512, 64)),
        "b=4,hq=16,sq=1024,d=128,causal": _cpu_us((4, 16, 1024, 128), causal=True),
    }


def _cpu_us(shape: tuple[int, ...], causal: bool = False) -> dict[str, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(3))
    out, plan = torch.empty_like(q), rtk.plan(q, k, v, causal=causal)
    ways: dict[str, Callable[[], Any]] = {
        "rtk.attention": lambda: rtk.attention(q, k, v, causal=causal),
        "rtk.plan, out=": lambda: plan(q, k, v, out),
        "rtk drop-in": lambda: rtk.torch.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "torch.ops.rtk": lambda: torch.ops.rtk.attention_fwd(q, k, v, causal=causal),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    x, y = ([z.clone().requires_grad_() for z in (q, k, v)] for _ in range(2))
    ways["rtk.attention, gradients wanted"] = lambda: rtk.attention(x[0], x[1], x[2], causal=causal)
    ways["sdpa, gradients wanted"] = lambda: scaled_dot_product_attention(y[0], y[1], y[2], is_causal=causal)
    ways |= _floors(plan, (q, k, v, out))
    with contextlib.suppress(ImportError):
        import cupy

        a, b, c = (cupy.from_dlpack(x) for x in (q, k, v))
        ways["rtk.attention, CuPy"] = lambda: rtk.attention(a, b, c, causal=causal)
    return _medians(ways)


def _floors(plan: Any, arrays: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """What no call can be cheaper than: the driver's launch of this very kernel, in two ways, and torch's memory.

    (The kernel of a dynamic scheduler leaves its counter at zero, and no two of these launches run at once.)
    """
    import torch

    plan(*arrays)
    torch.cuda.synchronize()
    launch = plan._known.plan._ready[0].launch
    ways: dict[str, Callable[[], Any]] = {
        "launch alone, ctypes": launch.call,
        "torch.empty_like": lambda: torch.empty_like(arrays[0]),
    }
    with contextlib.suppress(ImportError):
        from cuda.bindings import driver as bindings

        config = bindings.CUlaunchConfig(_ptr=ctypes.addressof(launch._config))
        function = bindings.CUfunction(launch._function.handle.value)
        at = ctypes.addressof(launch._arguments)
        ways["launch alone, cuda-bindings"] = lambda: bindings.cuLaunchKernelEx(config, function, at, 0)
    return ways


def _medians(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    import torch

    found: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for turn in range(_ROUNDS + 2):
        for name in draw.sample(list(ways), len(ways)):
            call = ways[name]
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_CALLS):
                call()
            took = time.perf_counter() - start
            torch.cuda.synchronize()
            if turn > 1:
                found[name].append(took / _CALLS * 1e6)
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


# --- a model ---------------------------------------------------------------------------------------------------------


def tokens_per_s(tokens: int, layers: int) -> dict[str, float]:
    """{attention: tokens a second} of one sequence, the ways taking turns."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    stack = _Stack(layers)
    x = torch.randn(1, tokens, _WIDTH, device="cuda", dtype=torch.bfloat16)

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            stack(x)

    def ours() -> None:
        with rtk.torch.patched():
            stack(x)

    with torch.no_grad():
        found = timing.interleaved({"rtk": [ours], "sdpa": [lambda: stack(x)], "cudnn": [cudnn]}, rounds=9)
    return {name: round(tokens / timed.us * 1e6, 1) for name, timed in found.items()}


class _Stack:
    """Blocks of a Llama: RMSNorm, grouped attention with RoPE, RMSNorm, gated MLP; random weights."""

    def __init__(self, layers: int) -> None:
        import torch

        dim = _WIDTH // _HEADS
        sizes = {
            "qkv": (_WIDTH + 2 * _HEADS_KV * dim, _WIDTH),
            "o": (_WIDTH, _WIDTH),
            "gate": (2 * _MLP, _WIDTH),
            "down": (_WIDTH, _MLP),
        }
        self.blocks = [
            {name: torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02 for name, size in sizes.items()}
            for _ in range(layers)
        ]
        self.scale = torch.ones(_WIDTH, device="cuda", dtype=torch.bfloat16)
        self.frequencies = 500000.0 ** (-torch.arange(0, dim, 2, device="cuda") / dim)

    def __call__(self, x: Any) -> Any:
        import torch

        angles = torch.arange(x.shape[1], device="cuda")[:, None] * self.frequencies
        turn = torch.cat((angles, angles), -1)
        cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
        for block in self.blocks:
            x = x + self._attended(block, self._normed(x), cos, sin)
            gate, up = torch.nn.functional.linear(self._normed(x), block["gate"]).chunk(2, -1)
            x = x + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, block["down"])
        return x

    def _normed(self, x: Any) -> Any:
        import torch

        return torch.nn.functional.rms_norm(x, (_WIDTH,), self.scale)

    def _attended(self, block: dict[str, Any], x: Any, cos: Any, sin: Any) -> Any:
        import torch

        dim = _WIDTH // _HEADS
        heads = torch.nn.functional.linear(x, block["qkv"]).unflatten(-1, (-1, dim)).transpose(1, 2)
        q, k, v = heads.split((_HEADS, _HEADS_KV, _HEADS_KV), 1)
        q, k = (y * cos + torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1) * sin for y in (q, k))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.nn.functional.linear(o.transpose(1, 2).flatten(2), block["o"])


if __name__ == "__main__":
    main()
