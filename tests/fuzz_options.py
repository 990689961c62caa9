"""Options of the fuzzing on the command line of pytest, loaded by conftest.py."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DEFAULT_EXAMPLES = 2000
_FAILURES = "fuzz_failures.jsonl"


@dataclass(frozen=True)
class FuzzOptions:
    examples: int  # in all, over the properties
    seed: int
    failures: Path  # where failing examples are appended


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rtk fuzzing")
    group.addoption(
        "--fuzz-examples", type=int, default=DEFAULT_EXAMPLES, metavar="N", help="examples in all (default %(default)s)"
    )
    group.addoption("--fuzz-seed", default="0", metavar="SEED", help='a number, or "random" (default 0)')
    group.addoption(
        "--fuzz-failures", default=_FAILURES, metavar="PATH", help="append failing examples here (default %(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fuzz-seed") == "random":
        config.option.fuzz_seed = str(secrets.randbelow(1 << 32))


@pytest.fixture(scope="module")
def fixed_choices() -> Iterator[None]:
    """Calls get the kernel's own pick, so that the pool of kernels (strategies.py) can say which lengths lead where."""
    from rtk.autotune import choice

    with choice.using("off"):
        yield


def pytest_report_header(config: pytest.Config) -> str | None:
    options = of(config)
    if (options.examples, options.seed) == (DEFAULT_EXAMPLES, 0):
        return None
    return f"fuzzing: --fuzz-examples {options.examples} --fuzz-seed {options.seed}"


def of(config: pytest.Config) -> FuzzOptions:
    """The defaults where this plugin is not loaded."""
    try:
        seed = int(config.getoption("--fuzz-seed", default="0"))
    except ValueError:
        raise pytest.UsageError("--fuzz-seed: a number, or random") from None
    path = Path(config.invocation_params.dir, config.getoption("--fuzz-failures", default=_FAILURES))
    return FuzzOptions(config.getoption("--fuzz-examples", default=DEFAULT_EXAMPLES), seed, path)


@pytest.fixture
def fuzz_options(request: pytest.FixtureRequest) -> FuzzOptions:
    return of(request.config)
