"""How good tuning is: what the tuner, the cost model and the default config reach of an exhaustive search.

    python -m rtk.benchmarks.tuning sweep            # on a GPU: every config of every problem, kept in the cache folder
    python -m rtk.benchmarks.tuning raw FILE         # those times as JSON, which the last three read
    python -m rtk.benchmarks.tuning check FILE       # on a GPU: every config of every kind of problem gives the truth
    python -m rtk.benchmarks.tuning fit FILE         # the constants of rtk.autotune.model.Machine
    python -m rtk.benchmarks.tuning judge FILE OUT   # on a GPU: tunes, times the winners again, writes autotune.json
    python -m rtk.benchmarks.tuning plot FILE PNG    # estimates against measured times

The constants are fitted to problems of their own; the others are judged. Each step goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np

from rtk import jit, shapes
from rtk.autotune import manage, model, session, trial
from rtk.autotune.choice import config_of
from rtk.autotune.keys import Gpu, config_key, gpu_here
from rtk.autotune.store import Store
from rtk.benchmarks import suites
from rtk.digest import sources_digest, timestamp
from rtk.kernels.attention_fwd import SPEC
from rtk.problem import AttentionProblem
from rtk.spec import config_fields

_MASKS = ("", ",causal")
# What the model's constants are fitted to; none of them is among those that it is judged by.
_FIT = (
    *(
        f"b={batch},hq={heads},sq={seqlen},d={d}{mask}"
        for d in (64, 128, 256)
        for mask in _MASKS
        for batch, heads, seqlen in ((4, 16, 384), (24, 8, 640), (1, 16, 1536), (2, 16, 3072), (1, 8, 12288))
    ),
    *(f"hq=16,sq={seqlen},d=192,dv=128{mask}" for mask in _MASKS for seqlen in (1536, 6144)),
    "hq=40,hk=8,sq=3000,d=128,causal",
    "b=4,hq=8,sq=300,sk=6000,d=128",
)
_JUDGED = ("paper", "small", "gqa", "ragged", "models")  # suites
_JUDGED_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
_LONGEST_JUDGED = 20_000  # an exhaustive search of longer ones takes minutes
_FIRST = "b=4,hq=16,sq=2000,d=128,causal"  # a new shape, for the seconds that one takes
_ROUNDS = 21
_NEAR = 1.4  # times the best: configs whose estimates the fit looks at

Raw = list[tuple[AttentionProblem, dict[str, float]]]  # µs by _name()


def fitted() -> list[AttentionProblem]:
    """The problems whose times the model's constants come from."""
    return [shapes.parse(line) for line in _FIT]


def _name(config: Any) -> str:
    """What tells a config from the others of its problem: the label from the tile on."""
    label = SPEC.label(config)
    return label[label.index("_m") + 1 :]


def judged() -> list[AttentionProblem]:
    """The problems that tuner and model are judged by."""
    found = [cell.problem for name in _JUDGED for cell in suites.find(name).cells]
    return [p for p in found if (p.head_dim, p.head_dim_v) in _JUDGED_DIMS and p.seqlen_q < _LONGEST_JUDGED]


def swept() -> list[AttentionProblem]:
    """The problems for the seconds that a whole suite takes."""
    return [cell.problem for cell in suites.find("paper").cells]


# --- raw times -------------------------------------------------------------------------------------------------------


def raw(store: Store, gpu: Gpu) -> str:
    """What a sweep left in a store, as JSON."""
    problems = []
    for found in store.choices():
        if found.place.gpu == gpu and found.place.kernel == SPEC.name:
            problem = shapes.parse(found.problem)
            names = {config_key(config_fields(config)): _name(config) for config in SPEC.configs(problem)}
            timings = [(names.get(config_key(each.config)), each.us) for each in store.timings(found.place)]
            times = {name: round(us, 3) for name, us in timings if name is not None}
            problems.append({"problem": found.problem, "nvrtc": found.nvrtc, "driver": found.driver, "us": times})
    problems.sort(key=lambda each: str(each["problem"]))
    head = f'{{"gpu": {json.dumps(gpu.to_json())},\n"sources": {json.dumps(sources_digest())},\n"problems": [\n'
    return head + ",\n".join(json.dumps(each, separators=(",", ":")) for each in problems) + "\n]}\n"


