"""After a fork: the GPU says in words that it cannot be used; what needs no GPU works, whatever threads were doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import needs_nvrtc

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# A process of its own for each test, so that the forks are of something small and known.
TOOLS = """
import ctypes, faulthandler, os, signal, sys, threading, time, warnings
sys.path.insert(0, sys.argv[1])
faulthandler.enable()
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking with threads
from rtk import cache, driver, forks, jit, toolchain
from rtk.errors import ToolchainError


def in_child(work, seconds=20):
    # What work() returned in a forked child, or its error, as text.
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)  # a hang ends it
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else f"ended by {status}"


class Cuda:  # libcuda, as far as these tests call it
    started_in = None

    def cuInit(self, flags):
        if Cuda.started_in not in (None, os.getpid()):
            return 3  # as the real one
        Cuda.started_in = os.getpid()
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value, attribute, ordinal):
        value._obj.value = {75: 9, 76: 0}.get(attribute, 132)
        return 0

    def cuDevicePrimaryCtxRetain(self, context, ordinal):
        context._obj.value = 4096
        return 0

    cuCtxGetCurrent = cuDevicePrimaryCtxRetain = lambda self, context, *_: setattr(context._obj, "value", 4096) or 0

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *_: 0


def with_fake_driver():
    real = ctypes.CDLL
    ctypes.CDLL = lambda name, *rest, **named: Cuda() if name == "libcuda.so.1" else real(name, *rest, **named)


USES = {
    "count": lambda: driver.device_count(),
    "properties": lambda: driver.device_properties(0),
    "call": lambda: driver.call("cuCtxSynchronize"),
    "load": lambda: driver.load(b"", "k", 0, 0),
    "zero": lambda: driver.zero(4096, 4, 0, 0),
    "launch": lambda: driver.Function(ctypes.c_void_p(1), 0).ready(1, 1, 0, bytes(64)).start(0),
}
"""


def run(code: str, *arguments: str, timeout: float = 100) -> str:
    """Standard output of the code after TOOLS."""
    command = [sys.executable, "-c", TOOLS + code, str(REPOSITORY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_use_of_the_driver_in_a_forked_child_is_an_error_that_says_what_to_do():
    run("""
with_fake_driver()
for use in USES.values():
    use()
parent = os.getpid()
for name, use in USES.items():
    said = in_child(use)
    assert said.startswith("ToolchainError"), (name, said)
    assert f"forked from process {parent}" in said and "CUDA" in said and 'set_start_method("spawn")' in said, said
    assert in_child(lambda: in_child(use)) == said, "a child of a child"
assert in_child(driver.available) == "False"
for use in USES.values():  # the parent is none the worse
    use()
""")


def test_a_child_forked_before_the_driver_was_started_may_start_it():
    run("""
with_fake_driver()
assert in_child(driver.device_count) == "1"
assert driver.device_count() == 1
""")


def test_a_driver_that_somebody_else_had_started_is_recognised_by_its_answer():
    run("""
with_fake_driver()
Cuda().cuInit(0)  # as torch does, without telling
said = in_child(driver.device_count)
assert said.startswith("ToolchainError") and "forked from a process that had started CUDA" in said and "spawn" in said
""")


def test_the_cpu_path_works_in_a_forked_child():
    run("""
import numpy as np
import rtk
from rtk import counters
with_fake_driver()
driver.device_count()
q, k, v = (np.random.default_rng(n).standard_normal((2, 3, 40, 16)) for n in range(3))
expected = rtk.attention(q, k, v, causal=True)
same = lambda: np.array_equal(rtk.attention(q, k, v, causal=True), expected)
assert in_child(same) == "True"
with counters._lock:  # a thread that was counting when the process was forked
    assert in_child(same) == "True"
""")


COMPILE = """
def source(name, lines=1):
    body = "".join(f"for (int j = 0; j < n; j++) p[j] = p[j + {n}] * {n}.5f;" for n in range(lines))
    return jit.Source(name, f'extern "C" __global__ void {name}(float* p, int n) {{ {body} }}')


def build(name, folder=sys.argv[2]):
    return jit.build(source(name), cache=cache.Cache(folder)).report.registers > 0
"""


@needs_nvrtc
def test_a_child_compiles_what_its_parent_has_and_has_not_compiled(tmp_path):
    run(
        COMPILE
        + """
