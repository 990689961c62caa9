"""rtk/jit.py: what is keyed is what is compiled, each key is compiled once, and every report tells the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rtk import jit, toolchain
from rtk.cache import Cache
from rtk.errors import ArgumentError, CacheWarning, CompileError, ToolchainError
from rtk.jit import Binary, CompileReport, Source, build, build_many, include_closure, key

REPOSITORY = Path(__file__).resolve().parents[1]


def installed_nvrtcs() -> list[toolchain.Nvrtc]:
    """One of each build that is installed."""
    try:
        toolchain.nvrtc()
    except ToolchainError:
        return []
    return list({found.build: found for found in reversed(toolchain.find_nvrtc())}.values())


needs_nvrtc = pytest.mark.skipif(not installed_nvrtcs(), reason="no NVRTC is installed")


EACH: list[toolchain.Nvrtc | None] = [*installed_nvrtcs()] or [None]


@pytest.fixture(params=EACH, ids=lambda found: found.build if found else "none")
def each_nvrtc(request, monkeypatch):
    """The test runs under every NVRTC that is installed."""
    if request.param is None:
        pytest.skip("no NVRTC is installed")
    monkeypatch.setenv("RTK_NVRTC", request.param.path)
    return request.param


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.setattr(jit, "_memory", type(jit._memory)())
    return Cache(tmp_path / "cache")


@pytest.fixture
def compiles(monkeypatch) -> list[str]:
    """The names of what has been compiled, in order."""
    names: list[str] = []
    really_compile = jit._compile

    def compile_(source, *rest):
        names.append(source.name)
        return really_compile(source, *rest)

    monkeypatch.setattr(jit, "_compile", compile_)
    return names


def kernel(name: str = "k", body: str = "p[threadIdx.x] = 1.0f;", head: str = "", **more) -> Source:
    return Source(name, f'{head}\nextern "C" __global__ void {name}(float* p, int n) {{\n{body}\n}}\n', **more)


def headers_in(folder: Path, **files: str) -> tuple[str, ...]:
    """Writes files (named with __ for /, without .cuh) and returns include_dirs that find them."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".cuh")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return (str(folder),)


# --- the include closure ---------------------------------------------------------------------------------------------


def test_closure_is_recursive_and_named_as_spelled(tmp_path):
    dirs = headers_in(
        tmp_path,
        a="#pragma once\n#include <rtk/b.cuh>\n",
        rtk__b='  #  include "c.cuh" // beside b\n#include <a.cuh>\n',  # and a circle
        rtk__c="int c;\n",
        unused="int unused;\n",
    )
    found = include_closure(Source("k", "#include <a.cuh>\n", dirs))
    assert found == {name: (tmp_path / path).read_text() for name, path in
                     [("a.cuh", "a.cuh"), ("rtk/b.cuh", "rtk/b.cuh"), ("c.cuh", "rtk/c.cuh")]}  # fmt: skip
    assert include_closure(Source("k", "int nothing;", dirs)) == {}


def test_closure_takes_the_first_folder_and_does_not_ask_for_comments(tmp_path):
    first = headers_in(tmp_path / "1", x="int first;\n")
    second = headers_in(tmp_path / "2", x="int second;\n", y="int y;\n")
    text = """
#include <x.cuh>
// #include <absent1.cuh>
/* a longer one:
#include <absent2.cuh>
*/
const char* s = "/*";
#if 0
#include <y.cuh>
#endif
"""
    assert include_closure(Source("k", text, first + second)) == {"x.cuh": "int first;\n", "y.cuh": "int y;\n"}
    assert include_closure(Source("k", "#include <x.cuh>", second + first)) == {"x.cuh": "int second;\n"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("#include <absent.cuh>", r"include of absent\.cuh in rtk/a\.cuh, line 2, was not found in \["),
        ('#include "absent.cuh"', r"include of absent\.cuh in rtk/a\.cuh, line 2, was not found in \[.*/rtk"),
        ("#include WHICH", r"include of a name in rtk/a\.cuh, line 2, is computed by a macro"),
        ('#include "same.cuh"', r"include of same\.cuh in rtk/a\.cuh, line 2, means .*rtk/same\.cuh here and "),
        ("#include <cuda_fp16.h>", r"cuda_fp16\.h in rtk/a\.cuh"),
    ],
)
def test_an_include_that_cannot_be_keyed_is_an_error_that_names_it_and_who_asked(tmp_path, line, said):
    dirs = headers_in(tmp_path, rtk__a=f"int one;\n{line}\nint three;\n", rtk__same="int x;", same="int y;")
    source = Source("k", "#include <same.cuh>\n#include <rtk/a.cuh>\n", dirs)
    for ask in (include_closure, lambda s: key(s, "13.0.88")):
        with pytest.raises(CompileError, match=said) as caught:
            ask(source)
        assert f">    2 | {line}" in str(caught.value)


