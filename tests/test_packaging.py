"""What people install: a real wheel, a wheel by way of the source distribution, and an editable install. No network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import rtk
from rtk.digest import sources_digest

ROOT = Path(__file__).resolve().parent.parent
BACKEND = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "shared")

pytestmark = [
    pytest.mark.xdist_group("packaging"),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a checkout"),
]


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build(what, tree, folder):
    """Runs the build backend as pip does; the file it made."""
    folder.mkdir(exist_ok=True)
    return folder / run(sys.executable, "-c", BACKEND, what, folder, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, links kept, so that nothing is built in the checkout itself."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml asks for")
    copy = tmp_path_factory.mktemp("checkout") / "rtk-kernels"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (copy / "benchmarks" / "results").mkdir(exist_ok=True)
    (copy / "benchmarks" / "results" / "recorded.json").write_text("{}")
    (copy / "benchmarks" / "results" / "plot.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


def contents(wheel):
    """{name: bytes} of what a wheel installs, without its own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def code_files():
    """Every .py and .cuh of the package in the checkout, by its name in a wheel."""
    for folder, _, files in os.walk(ROOT / "rtk", followlinks=True):
        place = Path(folder).relative_to(ROOT)
        if "__pycache__" not in place.parts and place.parts[:3] != ("rtk", "benchmarks", "results"):
            yield from ((place / name).as_posix() for name in files if name.endswith((".py", ".cuh")))


def test_the_wheel_holds_all_the_code_and_no_results(wheel):
    names = set(contents(wheel))
    assert names >= {*code_files(), "rtk/py.typed", "rtk/benchmarks/report/report.html.j2"}
    assert any(name.startswith("rtk/cuda_src/rtk/") for name in names)
    assert not [name for name in names if "results" in name]
    assert {name.split("/")[0] for name in names} == {"rtk"}, "nothing as generic as `autotune` in site-packages"
    for name, data in contents(wheel).items():
        assert data == (ROOT / name).read_bytes()


def test_the_metadata_is_what_pyproject_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"rtk_kernels-{rtk.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert archive.read(f"{folder}/entry_points.txt").decode().strip() == "[console_scripts]\nrtk = rtk.cli:main"
        assert any(name.startswith(folder) and name.endswith("LICENSE") for name in archive.namelist())
    assert "Name: rtk-kernels\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    needed = [
        line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert sorted(name.split(">")[0] for name in needed) == ["ml_dtypes", "numpy"]
    for extra in ("cuda12", "cuda13", "torch", "bench", "test"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_source_distribution_makes_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        assert not [name for name in names if "results" in name or "/tests" in name]
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
        # filter= came with 3.12 and the last bug-fix releases of the older ones
        keywords = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **keywords)
    (unpacked,) = tmp_path.iterdir()
    assert contents(build("build_wheel", unpacked, tmp_path / "made")) == contents(wheel)


def make_venv(folder, package):
    """A fresh environment with `package` in it, and links to whatever else is installed here; its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", package]
    run(*pip, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Link by link, not one .pth to the whole folder: the rtk that is installed here must not be seen.
    for outer in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(outer).iterdir():
            ours = entry.name == "rtk" or entry.name.startswith(("rtk_kernels", "__editable__"))
            if not ours and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tree, tmp_path_factory):
    """(how, python of an environment where rtk is installed that way)."""
    how = request.param
    if how == "wheel":
        package = request.getfixturevalue("wheel")
    else:
        package = build("build_editable", tree, tmp_path_factory.mktemp("editable"))
    return how, make_venv(tmp_path_factory.mktemp(f"venv-{how}") / "venv", package)


def test_it_imports_from_anywhere_and_is_the_same_code(installed, tree, tmp_path):
    how, python = installed
    code = """
import json, pathlib, sys
import rtk, rtk.autotune, rtk.benchmarks, rtk.cuda_src
from rtk.digest import sources_digest
folder = pathlib.Path(rtk.cuda_src.__file__).parent
import numpy as np
x = np.ones((1, 1, 4, 8), np.float32)
print(json.dumps({
    "file": rtk.__file__,
    "digest": sources_digest(),
    "headers": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.cuh")),
    "results": (pathlib.Path(rtk.benchmarks.__file__).parent / "results").exists(),
    "shape": rtk.attention(x, x, x).shape,
}))
"""
    found = json.loads(run(python, "-I", "-c", code, cwd=tmp_path))
    assert Path(found["file"]).is_relative_to(tree if how == "editable" else python.parent.parent)
    assert found["digest"] == sources_digest()
    headers = sorted(path.relative_to(ROOT / "cuda_src").as_posix() for path in (ROOT / "cuda_src").rglob("*.cuh"))
    assert found["headers"] == headers
    assert found["shape"] == [1, 1, 4, 8]
    if how == "wheel":
        assert not found["results"]


def test_its_commands_run(installed, tmp_path):
    _, python = installed
    assert run(python.parent / "rtk", "--version", cwd=tmp_path) == f"rtk {rtk.__version__}\n"
    command = [python, "-I", "-m", "rtk.cli", "doctor", "--json"]
    environment = {**os.environ, "RTK_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["gpu_path"] == (done.returncode == 0)


def test_it_compiles_its_kernels(installed, tmp_path):
    """The headers are found where they were installed, and are all there."""
    _, python = installed
    code = """
import sys
from rtk.cache import Cache
from rtk.errors import ToolchainError
from rtk.jit import build
from rtk.kernels import sample_configs
spec, config = sample_configs()[0]
try:
    print(build(spec.render(config), cache=Cache(sys.argv[1])).report.clean)
except ToolchainError:
    print("no NVRTC")
"""
    said = run(python, "-I", "-c", code, tmp_path / "cache", cwd=tmp_path).strip()
    if said == "no NVRTC":
        pytest.skip(said)
    assert said == "True"