def read(path: Path) -> Raw:
    """Those problems of a file of `raw` in which the whole space was timed."""
    found = []
    for each in json.loads(path.read_text())["problems"]:
        problem = shapes.parse(each["problem"])
        if {_name(config) for config in SPEC.configs(problem)} <= set(each["us"]):
            found.append((problem, each["us"]))
    return found


def _times(problem: AttentionProblem, us: dict[str, float], configs: Iterable[Any]) -> np.ndarray[Any, Any]:
    return np.array([us[_name(config)] for config in configs])


# --- every config is right -------------------------------------------------------------------------------------------


def check(out: Path, minutes: float) -> int:
    """Runs every config of each kind of problem that is tuned here once, on a small one, against float64.

    Kinds are what a kernel is specialised to. Returns how many kinds are left when time is up; the file has the others.
    """
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if found.get("sources") != sources_digest():
        found = {"gpu": gpu_here().to_json(), "sources": sources_digest(), "kinds": {}}
    deadline = time.monotonic() + 60 * minutes
    kinds = {_small(problem): None for problem in (*judged(), *fitted())}
    for problem in kinds:
        line = shapes.describe(problem)
        if line in found["kinds"] or time.monotonic() > deadline:
            continue
        configs = SPEC.configs(problem)
        jit.build_many([SPEC.render(config) for config in configs])
        with trial.entered(0, SPEC, problem) as trying:
            wrong = {SPEC.label(config): said for config in configs if (said := trying.verify(config))}
        found["kinds"][line] = {"configs": len(configs), "wrong": wrong}
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{line}: {len(configs)} configs, {len(wrong)} of them wrong", flush=True)
    return len(kinds) - len(found["kinds"])


def _small(problem: AttentionProblem) -> AttentionProblem:
    """The problem of this kind that the check runs: odd lengths, several tiles each way, a group of two."""
    window = min(200, problem.window_left) if problem.window_left is not None else None
    return dataclasses.replace(
        problem,
        batch=2,
        num_heads_q=4,
        num_heads_kv=2,
        seqlen_q=777,
        seqlen_k=1001,
        diagonal=1001 - 777,
        window_left=window,
    )


# --- the model -------------------------------------------------------------------------------------------------------


def shares(times: Raw, machine: model.Machine) -> list[float]:
    """What the model's pick reaches of the best config's speed, for each problem."""
    return [min(us.values()) / us[_name(model.pick(SPEC, problem, machine))] for problem, us in times]


def fit(times: Raw, turns: int = 3000, seed: int = 0) -> model.Machine:
    """The machine whose picks are best, found by changing one constant at a time at random."""
    known = {shapes.describe(problem) for problem in fitted()}
    cases = []
    for problem, us in times:
        if shapes.describe(problem) in known:
            configs = SPEC.configs(problem)
            cases.append((SPEC.work(problem, configs), _times(problem, us, configs)))
    draw = random.Random(seed)
    names = [f.name for f in dataclasses.fields(model.Machine)][5:]  # the rates before those are the hardware's
    best = model.Machine()
    least = _loss(cases, best)
    for _ in range(turns):
        name = draw.choice(names)
        value = getattr(best, name)
        if isinstance(value, tuple):
            place = draw.randrange(len(value))
            changed: Any = (*value[:place], min(1.0, value[place] * math.exp(draw.gauss(0, 0.1))), *value[place + 1 :])
        else:
            changed = value * math.exp(draw.gauss(0, 0.2))
            changed = min(changed, 1.0) if name == "mma_share" else changed
        machine = dataclasses.replace(best, **{name: changed})
        loss = _loss(cases, machine)
        if loss < least:
            best, least = machine, loss
    return best


