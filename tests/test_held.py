"""rtk.plan: a prepared call. On the CPU it is the call itself; what reaches a GPU is seen by a pretended plan."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import rtk
from rtk import held, repeats
from rtk.arrays import NumpyLibrary
from rtk.errors import ArgumentError, UnsupportedError


def inputs(shape: tuple[int, ...] = (2, 4, 9, 16)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"causal": True, "return_lse": True}, {"layout": "bshd", "softcap": 3.0}])
def test_on_the_cpu_it_is_the_call(options: dict[str, Any]) -> None:
    x = inputs()
    plan = rtk.plan(*x, **options)
    got, expected = plan(*x, check=True), rtk.attention(*x, **options)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, expected)), strict=True):
        assert np.array_equal(a, b)
    out = np.empty_like(x[0])
    result = plan(*x, out)
    assert (result[0] if isinstance(result, tuple) else result) is out


def test_what_cannot_be_planned() -> None:
    q, k, v = inputs()
    for arguments, options, said in (
        ((q, k[:, :3], v[:, :3]), {}, "q: received 4 heads"),
        (("q", k, v), {}, "q: received an object of type str"),
        ((q, "k", v), {}, "k: received an object of type str"),
        ((q, k, v), {"return_lse": 1}, "return_lse"),
        ((q, k, v), {"causal": 1}, "causal"),
        ((q, k, v), {"config": {"BLOCK_N": 7}}, "config"),
        ((q, k, v), {"sm_margin": -1}, "sm_margin"),
    ):
        with pytest.raises((ArgumentError, UnsupportedError), match=said):
            rtk.plan(*arguments, **options)
    with pytest.raises(TypeError):
        rtk.plan(q, k, v, kv_range=None)  # type: ignore[call-arg]


def test_a_checked_call_says_what_does_not_fit() -> None:
    q, k, v = inputs()
    plan = rtk.plan(q, k, v)
    for name, arguments in (
        ("q", (q[:1], k, v)),
        ("k", (q, np.asfortranarray(k), v)),
        ("v", (q, k, v.astype(np.float64))),
        ("k", (q, k.tolist(), v)),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: received .*as the plan was made for"):
            plan(*arguments, check=True)


def test_a_launch_gets_the_addresses(monkeypatch: Any) -> None:
    torch = pytest.importorskip("torch")
    from rtk.torch import quick

    seen: list[Any] = []

    class Plan:
        arrays, device, counts = repeats.ARRAYS, 0, False

        def launch(self, addresses: Any, stream: int, counter: Any, here: bool) -> None:
            seen.append((addresses, stream, counter, here))

    monkeypatch.setattr(quick, "_device", lambda: 0)
    monkeypatch.setattr(quick, "_stream", lambda device: 5)
    monkeypatch.setattr(quick, "_empty", functools.partial(quick._empty_strided, device="cpu"))
    o = NumpyLibrary().view(inputs()[0].astype(np.float16), "o")
    known = repeats.Known(Plan(), o, (2, 4, 9), None)  # type: ignore[arg-type]
    monkeypatch.setattr(held.ops, "prepare", lambda *_, **__: known)
    q, k, v = (torch.from_numpy(x).half() for x in inputs())
    plan = rtk.plan(q, k, v, return_lse=True)
    out, lse = torch.empty_like(q), torch.empty(2, 4, 9)
    assert plan(q, k, v, out, lse) == (out, lse)
    o, made = plan(q, k, v)
    wanted = [(out, lse), (o, made)]
    for (addresses, *rest), results in zip(seen, wanted, strict=True):
        assert addresses == (*(x.data_ptr() for x in (q, k, v, *results)), 0, 0)
        assert rest == [5, None, True]
    with pytest.raises(ArgumentError, match=r"out: received memory that q has a part in"):
        plan(q, k, v, q, check=True)
    versions = out._version, lse._version
    weights = torch.randn_like(out).requires_grad_()
    loss = (out * weights).sum()
    plan(q, k, v, out, lse)
    assert (out._version, lse._version) == (versions[0] + 1, versions[1] + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inference = torch.empty_like(out)
    assert plan(q, k, v, inference, lse)[0] is inference
    with pytest.raises(ArgumentError, match=r"out: received .*as the plan was made for"):
        plan(q, k, v, out.float(), check=True)
    with pytest.raises(ArgumentError, match="a multiple of 16 bytes"):
        odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
        plan(odd, k, v, check=True)
