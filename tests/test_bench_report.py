"""From a folder of results to tables, Markdown, PNGs, HTML and the README's figures."""

from __future__ import annotations

import html.parser
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bench_cases import SUITES, fill, meta, problem, run, slower, timed

from rtk.benchmarks import records
from rtk.benchmarks.records import Run
from rtk.benchmarks.report import NAMES, ordered, readme, standing, warnings
from rtk.benchmarks.report import table as tables
from rtk.cli import bench_report
from rtk.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
PAGE = f"# rtk\n\nbefore\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n"
IMPOSSIBLE = {"batch": 16, "heads_q": 96, "heads_kv": 96, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64}
BLOCKED = """
import sys
sys.modules[sys.argv[1]] = None  # an import of it fails from here on
from rtk.cli import bench_report
from rtk.errors import RtkError
try:
    bench_report.report([sys.argv[2]], sys.argv[3])
except RtkError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def drawn(results, tmp_path_factory):
    """(folder, what was printed) of a whole report."""
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("report") / "new"
    command = "import sys; from rtk.cli import bench_report as b; sys.exit(b.report([sys.argv[1]], sys.argv[2]))"
    call = [sys.executable, "-c", command, results, folder]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment(COLUMNS="200"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **more}


# --- the whole report ------------------------------------------------------------------------------------------------


def test_every_suite_is_in_everything(drawn):
    folder, printed = drawn
    markdown, page = ((folder / name).read_text() for name in ("report.md", "report.html"))
    for suite in SUITES:
        title = meta(suite)["title"]
        assert title in markdown and title in page and title in printed
    assert "d128 causal seqlen 8192" in markdown and "b16 h96 s512 d64" in page
    assert "head_dim 256 is not supported (d256 full seqlen 512" in markdown
    assert "out of memory" in page
    assert "xFormers: not installed" in page


def test_the_pngs_are_pngs_and_small(drawn):
    folder, _ = drawn
    image = pytest.importorskip("PIL.Image")
    found = {path.stem: path for path in folder.glob("*.png")}
    expected = {"paper-throughput", "paper-roofline", "small-small", "long-memory", "long-throughput"}
    assert set(found) == expected | {"coldstart-coldstart"}
    for path in found.values():
        picture = image.open(io.BytesIO(path.read_bytes()))
        picture.load()  # fails on what is not whole
        assert picture.format == "PNG" and picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 8, "an empty picture"
        assert path.stat().st_size < 100_000
    assert all(f"]({name}.png)" in (folder / "report.md").read_text() for name in found)


class Page(html.parser.HTMLParser):
    """Tags that are open, and where the page points to."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.targets, self.ids, self.tables = [], [], set(), 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.targets += [found[key] for key in ("src", "href", "srcset", "action") if found.get(key)]
        self.ids.add(found.get("id"))
        self.tables += tag == "table"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(drawn):
    text = (drawn[0] / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.tables >= 8
    images = [target for target in page.targets if target.startswith("data:image/png;base64,")]
    assert len(images) == 6
    links = set(page.targets) - set(images)
    assert links == {f"#{suite}" for suite in SUITES} and {link[1:] for link in links} <= page.ids
    assert not re.search(r"https?://|url\(|@import|<link|fetch\(|import\(", re.sub(r'"data:[^"]*"', "", text))
    assert "prefers-color-scheme: dark" in text
    assert "not installed &lt;here&gt;" in text and "<here>" not in text  # what a run says is text, never markup


def test_the_meta_of_each_run_is_on_the_page(drawn):
    text = (drawn[0] / "report.html").read_text()
    for fact in ("580.159.04", "GPU-00000000", "cudnn 9.19.0", "744 TFLOP/s", "4,300 GB/s", "median 1,530", "max 701"):
        assert fact in text
    assert meta("paper")["method"] in text


def test_the_same_results_make_the_same_pictures(results):
    pytest.importorskip("matplotlib")
    from rtk.benchmarks.report import plots

    small = records.read(results / "small.json")
    assert plots.draw(small) == plots.draw(small)


def test_beside_the_results_by_default_and_in_json(tmp_path, capsys):
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    fill(tmp_path)
    assert bench_report.report([tmp_path / "small.json", tmp_path / "accuracy.json"], json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in said["written"]} == {"report.html", "report.md", "small-small.png"}
    assert all((tmp_path / Path(path).name).exists() for path in said["written"])
    assert said["suites"]["accuracy"] is None
    assert sum(said["suites"]["small"][key] for key in ("wins", "ties", "losses")) == 4


def test_one_suite_twice_is_refused(results, tmp_path):
    again = fill(tmp_path) / "paper.json"
    with pytest.raises(ArgumentError, match="each suite once"):
        bench_report.report([results, again])


@pytest.mark.parametrize("module", ["rich", "matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_cure(results, tmp_path, module):
    for other in {"rich", "matplotlib", "jinja2"} - {module}:
        pytest.importorskip(other)
    call = [sys.executable, "-c", BLOCKED, module, results, tmp_path / "out"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 1
    assert done.stderr.startswith("ToolchainError: ") and f"need {module}" in done.stderr
    assert 'pip install "rtk-kernels[bench]"' in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_comparing_and_the_readme_need_no_library(results):
    code = "import sys\nfor m in ('rich', 'matplotlib', 'jinja2', 'numpy'): sys.modules[m] = None\n"
    code += "from rtk.benchmarks.report import readme\nfrom rtk.cli import bench_report\n"
    code += "readme.block(sys.argv[1]); sys.exit(bench_report.compare(sys.argv[1], sys.argv[1]))"
    call = [sys.executable, "-c", code, results]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr


# --- what the tables say ---------------------------------------------------------------------------------------------


def test_a_tie_is_printed_as_a_tie():
    assert tables.ratio_text(records.Ratio(1.004, 0.99, 1.02)) == "tie 1.004 (0.990–1.020)"
    assert tables.ratio_text(records.Ratio(1.05, 1.04, 1.06)) == "1.050 (1.040–1.060)"
    assert tables.ratio_text(None) == "–"


def test_rows_and_columns(results):
    (sheet,) = tables.sheets(records.read(results / "paper.json"))
    assert sheet.header[:6] == ["problem", *map(NAMES.get, ("rtk", "fa3", "fa4", "cudnn", "fa2"))]
    assert len(sheet.rows) == 36 and {len(row) for row in sheet.rows} == {len(sheet.header)}
    assert {row[3] for row in sheet.rows if row[0].startswith("d256")} == {"error"}
    for suite in SUITES:
        for sheet in tables.sheets(records.read(results / f"{suite}.json")):
            assert sheet.rows and {len(row) for row in sheet.rows} == {len(sheet.header)}


def test_where_rtk_stands():
    found = run("paper")[1]
    total = standing(found)
    assert total.cells == 36
    best = standing(slower(found, 0.5))
    assert (best.wins, best.ties, best.losses) == (36, 0, 0)
    assert best.geomean == pytest.approx(2 * total.geomean)
    assert standing(slower(found, 2)).losses == 36
    assert standing(run("accuracy")[1]) is None


def test_an_impossible_time_is_said_in_every_output(tmp_path, capsys):
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    record = timed(problem("small", head_dim_v=64, **IMPOSSIBLE), 0.49 * 96, random.Random(0))
    one = Run(meta("small"), [record])
    assert len(warnings(one)) == 1 and warnings(one)[0].startswith("IMPOSSIBLE: b16 h96 s512 d64, rtk: ")
    records.write(tmp_path / "small.json", one.meta, one.records)
    assert bench_report.report([tmp_path / "small.json"]) == 0
    assert "IMPOSSIBLE" in capsys.readouterr().out
    assert "IMPOSSIBLE" in (tmp_path / "report.md").read_text()
    assert "IMPOSSIBLE" in (tmp_path / "report.html").read_text()


def test_unknown_suites_implementations_and_sparse_records_are_drawn_too(tmp_path):
    for module in ("rich", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    sparse = {"suite": "new", "impl": "mine", "us": 3.0}
    records.write(
        tmp_path / "new.json", {"schema": 1, "suite": "new"}, [sparse, {"suite": "new", "impl": "rtk", "us": 2.0}]
    )
    records.write(tmp_path / "empty.json", {"schema": 1, "suite": "empty"}, [])
    assert bench_report.report([tmp_path]) == 0
    assert "mine" in (tmp_path / "report.html").read_text()


def test_the_order_of_implementations():
    assert ordered(["zebra", "fa2", "apple", "rtk", "fa3", "fa2"]) == ["rtk", "fa3", "fa2", "apple", "zebra"]


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_made_once_and_then_stays(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    call = [str(results), str(page)]
    assert readme.main([*call, "--check"]) == 1
    assert page.read_text() == PAGE and "not those in" in capsys.readouterr().err
    assert readme.main(call) == 0
    made = page.read_text()
    assert made.startswith("# rtk\n\nbefore\n\n") and made.endswith("\n\nafter\n") and "\nold\n" not in made
    assert readme.main([*call, "--check"]) == 0
    assert readme.main(call) == 0 and page.read_text() == made


def test_the_readmes_figures_are_the_recorded_ones(results):
    block = readme.block(results)
    of = {
        (r["head_dim"], r["causal"], r["impl"]): r["tflops"]
        for r in records.read(results / "paper.json").records
        if r["seqlen_q"] == 8192 and r.get("tflops")
    }
    rows = re.findall(r"^\| (\d+) \| (full|causal) \| (.*) \|$", block, re.MULTILINE)
    assert len(rows) == 6
    for head_dim, mask, figures in rows:
        found = [of.get((int(head_dim), mask == "causal", impl)) for impl in readme.IMPLS]
        assert figures.split(" | ") == [f"{value:.0f}" if value else "–" for value in found]
    total = standing(records.read(results / "paper.json").records)
    assert f"- paper (Attention forward, batch × seqlen 16384; 36 problems): {total}." in block
    assert "accuracy" not in block


@pytest.mark.parametrize("page", ["no markers", f"{readme.END}\n{readme.BEGIN}", f"{readme.BEGIN}\n{readme.END}" * 2])
def test_a_readme_without_a_place_is_refused(results, tmp_path, page, capsys):
    path = tmp_path / "README.md"
    path.write_text(page)
    assert readme.main([str(results), str(path)]) == 1
    assert "place for the figures" in capsys.readouterr().err and path.read_text() == page
    assert readme.main([str(tmp_path), str(path)]) == 1
    assert "paper.json" in capsys.readouterr().err


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("packaging")
def test_the_wheel_holds_the_template_and_no_results(tmp_path):
    """Built from a copy of what the reports need, with a results folder in it."""
    pytest.importorskip("setuptools", "77")
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "results", ".*_cache", "kernels", "*.cuh")
    for name in ("rtk", "benchmarks", "autotune", "cuda_src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    fill(copy / "benchmarks" / "results" / "h200")
    (copy / "benchmarks" / "results" / "__init__.py").write_text("")
    code = "from setuptools import build_meta; build_meta.build_wheel('made')"
    (copy / "made").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((copy / "made").glob("*.whl"))) as archive:
        names = archive.namelist()
    assert "rtk/benchmarks/report/report.html.j2" in names and "rtk/benchmarks/report/html.py" in names
    assert not [name for name in names if "results" in name]
