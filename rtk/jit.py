"""Source -> key -> NVRTC -> cubin and its resource report; looked for in memory, then on disk, then compiled.

What is keyed is what is compiled: every header a source includes is read here, hashed, and handed to NVRTC as text, and
NVRTC gets no include path and no source directory in which it could find anything else.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rtk import forks, toolchain
from rtk.cache import Cache, default_cache
from rtk.errors import ArgumentError, CompileError, ToolchainError

__all__ = ["Binary", "CompileReport", "Source", "build", "build_many", "include_closure", "key"]

_SCHEMA = 1  # raise it when the meaning of a stored entry changes
_BASE_OPTIONS = (
    "--gpu-architecture=sm_90a",
    "--std=c++17",
    "-default-device",  # functions need no __device__: the sources stay plain C++
    "--ptxas-options=-v",  # the resource report
    "-lineinfo",  # profilers show source; costs no run time
    "-no-source-include",  # nothing is found beside the unit
)
# Options that would let in what is not keyed, or that send ptxas's warnings where no report sees them.
_REFUSED_OPTIONS = re.compile(r"-I|--?include|--?pre-include|--?(create-|use-)?pch|--?split-compile")


@dataclass(frozen=True)
class Source:
    """One translation unit: the kernel's `extern "C"` name, the text, where its includes live, extra NVRTC options."""

    name: str
    text: str
    include_dirs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompileReport:
    """What ptxas made of a kernel. Bytes are per thread for stack and spills, per block for static shared memory.

    `registers` under setmaxnreg is the cap of the launch bounds, not the pressure. `compile_ms` is what the compile
    took when it ran, also where the cubin now came `from_cache` (memory or disk).
    """

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    smem_static_bytes: int
    warnings: tuple[str, ...]
    compile_ms: float
    nvrtc: str
    from_cache: bool

    @property
    def clean(self) -> bool:
        """No stack frame, no spill, no performance warning."""
        return not self.problems()

    def problems(self) -> list[str]:
        """What makes this kernel slower than it looks, in words; empty is the only good answer."""
        found = [] if self.registers else [f"{self.name}: ptxas reported nothing that was understood"]
        if self.stack_bytes:
            found.append(f"{self.name}: {self.stack_bytes} bytes of stack")
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(
                f"{self.name}: spills {self.spill_store_bytes} bytes stored, {self.spill_load_bytes} bytes loaded"
            )
        return found + [f"{self.name}: {line}" for line in self.warnings if _PERFORMANCE.search(line)]

    def to_json(self) -> dict[str, Any]:
        """A dict that json can write; from_json(to_json()) is the same report."""
        return asdict(self) | {"warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompileReport:
        """The report that to_json() gave. KeyError where a field is missing."""
        values = {f.name: data[f.name] for f in fields(cls)}
        return cls(**values | {"warnings": tuple(values["warnings"])})


_REPORT_FIELDS = tuple(field.name for field in fields(CompileReport))


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its name, the key of all that went into it, the cubin, and the report."""

    name: str
    key: str
    cubin: bytes
    report: CompileReport


# ------------------------------------------------------------------------------------------------------------ the key

_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b[ \t]*(?:([<\"])([^>\"\n]+)[>\"])?", re.MULTILINE)
_COMMENT_OR_STRING = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def include_closure(source: Source) -> dict[str, str]:
    """Text of every header that `source` includes, directly or not, by the name it is included under.

    "x" is looked for beside the file that includes it and then, like <x>, in `source.include_dirs`. Conditions are not
    evaluated: an include counts wherever it stands. CompileError for one that is not found, or is computed by a macro.
    """
    headers: dict[str, str] = {}
    places: dict[str, str] = {}
    waiting = deque([(f"{source.name}.cu", "", source.text)])
    while waiting:
        file, folder, text = waiting.popleft()
        for quote, name, offset in _includes(text):
            folders = (folder, *source.include_dirs) if quote == '"' and folder else source.include_dirs
            found = _find_header(name, folders) if name else None
            if found is not None and places.setdefault(name, found[0]) == found[0]:
                if name not in headers:
                    headers[name] = found[1]
                    waiting.append((name, os.path.dirname(found[0]), found[1]))
            elif _is_code(text, offset):
                trouble = (
                    "is computed by a macro, so it cannot be keyed" if not name
                    else f"was not found in {list(folders)}" if found is None
                    else f"means {found[0]} here and {places[name]} elsewhere"
                )  # fmt: skip
                line = text.count("\n", 0, offset) + 1
                what = f"include of {name or 'a name'} in {file}, line {line}, {trouble}"
                raise CompileError(what, source.text, f"{file}({line}): error: {what}", headers | {file: text})
    return headers


@functools.lru_cache(maxsize=512)
def _includes(text: str) -> tuple[tuple[str, str, int], ...]:
    """(quote, name, offset) of each include line; name "" where it is neither <...> nor "..."."""
    return tuple((m[1] or "", m[2] or "", m.start()) for m in _INCLUDE.finditer(text))


def _is_code(text: str, offset: int) -> bool:
    """Whether `offset` lies outside comments and strings. Slow, so asked only before complaining."""
    return all(not m.start() <= offset < m.end() for m in _COMMENT_OR_STRING.finditer(text))


def _find_header(name: str, folders: Iterable[str]) -> tuple[str, str] | None:
    """(path, text) of the first `name` in `folders`. Bytes that are not UTF-8 survive as surrogates, and are keyed."""
    for folder in folders:
        path = os.path.normpath(os.path.join(folder, name))
        try:
            with open(path, "rb") as file:
                return path, file.read().decode(errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
    return None


def key(source: Source, nvrtc_build: str) -> str:
    """sha256 (hex) of all that can change the cubin: schema, NVRTC build, options, name, text, included texts."""
    return _key(source, nvrtc_build, include_closure(source))


def _key(source: Source, nvrtc_build: str, headers: dict[str, str]) -> str:
    schema = " ".join([str(_SCHEMA), *_REPORT_FIELDS])  # what a stored entry holds
    parts = [schema, nvrtc_build, source.name, source.text, str(len(source.options)), *_BASE_OPTIONS]
    parts += source.options
    for name in sorted(headers):
        parts += (name, headers[name])
    sha = hashlib.sha256()
    for part in parts:  # each with its length, so that no two lists of parts run together into the same bytes
        data = part.encode(errors="surrogateescape")
        sha.update(b"%d:" % len(data))
        sha.update(data)
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------------------------ building

_memory: OrderedDict[tuple[str, str], Binary] = OrderedDict()
_busy: dict[tuple[str, str], list[Any]] = {}  # slot -> [lock, how many threads hold or await it]
os.register_at_fork(after_in_child=_busy.clear)
_lock = threading.Lock()
forks.new_in_child(globals(), "_lock")


def build(source: Source, *, cache: Cache | None = None) -> Binary:
    """The cubin of `source`: from memory, else from `cache` (default_cache()), else compiled and kept in both.

    From several threads at once, each key is compiled once; from several processes, about once. Raises CompileError
    where NVRTC refuses the source, ToolchainError where there is no NVRTC.
    """
    _check(source)
    store = default_cache() if cache is None else cache
    tool = toolchain.nvrtc()
    headers = include_closure(source)
    entry_key = _key(source, tool.build, headers)
    slot = (str(store.path), entry_key)
    if (known := _recall(slot)) is not None:
        return known
    with _alone(slot):
        if (known := _recall(slot)) is not None:
            return known
        binary = _from_disk(store, entry_key, source.name)
        if binary is None:
            with store.compiling(entry_key):
                if store.contains(entry_key):  # another process made it while this one waited
                    binary = _from_disk(store, entry_key, source.name)
                if binary is None:
                    binary = _compile(source, headers, entry_key, tool.build)
                    store.put(entry_key, binary.cubin, binary.report.to_json())
        _remember(slot, binary)
        return binary


def build_many(
    sources: Sequence[Source],
    *,
    jobs: int | None = None,
    progress: Callable[[int, int, Binary], None] | None = None,
    cache: Cache | None = None,
) -> list[Binary]:
    """build() of each source, in `jobs` threads (one per usable CPU), results in the order of `sources`.

    `progress(done, total, binary)` is called in the calling thread as each is finished. The first failure is raised
    once the compiles under way have ended; those not yet begun are dropped.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    if jobs is not None and jobs < 1:
        raise ArgumentError("jobs", jobs, "None, or an integer of at least 1")
    workers = jobs or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max(1, min(workers, len(sources))), thread_name_prefix="rtk-jit") as pool:
        futures = [pool.submit(build, source, cache=cache) for source in sources]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                binary = future.result()
                if progress is not None:
                    progress(done, len(futures), binary)
        except BaseException:  # Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _check(source: Source) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", source.name, re.ASCII):
        raise ArgumentError("source.name", repr(source.name), "a C identifier")
    if "\0" in source.text:
        raise ArgumentError("source.text", "a text with a NUL character", "C++ source")
    for option in source.options:
        if _REFUSED_OPTIONS.match(option):
            hint = "Use include_dirs: they are keyed."
            raise ArgumentError("source.options", option, "options that bring in no files", hint)


