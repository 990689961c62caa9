"""Hypothesis strategies for attention calls.

Kernels come from a bounded pool, because each takes half a second to compile; lengths, heads, batch, windows, scale,
strides, values and the way to run are free. A kernel of the pool says which lengths lead to it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from fuzz_calls import KINDS, Call, Placement, Plant
from gpu_cases import Case, covering
from hypothesis import strategies as st

from rtk.kernels.attention_fwd import SPEC

Strategy = st.SearchStrategy

DIMS = [(64, 64), (128, 128), (8, 8), (16, 16), (24, 24), (72, 72), (80, 80), (96, 96), (136, 136), (192, 192)]
DIMS += [(256, 256), (192, 128), (64, 256), (40, 200)]
_MASKED = list(itertools.product((False, True), (False, True), ("", "softcap", "prescale")))
_ROWS = ((1, 64), (65, 128), (129, 1024))  # query rows for one, two and three consumer warpgroups
_LARGE = 1 << 18  # scores of a call: more than the CPU has time for
_ONE_WAVE = 132  # output tiles up to which the static scheduler is picked
_PIN_FIELDS = ("BLOCK_M", "BLOCK_N", "NUM_CONSUMER_WARPGROUPS", "PINGPONG", "SCHEDULER", "STAGES")

_SCALES: dict[str, list[float | None]] = {
    "": [None, 0.11, 0.5, 1.0, 2.0, 1e-3, 1e-30],
    "prescale": [0.0, -0.05, -0.3, -1.0, -1e-30, 1e-40, 1e-46],  # the last are nothing in float32
}
_SOFTCAPS = [15.0, 0.5, 1.0, 50.0]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what it is specialised to, and which calls are given it."""

    dims: tuple[int, int]
    dtype: str
    left: bool
    right: bool
    variant: str  # "", "softcap" or "prescale"
    rows: int  # index in _ROWS
    many: bool  # more output tiles than _ONE_WAVE
    pin: tuple[tuple[str, int], ...] = ()

    def example(self) -> Call:
        """A call that runs on it."""
        mask = {(False, False): "full", (False, True): "causal", (True, False): "w9."}.get(
            (self.left, self.right), "w9.9"
        )
        heads = (150, 150) if self.many else (2, 2)
        scale, softcap = -0.1 if self.variant == "prescale" else 0.1, 15.0 if self.variant == "softcap" else 0.0
        lengths = (_ROWS[self.rows][1] if self.rows < 2 else 192, 192)
        case = Case(self.dims, mask, lengths, "normal", heads, self.dtype, "bhsd", softcap, scale, 1)
        return Call(case, pin=self.pin)

    def config(self) -> Any:
        return self.example().config()


@functools.cache
def pool() -> tuple[Kernel, ...]:
    """Head sizes by masks by variants, the rest so that every pair of choices occurs; and configurations to pin."""
    rows = covering(
        {"dims": DIMS, "mask": _MASKED, "dtype": ["bfloat16", "float16"], "rows": [2, 0, 1], "many": [False, True]}
    )
    free = [Kernel(row["dims"], row["dtype"], *row["mask"], row["rows"], row["many"]) for row in rows]
    pinned = []
    for number, kernel in enumerate(free[::4]):
        configs = SPEC.configs(kernel.example().case.problem())
        config = configs[7919 * number % len(configs)]
        pin = tuple((name, getattr(config, name)) for name in _PIN_FIELDS)
        pinned.append(Kernel(**(vars(kernel) | {"pin": pin})))
    return (*free, *pinned)


def sources() -> list[Any]:
    """What to compile before the pool is used."""
    found = {source.name: source for source in (SPEC.render(kernel.config()) for kernel in pool())}
    return list(found.values())


# --- sizes -----------------------------------------------------------------------------------------------------------


