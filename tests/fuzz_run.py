"""Runs a property on many examples, and keeps what fails.

An example that fails is appended to a file, smallest form last, from where a person puts it into fuzz_regressions.json.
The example under way stands in a file beside it, for when it ends the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fuzz_session
from fuzz_bench import Bench
from fuzz_calls import Call
from fuzz_options import FuzzOptions
from fuzz_properties import PROPERTIES, Property
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture.engine import ConjectureRunner
from hypothesis.stateful import run_state_machine_as_test

REGRESSIONS = Path(__file__).with_name("fuzz_regressions.json")
SESSIONS_SHARE = 0.5  # a session is many calls


def share(name: str, total: int) -> int:
    """How many of `total` examples a property has."""
    shares = {prop.name: prop.share for prop in PROPERTIES.values()} | {"sessions": SESSIONS_SHARE}
    return math.ceil(total * shares[name] / sum(shares.values()))


def quiet(examples: int, *, shrink: bool = True, **more: Any) -> settings:
    """Settings of hypothesis: no clock, nothing written, smallest failure only."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        **more,
    )


@contextlib.contextmanager
def without_mutations() -> Iterator[None]:
    """Every example drawn anew.

    Hypothesis makes five of six examples from the sixth, by repeating values in it: of 100 calls it asked for 20
    kernels and 28 pairs of lengths; drawn anew they are 70 and 94. Only the search changes, so a version of hypothesis
    that does this otherwise does no harm.
    """
    if not hasattr(ConjectureRunner, "generate_mutations_from"):
        yield
        return
    with patch.object(ConjectureRunner, "generate_mutations_from", lambda self, data: None):
        yield


def seed_of(name: str, number: int) -> int:
    return zlib.crc32(f"{name} {number}".encode())


def fuzz(
    prop: Property, bench: Bench, options: FuzzOptions, *, budget: int | None = None, shrink: bool = True
) -> Counter[str]:
    """Counts: `examples` that ran, `calls` in them, and `kernels` that they asked for."""
    counts: Counter[str] = Counter()
    kernels = set()
    failed: dict[str, Any] = {}
    journal = Journal(options.failures)

    @seed(seed_of(prop.name, options.seed))
    @quiet(share(prop.name, options.examples), shrink=shrink)
    @given(prop.examples(budget))
    def one(calls: tuple[Call, ...]) -> None:
        if "fatal" in failed:  # nothing more can be said once the context is lost
            return
        entry = {"property": prop.name, "calls": [call.to_json() for call in calls]}
        journal.begin(entry)
        try:
            prop.check(bench, calls)
        except Exception as error:
            failed["entry"] = entry | {"error": f"{type(error).__name__}: {error}"[:2000]}
            if not bench.alive():
                failed["fatal"] = error
                return
            raise
        counts.update(examples=1, calls=len(calls))
        kernels.update((call.case.dims, call.case.dtype, call.config()) for call in calls if not call.is_empty())

    with keeping(journal, failed), without_mutations():
        one()
    counts["kernels"] = len(kernels)
    return counts


def fuzz_sessions(
    bench: Bench, options: FuzzOptions, *, budget: int = 1 << 19, steps: int = 20, shrink: bool = True
) -> Counter[str]:
    """Counts: `examples` (sessions) and `calls` (steps in them)."""
    counts: Counter[str] = Counter()
    failed: dict[str, Any] = {}
    kind = seed(seed_of("sessions", options.seed))(fuzz_session.machine(bench, counts, failed, budget))
    how = quiet(share("sessions", options.examples), shrink=shrink, stateful_step_count=steps)
    with keeping(Journal(options.failures), failed), without_mutations():
        run_state_machine_as_test(kind, settings=how)
    return counts


@contextlib.contextmanager
def keeping(journal: Journal, failed: dict[str, Any]) -> Iterator[None]:
    """Keeps failed["entry"] if it comes to that; failed["fatal"] is raised here."""
    try:
        yield
        if "fatal" in failed:
            raise failed["fatal"]
    except BaseException:
        if "entry" in failed:
            print(f"kept in {journal.keep(failed['entry'])}:\n{json.dumps(failed['entry'])}")
        raise
    finally:
        journal.end()


# --- examples as JSON ------------------------------------------------------------------------------------------------


def replay(entry: dict[str, Any], bench: Bench) -> None:
    """Raises what the example raised when it was kept."""
    if entry["property"] == "sessions":
        fuzz_session.replay(entry["steps"], bench)
    else:
        PROPERTIES[entry["property"]].check(bench, tuple(map(Call.from_json, entry["calls"])))


def regressions() -> list[dict[str, Any]]:
    """Examples that failed once: property, calls (or steps), and in `found` what was wrong and what mended it."""
    entries: list[dict[str, Any]] = json.loads(REGRESSIONS.read_text())
    return entries


class Journal:
    """The example under way, and the file of those that failed. A folder that cannot be written is done without."""

    def __init__(self, failures: Path) -> None:
        self.failures = failures
        self._running = failures.with_suffix(f".running-{os.getpid()}.json")  # other properties run beside this one
        self._file = self._try(lambda: open(self._running, "w"))  # noqa: SIM115

    @staticmethod
    def _try(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            return None

    def begin(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            json.dump(entry, self._file)
            self._file.flush()

    def end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._try(self._running.unlink)

    def keep(self, entry: dict[str, Any]) -> Path:
        """Appends one line; returns the file."""
        for path in (self.failures, Path(tempfile.gettempdir(), self.failures.name)):
            if self._try(lambda path=path: _append(path, json.dumps(entry) + "\n")) is not None:
                return path
        return Path("nowhere: it cannot be written")


def _append(path: Path, line: str) -> int:
    with open(path, "a") as file:
        return file.write(line)
