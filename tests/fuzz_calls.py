"""A call as the fuzzing draws it: a case, how its arrays lie in memory, and how it is run. Round-trips through JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gpu_cases import Case, mask_options

from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.kernels.attention_fwd import SPEC

Four = tuple[int, int, int, int]

KINDS = ("normal", "peaked", "index", "outliers", "constant")  # of yardstick.make_inputs, and one more
_TAIL = 64  # elements after an array that are watched too


@dataclass(frozen=True)
class Placement:
    """Where the elements of an array of four dimensions lie; the default is C order."""

    order: Four = (0, 1, 2, 3)  # dimensions, outermost first
    steps: Four = (1, 1, 1, 1)  # every step-th place of a dimension is used
    gaps: Four = (0, 0, 0, 0)  # places left free behind each dimension
    repeats: tuple[int, ...] = ()  # dimensions of stride 0
    flips: tuple[int, ...] = ()  # dimensions of negative stride
    offset: int = 0  # of the first element in memory

    def strides(self, shape: tuple[int, ...]) -> Four:
        """In elements, and as if nothing were flipped."""
        strides, stride = [0] * 4, 1
        for axis in reversed(self.order):
            size = 1 if axis in self.repeats else max(1, shape[axis])
            if axis not in self.repeats:
                strides[axis] = stride * self.steps[axis]
            stride *= size * self.steps[axis] + self.gaps[axis]
        return strides[0], strides[1], strides[2], strides[3]

    def room(self, shape: tuple[int, ...]) -> int:
        """Elements of memory that hold the array and its surroundings."""
        sizes = [1 if axis in self.repeats else max(1, size) for axis, size in enumerate(shape)]
        used = math.prod(size * step + gap for size, step, gap in zip(sizes, self.steps, self.gaps, strict=True))
        return self.offset + used + _TAIL

    def flipped(self, shape: tuple[int, ...]) -> tuple[int, Four]:
        """(place of element 0, strides), with the flipped dimensions running backwards."""
        strides = list(self.strides(shape))
        start = self.offset
        for axis in self.flips:
            start += max(0, shape[axis] - 1) * strides[axis]
            strides[axis] = -strides[axis]
        return start, (strides[0], strides[1], strides[2], strides[3])


@dataclass(frozen=True)
class Plant:
    """A value that is no number, at one place of an input."""

    array: str  # "q", "k" or "v"
    value: str  # "nan", "inf" or "-inf"
    place: Four  # batch, head, position, channel


@dataclass(frozen=True)
class Call:
    case: Case = dataclasses.field(default_factory=Case)
    seed: int = 0
    q: Placement = Placement()
    k: Placement = Placement()
    v: Placement = Placement()
    out: Placement | None = None  # None: rtk allocates the result
    library: str = "torch"  # or "cupy"
    stream: str = "default"  # or "side"
    return_lse: bool = True
    batch_invariant: bool = False
    sm_margin: int = 0
    pin: tuple[tuple[str, int], ...] = ()  # fields of a configuration that is asked for
    plants: tuple[Plant, ...] = ()
    choice: int = 0  # whatever else a property has to choose

    # --- JSON ---

    def to_json(self) -> dict[str, Any]:
        """Of placements only what is not C order, so that a person can read it."""
        data = dataclasses.asdict(self)
        order = dataclasses.asdict(Placement())
        for name in ("q", "k", "v", "out"):
            if data[name] is not None:
                data[name] = {field: value for field, value in data[name].items() if value != order[field]}
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Call:
        """Fields that are not named have their defaults."""

        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

        def record(kind: Any, values: dict[str, Any]) -> Any:
            return kind(**{name: frozen(value) for name, value in values.items()})

        kinds = {"case": Case, "q": Placement, "k": Placement, "v": Placement, "out": Placement}
        fields = {name: frozen(value) for name, value in data.items()}
        for name, kind in kinds.items():
            if data.get(name) is not None:
                fields[name] = record(kind, data[name])
        fields["plants"] = tuple(record(Plant, plant) for plant in data.get("plants", ()))
        return Call(**fields)

    # --- what it asks ---

    def changed(self, *, case: dict[str, Any] | None = None, **changes: Any) -> Call:
        return dataclasses.replace(self, case=dataclasses.replace(self.case, **(case or {})), **changes)

    def in_order(self) -> Call:
        """The same call on contiguous arrays, its result allocated by rtk."""
        return self.changed(q=Placement(), k=Placement(), v=Placement(), out=None)

    def mask(self) -> dict[str, Any]:
        """Options of yardstick.visible_keys."""
        return mask_options(self.case.mask)

    def meaning(self) -> dict[str, Any]:
        """Options of yardstick.attention_f64, for arrays in bhsd."""
        scale = self.case.scale
        if scale is not None and abs(scale) < 2.0**-126:
            scale = 0.0  # as in float32; with scores of Inf it makes a difference
        return self.case.options() | {"layout": "bhsd", "softmax_scale": scale}

    def options(self) -> dict[str, Any]:
        """Options of rtk.attention."""
        run = {"batch_invariant": self.batch_invariant, "sm_margin": self.sm_margin, "return_lse": self.return_lse}
        return self.case.options() | run | {"config": dict(self.pin) if self.pin else None}

    def config(self) -> Any:
        """The configuration that the call runs with."""
        problem = self.case.problem()
        if self.pin:
            return SPEC.config(problem, **dict(self.pin))
        if self.batch_invariant:
            return SPEC.pick(problem.without_batch())
        return choice.choose(SPEC, problem, gpu_here()).config

    def pinned(self) -> Call:
        """The same call, asking for the configuration that it would run with."""
        free = {"BLOCK_M", "BLOCK_N", "STAGES", "NUM_CONSUMER_WARPGROUPS", "PINGPONG", "SCHEDULER"}
        config = dataclasses.asdict(self.config())
        return self.changed(pin=tuple((name, config[name]) for name in sorted(free)))

    def is_empty(self) -> bool:
        return 0 in (self.case.batch, *self.case.lengths)

    def shape(self, name: str) -> Four:
        """Of "q", "k", "v" or "o", in bhsd."""
        case = self.case
        heads = case.heads[0] if name in "qo" else case.heads[1]
        seqlen = case.lengths[0] if name in "qo" else case.lengths[1]
        return case.batch, heads, seqlen, case.dims[1] if name in "vo" else case.dims[0]