def _biased(low: int, high: int, *steps: int) -> Strategy[int]:
    """low to high, mostly where tiles begin and end."""
    edges = {low, low + 1, high, 1, 2}
    edges |= {n * step + d for step in steps for n in range(1, 9) for d in (-1, 0, 1)}
    likely = sorted(edge for edge in edges if low <= edge <= high)
    return st.sampled_from(likely) | st.sampled_from(likely) | st.integers(low, high)


@st.composite
def _sizes(draw: Any, kernel: Kernel, invariant: bool, min_batch: int, min_group: int, budget: int) -> dict[str, Any]:
    """batch, heads and lengths that lead to the kernel. `budget` bounds the scores, roughly; some calls have more."""
    config = kernel.config()
    long = budget >= _LARGE and draw(st.integers(0, 24)) == 24
    budget *= 8 if long else 1
    shortest, longest = (1, 1024) if kernel.pin else _ROWS[kernel.rows]
    seqlen_q = draw(_biased(shortest, min(longest, max(shortest, budget // 1024)), 64, config.BLOCK_M))
    per_wave = _ONE_WAVE // -(-seqlen_q // config.BLOCK_M)
    affordable = max(1, min(40, budget // seqlen_q // 64))
    low, high = 1, affordable if kernel.pin else min(affordable, per_wave)
    if kernel.many and not kernel.pin:
        low, high = per_wave + 1, per_wave + 8
    # What is batch-invariant is picked for one sequence: its heads alone are the tiles that count.
    batch = draw(st.integers(min_batch, min_batch + 2)) if invariant else draw(st.integers(1, min(4, high)))
    heads_q = draw(st.integers(low, high))
    if not invariant:
        heads_q = -(-heads_q // batch) if low > 1 else max(1, heads_q // batch)
    group = draw(st.sampled_from([n for n in range(1, heads_q + 1) if heads_q % n == 0]))
    if group < min_group:
        group = heads_q
    longest = max(1, min(8192 if long else 2048, budget // (batch * heads_q * seqlen_q)))
    seqlen_k = draw(_biased(1, longest, 64, config.BLOCK_N))
    return {"batch": batch, "heads": (heads_q, heads_q // group), "lengths": (seqlen_q, seqlen_k)}


@st.composite
def _masks(draw: Any, kernel: Kernel, lengths: tuple[int, int], block_n: int) -> str:
    """A mask of the kernel's kind. A window that no pair can pass is no window, so windows end before that."""
    longest = sum(lengths) - 1
    side = _biased(0, longest, block_n, 64)
    align = draw(st.sampled_from(["", "tl-"]))
    if not (kernel.left or kernel.right):
        wide = longest + 1 + draw(st.integers(0, 3))
        return draw(st.sampled_from(["full", "full", "full", "w.", f"{align}w{wide}.{wide}"]))
    left = str(draw(side)) if kernel.left else ""
    causal = kernel.right and draw(st.booleans())
    right = str(draw(side)) if kernel.right and not (causal and draw(st.booleans())) else ""
    window = f"w{left}.{right}" if left or right else ""
    return f"{'causal-' if causal else ''}{align}{window}".rstrip("-")


# --- memory ----------------------------------------------------------------------------------------------------------

_ORDERS: list[Any] = [(0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3), (2, 0, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2)]


@st.composite
def placements(draw: Any, library: str, *, read: bool = True) -> Placement:
    """Where an array lies. What is only read may repeat elements; torch has no negative strides."""
    kinds = ["plain", "plain", "turned", "gaps", "apart", "unaligned", "mixed"]
    kind = draw(st.sampled_from(kinds + ["repeated"] * read + ["backwards"] * (library == "cupy")))
    gap = st.sampled_from([0, 1, 2, 5])
    if kind == "turned":
        return Placement(order=draw(st.sampled_from(_ORDERS)))
    if kind == "gaps":  # whole 16-byte steps: TMA reads it where it is
        return Placement(gaps=(draw(gap), draw(gap), draw(gap), 8 * draw(gap)), offset=8 * draw(gap))
    if kind == "apart":
        steps = draw(st.sampled_from([(1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 3, 1), (2, 1, 1, 1)]))
        return Placement(steps=steps)
    if kind == "unaligned":
        return Placement(gaps=(0, 0, 0, draw(gap)), offset=draw(st.integers(1, 15)))
    if kind == "repeated":
        return Placement(repeats=draw(st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 1, 2)])))
    if kind == "backwards":
        return Placement(flips=draw(st.sampled_from([(2,), (0,), (1,), (3,), (1, 2)])))
    if kind == "mixed":
        gaps = (draw(gap), draw(gap), draw(gap), draw(st.sampled_from([0, 8, 3])))
        steps = draw(st.sampled_from([(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1)]))
        return Placement(draw(st.sampled_from(_ORDERS)), steps, gaps, offset=draw(st.sampled_from([0, 8, 4])))
    return Placement()


@st.composite
def _plants(draw: Any, call: Call) -> tuple[Plant, ...]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        array = draw(st.sampled_from("vkq"))
        place = [draw(st.integers(0, size - 1)) for size in call.shape(array)]
        found.append(Plant(array, draw(st.sampled_from(["nan", "inf", "-inf"])), tuple(place)))  # type: ignore[arg-type]
    return tuple(found)


# --- calls -----------------------------------------------------------------------------------------------------------


@st.composite
def calls(
    draw: Any,
    *,
    kernels: tuple[Kernel, ...] | None = None,
    unmasked: bool = False,
    batch_invariant: bool | None = None,
    min_batch: int = 1,
    min_group: int = 1,
    placed: bool = True,
    out: bool | None = None,
    lse: bool | None = True,
    plants: bool = False,
    empty: bool = False,
    budget: int = 1 << 21,
) -> Call:
    """A call; None leaves a choice free. `empty`: now and then there are no keys, no queries or no sequences."""
    if kernels is None:
        kernels = pool()
    if unmasked:
        kernels = tuple(kernel for kernel in kernels if not (kernel.left or kernel.right))
    if budget < _LARGE:  # on the CPU nothing depends on the number of tiles, but the time
        kernels = tuple(kernel for kernel in kernels if not kernel.many)
    kernel = draw(st.sampled_from(kernels))
    invariant = draw(st.sampled_from([False, False, False, True])) if batch_invariant is None else batch_invariant
    sizes = draw(_sizes(kernel, invariant, min_batch, min_group, budget))
    mask = draw(_masks(kernel, sizes["lengths"], kernel.config().BLOCK_N))
    if empty and draw(st.integers(0, 29)) == 29:
        hole = draw(st.sampled_from([{"lengths": (sizes["lengths"][0], 0)}, {"lengths": (0, 9)}, {"batch": 0}]))
        sizes, mask = sizes | hole, "full"
    case = Case(
        dims=kernel.dims,
        mask=mask,
        kind=draw(st.sampled_from(KINDS)),
        dtype=kernel.dtype,
        layout=draw(st.sampled_from(["bhsd", "bshd"])),
        softcap=draw(st.sampled_from(_SOFTCAPS)) if kernel.variant == "softcap" else 0.0,
        scale=draw(st.sampled_from(_SCALES[kernel.variant] if kernel.variant != "softcap" else [None, 0.3, -0.2, 0.0])),
        **sizes,
    )
    library = draw(st.sampled_from(["torch", "cupy"]))
    q, k, v = (draw(placements(library)) if placed else Placement() for _ in "qkv")
    given = draw(st.booleans()) if out is None else out
    call = Call(
        case,
        seed=draw(st.integers(0, 65535)),
        q=q,
        k=k,
        v=v,
        out=draw(placements(library, read=False)) if given else None,
        library=library,
        stream=draw(st.sampled_from(["default", "side"])),
        return_lse=draw(st.booleans()) if lse is None else lse,
        batch_invariant=invariant,
        sm_margin=draw(st.sampled_from([0, 0, 0, 1, 7, 100])),
        pin=kernel.pin,
        choice=draw(st.integers(0, 4095)),
    )
    return call.changed(plants=draw(_plants(call))) if plants else call
