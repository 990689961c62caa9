"""Fixtures of the GPU tests, loaded by conftest.py. (What they need is imported by those that run.)"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(params=["torch", "cupy"])
def library(gpu: Any, request: pytest.FixtureRequest) -> Any:
    from gpu_cases import arrays_of

    return arrays_of(gpu, request.param)


@pytest.fixture
def any_library(gpu: Any) -> Any:
    """One library is enough for what does not depend on it: torch where it is, for its float64 on the GPU."""
    from gpu_cases import arrays_of

    return arrays_of(gpu, "torch" if gpu.torch is not None else "cupy")


@pytest.fixture
def torch(gpu: Any) -> Any:
    from gpu_cases import arrays_of

    return arrays_of(gpu, "torch").module


@pytest.fixture
def cupy(gpu: Any) -> Any:
    from gpu_cases import arrays_of

    return arrays_of(gpu, "cupy").module


@pytest.fixture(scope="session")
def built(gpu: Any, request: pytest.FixtureRequest) -> None:
    """Compiles what the selected tests' cases will ask for, in parallel."""
    from gpu_cases import Case, build

    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [spec.params.get("case") for spec in parameters if spec is not None]
    build([case for case in cases if isinstance(case, Case)])
