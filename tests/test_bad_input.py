"""Bad calls on the CPU: each is refused with words, writes nothing, and leaves the next call good."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import bad_call_strategies
import bad_calls
import numpy as np
import pytest
from bad_call_libraries import NUMPY, STRANGERS, TORCH, TORCH_CPU
from bad_call_strategies import BadCall
from bad_call_table import EVERYWHERE, OPTIONS
from bad_calls import OUT, Check, Maker, refused, zeros
from hypothesis import given
from liars import Forged, Stranger

import rtk
from rtk.errors import ArgumentError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("error")

TABLES = {
    "numpy": EVERYWHERE | NUMPY,
    "torch": EVERYWHERE | TORCH | TORCH_CPU,
}
CASES = [pytest.param(library, name, id=f"{library}-{name}") for library, table in TABLES.items() for name in table]


def maker(library: str) -> Maker:
    return Maker(library, np if library == "numpy" else pytest.importorskip("torch"))


@pytest.fixture(scope="module")
def checks() -> Callable[[str], Check]:
    made: dict[str, Check] = {}
    return lambda library: made.get(library) or made.setdefault(library, Check(maker(library)))


def test_the_table_is_large_enough() -> None:
    distinct = {name for table in (EVERYWHERE, NUMPY, TORCH, TORCH_CPU) for name in table}
    assert len(distinct) + len(STRANGERS) >= 300
    assert len(EVERYWHERE) >= 120


def test_every_argument_is_in_the_table() -> None:
    named = {name for table in (EVERYWHERE, NUMPY, TORCH) for _, names in table.values() for name in names.split()}
    assert named == {"q", "k", "v", *OPTIONS}


@pytest.mark.parametrize(("library", "name"), CASES)
def test_refuses(checks: Callable[[str], Check], library: str, name: str) -> None:
    check = checks(library)
    changes, names = TABLES[library][name]
    check(bad_calls.changed_arguments(check.make, changes), names)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", STRANGERS)
def test_refuses_strangers(checks: Callable[[str], Check], library: str, name: str) -> None:
    check = checks(library)
    changes, names = STRANGERS[name]
    check(bad_calls.changed_arguments(check.make, changes), names, strangers=True)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_strangers_would_be_good(library: str) -> None:
    make = maker(library)
    expected = np.asarray(rtk.attention(**make.call()))
    strangers = make.strangers()
    np.testing.assert_array_equal(np.from_dlpack(rtk.attention(**strangers)), expected)
    forged = strangers | {"q": Forged(bad_calls.Q)}
    assert np.from_dlpack(rtk.attention(**forged)).shape == OUT


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_random_bad_calls(checks: Callable[[str], Check], library: str) -> None:
    check = checks(library)

    @given(bad_call_strategies.bad_calls())
    def refuse(call: BadCall) -> None:
        check(call.made(check.make), " ".join(call.names))

    refuse()


OPTION_CASES = [
    name
    for name, (changes, names) in EVERYWHERE.items()
    if isinstance(changes, dict) and names not in ("q", "k", "v", "out") and not {*"qkv"} & {*changes}
]


@pytest.mark.parametrize("name", OPTION_CASES)
def test_refuses_for_an_empty_batch_too(name: str) -> None:
    changes, names = EVERYWHERE[name]
    assert isinstance(changes, dict)
    empty = {key: x[:0] for key, x in bad_calls.good_arrays().items()}
    refused(empty | changes, names)


def test_what_was_accepted_before_does_not_open_the_door() -> None:
    """Problems are remembered by their arguments, and 1 == 1.0 == True there."""
    good = bad_calls.good_arrays()
    rtk.attention(**good, window_size=(1, 0), softcap=1.0, softmax_scale=1.0, sm_margin=1, config={"SCHEDULER": 1})
    for window in ((1.0, 0), (True, False), (1, 0.0), (np.float64(1), 0)):
        refused(good | {"window_size": window}, "window_size")
    for name in ("softcap", "softmax_scale", "sm_margin", "causal"):
        refused(good | {name: {"causal": 1}.get(name, True)}, name)
    refused(good | {"config": {"SCHEDULER": True}}, "config")
    refused(good | {"config": {"SCHEDULER": 1.0}}, "config")


def test_numbers_at_the_edge_are_taken() -> None:
    good = bad_calls.good_arrays()
    for options in (
        {"softmax_scale": 2.3e38},
        {"softmax_scale": np.float16(0.1)},
        {"softmax_scale": np.int64(-(2**63))},
        {"softcap": 1.2e-38, "softmax_scale": 0.5},
        {"softcap": np.float16(20)},
        {"softcap": 3.4e38},
        {"window_size": (10**400, np.int8(3))},
        {"causal": np.True_},
        {"layout": np.str_("bhsd")},
    ):
        assert rtk.attention(**good, **options).shape == OUT, options
    for tiny in (1e-300, -1e-300, 1e-39):  # 0 in float32
        np.testing.assert_array_equal(rtk.attention(**good, softmax_scale=tiny), rtk.attention(**good, softmax_scale=0))


def test_what_is_larger_than_memory_is_named() -> None:
    for library in ("numpy", "torch"):
        changes = bad_calls.changed_arguments(maker(library), EVERYWHERE["a result larger than memory"][0])
        assert "bytes of memory of the CPU" in str(refused(changes, "q"))


@pytest.mark.parametrize(
    "changes",
    [{"window_size": (-5, 0)}, {"softmax_scale": float("nan")}, {"softcap": -1.0}, {"causal": "yes"}, {"q": None}],
    ids=lambda x: next(iter(x)),
)
def test_flash_attn_func_refuses(changes: dict[str, Any]) -> None:
    good = {name: x.swapaxes(1, 2) for name, x in bad_calls.good_arrays().items()}
    refused(good | changes, next(iter(changes)), rtk.flash_attn_func)


@pytest.mark.parametrize("arguments", [{}, {"q": 1}, {"q": 1, "k": 2, "v": 3, "dropout": 0.1}], ids=str)
def test_python_refuses_what_is_missing_or_unknown(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        rtk.attention(**arguments)


def test_torch_in_forward_mode() -> None:
    torch = pytest.importorskip("torch")
    x = {name: y.float() for name, y in maker("torch").call().items()}

    def attend(q: Any) -> Any:
        return rtk.attention(q, x["k"], x["v"]).sum()

    def dual(q: Any) -> None:
        with torch.autograd.forward_ad.dual_level():
            attend(torch.autograd.forward_ad.make_dual(q, q))

    for transformed in (lambda q: torch.func.jvp(attend, (q,), (q,)), dual):
        with (
            pytest.raises((ArgumentError, UnsupportedError), match=r"rtk: q: received .*accepted: "),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's own
            transformed(x["q"])
    assert tuple(rtk.attention(**x).shape) == OUT


def test_torch_tensors_that_only_look_wrong() -> None:
    torch = pytest.importorskip("torch")
    x = maker("torch").call()
    expected = rtk.attention(**x)
    with torch.no_grad():
        assert (rtk.attention(**(x | {"q": x["q"].clone().requires_grad_()})) == expected).all()
        out = torch.zeros_like(expected, requires_grad=True)
        assert (rtk.attention(**x, out=out) == expected).all()
    with torch.inference_mode():
        assert (rtk.attention(**{name: y + 0 for name, y in x.items()}) == expected).all()
        out = torch.zeros_like(expected)
    assert (rtk.attention(**x, out=out) == expected).all(), "a tensor made for inference, written outside of it"
    assert (rtk.attention(**(x | {"q": torch._neg_view(-x["q"])})) == expected).all()


def test_numpy_arrays_that_only_look_wrong(tmp_path: Any) -> None:
    x = bad_calls.good_arrays()
    expected = rtk.attention(**x)
    on_disk = np.memmap(tmp_path / "q", np.float16, "w+", shape=bad_calls.Q)
    on_disk[...] = x["q"]
    odd = np.zeros(x["q"].nbytes + 1, np.uint8)[1:].view(np.float16).reshape(bad_calls.Q)
    odd[...] = x["q"]
    for q in (on_disk, odd, x["q"].view(type("Own", (np.ndarray,), {}))):
        np.testing.assert_array_equal(rtk.attention(**(x | {"q": q})), expected)


def test_out_beside_an_input_is_fine() -> None:
    """Halves of one allocation share no element, though their ranges of addresses cross."""
    for library in ("numpy", "torch"):
        make = maker(library)
        room = make.of(zeros(2, 4, 5, 16 + 24))
        out = room[..., 16:]
        assert rtk.attention(**(make.call() | {"q": room[..., :16]}), out=out) is out


def test_a_library_that_does_not_take_the_result() -> None:
    class Ungrateful(Stranger):
        def __array_namespace__(self, **_: Any) -> Any:
            return Ungrateful

        @staticmethod
        def from_dlpack(_: Any) -> Any:
            raise RuntimeError("full")

    with pytest.raises(ArgumentError, match=r"q: received .*full"):
        rtk.attention(**{name: Ungrateful(x) for name, x in bad_calls.good_arrays().items()})


def test_errors_are_also_the_builtin_ones() -> None:
    q, k, v = bad_calls.good_arrays().values()
    with pytest.raises(ValueError, match="softcap"):
        rtk.attention(q, k, v, softcap=-1)
    with pytest.raises((NotImplementedError, ValueError), match="head_dim"):
        rtk.attention(zeros(1, 1, 4, 300), zeros(1, 1, 4, 300), zeros(1, 1, 4, 300))


def test_errors_stay_short_and_do_not_read_arrays() -> None:
    class Watched(np.ndarray):
        def __repr__(self) -> str:
            raise AssertionError("on a GPU, that waits for all that is enqueued")

    watched = np.zeros(3).view(Watched)
    assert "shape (3,), dtype float64" in str(ArgumentError("softcap", watched, "a number"))
    assert len(str(ArgumentError("config", list(range(10**6)), "a config"))) < 400
    assert "type Loud" in str(ArgumentError("q", type("Loud", (), {"__repr__": lambda _: 1 / 0})(), "an array"))


def test_memory_on_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that says "GPU" must give memory of that GPU: the driver is asked for both ends of it."""
    import contextlib

    from rtk import arrays, dlpack, driver
    from rtk.errors import DriverError

    owner = {0x1000: 0, 0x1FFE: 0, 0x5000: 1}

    def call(function: str, result: Any, attribute: int, pointer: Any) -> None:
        assert (function, attribute) == ("cuPointerGetAttribute", 9)
        if pointer.value not in owner:
            raise DriverError(function, 1, "CUDA_ERROR_INVALID_VALUE")
        result._obj.value = owner[pointer.value]

    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "on_device", lambda _: contextlib.nullcontext())
    dlpack._check_memory(arrays.View(0x1000, (2, 1024), (1024, 1), "float16", 0), 0)
    dlpack._check_memory(arrays.View(0x1FFE, (2, 1024), (-1024, -1), "float16", 0), 0)
    dlpack._check_memory(arrays.View(0, (0, 4), (4, 1), "float16", 0), 0)
    for view in (
        arrays.View(0x1000, (2, 2048), (2048, 1), "float16", 0),  # the end is elsewhere
        arrays.View(0, (2, 2), (2, 1), "float16", 0),
        arrays.View(0x5000, (1, 1), (1, 1), "float16", 0),  # another GPU's
        arrays.View(0x5000, (1, 1), (1, 1), "float16", 1),
    ):
        with pytest.raises(BufferError, match="memory"):
            dlpack._check_memory(view, 0)
