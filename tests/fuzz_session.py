"""A session with rtk: calls, the same ones again, caches that forget, calls that are refused. Answers never change.

`Session` is what happens, each step a name and arguments that JSON holds; `machine` lets hypothesis choose the steps.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_bench import Answer, Bench, assert_same
from fuzz_calls import Call
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule
from strategies import calls, pool

import rtk
from rtk import jit, launch, ops
from rtk.cache import default_cache
from rtk.errors import CacheWarning, RtkError
from rtk.kernels.attention_fwd import SPEC

KERNELS = pool()[::25]  # few enough to compile each again and again

# What makes a call impossible, by name: (q, k, v, options) -> the same, changed.
REFUSED: dict[str, Callable[..., Any]] = {
    "k of another batch": lambda q, k, v, options: (q, k[:0] if k.shape[0] else k[0], v, options),
    "v one key short": lambda q, k, v, options: (q, k, v[:, 1:, 1:], options),
    "three dimensions": lambda q, k, v, options: (q[0], k, v, options),
    "head_dim not a multiple of 8": lambda q, k, v, options: (q[..., :3], k[..., :3], v, options),
    "k is None": lambda q, k, v, options: (q, None, v, options),
    "scale": lambda q, k, v, options: (q, k, v, options | {"softmax_scale": float("nan")}),
    "window": lambda q, k, v, options: (q, k, v, options | {"window_size": (-5, 0)}),
    "config": lambda q, k, v, options: (q, k, v, options | {"config": {"BLOCK_N": 4096}}),
    "sm_margin": lambda q, k, v, options: (q, k, v, options | {"sm_margin": -1}),
    "out is q": lambda q, k, v, options: (q, k, v, options | {"out": q}),
}
FORGOTTEN = ("plans", "binaries", "disk", "pools", "everything")


def sources() -> list[jit.Source]:
    """What a session's calls need compiled: the kernels, and each with the other scheduler."""
    configs = [kernel.config() for kernel in KERNELS]
    configs += [dataclasses.replace(config, SCHEDULER=1 - config.SCHEDULER) for config in configs]
    return [SPEC.render(config) for config in configs]


def shrink_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that remember plans and tensor maps, so small that sessions fill them."""
    monkeypatch.setattr(ops, "_plans", launch.Recent(6))
    monkeypatch.setattr(launch._Maps, "_encoded", launch.Recent(12))


def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that remembers: NVRTC takes half a second for what a session forgets again and again.

    Everything around it (tables, files, loading) happens as ever.
    """
    compiled: dict[jit.Source, jit.Binary] = {}
    really = jit._compile

    def remembering(source: jit.Source, *rest: Any) -> jit.Binary:
        if source not in compiled:
            compiled[source] = really(source, *rest)
        return compiled[source]

    monkeypatch.setattr(jit, "_compile", remembering)