# --- the key ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@st.composite
def an_edit(draw) -> tuple[str, str]:
    """A text and the same text with one character replaced, inserted or dropped."""
    text = draw(TEXTS.filter(bool))
    at = draw(st.integers(0, len(text) - 1))
    other = draw(st.sampled_from(["", *"x\n #", text[at] + "y"]))
    assume(other != text[at] and "#" not in text + other)
    return text, text[:at] + other + text[at + 1 :]


@given(an_edit(), st.sampled_from(["text", "name", "option", "build", "header", "nested"]))
def test_any_edit_of_any_input_changes_the_key(tmp_path_factory, edit, where):
    folder = tmp_path_factory.mktemp("h")

    def key_with(text: str) -> str:
        value = dict.fromkeys(("text", "name", "option", "build", "header", "nested"), "same") | {where: text}
        for file, include, content in [("a", "#include <b.cuh>\n", "header"), ("b", "", "nested")]:
            (folder / f"{file}.cuh").write_bytes((include + value[content]).encode())
        source = Source(value["name"], "#include <a.cuh>\n" + value["text"], (str(folder),), (value["option"],))
        return key(source, value["build"])

    before, after = edit
    assert key_with(before) == key_with(before)
    assert key_with(before) != key_with(after)


@given(st.lists(TEXTS, min_size=2, max_size=6), st.data())
def test_no_two_inputs_run_together_into_one_key(parts, data):
    def key_of(texts: list[str]) -> str:
        return key(Source(texts[0], texts[1].replace("#", ""), (), tuple(texts[2:])), "13.0.88")

    at = data.draw(st.integers(0, len(parts) - 2))
    moved = [*parts[:at], parts[at] + parts[at + 1][:1], parts[at + 1][1:], *parts[at + 2 :]]
    assume([t.replace("#", "") for t in moved] != [t.replace("#", "") for t in parts] and "#" not in "".join(parts))
    assert key_of(moved) != key_of(parts)
    assert key_of([*parts, ""]) != key_of(parts)


def test_the_key_does_not_know_where_the_headers_lie(tmp_path):
    files = {"a": "#include <rtk/b.cuh>\n", "rtk__b": "int b;\n"}
    keys = [key(Source("k", "#include <a.cuh>", headers_in(tmp_path / place, **files)), "1.2.3") for place in "xy"]
    assert keys[0] == keys[1]
    (tmp_path / "y" / "other.cuh").write_text("not included")
    assert keys[1] == key(Source("k", "#include <a.cuh>", (str(tmp_path / "y"),)), "1.2.3")


def test_a_change_of_headers_that_are_not_utf8_changes_the_key(tmp_path):
    def key_with(data: bytes) -> str:
        (tmp_path / "a.cuh").write_bytes(data)
        return key(Source("k", "#include <a.cuh>", (str(tmp_path),)), "1.2.3")

    assert key_with(b"// \xff\n") != key_with(b"// \xfe\n")


# --- the report ------------------------------------------------------------------------------------------------------

