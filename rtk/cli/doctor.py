"""``rtk doctor``: what the GPU path needs, one check a line; for what is missing, the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import rtk
from rtk.cli import console
from rtk.errors import RtkError

_NEEDED_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Check:
    """One line of the report. `needed`: the GPU path cannot run while this is not "ok"."""

    name: str
    status: str  # "ok", "missing" (a needed thing is not there or not usable) or "note" (worth knowing, nothing stops)
    detail: str
    fix: str = ""
    needed: bool = True


def run(arguments: argparse.Namespace) -> int:
    checks = list(examine())
    able = not any(check.needed and check.status == "missing" for check in checks)
    if arguments.json:
        console.write_json({"rtk": rtk.__version__, "gpu_path": able, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, able)
    return 0 if able else 1


def examine() -> Iterator[Check]:
    """Every check, cheapest first. A check that itself fails unexpectedly is reported as missing, never raised."""
    found: list[Check] = []
    for function in (_python, _packages, _driver, _gpus, _cupy, _nvrtc, _compiles, _torch, _cache):
        for check in _guarded(function):
            found.append(check)
            yield check
    if all(check.status != "missing" for check in found if check.needed):
        yield from _guarded(_launches)


def _guarded(function: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from function()
    except Exception as error:  # one broken part must not hide the other checks
        if os.environ.get("RTK_DEBUG") == "1":
            raise
        yield Check(function.__name__.strip("_"), "missing", f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("rtk: ")


def _print(checks: list[Check], able: bool) -> None:
    print(f"rtk {rtk.__version__} doctor\n")
    colours = {"ok": "green", "missing": "red", "note": "yellow"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        status, name = console.paint(check.status.ljust(7), colours[check.status]), check.name.ljust(width)
        print(f"  {status}  {name}  {check.detail}")
        if check.fix:
            print(f"  {'':7}  {'':{width}}  to mend it: {console.paint(check.fix, 'bold')}")
    print()
    if able:
        print("The GPU path can run.")
    else:
        blocking = ", ".join(check.name for check in checks if check.needed and check.status == "missing")
        print(f"The GPU path cannot run here (missing: {blocking}). NumPy arrays and CPU tensors work all the same.")


# --- the checks, in the order they are printed -----------------------------------------------------------------------


def _python() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}, {platform.system()}")
    yield Check("rtk", "ok", f"{rtk.__version__} at {Path(rtk.__file__).parent}")


def _packages() -> Iterator[Check]:
    for name in ("numpy", "ml_dtypes"):
        version = _version(name)
        if version:
            yield Check(name, "ok", version)
        else:
            yield Check(name, "missing", "not installed", _pip(name))


def _driver() -> Iterator[Check]:
    from rtk import toolchain

    version = toolchain.driver_version()
    if version is None:
        detail = "no NVIDIA driver (libcuda.so.1 cannot be loaded, or finds no GPU)"
        yield Check("driver", "missing", detail, _driver_command())
    elif version < (12, 0):
        detail = f"serves CUDA {version[0]}.{version[1]}; sm_90a kernels need 12.0 or newer"
        yield Check("driver", "missing", detail, _driver_command())
    else:
        yield Check("driver", "ok", f"serves CUDA {version[0]}.{version[1]}")


def _gpus() -> Iterator[Check]:
    from rtk import driver

    hardware = "no command mends this: rtk's kernels are for Hopper GPUs (H100, H200, GH200)"
    if not driver.available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        fix = "lspci | grep -i nvidia  # is one there, waiting for its driver?"
        if hidden is not None:
            fix = f"unset CUDA_VISIBLE_DEVICES  # it is {hidden!r}"
        yield Check("gpu", "missing", "none seen", fix)
        return
    devices = [driver.device_properties(index) for index in range(driver.device_count())]
    usable = [device for device in devices if tuple(device.compute_capability) == _NEEDED_CAPABILITY]
    for index, device in enumerate(devices):
        major, minor = device.compute_capability
        detail = f"{index}: {device.name}, compute capability {major}.{minor}, {device.sm_count} SMs"
        if (major, minor) == _NEEDED_CAPABILITY:
            yield Check("gpu", "ok", detail)
        elif usable:
            yield Check("gpu", "note", f"{detail}: not served, kernels need 9.0", needed=False)
        else:
            yield Check("gpu", "missing", f"{detail}: kernels need 9.0", hardware)


def _cupy() -> Iterator[Check]:
    trouble = _cupy_trouble()
    if trouble is None:
        from rtk import toolchain

        yield Check("cupy", "ok", toolchain.cupy_wheels()[0])
    elif _torch_cuda():  # rtk itself needs one library that allocates on the GPU, no matter which
        detail, fix = trouble
        yield Check("cupy", "note", f"{detail} (optional where torch has CUDA)", fix, needed=False)
    else:
        yield Check("cupy", "missing", *trouble)


def _cupy_trouble() -> tuple[str, str] | None:
    """(what is wrong with CuPy, the command that mends it), or None."""
    from rtk import toolchain

    wheels, python = toolchain.cupy_wheels(), shlex.quote(sys.executable)
    if not wheels:
        return "not installed", _pip(f"cupy-cuda{_cuda_major()}x")
    name = wheels[0].split()[0]
    if len(wheels) > 1:
        names = [wheel.split()[0] for wheel in wheels]
        # All of them have to go: each removal takes files of the others along.
        fix = f"{python} -m pip uninstall -y {' '.join(names)} && {_pip(f'cupy-cuda{_cuda_major()}x')}"
        return f"{' and '.join(wheels)} overwrite each other's files", fix
    try:
        importlib.import_module("cupy")
    except Exception as error:  # CuPy raises many kinds when a library of CUDA is not there
        return f"{wheels[0]} does not import: {first_line(error)}", _pip("--force-reinstall", "--no-deps", name)
    built_for, driver = _wheel_major(name), toolchain.driver_version()
    if built_for and driver and built_for > driver[0]:
        detail = f"{wheels[0]} needs a driver that serves CUDA {built_for}; this one serves {driver[0]}.{driver[1]}"
        return detail, f"{python} -m pip uninstall -y {name} && {_pip(f'cupy-cuda{driver[0]}x')}"
    return None


def _nvrtc() -> Iterator[Check]:
    from rtk import toolchain

    try:
        chosen = toolchain.nvrtc()
    except RtkError as error:
        yield Check("nvrtc", "missing", first_line(error), _pip(_nvrtc_wheel()))
        return
    yield Check("nvrtc", "ok", f"{chosen.build} at {chosen.path} ({chosen.reason})")
    for other in toolchain.find_nvrtc():
        if other.path != chosen.path:
            yield Check("nvrtc", "note", f"not chosen: {other.build} at {other.path} ({other.reason})", needed=False)


def _compiles() -> Iterator[Check]:
    """NVRTC really compiles: a wheel without its builtins library is found, loads, and fails only here."""
    from rtk import cache, jit

    source = jit.Source("rtk_doctor", 'extern "C" __global__ void rtk_doctor() {}')
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = jit.build(source, cache=cache.Cache(Path(folder) / "cache")).report
        except RtkError as error:
            fix = _pip("--force-reinstall", "--no-deps", _nvrtc_wheel())
            yield Check("compiler", "missing", first_line(error), fix)
            return
    yield Check("compiler", "ok", f"an empty kernel for sm_90a in {report.compile_ms:.0f} ms")


def _torch() -> Iterator[Check]:
    """torch is optional, and importing it takes seconds: its version file says as much."""
    version = _version("torch")
    if version is None:
        detail = "not installed (optional: rtk takes torch tensors where it is)"
        yield Check("torch", "note", detail, _pip("torch"), needed=False)
        return
    cuda = _torch_cuda()
    if cuda:
        yield Check("torch", "ok", f"{version}, built for CUDA {cuda}", needed=False)
    else:
        yield Check("torch", "note", f"{version}, built without CUDA: its tensors take the CPU path", needed=False)


def _cache() -> Iterator[Check]:
    from rtk.cache import default_cache

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = default_cache()
        stats = cache.stats()
    trouble = [str(w.message).removeprefix("rtk: ") for w in caught] or _unwritable(Path(cache.path))
    if trouble:
        fix = f"export RTK_CACHE_DIR={shlex.quote(str(Path.home() / 'rtk-cache'))}  # or any folder of your own"
        yield Check("cache", "note", trouble[0], fix, needed=False)
    else:
        held = (
            f"{stats['entries']} kernels, {console.size(stats['bytes'])} of at most {console.size(stats['max_bytes'])}"
        )
        yield Check("cache", "ok", f"{cache.path}: {held}", needed=False)


def _launches() -> Iterator[Check]:
    """Everything needed is there: so attention must run, and be right."""
    from rtk.cli import onboard

    yield Check("attention", *onboard.smoke())


# --- helpers ---------------------------------------------------------------------------------------------------------


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA version torch was built for, read from torch/version.py without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _unwritable(folder: Path) -> list[str]:
    """Why the cache folder, or the nearest folder above it that exists, cannot be written. Creates nothing lasting."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return []
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}; compiled kernels stay in memory"]


