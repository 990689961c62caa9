"""Kernels compiled ahead, so that the first call of a service or of a job on another machine does not wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rtk import jit, shapes
from rtk.autotune import choice
from rtk.autotune.keys import gpu_here
from rtk.cache import Cache, default_cache
from rtk.errors import ArgumentError
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import AttentionProblem

__all__ = ["Warmed", "warmup"]


@dataclass(frozen=True)
class Warmed:
    """A kernel, the problems it serves, and whether it now lies in the cache folder (or only in memory)."""

    binary: jit.Binary
    problems: tuple[AttentionProblem, ...]
    stored: bool


def warmup(
    problems: Iterable[AttentionProblem | str | Mapping[str, Any]],
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    batch_invariant: bool = False,
    progress: Callable[[int, int, jit.Binary], None] | None = None,
) -> list[Warmed]:
    """Compiles the kernels that these calls of rtk.attention will ask for. Needs NVRTC, but no GPU.

    Args:
        problems: each an AttentionProblem, a line such as "b=4,hq=32,hk=8,sq=4096,d=128,causal", or a mapping of such
            keys (see rtk.shapes).
        out: the folder to fill, readable by every user, such as one that goes into a container image and stands first
            in RTK_CACHE_DIR there; None for the folder that calls here will look in.
        jobs: threads; None for one per usable CPU.
        batch_invariant: as the calls will have it.
        progress: called as progress(done, total, binary) in the calling thread when each kernel is there.

    Returns:
        The kernels, in the order in which the problems first need them.

    Raises:
        ArgumentError: a problem that is none; it names the key at fault.
        ToolchainError: there is no NVRTC; `rtk doctor` says what to install.
    """
    cache = default_cache() if out is None else Cache(out, for_everyone=True)
    gpu = gpu_here()
    served: dict[jit.Source, list[AttentionProblem]] = {}
    for asked in problems:
        problem = _problem(asked)
        if problem.is_empty:  # answered without a kernel
            continue
        if batch_invariant:
            config = SPEC.pick(problem.without_batch())
        else:
            config = choice.choose(SPEC, problem, gpu, stored=out is None).config
        source = SPEC.render(config)
        served.setdefault(source, []).append(problem)
    binaries = jit.build_many(list(served), jobs=jobs, progress=progress, cache=cache)
    return [
        Warmed(binary, tuple(dict.fromkeys(found)), _store(cache, binary))
        for binary, found in zip(binaries, served.values(), strict=True)
    ]


def _problem(asked: AttentionProblem | str | Mapping[str, Any]) -> AttentionProblem:
    if isinstance(asked, AttentionProblem):
        if asked.dtype not in ("bfloat16", "float16"):
            raise ArgumentError("problems", f"dtype {asked.dtype}", "bfloat16 or float16: others run on the CPU only")
        return asked
    if isinstance(asked, str):
        return shapes.parse(asked)
    if isinstance(asked, Mapping):
        return shapes.problem(asked)
    raise ArgumentError("problems", asked, "AttentionProblems, lines such as 'hq=32,sq=4096,d=128', or mappings")


def _store(cache: Cache, binary: jit.Binary) -> bool:
    """Whether the kernel lies in a folder. One that only this process remembered, the folder cleared since, is put."""
    found = cache.get(binary.key) is not None
    return found or cache.put(binary.key, binary.cubin, binary.report.to_json())