TODAY = """ptxas info    : (C7517) warpgroup.wait is injected in around line 53 by compiler in function 'k'
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     3688 bytes stack frame, 4108 bytes spill stores, 4148 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 3720 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 131.389 ms
ptxas info    : Function properties for _Z1fPf
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'k2' for 'sm_90a'
ptxas info    : Function properties for k2
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 512 bytes smem
"""
OLDER = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 256+0 bytes smem, 384 bytes cmem[0], 4 bytes cmem[2]
"""


@pytest.mark.parametrize(
    ("log", "numbers"),
    [(TODAY, (168, 3720, 4112, 4156, 1024, 1)), (OLDER, (40, 8, 0, 0, 256, 0)), ("", (0,) * 6)],
)
def test_reading_ptxas(log, numbers):
    report = jit._read_log(log, "k", 12.5, "13.0.88")
    assert numbers == (
        report.registers,
        report.stack_bytes,
        report.spill_store_bytes,
        report.spill_load_bytes,
        report.smem_static_bytes,
        len(report.warnings),
    )
    assert (report.name, report.compile_ms, report.nvrtc, report.from_cache) == ("k", 12.5, "13.0.88", False)
    assert not report.clean  # the last one, because a kernel that nothing is known of is not called clean


CLEAN_LOG = OLDER.replace("8 bytes stack", "0 bytes stack")


@pytest.mark.parametrize(
    ("line", "is_problem"),
    [
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
            True,
        ),
        (
            "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to y",
            True,
        ),
        ("ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine", True),
        ("ptxas info    : (C7514) something about wgmma in function 'k'", True),
        ("ptxas info    : (C7515) something else", True),
        ("ptxas info    : (C7519) warpgroup.arrive is injected in around line 39 by compiler", True),
        ("ptxas warning : Potential Performance Loss: without a number", True),
        ("ptxas warning : Unresolved extern variable 'x'", False),
        ('k.cu(2): warning #177-D: variable "unused" was declared but never referenced', False),
        ("ptxas info    : (C1234) advisory of another kind", False),
    ],
)
def test_every_warning_line_is_kept_and_performance_ones_are_problems(line, is_problem):
    assert jit._read_log(CLEAN_LOG, "k", 1.0, "1.2.3").clean
    report = jit._read_log(
        f"{line}\n  int warning = 3; // a line of source that NVRTC shows\n{CLEAN_LOG}", "k", 1.0, "1.2.3"
    )
    assert report.warnings == (line,)
    assert report.problems() == ([f"k: {line}"] if is_problem else [])
    assert report.clean is not is_problem


REPORTS = st.builds(
    CompileReport,
    *[TEXTS, *[st.integers(0, 1 << 20)] * 5, st.lists(TEXTS).map(tuple), st.floats(0, 1e6), TEXTS, st.booleans()],
)


@given(REPORTS)
def test_a_report_survives_json(report):
    assert CompileReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.clean == (not report.problems())
    expected = [
        report.registers == 0,
        report.stack_bytes > 0,
        bool(report.spill_store_bytes or report.spill_load_bytes),
    ]
    assert len(replace(report, warnings=()).problems()) == sum(expected)


# --- planted kernels, each with one fault ----------------------------------------------------------------------------

WGMMA = {
    "F": 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");',
    "M": (
        'asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" '
        ': "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));'
    ),
    "C": 'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");',
    "W": 'asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");',
    "T": 'asm volatile("mul.f32 %0, %0, 0f40000000;" : "+f"(d[0]) :: "memory");',  # touches an accumulator
}
SPILLS = """
float a[200];
#pragma unroll
for (int i = 0; i < 200; i++) a[i] = p[i * n + threadIdx.x];
__syncthreads();
#pragma unroll
for (int i = 0; i < 200; i++) p[i * n + threadIdx.x] = a[199 - i] * a[i];
"""
STACK = """
float a[300];
for (int i = 0; i < 300; i++) a[i] = p[i * n];
__syncthreads();
for (int i = 0; i < n; i++) p[threadIdx.x + i] = a[(n * i) % 300];
"""


def steps(order: str) -> str:
    return "\n".join(WGMMA[step] for step in order)


def wgmma(order: str) -> str:
    sum_of_d = "d[0] + d[1] + d[2] + d[3]"
    return f"unsigned long long a = n, b = 2 * n; float d[4] = {{}};\n{steps(order)}\np[threadIdx.x] = {sum_of_d};"


CALLED = f"__noinline__ void f(float* d, unsigned long long a, unsigned long long b) {{ {steps('FMCW')} }}"
SERIALIZED = kernel(  # the pipeline crosses a call
    head=CALLED,
    body="float d[4] = {}; for (int i = 0; i < n; i++) f(d, i, 2 * i); p[threadIdx.x] = d[0] + d[1] + d[2] + d[3];",
)


def test_a_clean_kernel_is_clean(each_nvrtc, cache):
    binary = build(kernel(body=wgmma("FMCW") + "\n__shared__ float s[32]; s[n & 31] = p[0]; p[1] = s[0];"), cache=cache)
    report = binary.report
    assert report.clean and report.problems() == [] and report.warnings == ()
    assert (report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (0, 0, 0)
    assert 8 <= report.registers <= 255 and report.smem_static_bytes == 128
    assert report.nvrtc == each_nvrtc.build and report.compile_ms > 0 and not report.from_cache
    assert binary.cubin[:4] == b"\x7fELF" and binary.name == report.name == "k"


def test_a_kernel_that_spills_is_reported(each_nvrtc, cache):
    spilling = kernel(body=SPILLS)
    spilling = replace(spilling, text=spilling.text.replace("void k", "void __launch_bounds__(1024, 2) k"))
    report = build(spilling, cache=cache).report
    assert report.spill_store_bytes > 0 and report.spill_load_bytes > 0 and report.registers == 32
    assert any("spills" in problem for problem in report.problems()) and not report.clean


@pytest.mark.parametrize("called", [False, True])
def test_a_kernel_with_a_stack_frame_is_reported(each_nvrtc, cache, called):
    source = kernel(body=STACK)
    if called:  # in a function of its own, that the kernel calls
        head = f"__noinline__ void f(float* p, int n) {{ {STACK} }}"
        source = kernel(head=head, body="f(p, n); f(p + n, 2 * n);")
    report = build(source, cache=cache).report
    assert report.stack_bytes >= 1200 and report.spill_store_bytes == 0
    assert report.problems() == [f"k: {report.stack_bytes} bytes of stack"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (kernel(body=wgmma("FMCTW")), "(C7517)"),  # touched between commit and wait: a wait is injected
        (SERIALIZED, "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"),
        (kernel(body='asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); p[0] = 1;'), "(C7508)"),
    ],
    ids=["touched", "serialized", "setmaxnreg"],
)
def test_a_kernel_that_loses_its_wgmma_pipeline_is_reported(each_nvrtc, cache, source, code):
    report = build(source, cache=cache).report
    assert any(code in line for line in report.warnings), report.warnings
    assert any(code in problem for problem in report.problems()) and not report.clean
    jit._memory.clear()
    assert build(source, cache=cache).report == replace(report, from_cache=True)  # the disk forgets none of it


# --- errors of the source --------------------------------------------------------------------------------------------


def test_an_error_shows_the_line_in_the_unit(each_nvrtc, cache):
    with pytest.raises(CompileError) as caught:
        build(kernel(body="int ok = 1;\nint bad = undefined_thing;"), cache=cache)
    text = str(caught.value)
    assert ">    4 | int bad = undefined_thing;" in text and "     3 | int ok = 1;" in text
    assert 'identifier "undefined_thing" is undefined' in text and each_nvrtc.build in text
    assert caught.value.source.count("\n") > 3 and "undefined_thing" in caught.value.log


def test_a_static_assert_in_a_header_shows_its_text_and_its_line(each_nvrtc, cache, tmp_path):
    header = (
        '#pragma once\n\ntemplate <int N> struct Tile { static_assert(N % 64 == 0, "BLOCK_M must divide by 64"); };\n'
    )
    dirs = headers_in(tmp_path, rtk__tile=header)
    with pytest.raises(CompileError) as caught:
        build(kernel(head="#include <rtk/tile.cuh>", body="Tile<100> t;", include_dirs=dirs), cache=cache)
    text = str(caught.value)
    assert 'static assertion failed with "BLOCK_M must divide by 64"' in text
    assert "rtk/tile.cuh, line 3:" in text and ">    3 | template <int N> struct Tile" in text
    assert "N=100" in text  # and NVRTC's own account of who instantiated it


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (kernel(body='asm volatile("bogus.instr;");'), "Not a name of any known instruction: 'bogus'"),  # ptxas says it
        (kernel(options=("--no-such-option",)), "unrecognized option --no-such-option"),
        (kernel(options=("--gpu-architecture=sm_80",)), "gpu-architecture"),
        (Source("k", 'extern "C" __global__ void other() {}'), 'no extern "C" kernel named k'),
        (Source("k", "__global__ void k() {}"), 'no extern "C" kernel named k'),  # a mangled name
        (Source("k", ""), 'no extern "C" kernel named k'),
    ],
)
def test_what_nvrtc_says_is_never_swallowed(each_nvrtc, cache, source, said):
    with pytest.raises(CompileError, match="k") as caught:
        build(source, cache=cache)
    assert said in str(caught.value)
    assert cache.stats()["entries"] == 0 and not jit._memory  # a failure is not kept


@needs_nvrtc
def test_only_the_closure_is_compiled(cache, tmp_path, monkeypatch):
    """Nothing is found in the current folder or beside the unit: what was not keyed cannot get in."""
    headers_in(tmp_path, here="int x;")
    monkeypatch.chdir(tmp_path)
    sneaky = '/**/ #include "here.cuh"\n#inc\\\nlude <here.cuh>'  # two spellings that the scan does not see
    for line in sneaky.split("\n", 1):
        with pytest.raises(CompileError, match="could not open source file"):
            build(kernel(head=line), cache=cache)


@needs_nvrtc
def test_headers_reach_nvrtc_under_the_names_they_are_included_by(cache, tmp_path):
    dirs = headers_in(
        tmp_path,
        a="#pragma once\n#include <rtk/b.cuh>\n#include <rtk/sub/d.cuh>\nstruct A { B b; D d; };\n",
        rtk__b='#pragma once\n#include "c.cuh"\nstruct B { C c; };\n',
        rtk__c="#pragma once\nstruct C { int x = 40; };\n",
        rtk__sub__d='#pragma once\n#include "../e.cuh"\nstruct D { E e; };\n',
        rtk__e="#pragma once\nstruct E { int x = 2; };\n",
    )
    text = "#include <rtk/b.cuh>\n#include <a.cuh>"
    source = kernel(head=text, body="A a; p[0] = a.b.c.x + a.d.e.x; static_assert(sizeof(A) == 8);", include_dirs=dirs)
    assert build(source, cache=cache).report.clean


@pytest.mark.parametrize(
    "option",
    [
        "-I/usr/include",
        "-I",
        "--include-path=/x",
        "-include-path=/x",
        "-include=x.h",
        "--pre-include=x.h",
        "-pch",
        "--pch",
        "--use-pch=x",
        "--create-pch=x",
        "--split-compile=0",
        "-split-compile=2",
    ],
)
def test_options_that_bring_in_what_is_not_keyed_are_refused(cache, option):
    with pytest.raises(ArgumentError, match="options that bring in no files"):
        build(kernel(options=(option,)), cache=cache)


@pytest.mark.parametrize("source", [Source("a-b", ""), Source("", ""), Source("k\n", ""), Source("k", "int x;\0")])
def test_sources_that_cannot_be(cache, source):
    with pytest.raises(ArgumentError):
        build(source, cache=cache)


def test_nvrtc_is_told_to_compile_and_not_to_look_into_a_cache_of_its_own(each_nvrtc, cache, monkeypatch):
    """Since 12.9 it keeps one where there is a driver, and what comes out of it comes without ptxas's report."""
    given: list[bytes] = []

    class Spy:
        def __init__(self, library):
            self.library = library

        def __getattr__(self, name):
            if name == "nvrtcCompileProgram":
                return self.compile
            return getattr(self.library, name)

        def compile(self, program, count, options):
            given.extend(options)
            return self.library.nvrtcCompileProgram(program, count, options)

    spy = Spy(toolchain.open_nvrtc())
    monkeypatch.setattr(toolchain, "open_nvrtc", lambda: spy)
    assert build(kernel(), cache=cache).report.registers > 0
    assert b"--gpu-architecture=sm_90a" in given
    assert (b"--no-cache" in given) == (toolchain.version_of(spy.library) >= (12, 9))