def _loss(cases: Sequence[tuple[Any, np.ndarray[Any, Any]]], machine: model.Machine) -> float:
    """What the picks lose of speed, on average and at worst, and how far good configs are from their estimates."""
    reached, errors = [], []
    for work, us in cases:
        estimate, least = model.of_work(work, machine), us.min()
        reached.append(least / us[int(np.argmin(estimate))])
        near = us < _NEAR * least
        logs = np.log(estimate[near] / us[near])
        errors.append(float(np.sqrt(np.mean((logs - logs.mean()) ** 2))) + 0.15 * abs(float(logs.mean())))
    return float(-math.log(geometric_mean(reached)) + 0.15 * (1 - min(reached)) + 0.3 * fmean(errors))


# --- the judgement ---------------------------------------------------------------------------------------------------


def judge(times: Raw, out: Path) -> None:
    """Tunes the judged problems anew and times the winners of each way again, in a process that did not choose them."""
    known = {shapes.describe(problem): us for problem, us in times}
    problems = [problem for problem in judged() if shapes.describe(problem) in known]
    if not problems:
        sys.exit("rtk: none of the judged problems is in the file: run `sweep` and `raw` first")
    with tempfile.TemporaryDirectory() as folder:
        first = shapes.parse(_FIRST)
        cold = _tuned_in_new_process([first], Path(folder, "cold"))
        warm = _tuned_in_new_process([first], Path(folder, "warm"), Path(folder, "cold"))
        sweep = _tuned_in_new_process(swept(), Path(folder, "tuned"))
        rest = [problem for problem in problems if problem not in swept()]
        tuned = sweep["tuned"] | _tuned_in_new_process(rest, Path(folder, "tuned"))["tuned"]
    asked = []
    for problem in problems:
        us = known[shapes.describe(problem)]
        labels = {
            "exhaustive": min(us, key=lambda label: us[label]),
            "tuned": tuned[shapes.describe(problem)],
            "model": _name(model.pick(SPEC, problem, model.Machine.of(gpu_here()))),
            "default": _name(SPEC.pick(problem)),
        }
        asked.append({"problem": shapes.describe(problem), "labels": labels})
    again = _in_new_process("retime", asked)
    result = {
        "gpu": gpu_here().to_json(),
        "sources": sources_digest(),
        "date": timestamp(),
        "space": {shapes.describe(p): len(SPEC.configs(p)) for p in problems},
        "seconds_cold": cold["seconds"][0],
        "seconds_warm": warm["seconds"][0],
        "seconds_sweep": sweep["wall_s"],
        **summary(again),
        "shapes": again,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each way reaches of the exhaustive winner's speed, and the tuner's gains over the default config."""

    def over(one: str, other: str) -> list[float]:
        return [each["us"][other] / each["us"][one] for each in found]

    gains = sorted(zip(over("tuned", "default"), (each["problem"] for each in found), strict=True), reverse=True)
    return {
        **{
            f"{way}_over_exhaustive": {"geomean": geometric_mean(reached), "worst": min(reached)}
            for way, reached in ((way, over(way, "exhaustive")) for way in ("tuned", "model"))
        },
        "tuned_over_default": {"geomean": geometric_mean([gain for gain, _ in gains]), "best": gains[:5]},
    }


def retime(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median µs of each way's config, in turns."""
    found = []
    for each in asked:
        problem = shapes.parse(each["problem"])
        by_label = {_name(config): config for config in SPEC.configs(problem)}
        distinct = list(dict.fromkeys(each["labels"].values()))
        times = session.retimed(SPEC, problem, [by_label[label] for label in distinct], 0, _ROUNDS)
        us = dict(zip(distinct, times, strict=True))
        found.append({**each, "us": {way: us[label] for way, label in each["labels"].items()}})
    return found


def _tuned(lines: Sequence[str]) -> dict[str, Any]:
    """What tuning these problems came to, in this process."""
    start = time.monotonic()
    summary = manage.run(lines)
    return {
        "wall_s": round(time.monotonic() - start, 2),
        "seconds": [round(found.seconds, 3) for found in summary.tuned],
        "tuned": {found.choice.problem: _name(config_of(SPEC, found.problem, found.choice)) for found in summary.tuned},
    }


def _tuned_in_new_process(problems: Sequence[AttentionProblem], folder: Path, kernels: Path | None = None) -> Any:
    """_tuned() with a cache folder of its own; `kernels`: another, whose kernels need not be compiled again."""
    folder.mkdir(mode=0o700, exist_ok=True)
    caches = os.pathsep.join(map(str, filter(None, (kernels, folder))))
    return _in_new_process("tuned", [shapes.describe(problem) for problem in problems], RTK_CACHE_DIR=caches)


def _in_new_process(step: str, question: Any, **environment: str) -> Any:
    command = [sys.executable, "-m", "rtk.benchmarks.tuning", f"_{step}"]
    done = subprocess.run(
        command, input=json.dumps(question), env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"rtk: {' '.join(command)} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


# --- the plot --------------------------------------------------------------------------------------------------------


def plot(times: Raw, machine: model.Machine) -> bytes:
    """A PNG: the estimate of every config over its time, the fastest and the picked of each problem marked."""
    from rtk.benchmarks.report import need

    need("matplotlib").use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    best: list[tuple[float, float]] = []
    picked: list[tuple[float, float]] = []
    for problem, us in times:
        configs = SPEC.configs(problem)
        measured, estimated = _times(problem, us, configs), model.estimate_us(SPEC, problem, configs, machine)
        axes.plot(measured, estimated, ".", color="#56B4E9", markersize=2, alpha=0.4, rasterized=True)
        pick = configs.index(model.pick(SPEC, problem, machine))
        for chosen, index in ((best, int(np.argmin(measured))), (picked, pick)):
            chosen.append((measured[index], estimated[index]))
    axes.plot(*zip(*picked, strict=True), "o", color="#D55E00", markersize=4, label="the model's pick")
    axes.plot(*zip(*best, strict=True), "x", color="black", markersize=4, label="the fastest")
    ends = [min(us for us, _ in best) / 2, 4 * max(us for us, _ in best)]
    axes.plot(ends, ends, color="#666666", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, µs", ylabel="the model's estimate, µs")
    axes.set_title(f"{sum(len(us) for _, us in times)} configs of {len(times)} problems")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("sweep", "raw", "check", "fit", "judge", "plot", "_tuned", "_retime"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    given = parser.parse_args()
    if len(given.files) != {"raw": 1, "check": 1, "fit": 1, "judge": 2, "plot": 2}.get(given.step, 0):
        parser.error(f"{given.step} needs other files: see above")
    if given.step == "sweep":
        left = manage.run([*judged(), *fitted()], exhaustive=True, minutes=given.minutes).left
        print(f"{len(left)} problems are left")
    elif given.step == "raw":
        given.files[0].write_text(raw(Store(), gpu_here()))
    elif given.step == "check":
        sys.exit(1 if check(given.files[0], given.minutes) else 0)
    elif given.step == "fit":
        times = read(given.files[0])
        known = {shapes.describe(problem) for problem in fitted()}
        machine = fit(times)
        print(machine)
        for name, of_these in (("fitted", True), ("judged", False)):
            found = shares([each for each in times if (shapes.describe(each[0]) in known) is of_these], machine)
            print(f"{name}: {len(found)} problems, {geometric_mean(found):.3f} of the best, {min(found):.3f} at worst")
    elif given.step == "judge":
        judge(read(given.files[0]), given.files[1])
    elif given.step == "plot":
        given.files[1].write_bytes(plot(read(given.files[0]), model.Machine()))
    else:
        question = json.load(sys.stdin)
        print(json.dumps(_tuned(question) if given.step == "_tuned" else retime(question)))


if __name__ == "__main__":
    main()