def _recall(slot: tuple[str, str]) -> Binary | None:
    with _lock:
        binary = _memory.get(slot)
        if binary is not None:
            _memory.move_to_end(slot)
        return binary


def _remember(slot: tuple[str, str], binary: Binary) -> None:
    with _lock:
        _memory[slot] = replace(binary, report=replace(binary.report, from_cache=True))
        while len(_memory) > 512:
            _memory.popitem(last=False)


@contextmanager
def _alone(slot: tuple[str, str]) -> Iterator[None]:
    """One thread at a time per slot; other slots go on."""
    with _lock:
        turn = _busy.setdefault(slot, [threading.Lock(), 0])
        turn[1] += 1
    try:
        with turn[0]:
            yield
    finally:
        with _lock:
            turn[1] -= 1
            if not turn[1]:
                _busy.pop(slot, None)


def _from_disk(store: Cache, entry_key: str, name: str) -> Binary | None:
    if (entry := store.get(entry_key, needs=_REPORT_FIELDS)) is None:
        return None
    return Binary(name, entry_key, entry.cubin, replace(CompileReport.from_json(entry.meta), from_cache=True))


# ----------------------------------------------------------------------------------------------------------- compiling


def _compile(source: Source, headers: dict[str, str], entry_key: str, nvrtc_build: str) -> Binary:
    # NVRTC is called through ctypes, not through CuPy's binding: that one releases the GIL too, but costs an import of
    # CuPy (0.2-0.5 s) in a process that may only use torch, and it runs the NVRTC it finds first, whichever we chose.
    with forks.uninterrupted():
        library = toolchain.open_nvrtc()
        started = time.perf_counter()
        status, log, cubin = _run_nvrtc(library, source, headers)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    texts = headers | {f"{source.name}.cu": source.text}
    if "BUILTIN" in status:  # libnvrtc-builtins, a file of its own, is not there: no fault of the source
        raise ToolchainError(f"NVRTC {nvrtc_build} is not whole: {log.strip() or status}", toolchain.mend())
    if status or cubin is None:
        raise CompileError(f"NVRTC {nvrtc_build} cannot compile {source.name}: {status}", source.text, log, texts)
    if b".text.%s\0" % source.name.encode() not in cubin:
        raise CompileError(f'the source defines no extern "C" kernel named {source.name}', source.text, log, texts)
    report = _read_log(log, source.name, elapsed_ms, nvrtc_build)
    return Binary(source.name, entry_key, cubin, report)