@needs_nvrtc
def test_options_count(cache):
    source = kernel(body="p[0] = VALUE;", options=("-DVALUE=3",))
    other = replace(source, options=("-DVALUE=4",))
    assert build(source, cache=cache).cubin != build(other, cache=cache).cubin


# --- memory, disk, NVRTC ---------------------------------------------------------------------------------------------


@needs_nvrtc
def test_memory_then_disk_then_nvrtc(cache, compiles):
    source = kernel()
    first = build(source, cache=cache)
    assert (compiles, first.report.from_cache) == (["k"], False)
    reads = cache.stats()["hits"]
    second = build(source, cache=cache)
    assert second.cubin == first.cubin and second.report == replace(first.report, from_cache=True)
    assert cache.stats()["hits"] == reads  # it came from memory
    jit._memory.clear()
    assert build(source, cache=cache) == second
    assert cache.stats()["hits"] == reads + 1  # it came from disk
    assert compiles == ["k"]
    assert first.key == key(source, toolchain.nvrtc().build)
    build(source, cache=Cache(cache.path.parent / "another"))  # another folder gets an entry of its own
    assert compiles == ["k", "k"]


@needs_nvrtc
def test_an_edited_header_is_compiled_again(cache, compiles, tmp_path):
    dirs = headers_in(tmp_path, value="#define VALUE 1\n")
    source = kernel(head="#include <value.cuh>", body="p[0] = VALUE;", include_dirs=dirs)
    one = build(source, cache=cache)
    headers_in(tmp_path, value="#define VALUE 2\n")
    two = build(source, cache=cache)
    headers_in(tmp_path, value="#define VALUE 1\n")
    assert build(source, cache=cache).cubin == one.cubin != two.cubin
    assert len(compiles) == 2


