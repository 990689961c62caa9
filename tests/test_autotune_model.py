"""The cost model: it is quick, its picks are legal and few, and they are good where that was measured."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import config_space
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtk import shapes
from rtk.autotune import choice, exchange, keys, model
from rtk.autotune.keys import USUAL_GPU, Gpu, Place, Timed
from rtk.autotune.store import Store
from rtk.benchmarks import tuning
from rtk.digest import sources_digest
from rtk.kernels.attention_fwd import SPEC
from rtk.spec import config_fields

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "h200" / "autotune-exhaustive.json"
MACHINE = model.Machine.of(USUAL_GPU)

lengths = st.integers(1, 1 << 17)
problems = st.builds(
    lambda b, hk, group, sq, sk, d, dtype, mask, cap: shapes.parse(
        f"b={b},hq={hk * group},hk={hk},sq={sq},sk={sk},d={d[0]},dv={d[1]},dtype={dtype}{mask}{cap}"
    ),
    st.integers(1, 64),
    st.integers(1, 16),
    st.sampled_from((1, 2, 8)),
    lengths,
    lengths,
    st.sampled_from(((16, 16), (64, 64), (72, 72), (128, 128), (192, 128), (256, 256), (64, 256))),
    st.sampled_from(("bf16", "fp16")),
    st.sampled_from(("", ",causal", ",window=100:0", ",window=:50", ",window=4095:30", ",causal,align=top-left")),
    st.sampled_from(("", ",softcap=30")),
)


@given(problems)
def test_every_problem_has_a_legal_pick_and_estimates(problem):
    configs = SPEC.configs(problem)
    estimates = model.estimate_us(SPEC, problem, configs, MACHINE)
    assert estimates.shape == (len(configs),) and np.isfinite(estimates).all() and (estimates > 0).all()
    pick = model.pick(SPEC, problem, MACHINE)
    assert SPEC.refusal(problem, pick) is None and pick in SPEC.first_picks(problem) and pick in configs
    assert sorted(model.ranked(SPEC, problem, configs, MACHINE)) == list(range(len(configs)))
    assert len(configs) <= 300


@given(problems)
def test_more_work_takes_longer(problem):
    configs = SPEC.configs(problem)
    now = model.estimate_us(SPEC, problem, configs, MACHINE)
    more = problem.__class__(**{**vars(problem), "batch": 4 * problem.batch})
    later = model.estimate_us(SPEC, more, configs, MACHINE)
    assert (later >= now * 0.999).all()
    fewer_sms = model.estimate_us(SPEC, problem, configs, model.Machine(sm_count=66))
    assert (fewer_sms >= now * 0.999).all()


def test_a_shape_is_ranked_within_a_millisecond():
    spent = []
    for seqlen in range(1000, 1100):
        problem = shapes.parse(f"b=2,hq=16,sq={seqlen},d=64,causal")
        start = time.process_time()
        model.ranked(SPEC, problem, SPEC.configs(problem), MACHINE)
        spent.append(time.process_time() - start)
    assert statistics.median(spent) < 1e-3


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_new_shapes_seldom_mean_new_kernels(dims, mask):
    """Few distinct first picks, over all lengths and numbers of heads."""
    found = set()
    for step in range(200):
        seqlen, heads = int(2 ** (4 + step % 21 / 2)), int(2 ** (step * 7 % 19 / 2))
        causal = ",causal" if mask == "causal" else ""
        line = f"hq={heads},sq={seqlen},d={dims[0]},dv={dims[1]}{causal}"
        found.add(model.pick(SPEC, shapes.parse(line), MACHINE))
    assert len(found) <= 16, len(found)


def test_the_whole_space_has_first_picks():
    for pair in (*config_space.UNEQUAL, *map(config_space.equal, config_space.HEAD_DIMS)):
        for mask in config_space.MASKS:
            problem = config_space.problem(pair, mask)
            assert SPEC.pick(problem).BLOCK_N in {config.BLOCK_N for config in SPEC.first_picks(problem)}


# --- what was measured -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    return tuning.read(RECORDED)


def test_the_record_is_of_this_kernel(recorded):
    assert json.loads(RECORDED.read_text())["sources"]["cuda_src"] == sources_digest()["cuda_src"]
    for problem, us in recorded:
        assert min(us.values()) > 0 and len(us) >= len(SPEC.configs(problem))


def test_picks_are_good_on_problems_that_the_model_was_not_fitted_to(recorded):
    fitted = {shapes.describe(problem) for problem in tuning.fitted()}
    judged = [(problem, us) for problem, us in recorded if shapes.describe(problem) not in fitted]
    assert len(judged) >= 40 and len(recorded) - len(judged) >= 20
    reached = tuning.shares(judged, MACHINE)
    assert statistics.geometric_mean(reached) >= 0.95 and min(reached) >= 0.85
    assert not fitted & {shapes.describe(problem) for problem in tuning.judged()}


def test_no_constant_that_a_little_fitting_would_change_much(recorded):
    """The constants in the source are those that the record gives."""
    again = tuning.fit(recorded, turns=60)
    known = {shapes.describe(problem) for problem in tuning.fitted()}
    of = [each for each in recorded if shapes.describe(each[0]) in known]
    before, after = (statistics.geometric_mean(tuning.shares(of, machine)) for machine in (MACHINE, again))
    assert after <= before + 0.01


def test_tuning_reaches_what_was_asked_of_it():
    """Against an exhaustive search, both winners timed again in a fresh process."""
    found = json.loads((RECORDED.parent / "autotune.json").read_text())
    assert found["sources"]["cuda_src"] == sources_digest()["cuda_src"] and len(found["shapes"]) >= 40
    assert found["tuned_over_exhaustive"]["geomean"] >= 0.98 and found["tuned_over_exhaustive"]["worst"] >= 0.95
    assert found["model_over_exhaustive"]["geomean"] >= 0.95 and found["model_over_exhaustive"]["worst"] >= 0.85
    assert found["seconds_cold"] <= 5 and found["seconds_warm"] <= 1 and found["seconds_sweep"] <= 240


def test_every_config_was_run_and_was_right():
    """Of each kind of problem that is tuned here, on a GPU, against float64."""
    found = json.loads((RECORDED.parent / "autotune-check.json").read_text())
    assert found["sources"]["cuda_src"] == sources_digest()["cuda_src"]
    kinds = {shapes.describe(tuning._small(problem)) for problem in (*tuning.judged(), *tuning.fitted())}
    assert kinds == set(found["kinds"])
    for line, checked in found["kinds"].items():
        assert checked == {"configs": len(SPEC.configs(shapes.parse(line))), "wrong": {}}, line


def test_what_ships_is_of_this_kernel_and_legal():
    shipped = exchange.read(Path(keys.__file__).parent / "data" / "h200.json")
    assert len(shipped) >= 40
    for each in shipped:
        assert each.place.sources == keys.digest(SPEC) and each.place.gpu == USUAL_GPU and each.nvrtc
        problem = shapes.parse(each.problem)
        assert each.place == Place.of(SPEC, problem, USUAL_GPU)
        assert choice.config_of(SPEC, problem, each) in SPEC.configs(problem)


# --- the tool --------------------------------------------------------------------------------------------------------


def test_raw_times_go_from_a_store_to_a_file_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    problem = shapes.parse("hq=4,sq=700,d=256")
    configs = SPEC.configs(problem)
    place = Place.of(SPEC, problem, USUAL_GPU)
    times = [
        Timed(config_fields(config), 50.0 + n, 50.0, 51.0, 3, "13.0", "13.0.88") for n, config in enumerate(configs)
    ]
    chosen = keys.Choice(place, config_fields(configs[0]), shapes.describe(problem), 50.0, nvrtc="13.0.88")
    store = Store(tmp_path / "store")
    store.put(chosen, times)
    half = shapes.parse("hq=4,sq=300,d=256")
    store.put(keys.Choice(Place.of(SPEC, half, USUAL_GPU), chosen.config, shapes.describe(half), 50.0), times[:5])
    file = tmp_path / "raw.json"
    file.write_text(tuning.raw(store, USUAL_GPU))
    ((found, us),) = tuning.read(file)
    assert found == problem and sorted(us.values()) == [50.0 + n for n in range(len(configs))], "whole spaces only"
    assert tuning.raw(store, Gpu("another", 1, 1)).count("problem") == 1
    assert tuning.plot([(found, us)], MACHINE).startswith(b"\x89PNG")


def test_the_summary():
    found = [
        {"problem": "a", "us": {"exhaustive": 10.0, "tuned": 10.0, "model": 12.5, "default": 20.0}},
        {"problem": "b", "us": {"exhaustive": 8.0, "tuned": 10.0, "model": 10.0, "default": 10.0}},
    ]
    said = tuning.summary(found)
    assert said["tuned_over_exhaustive"] == {"geomean": pytest.approx(0.8**0.5), "worst": 0.8}
    assert said["model_over_exhaustive"]["worst"] == 0.8
    assert said["tuned_over_default"]["best"][0] == (2.0, "a") and said["tuned_over_default"]["geomean"] > 1.4
