"""Which NVRTC compiles, found and named without loading it; and which CUDA the driver serves.

What the dynamic loader would pick on its own depends on what else was imported, and code generation for wgmma differs
between releases. So the library is chosen here, on purpose, and its exact build is part of every cubin's key.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from rtk import forks
from rtk.errors import ToolchainError

__all__ = [
    "Nvrtc",
    "cupy_wheels",
    "driver_version",
    "find_nvrtc",
    "mend",
    "nvrtc",
    "open_nvrtc",
    "version_of",
]

_MAJORS = range(12, 20)  # 12 is the first that knows sm_90a
_EXTRAS = (12, 13)  # the CUDA majors that rtk-kernels has an extra for


@dataclass(frozen=True)
class Nvrtc:
    """One NVRTC library: `path`, exact `build` ("12.9.86"), `major` version, and why it stands where it does."""

    path: str
    build: str
    major: int
    reason: str


# ------------------------------------------------------------------------------------------------------------- finding


def find_nvrtc() -> list[Nvrtc]:
    """Every NVRTC on this machine, best first, without loading any of them.

    Best is the newest one whose cubins the driver can load; without a driver, the newest there is. Those too new for
    the driver come last and say so in `reason`. RTK_NVRTC, if it names a file, comes first.
    """
    override = os.environ.get("RTK_NVRTC")
    ranked: list[tuple[int, tuple[int, ...], int, Nvrtc]] = []
    if override and os.path.isfile(override):
        build = _exact_build(override)
        ranked.append((-1, (), 0, Nvrtc(os.path.abspath(override), build, _major(build), "RTK_NVRTC names it")))
    files = list(_library_files())
    driver = driver_version() if files else None
    for order, path in enumerate(files):
        build = _exact_build(path)
        rank, reason = _judge(_major(build), driver)
        newest_first = tuple(-n for n in _numbers(build))
        ranked.append((rank, newest_first, order, Nvrtc(path, build, _major(build), reason)))
    ranked.sort(key=lambda row: row[:3])
    return [row[3] for row in ranked]


def _judge(major: int, driver: tuple[int, int] | None) -> tuple[int, str]:
    """Rank (0 usable, 1 not) and the words for it."""
    if driver is None:
        return 0, "no driver here to limit it, so the newest found"
    # A driver loads cubins of any minor release of its own major version, not of the next one.
    if major > driver[0]:
        return 1, f"too new: the driver serves CUDA {driver[0]}.{driver[1]}"
    return 0, f"newest found that the driver (CUDA {driver[0]}.{driver[1]}) can load"


_LIBRARY = re.compile(r"libnvrtc\.so\.(\d+(?:\.\d+)*)")
_WHEEL_FOLDER = re.compile(r"cu\d+|cuda_nvrtc")  # cu13, cu14 ...; cuda_nvrtc of the CUDA 12 wheel
_TOOLKIT = re.compile(r"cuda(-\d.*)?")


def _library_files() -> Iterator[str]:
    """Each libnvrtc.so.N where wheels, conda, toolkits and distributions put it; each real file once."""
    seen: set[tuple[int, int]] = set()
    for folder in _library_folders():
        for major in _MAJORS:  # stat by name: listing a system's library folder costs a hundred times as much
            path = os.path.join(folder, f"libnvrtc.so.{major}")
            try:
                stat = os.stat(path)
            except OSError:
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                yield path


def _library_folders() -> Iterator[str]:
    for entry in sys.path:
        nvidia = os.path.abspath(os.path.join(entry, "nvidia"))
        for part in _names_in(nvidia):
            if _WHEEL_FOLDER.fullmatch(part):
                yield os.path.join(nvidia, part, "lib")
    conda = os.environ.get("CONDA_PREFIX", "")
    yield from (os.path.join(prefix, "lib") for prefix in (conda, sys.prefix) if prefix)
    yield from (folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder)
    roots = [os.environ.get("CUDA_PATH", ""), os.environ.get("CUDA_HOME", "")]
    roots += [os.path.join("/usr/local", name) for name in _names_in("/usr/local") if _TOOLKIT.fullmatch(name)]
    yield from (os.path.join(root, "lib64") for root in roots if root)
    yield os.path.join("/usr/lib", getattr(sys.implementation, "_multiarch", ""))
    yield "/usr/lib64"


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


# ------------------------------------------------------------------------------------------ the exact build, unloaded


_EXACT = re.compile(r"libnvrtc\.so\.(\d+\.\d+\.\d+)")
_BUILTINS = re.compile(r"libnvrtc-builtins\.so\.(\d+)\.\d+")


def _exact_build(path: str) -> str:
    """The build of a libnvrtc file, without loading it (nor would that tell: nvrtcVersion has no third number)."""
    real = os.path.realpath(path)
    if named := _EXACT.fullmatch(os.path.basename(real)):  # toolkits: the real file's name carries it
        return named[1]
    if wheel := _wheel_version(real):
        return wheel
    # Neither: name the very file, so that two builds can never share a key.
    stat = os.stat(real)
    builtins = _builtins_beside(real)
    named = _LIBRARY.fullmatch(os.path.basename(real))
    version = builtins[0].rpartition(".so.")[2] if len(builtins) == 1 else named[1] if named else "0"
    return f"{version}+{stat.st_size:x}.{stat.st_mtime_ns:x}"


def _wheel_version(real: str) -> str | None:
    """The version of the wheel that installed `real`, if the wheel's own record agrees with the file lying there."""
    site, nvidia, *_ = real.rsplit(os.sep, 4)
    if nvidia != "nvidia":
        return None
    start, end = real[len(site) + 1 :] + ",", f",{os.path.getsize(real)}"  # of its row: path,hash,size
    for info in _names_in(site):
        if info.startswith("nvidia_cuda_nvrtc") and info.endswith(".dist-info"):
            try:
                with open(os.path.join(site, info, "RECORD"), encoding="utf-8", errors="replace") as record:
                    if any(row.startswith(start) and row.endswith(end) for row in record.read().splitlines()):
                        return info.removesuffix(".dist-info").rpartition("-")[2]
            except OSError:
                continue
    return None