def test_each_nvrtc_has_its_own_entry(each_nvrtc, cache, compiles):
    build(kernel(), cache=cache)
    assert build(kernel(), cache=cache).report.nvrtc == each_nvrtc.build
    keys = {key(kernel(), found.build) for found in installed_nvrtcs()}
    assert len(keys) == len(installed_nvrtcs())


@needs_nvrtc
def test_a_damaged_entry_is_compiled_again(cache, compiles):
    binary = build(kernel(), cache=cache)
    path = cache.path / f"{binary.key}.cubin"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    jit._memory.clear()
    with pytest.warns(CacheWarning, match="damaged") as caught:
        again = build(kernel(), cache=cache)
    assert len(caught) == 1
    assert again.cubin == binary.cubin and compiles == ["k", "k"]
    jit._memory.clear()
    assert build(kernel(), cache=cache).report.from_cache and len(compiles) == 2  # the new entry is good


@needs_nvrtc
def test_without_a_usable_folder_each_kernel_is_compiled_once_a_process(tmp_path, cache, compiles):
    (tmp_path / "file").write_text("in the way")
    nowhere = Cache(tmp_path / "file" / "cache")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert build(kernel("k"), cache=nowhere).cubin
            assert build(kernel("l"), cache=nowhere).cubin
    assert [w.category for w in caught] == [CacheWarning]
    assert compiles == ["k", "l"]


