"""rtk/digest.py: the digest follows the code, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

import rtk.digest

FILES = {
    "rtk/__init__.py": "",
    "rtk/jit.py": "x = 1\n",
    "rtk/kernels/attention_fwd.py": "y = 1\n",
    "cuda_src/attention_fwd.cuh": "// a\n",
    "cuda_src/rtk/mask.cuh": "// b\n",
    "autotune/__init__.py": "",
    "autotune/data/h200.json": "{}\n",
    "benchmarks/run.py": "z = 1\n",
}


def clone(root: Path, linked: bool) -> Path:
    """A tree as in a clone (links inside rtk/), or as installed (real folders there)."""
    for name, text in FILES.items():
        top, _, rest = name.partition("/")
        path = root / name if linked or top == "rtk" else root / "rtk" / top / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if linked:
        for name in ("autotune", "cuda_src", "benchmarks"):
            (root / "rtk" / name).symlink_to(f"../{name}")
    shutil.copy(rtk.digest.__file__, root / "rtk" / "digest.py")
    return root


def digest_in(root: Path) -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("digest_of_a_clone", root / "rtk" / "digest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.sources_digest()
    return found


def changed(root: Path, before: dict[str, str]) -> set[str]:
    after = digest_in(root)
    return {name for name in after if after[name] != before[name]}


def test_a_clone_and_an_installation_have_the_same_digest(tmp_path):
    a, b = clone(tmp_path / "a", linked=True), clone(tmp_path / "deep" / "b", linked=False)
    assert digest_in(a) == digest_in(b)
    assert sorted(digest_in(a)) == ["autotune", "cuda_src", "rtk"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("cuda_src/attention_fwd.cuh", {"cuda_src"}),
        ("cuda_src/rtk/mask.cuh", {"cuda_src"}),
        ("rtk/kernels/attention_fwd.py", {"rtk"}),
        ("autotune/data/h200.json", {"autotune"}),
        ("benchmarks/run.py", set()),
    ],
)
def test_a_changed_file_changes_its_own_digest(tmp_path, path, expected):
    root = clone(tmp_path, linked=True)
    before = digest_in(root)
    (root / path).write_text(FILES[path] + " ")
    assert changed(root, before) == expected
    (root / path).write_text(FILES[path])
    assert changed(root, before) == set()
    os.rename(root / path, (root / path).with_stem("renamed"))
    assert changed(root, before) == expected
    (root / path).with_stem("renamed").unlink()
    assert changed(root, before) == expected


def test_what_is_not_code_does_not_count(tmp_path):
    root = clone(tmp_path, linked=True)
    before = digest_in(root)
    for name in ("rtk/__pycache__/jit.py", "rtk/notes.txt", "cuda_src/.attention_fwd.cuh", "rtk/.hidden/x.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("anything")
    assert changed(root, before) == set()


def test_bytes_that_move_between_files_are_seen(tmp_path):
    root = clone(tmp_path, linked=True)
    (root / "cuda_src/y.cuh").write_text("1")
    (root / "cuda_src/z.cuh").write_text("2")
    before = digest_in(root)
    (root / "cuda_src/y.cuh").write_text("12")
    (root / "cuda_src/z.cuh").write_text("")
    assert changed(root, before) == {"cuda_src"}
    (root / "cuda_src/z.cuh").unlink()
    (root / "cuda_src/y.cuh").write_text("1z.cuh\0" + "2")  # reads like the end of one file and the next one's name
    assert changed(root, before) == {"cuda_src"}


def test_of_this_repository():
    found = rtk.digest.sources_digest()
    assert found == rtk.digest.sources_digest()
    assert all(len(value) == 64 for value in found.values())
    assert found["cuda_src"] != found["rtk"]
