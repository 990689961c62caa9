"""Sessions with rtk on the GPU, whose steps hypothesis chooses: a call's bits stay the same, whatever came between.

Calls of several shapes, streams, threads, pinned configurations, tables and caches that forget, damaged cache files,
calls that are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fuzz_run
import fuzz_session
import pytest
from fuzz_bench import Bench
from fuzz_options import FuzzOptions

from rtk import jit

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fixed_choices")]


def test_sessions(
    gpu: Any, fuzz_options: FuzzOptions, record_property: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.torch is None:
        pytest.skip("the fuzzing computes its reference with torch on the GPU")
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    fuzz_session.shrink_tables(monkeypatch)
    fuzz_session.compile_once(monkeypatch)
    jit.build_many(fuzz_session.sources())
    counts = fuzz_run.fuzz_sessions(Bench(gpu), fuzz_options)
    for what, count in counts.items():
        record_property(what, count)
    assert counts["examples"] >= fuzz_run.share("sessions", fuzz_options.examples), "hypothesis stopped early"