@needs_nvrtc
def test_the_default_cache_is_used(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "mine"))
    binary = build(kernel())
    assert (tmp_path / "mine" / f"{binary.key}.cubin").exists()


def test_memory_is_bounded(cache, monkeypatch):
    report = CompileReport("k", 8, 0, 0, 0, 0, (), 1.0, "1.2.3", False)
    for n in range(600):
        jit._remember(("here", str(n)), Binary("k", str(n), b"", report))
        jit._recall(("here", "0"))
    assert len(jit._memory) == 512
    assert jit._recall(("here", "0")) is not None and jit._recall(("here", "1")) is None  # the least recently used went


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_compile(monkeypatch, cache):
    """A compile that only calls what the test sets: `during(source)`."""
    calls: list[str] = []

    class Fake:
        during = staticmethod(lambda source: None)
        names = calls

    def compile_(source, headers, entry_key, build_):
        calls.append(source.name)
        Fake.during(source)
        report = CompileReport(source.name, 8, 0, 0, 0, 0, (), 1.0, build_, False)
        return Binary(source.name, entry_key, source.text.encode(), report)

    monkeypatch.setattr(jit, "_compile", compile_)
    monkeypatch.setattr(toolchain, "nvrtc", lambda: toolchain.Nvrtc("/none", "1.2.3", 1, "made up"))
    return Fake


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(n: int) -> None:
        barrier.wait(30)
        try:
            results[n] = work(n)
        except BaseException as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize("folder", ["usable", "unusable"])  # the lock in the folder must not be what does it
