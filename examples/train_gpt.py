"""Trains a small GPT twice from one seed, with rtk's attention and with torch's, and compares the losses.

    python examples/train_gpt.py                 on a GPU in bfloat16 (autocast), on the CPU in float32
    python examples/train_gpt.py --device cpu --steps 100 --out loss.png --json loss.json

The model reads bytes: pre-norm blocks with rotary positions and grouped key/value heads. Its text is made on the spot,
sums and little stories in which names, colours and numbers come back. A third run, torch's attention over other pieces
of the text, shows how far apart two runs are that differ in nothing but chance.

Needs torch 2.5 or newer and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import rtk

TEXT_BYTES = 1 << 20
LAST = 50  # steps that the comparison looks at
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the model and of its training."""

    layers: int
    features: int
    heads: int
    kv_heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float


CPU = Size(layers=2, features=64, heads=4, kv_heads=2, context=128, batch=16, steps=300, learning_rate=4e-3)
GPU = Size(layers=4, features=512, heads=8, kv_heads=2, context=512, batch=16, steps=600, learning_rate=1e-3)


# --- attention: all that differs between the runs ---------------------------------------------------------------------


def attend_rtk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rtk.attention(q, k, v, causal=True)


def attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- the model --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with rotary positions, (batch, seqlen, features) to the same."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.head_dim = size.features // size.heads
        self.rows = [heads * self.head_dim for heads in (size.heads, size.kv_heads, size.kv_heads)]
        self.qkv = nn.Linear(size.features, sum(self.rows), bias=False)
        self.out = nn.Linear(size.features, size.features, bias=False)
        frequencies = 10_000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(size.context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        """x (batch, heads, seqlen, head_dim): pairs of features turned by an angle that grows with the position."""
        a, b = x.float().chunk(2, -1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.rows, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        return self.out(self.attend(self.rotated(q), self.rotated(k), v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        n = size.features
        self.attention = nn.Sequential(nn.LayerNorm(n), Attention(size, attend))
        self.mlp = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class GPT(nn.Module):
    """Bytes (batch, seqlen), int64, to logits of the next one, (batch, seqlen, 256)."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        blocks = [Block(size, attend) for _ in range(size.layers)]
        head = nn.Linear(size.features, 256, bias=False)
        self.layers = nn.Sequential(nn.Embedding(256, size.features), *blocks, nn.LayerNorm(size.features), head)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# --- the text ---------------------------------------------------------------------------------------------------------

NAMES = ["Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jan", "Kim", "Lea"]
COLOURS = ["red", "green", "blue", "black", "white", "yellow"]
THINGS = ["apples", "birds", "boats", "books", "coins", "hats", "keys", "kites", "lamps", "stones"]


def sentence(rng: random.Random) -> str:
    a, b = rng.randrange(50), rng.randrange(50)
    name, thing = rng.choice(NAMES), f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    kind = rng.randrange(4)
    if kind == 0:
        return f"{a} + {b} = {a + b}.\n"
    if kind == 1:
        return f"{a + b} - {a} = {b}.\n"
    if kind == 2:
        return f"{name} has {a} {thing} and finds {b} more. Now {name} has {a + b} {thing}.\n"
    return f"{name} looks for {thing}. What does {name} look for? {thing.capitalize()}.\n"


def make_text(seed: int) -> Tensor:
    """(TEXT_BYTES,) uint8, the same for the same seed."""
    rng, text = random.Random(seed), bytearray()
    while len(text) < TEXT_BYTES:
        text += sentence(rng).encode()
    return torch.frombuffer(text, dtype=torch.uint8)[:TEXT_BYTES]


# --- training ---------------------------------------------------------------------------------------------------------


class Run:
    """One model on its way, and its losses so far."""

    def __init__(self, name: str, attend: Attend, size: Size, device: torch.device, seed: int, order: int) -> None:
        self.name, self.size, self.device = name, size, device
        torch.manual_seed(seed)  # the same first weights for all runs
        self.model = GPT(size, attend).to(device)
        self.pieces = torch.Generator().manual_seed(order)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.losses: list[float] = []

    def _rate(self, step: int) -> float:
        """Rises over a tenth of the steps, then falls."""
        rise = max(1, self.size.steps // 10)
        return min((step + 1) / rise, max(0.05, (self.size.steps - step) / (self.size.steps - rise + 1)))

    def step(self, text: Tensor) -> None:
        starts = torch.randint(len(text) - self.size.context, (self.size.batch, 1), generator=self.pieces)
        piece = text[starts + torch.arange(self.size.context + 1)].long().to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(piece[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())


def train(runs: list[Run], text: Tensor, steps: int) -> None:
    """All runs side by side; prints their losses now and then, and on a terminal how far it is in between."""
    print(f"{'step':>9}" + "".join(f"{run.name:>20}" for run in runs), flush=True)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        for run in runs:
            run.step(text)
        seconds = time.perf_counter() - began
        if sys.stdout.isatty():
            left = seconds / step * (steps - step)
            print(f"\r{step}/{steps}, {seconds:.0f} s, about {left:.0f} s left ", end="\r", flush=True)
        if step == 1 or step == steps or step % max(1, steps // 12) == 0:
            losses = "".join(f"{run.losses[-1]:20.4f}" for run in runs)
            print(f"{step:4}/{steps:<4}{losses}   {seconds:5.0f} s", flush=True)


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(ours: list[float], theirs: list[float], other: list[float]) -> dict[str, Any]:
    """How far rtk's losses are from torch's, beside how far torch's are from torch's over other pieces of the text."""

    def apart(a: list[float], b: list[float]) -> dict[str, float]:
        differences = [x - y for x, y in zip(a[-LAST:], b[-LAST:], strict=True)]
        count = len(differences)
        return {"of_means": abs(sum(differences)) / count, "step_by_step": sum(map(abs, differences)) / count}

    found, noise = apart(ours, theirs), apart(theirs, other)
    return {"rtk_torch": found, "torch_torch": noise, "within_noise": found["step_by_step"] <= noise["step_by_step"]}


def describe(comparison: dict[str, Any], steps: int) -> str:
    found, noise = comparison["rtk_torch"], comparison["torch_torch"]
    verdict = "no more" if comparison["within_noise"] else "MORE"
    return (
        f"\nOver the last {min(LAST, steps)} steps, losses apart:"
        f"\n                                step by step    their means"
        f"\n  rtk and torch                   {found['step_by_step']:10.2e}     {found['of_means']:10.2e}"
        f"\n  torch twice, text reordered     {noise['step_by_step']:10.2e}     {noise['of_means']:10.2e}"
        f"\nrtk's losses differ from torch's by {verdict} than chance makes two runs differ."
    )


def plot(runs: list[Run], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ours, theirs, other = runs
    axes.plot(other.losses, color="0.8", label=other.name)
    axes.plot(theirs.losses, color="tab:blue", linewidth=3, alpha=0.5, label=theirs.name)
    axes.plot(ours.losses, color="tab:red", linewidth=1, linestyle="--", label=ours.name)
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, help=f"default {GPU.steps} on a GPU, {CPU.steps} on the CPU")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.png"), help="the plot (default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("train_gpt.json"), help="the losses (default %(default)s)")
    parser.add_argument("--device", help="cuda or cpu; default cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps: at least 1")

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = GPU if device.type == "cuda" else CPU
    size = Size(**{**asdict(size), "steps": options.steps or size.steps})
    seed, text = options.seed, make_text(options.seed)
    runs = [
        Run("rtk", attend_rtk, size, device, seed, order=seed),
        Run("torch", attend_torch, size, device, seed, order=seed),
        Run("torch, reordered", attend_torch, size, device, seed, order=seed + 1),
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{name}, {'bfloat16' if device.type == 'cuda' else 'float32'}"
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(f"A GPT of {parameters:,} parameters on {where}; {size.batch} × {size.context} bytes a step.\n")
    train(runs, text, size.steps)
    comparison = compare(*(run.losses for run in runs))
    print(describe(comparison, size.steps))

    losses = {run.name: run.losses for run in runs}
    record = {"device": where, "seed": seed, **asdict(size), "losses": losses, "comparison": comparison}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    plot(runs, options.out, f"A small GPT, {where}")
    print(f"\nSaved {options.out} and {options.json}.")


if __name__ == "__main__":
    main()