def _builtins_beside(real: str) -> list[str]:
    """Paths of the libnvrtc-builtins.so.<major>.<minor> beside a libnvrtc, of its major where its name tells one."""
    folder, base = os.path.split(real)
    named = _LIBRARY.fullmatch(base)
    found = ((name, _BUILTINS.fullmatch(name)) for name in _names_in(folder))
    return [os.path.join(folder, name) for name, m in found if m and (not named or m[1] == named[1].partition(".")[0])]


def _numbers(build: str) -> tuple[int, ...]:
    """The leading numbers of a build: (12, 9, 86), or as many as are known."""
    return tuple(int(n) for n in build.partition("+")[0].split("."))


def _major(build: str) -> int:
    return _numbers(build)[0]


# --------------------------------------------------------------------------------------------------- choosing, loading

_chosen: dict[str | None, Nvrtc] = {}
_opened: dict[str, ctypes.CDLL] = {}
_open_lock = threading.Lock()
forks.new_in_child(globals(), "_open_lock")


def nvrtc() -> Nvrtc:
    """The NVRTC that compiles; chosen once a process (and once per value of RTK_NVRTC), not loaded.

    Raises ToolchainError, with the command that mends it, where there is none or none that can serve.
    """
    override = os.environ.get("RTK_NVRTC") or None
    if override in _chosen:
        return _chosen[override]
    if override and not os.path.isfile(override):
        raise ToolchainError(f"RTK_NVRTC names {override!r}, which is not a file", "unset RTK_NVRTC")
    found = find_nvrtc()
    if not found:
        raise ToolchainError("NVRTC, the CUDA run-time compiler, was not found", mend())
    best = found[0]
    if best.reason.startswith("too new"):
        raise ToolchainError(f"no NVRTC here can be used; {best.path} ({best.build}) is {best.reason}", mend())
    return _chosen.setdefault(override, best)


def mend() -> str:
    """The command that installs an NVRTC this machine's driver can use."""
    driver = driver_version()
    major = _EXTRAS[0] if driver is None else min(max(driver[0], _EXTRAS[0]), _EXTRAS[-1])
    return f'pip install "rtk-kernels[cuda{major}]"'


def open_nvrtc() -> ctypes.CDLL:
    """The chosen NVRTC, loaded by full path and checked to be the version it was taken for.

    Calls through it release the GIL. Different NVRTCs can be open in one process, each with its own symbols.
    """
    tool = nvrtc()
    with _open_lock:
        if tool.path in _opened:
            return _opened[tool.path]
        try:
            # NVRTC opens its builtins by bare name, and the CUDA 13.0 wheel has no run path to find them by.
            for builtins in _builtins_beside(os.path.realpath(tool.path)):
                ctypes.CDLL(builtins)
            library = ctypes.CDLL(tool.path)
            version = version_of(library)
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise ToolchainError(f"cannot load NVRTC from {tool.path}: {error}", mend()) from error
        taken_for = _numbers(tool.build)[:2]
        if taken_for != (0,) and version[: len(taken_for)] != taken_for:
            raise ToolchainError(
                f"{tool.path} was taken for NVRTC {tool.build} but is {version[0]}.{version[1]}", mend()
            )
        _settle(library)
        return _opened.setdefault(tool.path, library)


def _settle(library: ctypes.CDLL) -> None:
    """Lets NVRTC compile nothing, once, while SIGINT is ignored.

    During its first compile it installs a handler that ends the process at Ctrl-C, without a word and with exit code 4;
    where the signal is ignored it does not. Blocked as well, so that a process of one thread does not miss it. In one
    of several threads a Ctrl-C in these some 50 ms may be lost: another thread takes the signal, and ignores it.
    """
    libc, program, handler = ctypes.CDLL(None), ctypes.c_void_p(), ctypes.create_string_buffer(512)
    if library.nvrtcCreateProgram(ctypes.byref(program), b"", b"", 0, None, None):
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        libc.sigaction(signal.SIGINT, None, handler)
        try:
            libc.signal(signal.SIGINT, ctypes.c_void_p(signal.SIG_IGN))
            library.nvrtcCompileProgram(program, 0, None)
        finally:
            libc.sigaction(signal.SIGINT, handler, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version_of(library: ctypes.CDLL) -> tuple[int, int]:
    """(major, minor) that an opened NVRTC says it is."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


# --------------------------------------------------------------------------------------------------------- the rest


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the installed driver serves; None without a driver."""
    try:
        get_version = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    version = ctypes.c_int()
    if get_version(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def cupy_wheels() -> list[str]:
    """The installed CuPy distributions, as "name version", sorted. Two or more overwrite each other's files."""
    from importlib.metadata import distributions

    found = {(d.metadata["Name"] or "", d.version) for d in distributions()}
    return sorted(f"{name} {version}" for name, version in found if _CUPY.fullmatch(name))


_CUPY = re.compile(r"cupy([-_](cuda|rocm).*)?", re.IGNORECASE)