@pytest.mark.filterwarnings("ignore::rtk.errors.CacheWarning")
def test_many_threads_that_ask_for_one_kernel_compile_it_once(tmp_path, cache, fake_compile, folder):
    if folder == "unusable":
        (tmp_path / "file").write_text("in the way")
        cache = Cache(tmp_path / "file" / "cache")
    fake_compile.during = staticmethod(lambda source: time.sleep(0.1))
    results = in_threads(12, lambda n: build(kernel(), cache=cache))
    assert fake_compile.names == ["k"]
    assert len({binary.cubin for binary in results}) == 1
    assert sorted(binary.report.from_cache for binary in results) == [False] + [True] * 11
    assert not jit._busy  # no lock stays behind


def test_different_kernels_compile_at_the_same_time(cache, fake_compile):
    both = threading.Barrier(2)
    fake_compile.during = staticmethod(lambda source: both.wait(30))  # breaks if one waits for the other
    results = in_threads(2, lambda n: build(kernel(f"k{n}"), cache=cache))
    assert [binary.name for binary in results] == ["k0", "k1"]


def test_a_failure_reaches_every_thread_and_the_next_try_is_free(cache, fake_compile):
    def fail(source):
        raise CompileError("planted", source.text, "log")

    fake_compile.during = staticmethod(fail)
    results = in_threads(3, lambda n: build(kernel(), cache=cache))
    assert all(isinstance(error, CompileError) for error in results) and not jit._busy
    fake_compile.during = staticmethod(lambda source: None)
    assert build(kernel(), cache=cache).name == "k"


@needs_nvrtc
def test_other_threads_run_while_nvrtc_compiles(cache):
    """The GIL is let go for the length of a compile, so several configs really compile in parallel."""
    body = "".join(f"for (int j = 0; j < n; j++) p[j] = p[j + {n}] * {n}.5f;\n" for n in range(150))
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    for attempt in range(3):  # another process may take the CPU away
        ticks.clear()
        done.clear()
        ticker = threading.Thread(target=tick)
        ticker.start()
        ticks.append(time.perf_counter())
        binary = build(kernel(f"k{attempt}", body), cache=cache)
        ticks.append(time.perf_counter())
        done.set()
        ticker.join()
        longest_s = max(b - a for a, b in pairwise(ticks))
        if longest_s * 1e3 < binary.report.compile_ms / 3:
            return
    pytest.fail(f"no Python thread ran for {longest_s * 1e3:.0f} of {binary.report.compile_ms:.0f} ms")


def test_build_many_keeps_order_and_reports_progress(cache, fake_compile):
    fake_compile.during = staticmethod(lambda source: time.sleep(0.001 * (20 - int(source.name[1:]))))
    sources = [kernel(f"k{n}") for n in range(20)]
    seen: list[tuple[int, int, str]] = []
    caller = threading.current_thread()

    def progress(done, total, binary):
        assert threading.current_thread() is caller
        seen.append((done, total, binary.name))

    results = build_many([*sources, sources[0]], jobs=4, progress=progress, cache=cache)
    assert [binary.name for binary in results] == [source.name for source in sources] + ["k0"]
    assert [(done, total) for done, total, _ in seen] == [(n, 21) for n in range(1, 22)]
    assert sorted(fake_compile.names) == sorted(source.name for source in sources)  # the repeated one only once
    assert build_many([], cache=cache) == []
    for jobs in (0, -1):
        with pytest.raises(ArgumentError, match="jobs"):
            build_many(sources, jobs=jobs, cache=cache)


@pytest.mark.parametrize("error", [CompileError("planted", "text", "log"), KeyboardInterrupt()])
def test_build_many_raises_the_first_failure_and_drops_the_rest(cache, fake_compile, error):
    def during(source):
        time.sleep(0.01)
        if source.name == "k3":
            raise error

    fake_compile.during = staticmethod(during)
    with pytest.raises(type(error)):
        build_many([kernel(f"k{n}") for n in range(200)], jobs=2, cache=cache)
    assert len(fake_compile.names) < 100


# --- processes -------------------------------------------------------------------------------------------------------


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


