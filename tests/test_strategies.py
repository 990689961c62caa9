"""The fuzzing itself, on the CPU: its calls, its properties on the NumPy path, and the faults that they catch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import emulated
import fuzz_run
import fuzz_session
import pytest
from fuzz_calls import Call, Placement
from fuzz_options import DEFAULT_EXAMPLES, FuzzOptions
from hypothesis import given, seed
from strategies import calls, pool, sources

import rtk
from rtk import jit
from rtk.kernels.attention_fwd import SPEC

torch = pytest.importorskip("torch")

from faults import FAULTS  # noqa: E402
from fuzz_bench import Bench  # noqa: E402
from fuzz_properties import PROPERTIES  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_choices")

BUDGET = 1 << 14  # scores of a call: a few milliseconds of NumPy


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache folder that sessions may damage; one thread, because these products are small."""
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path: Path) -> FuzzOptions:
    return FuzzOptions(200, 0, tmp_path / "failures.jsonl")


# --- calls -----------------------------------------------------------------------------------------------------------


def test_pool_is_what_the_gpu_has_time_for_and_varied() -> None:
    assert 140 <= len(sources()) <= 240
    names = [source.name for source in sources()]
    for part in (
        "bf16",
        "fp16",
        "_left",
        "_right",
        "softcap",
        "prescale",
        "dynamic",
        "m64",
        "m128",
        "m192",
        "d256x256",
    ):
        assert sum(part in name for name in names) >= 5, part


def test_calls_run_on_the_pool_vary_and_survive_json() -> None:
    compiled = {source.name for source in sources()}
    seen: Counter[str] = Counter()

    @seed(1)
    @fuzz_run.quiet(300)
    @given(calls(empty=True))
    def look(call: Call) -> None:
        again = Call.from_json(json.loads(json.dumps(call.to_json())))
        assert again == call
        assert hash(again) == hash(call)
        case = call.case
        if call.is_empty():
            seen["empty"] += 1
            return
        assert SPEC.render(call.config()).name in compiled, "a call would have to be compiled on its own"
        assert case.batch * case.heads[0] * case.lengths[0] * case.lengths[1] <= 1 << 25
        seen.update([case.mask.rstrip("0123456789."), case.layout, case.kind, call.library, call.stream, case.dtype])
        seen.update(
            {f"group {case.heads[0] // case.heads[1] > 1}", f"pin {call.pin != ()}", f"out {call.out is not None}"}
        )
        for name in ("steps", "gaps", "repeats", "flips", "order", "offset"):
            seen[name] += getattr(call.k, name) != getattr(Placement(), name)
        seen["edges"] += case.lengths[0] % 64 in (0, 1, 63) and case.lengths[1] % 16 in (0, 1, 15)

    with fuzz_run.without_mutations():
        look()
    rare = {what: count for what, count in seen.items() if count < 3}
    assert not rare, f"hardly ever drawn: {rare}"
    wanted = {
        "full",
        "causal",
        "causal-tl",
        "w",
        "tl-w",
        "peaked",
        "outliers",
        "constant",
        "group True",
        "pin True",
        "empty",
    }
    assert wanted <= set(seen)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement(order=(2, 0, 1, 3)),
        Placement(order=(3, 1, 0, 2), steps=(1, 2, 3, 1), gaps=(1, 2, 3, 4), offset=3),
        Placement(steps=(1, 1, 1, 2), gaps=(0, 0, 0, 1)),
        Placement(repeats=(0, 2)),
        Placement(flips=(1, 2), gaps=(0, 1, 1, 3)),
    ],
    ids=str,
)
def test_placed_arrays_hold_their_values_and_nothing_else_is_touched(
    placement: Placement, library: str, layout: str
) -> None:
    bench = Bench()
    call = Call(library=library).changed(case={"layout": layout, "lengths": (5, 6), "dims": (8, 8)}, q=placement)
    x = bench.inputs(call)[0]
    placed = bench.place(x, placement, call, 7.0)
    array = bench.to_torch(placed.array.copy() if library == "cupy" else placed.array, call.case.dtype)
    assert torch.equal(array if layout == "bhsd" else array.transpose(1, 2), x)
    assert torch.equal(bench.read(placed, layout), x)
    placed.home.fill_(7.0)
    assert bool((placed.room == 7.0).all())


def test_inputs_are_those_of_the_seed() -> None:
    bench = Bench()
    for kind in ("normal", "peaked", "index", "outliers", "constant"):
        call = Call(seed=3).changed(case={"kind": kind})
        q, k, v = bench.inputs(call)
        assert all(torch.equal(a, b) for a, b in zip(bench.inputs(call), (q, k, v), strict=True))
        assert all(bool(x.isfinite().all()) for x in (q, k, v))
        if kind == "normal":
            assert abs(q.double().mean().item()) < 0.01
            assert abs(q.double().std().item() - 1) < 0.01
            assert not torch.equal(q, bench.inputs(call.changed(seed=4))[0])


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_holds_on_the_cpu(name: str, options: FuzzOptions) -> None:
    counts = fuzz_run.fuzz(PROPERTIES[name], Bench(), options, budget=BUDGET)
    assert counts["examples"] >= fuzz_run.share(name, options.examples)
    assert not list(options.failures.parent.glob("failures*")), "nothing failed, and something was kept"