def _wheel_major(cupy_wheel: str) -> int | None:
    match = re.fullmatch(r"cupy-cuda(\d+)x", cupy_wheel)
    return int(match[1]) if match else None


def _cuda_major() -> int:
    """The CUDA major that a fix should ask for: the installed CuPy wheel's (two would collide), else the README's."""
    from rtk import toolchain

    majors = [major for wheel in toolchain.cupy_wheels() if (major := _wheel_major(wheel.split()[0]))]
    driver = toolchain.driver_version()
    serves = [major for major in majors if driver is None or major <= driver[0]]
    return min(serves or [12])


def _nvrtc_wheel() -> str:
    return "nvidia-cuda-nvrtc-cu12" if _cuda_major() == 12 else "nvidia-cuda-nvrtc"


def _pip(*arguments: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install {' '.join(arguments)}"


def _driver_command() -> str:
    try:
        system = platform.freedesktop_os_release()["ID"]
    except (OSError, KeyError):
        system = ""
    return {
        "ubuntu": "sudo ubuntu-drivers install",
        "debian": "sudo apt-get install nvidia-driver  # from Debian's non-free-firmware and non-free sections",
        "fedora": "sudo dnf install akmod-nvidia  # from RPM Fusion",
        "arch": "sudo pacman -S nvidia-open",
    }.get(system, "install NVIDIA's driver, 525 or newer, with this system's package manager")