SOURCES = """
import sys
from rtk import cache, jit
sources = [jit.Source(f"k{n}", f'#include <a.cuh>\\nextern "C" __global__ void k{n}(float* p) {{ p[{n}] = A; }}',
                      (sys.argv[2],)) for n in range(4)]
store = cache.Cache(sys.argv[1])
"""
HIT = (
    SOURCES
    + """
import time
from rtk import toolchain
toolchain.driver_version()  # libcuda, where there is one: whatever will launch the kernel has it loaded already
times = []
for source in sources:
    started = time.perf_counter()
    binary = jit.build(source, cache=store)
    times.append((time.perf_counter() - started) * 1e3)
    assert binary.report.from_cache and binary.cubin[:4] == b"\\x7fELF"
assert not {"cupy", "cupy_backends", "torch"} & set(sys.modules), "imported what it does not need"
assert "libnvrtc" not in open("/proc/self/maps").read(), "loaded NVRTC"
print(times[0], sorted(times)[len(times) // 2])
"""
)


@needs_nvrtc
def test_a_disk_hit_is_quick_and_loads_neither_nvrtc_nor_cupy(cache, tmp_path):
    """At most 5 ms in a process that has imported rtk.jit: the first one, choosing NVRTC included, and the median."""
    filler = "".join(f"// {n}: as long as a header is\n" for n in range(1500))
    names = [f"h{n}" for n in range(12)]  # about as many files and bytes as an attention kernel includes
    dirs = headers_in(
        tmp_path,
        a="#define A 1\n" + "".join(f"#include <{name}.cuh>\n" for name in names),
        **{name: filler[: 4000 * (1 + n % 3)] + "\n" for n, name in enumerate(names)},
    )
    warm = start_python(SOURCES + "jit.build_many(sources, cache=store)", str(cache.path), *dirs)
    assert warm.communicate(timeout=120)[1] == "" and warm.returncode == 0
    tries = []
    for _ in range(8):  # the quickest counts: another process may have the CPU
        process = start_python(HIT, str(cache.path), *dirs)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        tries.append(tuple(float(t) for t in out.split()))
        if max(tries[-1]) <= 5:
            return
    pytest.fail(f"first and median ms of each try: {tries}")


RACE = (
    SOURCES
    + """
compiled = []
really_compile = jit._compile
jit._compile = lambda source, *rest: (compiled.append(source.name), really_compile(source, *rest))[1]
print("ready", flush=True)
sys.stdin.readline()
import hashlib
binaries = [jit.build(source, cache=store) for source in sources]
print(*compiled, "|", *(hashlib.sha256(binary.cubin).hexdigest() for binary in binaries))
"""
)


@needs_nvrtc
def test_processes_on_a_cold_cache_agree_and_compile_each_kernel_once(cache, tmp_path):
    dirs = headers_in(tmp_path, a="#define A 1\n")
    processes = [start_python(RACE, str(cache.path), *dirs) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    compiled: list[str] = []
    digests = set()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "", err
        names, _, sums = out.partition("|")
        compiled += names.split()
        digests.add(sums)
    assert len(digests) == 1
    assert sorted(compiled) == ["k0", "k1", "k2", "k3"]
    assert cache.stats()["entries"] == 4


FORK = (
    SOURCES
    + """
import os, threading
locked, go_on = threading.Event(), threading.Event()
really_compile = jit._compile
def compile_(*arguments):
    locked.set()
    go_on.wait(30)
    return really_compile(*arguments)
jit._compile = compile_
worker = threading.Thread(target=jit.build, args=(sources[0],), kwargs={"cache": store})
worker.start()
locked.wait(30)
from rtk import toolchain
locks = [jit._lock, cache._lock, toolchain._open_lock]
for lock in locks:
    lock.acquire()
child = os.fork()  # in the midst of it, as a data loader would
if child == 0:
    jit._compile = really_compile
    other = cache.Cache(sys.argv[1] + "-of-the-child")
    jit.build(sources[0], cache=other)
    os._exit(7)
for lock in locks:
    lock.release()
status = os.waitpid(child, 0)[1]
go_on.set()
worker.join()
print(os.waitstatus_to_exitcode(status))
"""
)


@needs_nvrtc
def test_a_fork_in_the_midst_of_a_compile_does_not_hang_the_child(cache, tmp_path):
    process = start_python(FORK, str(cache.path), *headers_in(tmp_path, a="#define A 1\n"))
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out.strip() == "7", err
