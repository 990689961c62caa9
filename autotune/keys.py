"""A stored choice, and what it is of: a kernel as its sources are, a model of GPU, and a bucket of problems."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtk import driver, jit
from rtk.errors import ArgumentError
from rtk.spec import CUDA_SOURCE, Bucket, KernelSpec

Config = dict[str, int | bool]  # fields and values
WORDS = ("problem", "driver", "nvrtc", "rtk", "date")  # of a choice: what is text


@dataclass(frozen=True)
class Gpu:
    """A model of GPU: what decides whether a time measured on one card holds for another."""

    name: str
    sm_count: int
    memory_clock_khz: int

    @classmethod
    def of(cls, device: int) -> Gpu:
        """Of a device of this machine."""
        properties = driver.device_properties(device)
        return cls(properties.name, properties.sm_count, properties.memory_clock_khz)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sm_count": self.sm_count, "memory_clock_khz": self.memory_clock_khz}

    @classmethod
    def from_json(cls, data: Any) -> Gpu:
        """ArgumentError for what is none."""
        try:
            return cls(str(data["name"]), int(data["sm_count"]), int(data["memory_clock_khz"]))
        except (TypeError, KeyError, ValueError):
            accepted = "an object with name, sm_count and memory_clock_khz"
            raise ArgumentError("gpu", data, accepted) from None


# Assumed where no GPU is in sight, as when a container image is filled.
USUAL_GPU = Gpu("NVIDIA H200", 132, 3201000)


def gpu_here() -> Gpu:
    """The first GPU of this machine, or the usual one where there is none."""
    return Gpu.of(0) if driver.available() else USUAL_GPU


@dataclass(frozen=True)
class Place:
    """Where a choice belongs."""

    kernel: str
    sources: str  # digest()
    gpu: Gpu
    bucket: Bucket

    @classmethod
    def of(cls, spec: KernelSpec[Any, Any], problem: Any, gpu: Gpu) -> Place:
        return cls(spec.name, digest(spec), gpu, spec.bucket(problem))

    def columns(self) -> tuple[str, str, str, str, str]:
        """Kernel, sources, GPU and the bucket's two parts, as text that is equal exactly when they are."""
        bucket = (_text(dict(self.bucket.exact)), _text(dict(self.bucket.sizes)))
        return (self.kernel, self.sources, _text(self.gpu.to_json()), *bucket)

    @classmethod
    def from_columns(cls, kernel: str, sources: str, gpu: str, exact: str, sizes: str) -> Place:
        """The inverse. ValueError for text that is no such thing."""
        return cls(kernel, sources, Gpu.from_json(json.loads(gpu)), bucket_of(json.loads(exact), json.loads(sizes)))


@dataclass(frozen=True)
class Timed:
    """One candidate's time in µs: median and quartiles over the rounds; and what it was built and run with.

    With no rounds it could not be used: it does not compile, cannot be launched, or gives a wrong answer.
    """

    config: Config
    us: float
    us_q1: float
    us_q3: float
    rounds: int
    driver: str = ""
    nvrtc: str = ""
    date: str = ""

    @property
    def failed(self) -> bool:
        return self.rounds == 0


@dataclass(frozen=True)
class Choice:
    """What was chosen at a place. `problem` is the one that was timed, as text; `us` its time."""

    place: Place
    config: Config
    problem: str
    us: float
    driver: str = ""
    nvrtc: str = ""
    rtk: str = ""
    date: str = ""


def bucket_of(exact: Any, sizes: Any) -> Bucket:
    """The bucket of two JSON objects. ValueError for what is none."""
    if not isinstance(exact, dict) or not all(isinstance(x, (str, int, float, bool)) for x in exact.values()):
        raise ValueError(f"{exact!r} is no object of texts and numbers")
    if not isinstance(sizes, dict) or not all(type(x) is int for x in sizes.values()):
        raise ValueError(f"{sizes!r} is no object of half-steps")
    return Bucket(tuple(exact.items()), tuple(sizes.items()))


def config_key(config: Mapping[str, int | bool]) -> tuple[tuple[str, int | bool], ...]:
    """A config's fields, to be looked up by: equal whatever their order."""
    return tuple(sorted(config.items()))


def config_of_json(value: Any) -> Config:
    """ValueError for what is no config."""
    if not isinstance(value, dict) or not value or not all(isinstance(x, (int, bool)) for x in value.values()):
        raise ValueError(f"{value!r} is no object of ints and bools")
    return value


def time_of_json(value: Any) -> float:
    """ValueError for what is no time."""
    us = float(value)
    if not 0 < us < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return us


@functools.lru_cache(maxsize=256)
def digest(spec: KernelSpec[Any, Any]) -> str:
    """sha256 (hex) of the header of a kernel and of all that it includes: what was timed is only that code.

    Computed once for each instance of a spec, which stands for its sources as they are then.
    """
    folders = tuple(dict.fromkeys(str(folder) for folder in (*spec.include_dirs, CUDA_SOURCE)))
    headers = jit.include_closure(jit.Source(spec.name, f"#include <{spec.header}>\n", folders))
    sha = hashlib.sha256()
    for name in sorted(headers):
        text = headers[name].encode(errors="surrogateescape")
        sha.update(f"{name}\0{len(text)}\0".encode() + text)
    return sha.hexdigest()


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
