"""`rtk profile` for real: one small call under Nsight Compute, ours and a peer's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from rtk import shapes
from rtk.autotune import locks
from rtk.benchmarks import measure, peers, profile
from rtk.cli import main
from rtk.errors import RtkError, ToolchainError

pytestmark = pytest.mark.gpu
SHAPE = "b=2,hq=16,sq=2048,d=128"


@pytest.fixture
def ncu(gpu):
    if gpu.torch is None:
        pytest.skip("the profiled call needs torch")
    try:
        found = profile.find()
    except ToolchainError:
        pytest.skip("ncu is not installed")
    # Two at a time fail now and then: "Failed to prepare kernel for profiling".
    with locks.held(Path(tempfile.gettempdir(), "rtk-tests-ncu.lock"), "ncu", 600) as alone:
        assert alone, "another process has held ncu for ten minutes"
        yield found


def test_a_call_of_ours(ncu, tmp_path, capsys):
    assert main(["profile", "--shape", SHAPE, "--json", "--export", str(tmp_path / "kept")]) == 0
    found = json.loads(capsys.readouterr().out)
    cell = measure.Cell("attention_fwd", shapes.parse(SHAPE))
    bench = measure.Bench("own", {"rtk": peers.known()["rtk"]}, 3, 60 << 20)
    # Other tests use the GPU too, and make the one time or the other longer: the quickest of some counts.
    us = min(timed["us"] for _ in range(5) for timed in measure.times(cell, bench))
    assert 0.5 * us < found["duration_us"] < 3 * us
    assert found["kernel"].startswith("attention_fwd_bf16_d128") and found["kernels"] == 1
    assert 0 < found["registers_per_thread"] <= 168 and found["local_loads"] == found["local_stores"] == 0
    assert found["tensor_pct"] > 20 and 0 < found["xu_pct"] <= 100 and 0 < found["issue_pct"] <= 100
    assert found["missing"] == [] and 500 < found["sm_mhz"] < 2100
    assert 0 < found["dram_gbps"] < 5000 and found["l2_gbps"] > found["dram_gbps"] and 0 < found["l2_hit_pct"] <= 100
    assert sum(stall["share_pct"] for stall in found["stalls"]) <= 100
    assert (tmp_path / "kept.ncu-rep").stat().st_size > 10_000


def test_a_pinned_configuration_and_a_peer(ncu, capsys):
    pins = "BLOCK_M=64,NUM_CONSUMER_WARPGROUPS=1"
    assert main(["profile", "--shape", SHAPE, "--config", pins, "--kernel", "m64"]) == 0
    assert "BLOCK_M=64" in capsys.readouterr().out
    assert main(["profile", "--shape", SHAPE, "--impl", "fa2"]) == 0
    out = capsys.readouterr().out
    assert "flash" in out and "tensor cores" in out and "Warps that do not issue" in out


def test_a_call_that_cannot_be_made(ncu):
    with pytest.raises(RtkError, match="no softcap"):
        profile.profile(shapes.parse(f"{SHAPE},softcap=5"), "fa2")