with_fake_driver()
driver.device_count()
assert in_child(lambda: build("first")) == "True"   # NVRTC not yet loaded in the parent
assert build("second")
assert in_child(lambda: build("second")) == "True"  # from memory
assert in_child(lambda: build("third")) == "True"   # with the NVRTC that the parent loaded
""",
        str(tmp_path),
    )


@needs_nvrtc
def test_a_child_forked_while_other_threads_compile_can_compile(tmp_path):
    """Left alone, such a child hangs more often than not, on a lock inside NVRTC; so a fork waits for compiles."""
    run(
        COMPILE
        + """
stop = threading.Event()
compiled = []


def keep_compiling(n):
    while not stop.is_set():
        name = f"busy{n}_{len(compiled)}"
        jit.build(source(name, 15), cache=cache.Cache(sys.argv[2]))
        compiled.append(name)


threads = [threading.Thread(target=keep_compiling, args=(n,)) for n in range(2)]
for thread in threads:
    thread.start()
try:
    while not compiled:
        time.sleep(0.01)
    longest = 0
    for n in range(10):
        time.sleep(0.013 * (n % 5))
        before = time.monotonic()
        said = in_child(lambda: build(f"child{n}"))
        longest = max(longest, time.monotonic() - before)
        assert said == "True", (n, said)
    assert longest < 15, longest
    count = len(compiled)
    time.sleep(1)
    assert len(compiled) > count, "the parent's compiles went on"
finally:
    stop.set()
for thread in threads:
    thread.join()
""",
        str(tmp_path),
    )


def test_a_fork_waits_for_those_inside_and_those_outside_wait_for_the_fork():
    run("""
entered, leave, order = threading.Event(), threading.Event(), []


def inside():
    with forks.uninterrupted(), forks.uninterrupted():  # within itself, too
        entered.set()
        leave.wait(20)
        order.append("left")


def forking():
    order.append("forked" if in_child(lambda: forks._cut) == "False" else "cut")


threads = [threading.Thread(target=work) for work in (inside, forking, forking)]
threads[0].start()
entered.wait(20)
for thread in threads[1:]:
    thread.start()
time.sleep(0.3)
assert order == []
late = threading.Thread(target=inside)
late.start()  # waits for the forks
time.sleep(0.1)
leave.set()
for thread in (*threads, late):
    thread.join(20)
    assert not thread.is_alive()
assert sorted(order) == ["forked", "forked", "left", "left"] and order[0] == "left", order
with forks.uninterrupted():  # by the thread itself, say from a signal handler: it cannot wait for itself
    assert in_child(lambda: forks._cut) == "False"
assert not forks._inside
""")


def test_a_child_forked_in_the_midst_of_a_compile_without_end_says_so():
    run("""
forks._WAIT_S = 0.2
entered, leave = threading.Event(), threading.Event()


def inside():
    with forks.uninterrupted():
        entered.set()
        leave.wait(20)


def enter():
    with forks.uninterrupted():
        return "entered"


thread = threading.Thread(target=inside)
thread.start()
entered.wait(20)
said = in_child(enter)
assert said.startswith("ToolchainError") and "in the midst of a compile" in said and "spawn" in said, said
leave.set()
thread.join()
assert in_child(enter) == enter() == "entered"
""")


@needs_nvrtc
def test_a_pool_of_forked_workers(tmp_path):
    """What a data loader does: workers that compute attention on the CPU and compile, while the parent compiles."""
    run(
        COMPILE
        + """
import multiprocessing
import numpy as np
import rtk

with_fake_driver()
driver.device_count()
q = np.random.default_rng(0).standard_normal((1, 2, 33, 8))
expected = rtk.attention(q, q, q)


def work(n):
    try:
        driver.device_count()
    except ToolchainError as error:
        assert "spawn" in str(error)
    return build(f"k{n % 4}") and np.array_equal(rtk.attention(q, q, q), expected)


thread = threading.Thread(target=build, args=("parent",))
thread.start()
with multiprocessing.get_context("fork").Pool(4) as pool:
    assert pool.map_async(work, range(12), chunksize=1).get(60) == [True] * 12
thread.join()
""",
        str(tmp_path),
    )
