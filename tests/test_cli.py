"""The commands: what they print, what they exit with, and that nobody sees a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from commands import call

import rtk
from rtk import driver, toolchain
from rtk.cli import console, demo, doctor, main, onboard, verify
from rtk.errors import RtkError, ToolchainError

HOPPER = SimpleNamespace(ordinal=0, name="NVIDIA H200", compute_capability=(9, 0), sm_count=132)
AMPERE = SimpleNamespace(ordinal=0, name="NVIDIA A100", compute_capability=(8, 0), sm_count=108)
SMALL = ["--batch", "1", "--heads", "2", "--seqlen", "200", "--head-dim", "64"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "cache"))


# --- the command line itself -----------------------------------------------------------------------------------------


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"rtk {rtk.__version__}\n")


def test_help_names_every_command(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("demo", "doctor", "warmup", "cache"):
        assert command in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["bake"], "bake"),
        (["cache", "bake"], "bake"),
        (["demo", "--head-dim", "12"], "12 is not a multiple of 8"),
        (["demo", "--head-dim", "264"], "264 is not a multiple of 8 up to 256"),
        (["demo", "--seqlen", "0"], "0 is not at least 1"),
        (["demo", "--heads", "many"], "many"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys, arguments, complaint):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert complaint in err


def test_an_error_is_one_line_and_no_traceback(capsys, monkeypatch):
    def fail():
        raise ToolchainError("NVRTC is away")

    monkeypatch.setattr("rtk.cli.cache.Cache", fail)
    assert call(capsys, "cache", "path") == (1, "", "rtk: NVRTC is away\n")


def test_rtk_debug_shows_the_traceback(monkeypatch):
    def fail():
        raise RtkError("as it was raised")

    monkeypatch.setattr("rtk.cli.cache.Cache", fail)
    monkeypatch.setenv("RTK_DEBUG", "1")
    with pytest.raises(RtkError, match="as it was raised"):
        main(["cache", "path"])


def test_as_a_module_and_into_a_closed_pipe():
    command = f"{sys.executable} -m rtk.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "rtk.cli", "cache", "path"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, os.environ["RTK_CACHE_DIR"])


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets what the doctor finds. Everything is there unless the test takes it away."""

    def be(**changes):
        facts = {
            "driver": (13, 0),
            "gpus": [HOPPER],
            "cupy": ["cupy-cuda12x 14.2.0"],
            "nvrtc": toolchain.Nvrtc("/x/libnvrtc.so.12", "12.9.86", 12, "newest found"),
            "torch_cuda": None,
            "smoke": ("ok", "ran, and its result is right", ""),
        }
        facts.update(changes)

        def nvrtc():
            if isinstance(facts["nvrtc"], Exception):
                raise facts["nvrtc"]
            return facts["nvrtc"]

        monkeypatch.setattr(toolchain, "driver_version", lambda: facts["driver"])
        monkeypatch.setattr(toolchain, "cupy_wheels", lambda: facts["cupy"])
        monkeypatch.setattr(toolchain, "nvrtc", nvrtc)
        monkeypatch.setattr(toolchain, "find_nvrtc", lambda: [] if isinstance(facts["nvrtc"], Exception) else [nvrtc()])
        monkeypatch.setattr(driver, "available", lambda: bool(facts["gpus"]))
        monkeypatch.setattr(driver, "device_count", lambda: len(facts["gpus"]))
        monkeypatch.setattr(driver, "device_properties", lambda index: facts["gpus"][index])
        monkeypatch.setattr(doctor.importlib, "import_module", lambda name: SimpleNamespace())
        monkeypatch.setattr(doctor, "_torch_cuda", lambda: facts["torch_cuda"])
        monkeypatch.setattr(doctor, "_compiles", lambda: iter([doctor.Check("compiler", "ok", "compiled")]))
        monkeypatch.setattr(onboard, "smoke", lambda: facts["smoke"])

    return be


