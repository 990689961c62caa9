"""What every test gets: hypothesis profiles, the `gpu` marker and the fixture `gpu`."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from gpus import Gpu, module_with_gpu, usable_gpu

# A shell ignores Ctrl-C in what it runs in the background, and children inherit that: tests of it would see nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["fuzz_options", "gpu_fixtures", "gpu_record_plugin"]

with contextlib.suppress(ImportError):  # a GPU machine may do without
    from hypothesis import HealthCheck, settings

    # No deadline: two workers on two cores, and the first call of anything compiles.
    settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
    settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """A GPU that rtk serves; the test is skipped where there is none."""
    index, why = usable_gpu()
    if index is None:
        pytest.skip(why)
    from rtk import driver

    found = Gpu(index, driver.device_properties(index), module_with_gpu("torch"), module_with_gpu("cupy"))
    if found.torch is not None:
        found.torch.cuda.set_device(index)
    if found.cupy is not None:
        found.cupy.cuda.Device(index).use()
    return found


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and usable_gpu()[0] is None:
        skip = pytest.mark.skip(reason=usable_gpu()[1])
        for item in marked:
            item.add_marker(skip)