def _run_nvrtc(library: ctypes.CDLL, source: Source, headers: dict[str, str]) -> tuple[str, str, bytes | None]:
    """(what went wrong or "", log, cubin or None)."""

    def strings(texts: Iterable[str]) -> Any:
        data = [text.encode(errors="surrogateescape") for text in texts]
        return (ctypes.c_char_p * len(data))(*data)

    def output(what: str) -> bytes:
        size = ctypes.c_size_t()
        if getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
            return b""
        buffer = ctypes.create_string_buffer(max(1, size.value))
        return buffer.raw if not getattr(library, f"nvrtcGet{what}")(program, buffer) else b""

    def error(code: int) -> str:
        return str(library.nvrtcGetErrorString(code).decode()) if code else ""

    options = _BASE_OPTIONS + source.options
    if toolchain.version_of(library) >= (12, 9):  # it keeps a cache of its own, whose hits come without ptxas's report
        options += ("--no-cache",)
    program = ctypes.c_void_p()
    unit = strings([source.text, f"{source.name}.cu"])
    texts, names = strings(headers.values()), strings(headers)
    status = library.nvrtcCreateProgram(ctypes.byref(program), unit[0], unit[1], len(headers), texts, names)
    if status:
        return error(status), "", None
    try:
        status = library.nvrtcCompileProgram(program, len(options), strings(options))
        log = output("ProgramLog").rstrip(b"\0").decode(errors="replace")
        return error(status), log, None if status else output("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


# --------------------------------------------------------------------------------------------------- ptxas -v, in words

_PERFORMANCE = re.compile(r"\(C7\d{3}\)|Potential Performance Loss", re.IGNORECASE)
_WARNING = re.compile(r"^\S.*(?:\bwarning\b|\badvisory\b|\(C\d{4}\)|Potential Performance Loss)", re.IGNORECASE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_SMEM = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


def _read_log(log: str, name: str, compile_ms: float, nvrtc_build: str) -> CompileReport:
    """The report that ptxas -v wrote into NVRTC's log. Stack and spills of called functions count as the kernel's."""
    entry, registers, smem, stack, stores, loads = "", 0, 0, 0, 0, 0
    warnings = []
    for line in log.splitlines():
        if _WARNING.search(line):
            warnings.append(line.strip())
        elif found := _ENTRY.search(line):
            entry = found[1]
        elif found := _FRAME.search(line):
            stack = max(stack, int(found[1]))
            stores += int(found[2])
            loads += int(found[3])
        elif found := _USED.search(line):
            if deeper := _STACK.search(line):
                stack = max(stack, int(deeper[1]))
            if entry == name:
                registers = int(found[1])
                smem = int(shared[1]) if (shared := _SMEM.search(line)) else 0
    return CompileReport(
        name, registers, stack, stores, loads, smem, tuple(warnings), round(compile_ms, 3), nvrtc_build, False
    )