class Session:
    """Steps raise AssertionError where an answer is not the one that was given first."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.log: list[list[Any]] = []
        self._calls: list[Call] = []
        self._answers: list[Answer] = []

    def do(self, name: str, *arguments: Any) -> Any:
        self.log.append([name, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)  # of entries that a step has damaged
            result = getattr(self, name)(*arguments)
        self.bench.synchronize()
        return result

    def new(self, data: dict[str, Any]) -> int:
        call = Call.from_json(data)
        inputs = self.bench.inputs(call)
        answer = self.bench.run(call, inputs)
        self.bench.judge(call, answer, inputs)
        self._calls.append(call)
        self._answers.append(answer)
        return len(self._calls) - 1

    def again(self, number: int, **changes: Any) -> None:
        self._expect(number, self._calls[number].changed(**changes), "a repeat")

    def elsewhere(self, number: int, library: str, stream: str, sm_margin: int) -> None:
        changes = {"library": library, "stream": stream, "sm_margin": sm_margin}
        self._expect(number, self._calls[number].changed(**changes), f"with {changes}")

    def laid_out_anew(self, number: int) -> None:
        call = self._calls[number]
        layout = "bshd" if call.case.layout == "bhsd" else "bhsd"
        self._expect(number, call.in_order().changed(case={"layout": layout}), "contiguous, in the other layout")

    def pinned(self, number: int, other_scheduler: bool) -> None:
        """The configuration by name; and which block computes a tile changes no bit either."""
        call = self._calls[number].pinned()
        if other_scheduler:
            call = call.changed(pin=tuple((k, 1 - x if k == "SCHEDULER" else x) for k, x in call.pin))
        self._expect(number, call, f"pinned to {dict(call.pin)}")

    def together(self, numbers: list[int]) -> None:
        """In threads, at once."""
        wrong: list[Exception] = []
        begin = threading.Barrier(len(numbers))

        def work(number: int) -> None:
            try:
                self.bench.enter_thread()
                begin.wait(60)
                self.again(number, stream="side")
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]

    def refused(self, number: int, how: str) -> None:
        """The error is one of ours, nothing is launched, and the good call is answered as ever."""
        call = self._calls[number]
        inputs = self.bench.inputs(call)
        placed = [self.bench.place(x, getattr(call, name), call) for name, x in zip("qkv", inputs, strict=True)]
        q, k, v, options = REFUSED[how](*(each.array for each in placed), call.options())
        before = rtk.stats()["launches"]
        try:
            self.bench.attention(q, k, v, **options)
        except RtkError:
            pass
        else:
            raise AssertionError(f"accepted: {how}")
        assert rtk.stats()["launches"] == before, f"launched before it was refused: {how}"
        self.again(number)

    def forget(self, what: str) -> None:
        if what in ("plans", "everything"):
            ops._plans.clear()
        if what in ("binaries", "everything"):
            jit._memory.clear()
        if what in ("disk", "everything"):
            default_cache().clear()
        if what in ("pools", "everything") and self.bench.gpu is not None:
            self.bench.torch.cuda.empty_cache()
            if self.bench.cupy is not None:
                self.bench.cupy.get_default_memory_pool().free_all_blocks()

    def damage(self, number: int) -> None:
        """An entry of the cache folder is cut short, and memory does not help."""
        entries = sorted(default_cache().path.glob("*.cubin")) if default_cache().path.is_dir() else []
        if entries:
            entry = entries[number % len(entries)]
            entry.write_bytes(entry.read_bytes()[: number % 997])
        self.forget("plans")
        self.forget("binaries")

    def _expect(self, number: int, call: Call, how: str) -> None:
        inputs = self.bench.inputs(self._calls[number])
        assert_same(self.bench.run(call, inputs), self._answers[number], f"{how}, after {len(self.log)} steps")


def replay(steps: list[list[Any]], bench: Bench) -> None:
    session = Session(bench)
    for name, *arguments in steps:
        session.do(name, *arguments)


def machine(bench: Bench, counts: Counter[str], failed: dict[str, Any], budget: int) -> type[RuleBasedStateMachine]:
    """What hypothesis runs: counts `examples` and `calls` (steps); failed["entry"] is the last that failed."""

    class Machine(RuleBasedStateMachine):
        known = Bundle("known")

        def __init__(self) -> None:
            super().__init__()
            self.session = Session(bench)

        def do(self, *step: Any) -> Any:
            counts.update(examples=not self.session.log, calls=1)
            if "fatal" in failed:
                return 0
            try:
                return self.session.do(*step)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:2000]
                failed["entry"] = {"property": "sessions", "steps": list(self.session.log), "error": said}
                if not bench.alive():
                    failed["fatal"] = error
                    return 0
                raise

        @rule(target=known, call=calls(kernels=KERNELS, budget=budget, lse=True))
        def new(self, call: Call) -> Any:
            return self.do("new", call.to_json())

        @rule(number=known)
        def again(self, number: int) -> None:
            self.do("again", number)

        @rule(
            number=known,
            library=st.sampled_from(["torch", "cupy"]),
            stream=st.sampled_from(["default", "side"]),
            sm_margin=st.sampled_from([0, 5]),
        )
        def elsewhere(self, number: int, library: str, stream: str, sm_margin: int) -> None:
            self.do("elsewhere", number, library, stream, sm_margin)

        @rule(number=known)
        def laid_out_anew(self, number: int) -> None:
            self.do("laid_out_anew", number)

        @rule(number=known, other_scheduler=st.booleans())
        def pinned(self, number: int, other_scheduler: bool) -> None:
            self.do("pinned", number, other_scheduler)

        @rule(numbers=st.lists(known, min_size=2, max_size=3))
        def together(self, numbers: list[int]) -> None:
            self.do("together", numbers)

        @rule(number=known, how=st.sampled_from(sorted(REFUSED)))
        def refused(self, number: int, how: str) -> None:
            self.do("refused", number, how)

        @rule(what=st.sampled_from(FORGOTTEN))
        def forget(self, what: str) -> None:
            self.do("forget", what)

        @rule(number=st.integers(0, 5000))
        def damage(self, number: int) -> None:
            self.do("damage", number)

    return Machine
