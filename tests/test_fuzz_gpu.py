"""Properties of attention on the GPU, over calls that hypothesis draws.

`--fuzz-examples N` sets how many in all (default 2,000), `--fuzz-seed` which ones; without them every run draws the
same. An example that fails is written to fuzz_failures.jsonl: once mended, it belongs into fuzz_regressions.json.
"""

from __future__ import annotations

from typing import Any

import fuzz_run
import pytest
from fuzz_bench import Bench
from fuzz_options import FuzzOptions
from fuzz_properties import PROPERTIES
from strategies import sources

from rtk import jit

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fixed_choices")]


@pytest.fixture(scope="module")
def bench(gpu: Any) -> Bench:
    if gpu.torch is None:
        pytest.skip("the fuzzing computes its reference with torch on the GPU")
    jit.build_many(sources())
    return Bench(gpu)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str, bench: Bench, fuzz_options: FuzzOptions, record_property: Any) -> None:
    counts = fuzz_run.fuzz(PROPERTIES[name], bench, fuzz_options)
    for what, count in counts.items():
        record_property(what, count)
    assert counts["examples"] >= fuzz_run.share(name, fuzz_options.examples), "hypothesis stopped early"


def test_what_failed_once(bench: Bench, record_property: Any) -> None:
    entries = fuzz_run.regressions()
    for entry in entries:
        fuzz_run.replay(entry, bench)
    record_property("examples", len(entries))
