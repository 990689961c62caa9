"""The README does not rot: its Python runs, and the commands it names exist.

A block that needs something says so in a comment above it, `<!-- needs: gpu cupy -->`. Blocks that need a GPU are only
compiled here, and run by the GPU tests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rtk.digest import sources_digest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>[\w ]+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    """(id, needs, code) of every Python block, its line numbers those of the page."""
    for page in PAGES:
        if page.name.startswith("your-own-kernel"):  # blocks that go together: test_own_kernel*.py run them in order
            continue
        text = page.read_text()
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start("code"))
            needs = set((found["needs"] or "").split())
            yield pytest.param(page, needs, "\n" * line + found["code"], id=f"{page.name}:{line + 1}")


BLOCKS = list(blocks())


def run(page, needs, code):
    for module in needs - {"gpu"}:
        pytest.importorskip(module)
    exec(compile(code, str(page), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("page", "needs", "code"), BLOCKS)
def test_python_block(page, needs, code):
    compile(code, str(page), "exec")
    if "gpu" not in needs:
        run(page, needs, code)


@pytest.mark.gpu
@pytest.mark.parametrize(("page", "needs", "code"), [block for block in BLOCKS if "gpu" in block.values[1]])
def test_python_block_on_the_gpu(gpu, page, needs, code):
    run(page, needs, code)


def test_the_readme_shows_torch_cupy_and_numpy():
    needs = [block.values[1] for block in BLOCKS if block.values[0].name == "README.md"]
    assert {"torch"} in needs
    assert {"gpu", "cupy"} in needs
    assert set() in needs
    # a fence in another spelling would not be found, and not be tested
    assert (ROOT / "README.md").read_text().count("```python") == len(needs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets, f"{page.name} names targets that are not in the Makefile"


def test_rtk_commands_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    named = {
        found.split() and tuple(found.split()) for found in re.findall(r"(?:`|^ {4})rtk ((?:[a-z]+ ?)+)", text, re.M)
    }
    assert ("doctor",) in named
    for command in sorted(named):
        call = [sys.executable, "-m", "rtk.cli", *command, "--help"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"rtk {' '.join(command)}: {done.stderr}"


def test_extras_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    extras = set(re.findall(r"^([a-z0-9]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {extra for group in re.findall(r'"\.\[([a-z0-9,]+)\]"', text) for extra in group.split(",")}
    assert "cuda12" in named
    assert named <= extras


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # C++ has ](…) too
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readmes_figures_are_the_recorded_ones():
    recorded = json.loads((ROOT / "benchmarks/results/h200/forward.json").read_text())["records"]
    of = {(r["head_dim"], r["causal"], r["impl"]): r["tflops"] for r in recorded if r["suite"] == "forward"}
    rows = re.findall(r"^\| (\d+) \| (full|causal) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for head_dim, mask, figures in rows:
        expected = [f"{of[int(head_dim), mask == 'causal', impl]:.0f}" for impl in ("rtk", "fa3", "cudnn", "fa2")]
        assert figures.split(" | ") == expected


def test_the_recorded_run_is_of_these_cuda_sources():
    recorded = json.loads((ROOT / "benchmarks/results/h200/forward.json").read_text())
    assert recorded["meta"]["sources"]["cuda_src"] == sources_digest()["cuda_src"], (
        "make benchmarks/forward.py's run anew"
    )


def test_the_recorded_run_reaches_what_was_asked_of_it():
    """At least 0.85 of the best peer, RMS error at most 1.1 of FA3's, compiled in 1.5 s, loaded in 5 ms, no spill."""
    recorded = json.loads((ROOT / "benchmarks/results/h200/forward.json").read_text())["records"]
    cells = {(r["head_dim"], r["causal"]) for r in recorded if r["suite"] == "forward"}
    assert len(cells) == 6
    for cell in cells:
        of = {r["impl"]: r for r in recorded if r["suite"] == "forward" and (r["head_dim"], r["causal"]) == cell}
        assert of["rtk"]["tflops"] >= 0.85 * max(of["fa3"]["tflops"], of["cudnn"]["tflops"])
        assert of["rtk"]["rms_error"] <= 1.1 * of["fa3"]["rms_error"]
    for start in (r for r in recorded if r["suite"] == "coldstart"):
        assert start["compile_ms"] <= 1500 and start["load_ms"] <= 5 and start["problems"] == []