@pytest.mark.parametrize("name", PROPERTIES)
def test_property_allows_what_the_kernel_rounds(name: str, options: FuzzOptions) -> None:
    counts = fuzz_run.fuzz(PROPERTIES[name], Bench(attention=emulated.attention, exact=True), options, budget=BUDGET)
    assert counts["examples"] >= fuzz_run.share(name, options.examples)


def test_sessions_run_on_the_cpu(options: FuzzOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_session.shrink_tables(monkeypatch)
    counts = fuzz_run.fuzz_sessions(Bench(), options, budget=BUDGET)
    assert counts["examples"] >= fuzz_run.share("sessions", options.examples)
    assert counts["calls"] > 2 * counts["examples"]


def test_sessions_compile_a_source_once_however_often_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_(source: jit.Source, headers: dict[str, str], key: str, nvrtc_build: str) -> jit.Binary:
        compiled.append(source.name)
        report = jit.CompileReport(source.name, 1, 0, 0, 0, 0, (), 1.0, nvrtc_build, False)
        return jit.Binary(source.name, key, b"cubin", report)

    monkeypatch.setattr(jit, "_compile", compile_)
    fuzz_session.compile_once(monkeypatch)
    source = fuzz_session.sources()[0]
    session = fuzz_session.Session(Bench())
    for what in ("nothing", *fuzz_session.FORGOTTEN, "everything"):
        session.do("forget", what)
        assert jit.build(source).cubin == b"cubin"
    assert compiled == [source.name]
    assert session.log[1] == ["forget", "plans"]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_by_its_property(fault: str, options: FuzzOptions) -> None:
    """Within the examples that every GPU run has."""
    name, make = FAULTS[fault]
    bench = Bench(attention=make())
    options = FuzzOptions(DEFAULT_EXAMPLES, 0, options.failures)
    with pytest.raises(AssertionError):
        if name == "sessions":
            fuzz_run.fuzz_sessions(bench, options, budget=BUDGET, shrink=False)
        else:
            fuzz_run.fuzz(PROPERTIES[name], bench, options, budget=BUDGET, shrink=False)
    entry = json.loads(options.failures.read_text().splitlines()[-1])
    assert entry["property"] == name
    assert entry["error"].startswith("AssertionError")
    with pytest.raises(AssertionError):
        fuzz_run.replay(entry, Bench(attention=make()))
    fuzz_run.replay(entry, Bench(attention=emulated.attention))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_failing_example_is_shrunk_and_kept(options: FuzzOptions, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(attention=FAULTS["lse_in_base_2"][1]())
    with pytest.raises(AssertionError, match="log-sum-exps are wrong"):
        fuzz_run.fuzz(PROPERTIES["equals_the_reference"], bench, options, budget=BUDGET)
    (line,) = options.failures.read_text().splitlines()
    assert line in capsys.readouterr().out
    (call,) = (Call.from_json(data) for data in json.loads(line)["calls"])
    assert call.q == call.k == call.v == Placement()
    assert call.case.lengths[1] <= 2
    assert not list(options.failures.parent.glob("*.running*"))


def test_where_nothing_can_be_written_the_example_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = FuzzOptions(200, 0, tmp_path / "missing" / "failures.jsonl")
    bench = Bench(attention=FAULTS["forgets_the_last_key"][1]())
    with pytest.raises(AssertionError):
        fuzz_run.fuzz(PROPERTIES["equals_the_reference"], bench, options, budget=BUDGET, shrink=False)
    assert '"property": "equals_the_reference"' in capsys.readouterr().out


def test_an_error_that_ends_the_context_ends_the_property(options: FuzzOptions) -> None:
    ran = []

    def dies(*_: Any, **__: Any) -> Any:
        ran.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    bench = Bench(attention=dies)
    bench.synchronize = lambda: (_ for _ in ()).throw(RuntimeError("lost"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fuzz_run.fuzz(PROPERTIES["equals_the_reference"], bench, options, budget=BUDGET)
    assert len(ran) == 1, "nothing that runs after it says anything"
    assert "illegal memory access" in options.failures.read_text()


def test_regressions_are_well_formed() -> None:
    for entry in fuzz_run.regressions():
        assert set(entry) <= {"property", "calls", "steps", "error", "found"}
        assert len(entry["found"]) > 10, "say what was wrong, and what mended it"
        assert entry["property"] in (*PROPERTIES, "sessions")
        again = [Call.from_json(data) for data in entry.get("calls", [])]
        assert again or entry["steps"]
        assert [Call.from_json(call.to_json()) for call in again] == again
        for attention in (rtk.attention, emulated.attention):
            fuzz_run.replay(entry, Bench(attention=attention))


def test_shares_make_up_the_whole() -> None:
    names = [*PROPERTIES, "sessions"]
    for total in (1, 2000, 20000):
        assert total <= sum(fuzz_run.share(name, total) for name in names) <= total + len(names)
    assert all(kernel.config() for kernel in pool())