def examine(capsys, *, able):
    """The checks of `doctor --json` by name, after looking at all that must hold for any of them."""
    code, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == (0 if able else 1)
    assert report["gpu_path"] is able
    assert report["rtk"] == rtk.__version__
    for check in report["checks"]:
        assert set(check) == {"name", "status", "detail", "fix", "needed"}
        assert check["status"] in ("ok", "missing", "note")
    return {check["name"]: check for check in report["checks"]}


def test_doctor_on_a_machine_where_all_is_well(capsys, machine):
    machine()
    checks = examine(capsys, able=True)
    assert checks["attention"]["status"] == "ok"
    assert "H200" in checks["gpu"]["detail"]
    assert "12.9.86" in checks["nvrtc"]["detail"]
    assert "newest found" in checks["nvrtc"]["detail"]
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert out.endswith("The GPU path can run.\n")


@pytest.mark.parametrize(
    ("changes", "name", "detail", "fix"),
    [
        ({"driver": None}, "driver", "no NVIDIA driver", "driver"),
        ({"driver": (11, 8)}, "driver", "serves CUDA 11.8", "driver"),
        ({"gpus": []}, "gpu", "none seen", "nvidia"),
        ({"gpus": [AMPERE]}, "gpu", "compute capability 8.0", "Hopper"),
        ({"cupy": []}, "cupy", "not installed", "-m pip install cupy-cuda12x"),
        (
            {"cupy": ["cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"]},
            "cupy",
            "overwrite each other",
            "-m pip uninstall -y cupy-cuda12x cupy-cuda13x && ",
        ),
        ({"cupy": ["cupy-cuda13x 14.2.0"], "driver": (12, 4)}, "cupy", "serves 12.4", "pip install cupy-cuda12x"),
        ({"nvrtc": ToolchainError("not found")}, "nvrtc", "not found", "-m pip install nvidia-cuda-nvrtc-cu12"),
        (
            {"nvrtc": ToolchainError("not found"), "cupy": ["cupy-cuda13x 14.2.0"]},
            "nvrtc",
            "not found",
            "-m pip install nvidia-cuda-nvrtc",
        ),
    ],
)
def test_doctor_names_what_is_missing_and_what_mends_it(capsys, machine, changes, name, detail, fix):
    machine(**changes)
    checks = examine(capsys, able=False)
    assert checks[name]["status"] == "missing"
    assert detail in checks[name]["detail"]
    assert fix in checks[name]["fix"]
    assert "attention" not in checks, "not tried where something is known to be missing"
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert f"missing: {name}" in out
    assert checks[name]["fix"] in out


def test_doctor_can_do_without_cupy_where_torch_has_cuda(capsys, machine):
    machine(cupy=[], torch_cuda="13.0")
    check = examine(capsys, able=True)["cupy"]
    assert (check["status"], check["needed"]) == ("note", False)
    assert "pip install cupy-cuda12x" in check["fix"]


def test_doctor_serves_a_hopper_gpu_beside_another(capsys, machine):
    machine(gpus=[AMPERE, HOPPER])
    examine(capsys, able=True)


def test_doctor_does_not_trust_parts_that_fail_together(capsys, machine):
    machine(smoke=("missing", "ran on NVIDIA H200, and its result is wrong", ""))
    assert examine(capsys, able=False)["attention"]["status"] == "missing"


def test_doctor_reports_a_check_that_breaks(capsys, machine, monkeypatch):
    machine()

    def broken(index):
        raise OSError("the driver went away")

    monkeypatch.setattr(driver, "device_properties", broken)
    assert "OSError: the driver went away" in examine(capsys, able=False)["gpus"]["detail"]


def test_doctor_notes_an_unusable_cache_folder(capsys, machine, monkeypatch, tmp_path):
    machine()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RTK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = examine(capsys, able=True)["cache"]  # kernels then live in memory: the GPU path still runs
    assert check["status"] == "note"
    assert "RTK_CACHE_DIR" in check["fix"]


