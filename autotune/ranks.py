"""Which process of a job may tune: one of each machine, as the variables say that the job's launcher sets.

torchrun, Slurm and Open MPI tell each process its number on its machine. The others must not time anything beside the
one that tunes, nor all of them the same: they take the cost model's pick, or wait for the result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from rtk.errors import ArgumentError

POLICIES = ("pick", "wait")
# (number on this machine, processes in the job) of each launcher
_VARIABLES = (
    ("LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def may_tune(environment: Mapping[str, str] = os.environ) -> bool:
    """True for a process on its own and for the first of a job's on each machine."""
    for rank, size in _VARIABLES:
        if environment.get(size, "").isdigit() and int(environment[size]) > 1 and environment.get(rank, "").isdigit():
            return int(environment[rank]) == 0
    return True


def policy(environment: Mapping[str, str] = os.environ) -> str:
    """What the others do, of RTK_AUTOTUNE_RANKS: "pick" (the default) or "wait". ArgumentError for what is neither."""
    found = environment.get("RTK_AUTOTUNE_RANKS") or POLICIES[0]
    if found not in POLICIES:
        raise ArgumentError("RTK_AUTOTUNE_RANKS", found, ", ".join(POLICIES))
    return found
