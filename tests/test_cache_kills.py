"""A thousand processes killed at random moments while they build, write, read and prune in one cache folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS = 1000

# A process of its own that imports nothing but rtk.jit: forking it takes a millisecond.
SUPERVISOR = """
import json, os, random, signal, sys, time, traceback, warnings
sys.path.insert(0, sys.argv[1])
from rtk import entries, jit, toolchain
from rtk.cache import Cache
assert not {"numpy", "cupy", "torch"} & set(sys.modules)
warnings.simplefilter("error")  # a damaged entry is a CacheWarning, and so ends the test
entries._TEMP_GRACE_S = 0.1     # ten seconds in earnest: the test would be over before anything was swept
folder, kills = sys.argv[2], int(sys.argv[3])
rng = random.Random(20240811)
keys = [f"{n:064x}" for n in range(6)]
cubins = {key: random.Random(key).randbytes(rng.choice([2_000, 60_000, 400_000])) for key in keys}
names = {f"k{n}": rng.randbytes(150_000) for n in range(6)}
sources = [jit.Source(f"k{n}", f"text {n}") for n in range(6)]
toolchain.nvrtc = lambda: toolchain.Nvrtc("/none", "1.2.3", 12, "made up")


def compile_(source, headers, key, build):  # what NVRTC would make of it, in no time
    report = jit.CompileReport(source.name, 8, 0, 0, 0, 0, (), 1.0, build, False)
    return jit.Binary(source.name, key, made_of(source.name), report)


def made_of(name):
    return names[name]


jit._compile = compile_


def write(cache, n):
    with cache.compiling(keys[n]):
        assert cache.put(keys[n], cubins[keys[n]], {"key": keys[n]})


def read(cache, n):
    for key in keys:
        entry = cache.get(key)
        assert entry is None or (entry.cubin, entry.meta) == (cubins[key], {"key": key})


def build(cache, n):
    jit._memory.clear()
    assert jit.build(sources[n], cache=cache).cubin == made_of(f"k{n}")


def prune(cache, n):
    cache.prune(n * 120_000)


def clear(cache, n):
    cache.clear()


def start():
    child = os.fork()
    if child:
        return child
    try:
        mine, bounded = random.Random(os.urandom(8)), Cache(folder, max_bytes=900_000)
        while True:
            cache = bounded if mine.random() < 0.5 else Cache(folder)  # one that has put before, or a new process's
            mine.choices([write, build, read, prune, clear], [6, 6, 3, 2, 0.1])[0](cache, mine.randrange(6))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def temps():
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


os.mkdir(folder, 0o700)
started = time.monotonic()
living = [start() for _ in range(3)]
torn = good = litter = 0
for kill in range(kills):
    time.sleep(rng.expovariate(1 / 0.006))
    child = living.pop(rng.randrange(len(living)))
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, f"after {kill} kills a child ended by itself: {status}"
    left = temps()
    torn += any(f".cubin.{child}." in name for name in left)
    litter = max(litter, len(left))
    living.append(start())
    cache = Cache(folder)
    for key in keys:
        entry = cache.get(key)
        assert entry is None or entry.cubin == cubins[key]
        good += entry is not None
    if kill % 20 == 0:  # everything, whoever made it
        for item in cache.items():
            found = cache.check(item)
            assert not isinstance(found, str) or "No such file" in found, (item, found)
for child in living:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

# The dead hold no lock, and what they left goes.
cache = Cache(folder)
for key in keys:
    begun = time.monotonic()
    with cache.compiling(key):
        pass
    assert time.monotonic() - begun < 1, "a lock outlived its holder"
time.sleep(0.2)
cache.sweep()
assert not temps()
for n in range(6):
    build(cache, n)
    write(cache, n)
assert len(cache.items()) == 12 and all(not isinstance(cache.check(item), str) for item in cache.items())
strangers = [name for name in os.listdir(folder) if not name.endswith(".cubin")]
assert strangers == [".lock"] and os.path.getsize(os.path.join(folder, ".lock")) == 0, strangers
seconds = round(time.monotonic() - started, 1)
shown = {"kills": kills, "torn_writes": torn, "entries_read": good, "most_litter": litter, "seconds": seconds}
print(json.dumps(shown))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_thousand_kills_leave_no_bad_entry_no_lock_and_no_litter(tmp_path, record_property):
    command = [sys.executable, "-c", SUPERVISOR, str(REPOSITORY), str(tmp_path / "cache"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    for name, value in shown.items():
        record_property(name, value)
    assert shown["kills"] == KILLS
    assert shown["torn_writes"] > KILLS / 50, f"too few kills hit a write, so this showed little: {shown}"
    assert shown["entries_read"] > KILLS, shown
    # Without the sweeping, every torn write would still lie there.
    assert shown["most_litter"] < max(20, shown["torn_writes"] / 2), shown