def test_doctor_here_says_what_is_here_and_imports_no_torch():
    """The real machine, whatever it is, in a fresh process."""
    code = """
import sys
from rtk.cli import main
code = main(["doctor", "--json"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["gpu_path"] == (done.returncode == 0)
    missing = [check for check in report["checks"] if check["status"] == "missing"]
    assert all(check["fix"] for check in missing if check["name"] != "attention"), missing
    assert bool(missing) != report["gpu_path"]


def test_torch_cuda_is_read_without_importing_torch(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    origin = str(tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=origin))
    for line, expected in [("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = '13.0'", "13.0"), ("cuda = None", None)]:
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2'\n{line}\n")
        assert doctor._torch_cuda() == expected


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo_without_a_gpu_computes_verifies_and_compiles(capsys):
    code, out, err = call(capsys, "demo", "--cpu", "--json", *SMALL)
    report = json.loads(out)
    if not report["kernels"]:
        pytest.skip(f"no NVRTC: {report['not_done']}")
    assert (code, report["ok"], report["mode"]) == (0, True, "cpu")
    assert err == "", "--json is for programs: no progress"
    assert {(result["dtype"], result["right"]) for result in report["results"]} == {
        ("bfloat16", True),
        ("float16", True),
        ("float32", True),
    }
    assert all(result["rows"] == 400 for result in report["results"])
    assert all(kernel["clean"] and kernel["registers"] for kernel in report["kernels"])
    assert "--cpu was given" in report["not_done"][0]


def test_demo_says_in_words_what_it_did_and_did_not_do(capsys):
    code, out, err = call(capsys, "demo", "--cpu", *SMALL)
    if "compiling the kernels" in out:
        pytest.skip("no NVRTC")
    assert code == 0
    assert "batch 1, 2 heads, 200 tokens, head_dim 64" in out
    assert "verified: 1200 rows against float64" in out
    assert "attention_fwd_bf16_d64" in out
    assert "Not done: launching and timing the kernels" in out
    assert "rtk doctor" in out
    assert "compiled 1 of" in err


def test_demo_without_nvrtc_still_computes_and_says_how_to_get_it(capsys, monkeypatch):
    def absent(*_, **__):
        raise ToolchainError("NVRTC was not found", "pip install nvrtc")

    monkeypatch.setattr(demo.jit, "build_many", absent)
    code, out, _ = call(capsys, "demo", "--cpu", *SMALL)
    assert code == 1, "a demo that could not show the kernels is not done"
    assert "verified: 1200 rows" in out
    assert "Not done: compiling the kernels: NVRTC was not found" in out
    assert "pip install nvrtc" in out


def test_demo_tells_a_wrong_result(capsys, monkeypatch):
    real = rtk.attention

    def wrong(q, k, v, **keywords):
        o = real(q, k, v, **keywords)
        o[0, -1, -1] = v[0, -1, 0]
        return o

    monkeypatch.setattr(rtk, "attention", wrong)
    code, out, _ = call(capsys, "demo", "--cpu", *SMALL)
    assert code == 1
    assert "WRONG against float64: bfloat16 causal, float16 causal, float32 full" in out


class HostArrays:
    """Stands in for a GPU's array library: NumPy arrays, made-up times."""

    name = "pretence"

    def put(self, host):
        return host

    def get(self, array):
        return array

    def median_ms(self, work):
        work()
        return 2.0

    def matmul(self, a, b):
        return lambda: None

    def sdpa(self, q, k, v, causal):
        return lambda: None


@pytest.mark.parametrize("blas", [True, False])
def test_demo_with_a_gpu(capsys, monkeypatch, blas):
    class Library(HostArrays):
        def matmul(self, a, b):
            if not blas:
                raise ImportError("libcublas.so.12 was not found")
            return lambda: None

    monkeypatch.setattr(onboard, "find", lambda: (HOPPER, ""))
    monkeypatch.setattr(onboard, "arrays", lambda ordinal: Library())
    monkeypatch.setattr(onboard, "_GEMM_SIZE", 64)
    monkeypatch.setattr(demo, "_compile", lambda problems, progress: [])
    code, out, _ = call(capsys, "demo", *SMALL)
    assert code == 0
    assert "NVIDIA H200" in out
    assert "verified: 1600 rows" in out, "4 cases, 2 heads, 200 rows"
    for word in ("TFLOP/s", "of GEMM", "SDPA ms", "2.000"):
        assert word in out
    assert ("Not done: bfloat16 GEMM ceiling: libcublas.so.12 was not found" in out) is not blas
    report = json.loads(call(capsys, "demo", "--json", *SMALL)[1])
    assert report["device"] == "NVIDIA H200"
    first = report["results"][0]
    assert first["tflops"] == pytest.approx(4 * 2 * 200 * 200 * 64 / 2e-3 / 1e12)
    assert (first["of_gemm"] is not None) is blas


