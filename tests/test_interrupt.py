"""Ctrl-C at any moment leaves nothing behind: no temp file, no lock, no bad entry; and the next run works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compilers import needs_nvrtc

from rtk import entries
from rtk.cache import Cache

REPOSITORY = Path(__file__).resolve().parents[1]


def nothing_left_behind(folder: Path) -> None:
    """No temp file, no lock that anybody holds, no entry that is not whole."""
    assert not [name for name in os.listdir(folder) if not name.endswith(".cubin") and name != ".lock"]
    cache = Cache(folder)
    assert all(not isinstance(cache.check(item), str) for item in cache.items())
    with open(folder / ".lock", "r+b", buffering=0) as file:
        assert entries.fcntl.fcntl(file.fileno(), entries.fcntl.F_OFD_GETLK, entries.lock_request(0, 0))[:2] == b"\2\0"


# --- in one process, at any moment -----------------------------------------------------------------------------------

INTERRUPTED = """
import gc, json, os, random, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
from rtk import entries, jit, toolchain
from rtk.cache import Cache
warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)
folder, rng = sys.argv[2], random.Random(5)
toolchain.nvrtc = lambda: toolchain.Nvrtc("/none", "1.2.3", 12, "made up")
report = jit.CompileReport("k", 8, 0, 0, 0, 0, (), 1.0, "1.2.3", False)
jit._compile = lambda source, headers, key, build: jit.Binary(source.name, key, bytes(20_000), report)
armed = False


def interrupt(*_):
    if armed:
        raise KeyboardInterrupt


signal.signal(signal.SIGALRM, interrupt)


def put(cache, n):
    with cache.compiling(f"{n:064x}"):
        cache.put(f"{n:064x}", bytes(50_000), {})


def build(cache, n):
    jit._memory.clear()
    jit.build(jit.Source("k", str(n)), cache=cache)


def get(cache, n):
    cache.get(f"{n:064x}")


cache, hits = Cache(folder, max_bytes=400_000), 0
files = len(os.listdir("/proc/self/fd"))
for turn in range(6000):
    work, n = rng.choice([put, build, get]), rng.randrange(8)
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 6e-4))
    try:
        armed = True
        for _ in range(3):
            work(cache if turn % 2 else Cache(folder), n)
        armed = False
    except KeyboardInterrupt:
        armed = False
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")], turn
    with open(os.path.join(folder, ".lock"), "a+b", buffering=0) as file:  # another opener, as another process is
        request = entries.lock_request(0, 0)
        assert entries.fcntl.fcntl(file.fileno(), entries.fcntl.F_OFD_GETLK, request)[:2] == b"\\2\\0", "a lock is held"
    assert not jit._lock.locked() and not any(lock.locked() for lock, _ in jit._busy.values())
gc.collect()
# A descriptor may be lost between the system call that opened it and the line that notes it: few, and of no lock.
assert len(os.listdir("/proc/self/fd")) - files <= hits / 100, (len(os.listdir("/proc/self/fd")), files)
for n in range(8):
    put(cache, n)
    build(cache, n)
    get(cache, n)
print(json.dumps({"interrupts": hits}))
"""


@pytest.mark.skipif(not hasattr(entries.fcntl, "F_OFD_GETLK"), reason="needs open-file locks")
def test_thousands_of_interrupts_leave_nothing_behind(tmp_path, record_property):
    (tmp_path / "c").mkdir(0o700)
    command = [sys.executable, "-c", INTERRUPTED, str(REPOSITORY), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    interrupts = json.loads(done.stdout)["interrupts"]
    record_property("interrupts", interrupts)
    assert interrupts > 1000, "too few hit anything"
    nothing_left_behind(tmp_path / "c")


# --- several compiles under way --------------------------------------------------------------------------------------

SOURCES = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)  # a lock that Ctrl-C left to the collector, which lets it go
from rtk import cache, jit, toolchain
store = cache.Cache(sys.argv[2])
body = "".join(f"for (int j = 0; j < n; j++) p[j] = p[j + {n}] * {n}.5f;" for n in range(30))
sources = [jit.Source(f"k{n}", f'extern "C" __global__ void k{n}(float* p, int n) {{ {body} }}') for n in range(200)]


def tell(done, total, binary):
    print(done, flush=True)
"""
SETTLED = SOURCES + "toolchain.open_nvrtc()\n"  # in that moment, once a process, SIGINT is ignored
BUILD_MANY = SETTLED + "jit.build_many(sources, jobs=2, progress=tell, cache=store)"
BUILD_ONE_BY_ONE = SETTLED + "for n, source in enumerate(sources): tell(n, 200, jit.build(source, cache=store))"


def interrupt(command: list[str], after: float) -> tuple[int, str, float]:
    """Starts it, waits for its first line, and `after` seconds more; then Ctrl-C: (exit code, stderr, seconds)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), process.communicate()[1]
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, err = process.communicate(timeout=60)
        return process.returncode, err, time.monotonic() - sent
    finally:
        process.kill()


@needs_nvrtc
@pytest.mark.parametrize("code", [BUILD_MANY, BUILD_ONE_BY_ONE], ids=["build_many", "build"])
def test_ctrl_c_amid_compiles(tmp_path, code):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", code, str(REPOSITORY), str(folder)]
    counts = [0]
    for after in (0.0, 0.05, 0.11, 0.2):
        exit_code, err, seconds = interrupt(command, after)
        assert exit_code == -signal.SIGINT, (exit_code, err)
        assert "KeyboardInterrupt" in err and "Warning" not in err
        assert seconds < 20, "only the compiles under way are waited for"
        nothing_left_behind(folder)
        counts.append(len(Cache(folder).items()))
    assert counts == sorted(counts) and 0 < counts[-1] < 200, counts  # each run goes on where the last one was stopped
    done = subprocess.run([*command[:2], code.replace("range(200)", "range(12)"), *command[3:]], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(Cache(folder).items()) >= 12


STORM = (
    SOURCES
    + """
import signal, threading, time
caught, done = [], threading.Event()
signal.signal(signal.SIGINT, lambda *_: caught.append(time.monotonic()))


def storm():
    while not done.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0005)


where, thread = sys.argv[3], threading.Thread(target=storm)
thread.start()
if where == "main thread":
    jit.build(sources[0], cache=store)
else:
    jit.build_many(sources[:2], jobs=2, cache=store)
done.set()
thread.join()
count = len(caught)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
assert len(caught) > count > 0, "the handler is Python's again"
print("built")
"""
)


@needs_nvrtc
@pytest.mark.parametrize("where", ["main thread", "other threads"])
def test_nvrtc_does_not_end_the_process_at_ctrl_c(tmp_path, where):
    """Left alone, its first compile in a process does, with exit code 4: a notebook would lose all it holds."""
    command = [sys.executable, "-c", STORM, str(REPOSITORY), str(tmp_path / "cache"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "built\n"), done.stderr


@needs_nvrtc
def test_ctrl_c_amid_rtk_warmup(tmp_path):
    shapes = [part for d in range(16, 160, 8) for part in ("--shape", f"hq=2,sq=100,d={d}")]
    environment = os.environ | {"RTK_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "rtk.cli", "warmup", "--jobs", "2"]
    process = subprocess.Popen([*command, *shapes], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert "1 of 18" in first, first
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.endswith("rtk: interrupted\n") and "Traceback" not in err
    nothing_left_behind(tmp_path / "cache")
    assert 1 <= len(Cache(tmp_path / "cache").items()) < 18
    done = subprocess.run([*command, *shapes[:2]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