def test_demo_where_no_library_can_use_the_gpu(capsys, monkeypatch):
    monkeypatch.setattr(onboard, "find", lambda: (HOPPER, ""))
    for library in ("TorchArrays", "CupyArrays"):
        fail = type(library, (), {"__init__": lambda self, ordinal: (_ for _ in ()).throw(ImportError("not there"))})
        monkeypatch.setattr(onboard, library, fail)
    code, out, err = call(capsys, "demo", *SMALL)
    assert (code, out) == (1, "")
    assert "no array library can use the GPU (torch: not there; cupy: not there)" in err


# --- how the demo verifies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_verification_accepts_the_right_result_and_sees_a_wrong_one(dtype, causal):
    q, k, v = (onboard.random((1, 1, 300, 32), dtype, seed) for seed in range(3))

    def used(o):
        return verify.judge([(q[0, 0], k[0, 0], v[0, 0], o[0, 0])], causal=causal, tiles_each=99)

    o = rtk.attention(q, k, v, causal=causal)
    assert used(o).right
    assert used(o).rows == 300
    # The mask off by one, or where there is none a tile of keys left out for some of the rows.
    window_size = (None, 1) if causal else (300 - 64, None)
    assert not used(rtk.attention(q, k, v, window_size=window_size)).right
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        o[0, 0, 150, 3] = np.nan
    assert not used(o).right
    assert used(o).max_error == np.inf


def test_tiles_are_spread_and_reach_both_ends():
    assert verify.tiles(100, 4) == [slice(0, 64), slice(64, 100)]
    assert verify.tiles(64, 4) == [slice(0, 64)]
    spread = verify.tiles(4096, 4)
    assert (len(spread), spread[0], spread[-1]) == (4, slice(0, 64), slice(4032, 4096))
    assert sum(s.stop - s.start for s in verify.tiles(1000, 1000)) == 1000


# --- the printing ----------------------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_plain_when_it_is_not_a_terminal(capsys):
    text = console.table(["name", "ms"], [["a", "1.0"], ["longer", "123.4"]])
    assert text.splitlines() == ["  name       ms", "  a         1.0", "  longer  123.4"]
    assert "\x1b" not in text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB")])
def test_sizes_for_people(count, text):
    assert console.size(count) == text


# --- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_doctor_and_demo_on_the_gpu(gpu, capsys):
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0, out
    code, out, _ = call(
        capsys, "demo", "--json", "--batch", "1", "--heads", "4", "--seqlen", "1000", "--head-dim", "128"
    )
    report = json.loads(out)
    assert (code, report["mode"]) == (0, "gpu")
    assert all(result["right"] and result["tflops"] > 0 for result in report["results"])


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["TorchArrays", "CupyArrays"])
def test_gpu_arrays_go_there_and_back_and_are_timed(gpu, library):
    if getattr(gpu, library.removesuffix("Arrays").lower()) is None:
        pytest.skip(f"{library.removesuffix('Arrays').lower()} cannot use the GPU")
    arrays = getattr(onboard, library)(gpu.index)
    for dtype in ("float16", "bfloat16"):
        host = onboard.random((512, 512), dtype, 1)
        there = arrays.put(host)
        assert (arrays.get(there) == host).all()
        tflops, why = onboard.gemm_ceiling(arrays, dtype)
        assert (tflops is None and why) or tflops > 10


def test_what_does_not_fit_into_memory_is_said_in_one_line(capsys):
    code, _, err = call(capsys, "demo", "--cpu", "--batch", "100000000", "--seqlen", "65536")
    assert code == 1
    assert err.splitlines()[-1].startswith("rtk: not enough memory for this: ")
