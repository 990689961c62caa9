"""Calls that rtk must refuse, with arrays that only one library can make, or none: see bad_call_table.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import ml_dtypes
import numpy as np
import pytest
from bad_calls import NAN, OUT, Changes, K, Maker, Q, Table, V, zeros
from liars import (
    CPU,
    CUDA,
    Array,
    DeviceRaises,
    Forged,
    NamespaceRaises,
    Raises,
    RaisesWhenLookedAt,
    Returns,
    SaysDevice,
    Stranger,
)


class ClassLiar:
    __class__ = np.ndarray  # type: ignore[assignment]


def _frozen(x: np.ndarray) -> np.ndarray:
    x.setflags(write=False)
    return x


def _strided(strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(zeros(2000), OUT, strides)


NUMPY: Table = {
    "torch k": (lambda _: {"k": pytest.importorskip("torch").from_numpy(zeros(*K))}, "k"),
    "torch v": (lambda _: {"v": pytest.importorskip("torch").from_numpy(zeros(*V))}, "v"),
    "torch out": (lambda _: {"out": pytest.importorskip("torch").from_numpy(zeros(*OUT))}, "out"),
    "stranger k": ({"k": Stranger(zeros(*K))}, "k"),
    "stranger v": ({"v": Stranger(zeros(*V))}, "v"),
    **{
        f"dtype {np.dtype(d)}": ({name: np.zeros(shape, d) for name, shape in (("q", Q), ("k", K), ("v", V))}, "q")
        for d in (
            "longdouble",
            "clongdouble",
            "object",
            "U3",
            "S2",
            "V2",
            "datetime64[s]",
            "timedelta64[ms]",
            np.dtype([("x", np.float16)]),
            np.dtype(ml_dtypes.float8_e4m3fn),
            np.dtype(ml_dtypes.float8_e5m2),
            np.dtype(ml_dtypes.int4),
        )
    },
    **{
        f"the other byte order, {d}": (
            {name: np.zeros(shape, d) for name, shape in (("q", Q), ("k", K), ("v", V))},
            "q",
        )
        for d in (">f2", ">f4", ">f8")
    },
    "the other byte order of k": ({"k": zeros(*K, dtype=">f2")}, "k"),
    "the other byte order of out": ({"out": zeros(*OUT, dtype=">f2")}, "out"),
    "q masked": ({"q": np.ma.masked_array(zeros(*Q), mask=True)}, "q"),
    "q masked nowhere": ({"q": np.ma.masked_array(zeros(*Q))}, "q"),
    "v masked": ({"v": np.ma.masked_array(zeros(*V), mask=False)}, "v"),
    "out masked": ({"out": np.ma.masked_array(zeros(*OUT))}, "out"),
    "q matrix": (lambda _: {"q": np.matrix(zeros(5, 16))}, "q"),
    "q a field of records": ({"q": np.zeros(Q, [("x", np.float16), ("y", np.int8)])["x"]}, "q"),
    "out a field of records": ({"out": np.zeros(OUT, [("x", np.float16), ("y", np.int8)])["x"]}, "out"),
    "q says it is an array": ({"q": ClassLiar()}, "q"),
    "q mock of an array": ({"q": Mock(spec=np.ndarray)}, "q"),
    "q __array__ of objects": ({"q": Array(np.array([object()])), "out": None}, "q"),
    "q __array__ of nothing": ({"q": Array(None), "out": None}, "q"),
    "out read-only": ({"out": _frozen(zeros(*OUT))}, "out"),
    "out broadcast": ({"out": np.broadcast_to(zeros(1, 4, 5, 24), OUT)}, "out"),
    **{
        f"out strides {strides}": ({"out": _strided(strides)}, "out")
        for strides in ((0, 240, 48, 2), (960, 0, 48, 2), (960, 240, 0, 2), (960, 240, 48, 0), (960, 240, 24, 2))
    },
}


def _with_torch(change: Callable[[Any, dict[str, Any]], Changes]) -> Callable[[Maker], Changes]:
    """change(torch, the good call's tensors)"""
    return lambda make: change(make.module, make.call())


def _fake(torch: Any, device: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(Q, dtype=torch.float16, device=device)


def _masked(torch: Any, x: Any) -> Any:
    from torch.masked import masked_tensor

    return masked_tensor(x.float(), torch.ones_like(x, dtype=torch.bool))


def _empty_like(x: Changes, dtype: Any) -> Changes:
    return {name: y.new_empty(y.shape, dtype=dtype) for name, y in x.items()}


def _freed(x: Any) -> Any:
    """As sharded training leaves parameters between uses: a shape without memory."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


TORCH: Table = {
    "k in NumPy": (lambda _: {"k": zeros(*K)}, "k"),
    "v in NumPy": (lambda _: {"v": zeros(*V)}, "v"),
    "out in NumPy": (lambda _: {"out": zeros(*OUT)}, "out"),
    **{
        f"{name} requires grad": (_with_torch(lambda _, x, name=name: {name: x[name].requires_grad_()}), "out")
        for name in "qkv"
    },
    "q parameter": (_with_torch(lambda torch, x: {"q": torch.nn.Parameter(x["q"])}), "out"),
    "q result of autograd": (_with_torch(lambda _, x: {"q": x["q"].requires_grad_() * 2}), "out"),
    "out requires grad": (lambda make: {"out": make.poisoned().requires_grad_()}, "out"),
    **{f"{name} sparse": (_with_torch(lambda _, x, name=name: {name: x[name].to_sparse()}), name) for name in "qkv"},
    "q sparse rows": (_with_torch(lambda torch, x: {"q": x["q"][0, 0].float().to_sparse_csr()}), "q"),
    "out sparse": (lambda make: {"out": make.poisoned().to_sparse()}, "out"),
    **{f"{name} meta": (_with_torch(lambda _, x, name=name: {name: x[name].to("meta")}), name) for name in "qkv"},
    "all meta": (_with_torch(lambda _, x: {name: y.to("meta") for name, y in x.items()}), "q"),
    "vast meta": (_with_torch(lambda torch, x: {"q": torch.empty(1 << 20, 4, 1 << 20, 16, device="meta")}), "q k"),
    "out meta": (lambda make: {"out": make.poisoned().to("meta")}, "out"),
    "q nested": (_with_torch(lambda torch, x: {"q": torch.nested.nested_tensor(list(x["q"]))}), "q"),
    "q jagged": (
        _with_torch(
            lambda torch, x: {"q": torch.nested.nested_tensor([x["q"][0, 0], x["q"][1, 0, :3]], layout=torch.jagged)}
        ),
        "q",
    ),
    **{
        f"dtype {name}": (
            _with_torch(
                lambda torch, x, name=name: {
                    key: torch.empty_like(y, dtype=getattr(torch, name)) for key, y in x.items()
                }
            ),
            "q",
        )
        for name in ("complex64", "complex128", "complex32", "float8_e4m3fn", "float8_e5m2", "uint64")
    },
    "k bfloat16": (_with_torch(lambda torch, x: {"k": x["k"].bfloat16()}), "k"),
    "out bfloat16": (lambda make: {"out": make.poisoned().bfloat16()}, "out"),
    "q fake": (lambda make: {"q": _fake(make.module, make.device)}, "out"),
    "q masked": (_with_torch(lambda torch, x: {"q": _masked(torch, x["q"])}), "q"),
    "q freed": (_with_torch(lambda _, x: {"q": _freed(x["q"])}), "q"),
    "v freed": (_with_torch(lambda _, x: {"v": _freed(x["v"])}), "v"),
    "out freed": (lambda make: {"out": _freed(make.poisoned())}, "out"),
    "scale a tensor": (lambda make: {"softmax_scale": make.of(np.array(0.1))}, "softmax_scale"),
    "scale that requires grad": (
        _with_torch(lambda torch, _: {"softmax_scale": torch.tensor(0.1, requires_grad=True)}),
        "softmax_scale",
    ),
    "q a module": (_with_torch(lambda torch, _: {"q": torch.nn.Linear(2, 2)}), "q"),
    "q a storage": (_with_torch(lambda _, x: {"q": x["q"].untyped_storage()}), "q"),
    "q a device": (_with_torch(lambda torch, _: {"q": torch.device("cpu")}), "q"),
    "q mock of a tensor": (_with_torch(lambda torch, _: {"q": Mock(spec=torch.Tensor)}), "q"),
}
TORCH_CPU: Table = {
    "q quantized": (
        _with_torch(lambda torch, x: {"q": torch.quantize_per_tensor(x["q"].float(), 0.1, 0, torch.qint8)}),
        "q",
    ),
    "q of MKL-DNN": (_with_torch(lambda _, x: {"q": x["q"].float().to_mkldnn()}), "q"),
}

# --- DLPack ----------------------------------------------------------------------------------------------------------
# The good call is made of strangers; without out=, which they cannot have.


def _reused(make: Maker) -> Any:
    capsule = make.of(zeros(*Q)).__dlpack__()
    make.module.from_dlpack(Returns(make.of(zeros(*Q)), capsule))
    return Returns(make.of(zeros(*Q)), capsule)


STRANGERS: Table = {
    "out": (lambda make: {"out": make.poisoned()}, "out"),
    "out stranger": (lambda make: {"out": Stranger(make.poisoned())}, "out"),
    "q not a capsule": (lambda make: {"q": Returns(make.of(zeros(*Q)), 3)}, "q"),
    "k not a capsule": (lambda make: {"k": Returns(make.of(zeros(*K)), None)}, "k"),
    "v gives an array": (lambda make: {"v": Returns(make.of(zeros(*V)), zeros(*V))}, "v"),
    "q capsule used before": (lambda make: {"q": _reused(make)}, "q"),
    **{
        f"{name} {kind.__name__}": (
            lambda make, name=name, kind=kind, shape=shape: {name: kind(make.of(zeros(*shape)))},
            name,
        )
        for name, shape in (("q", Q), ("k", K), ("v", V))
        for kind in (Raises, RaisesWhenLookedAt, DeviceRaises)
    },
    "q NamespaceRaises": (lambda make: {"q": NamespaceRaises(make.of(zeros(*Q)))}, "q"),
    **{
        f"q on {device}": (lambda make, device=device: {"q": SaysDevice(make.of(zeros(*Q)), device)}, "q")
        for device in ((10, 0), (3, 0), (13, 0), (0, 0), (-1, 0), (10**30, 0), (), None, "cpu", ("cpu", 0), (None, 0))
    },
    "k None": ({"k": None}, "k"),
    "v text": ({"v": "v"}, "v"),
    "q integers": (lambda make: {"q": Stranger(make.of(zeros(*Q, dtype=np.int32)))}, "q k"),
    "v of another dtype": (lambda make: {"v": Stranger(make.of(zeros(*V, dtype=np.float32)))}, "v"),
    "k of another shape": (lambda make: {"k": Stranger(make.of(zeros(1, 2, 7, 16)))}, "k"),
    "softcap nan": ({"softcap": NAN}, "softcap"),
}
FORGED: dict[str, dict[str, Any]] = {
    "name": {"name": b"junk"},
    "name of a used capsule": {"name": b"used_dltensor"},
    "name empty": {"name": b""},
    "null pointer": {"data": 0},
    "negative size": {"shape": (2, 4, -5, 16)},
    "size past 2**63": {"shape": (1 << 40, 1 << 40, 5, 16)},
    "no dimension": {"ndim": 0},
    "-1 dimensions": {"ndim": -1},
    "1000 dimensions": {"ndim": 1000},
    "33 dimensions": {"shape": (1,) * 33},
    "vectors": {"dtype": (2, 16, 4)},
    "7 bits": {"dtype": (2, 7, 1)},
    "kind 77": {"dtype": (77, 16, 1)},
    "int16": {"dtype": (0, 16, 1)},
    "complex": {"dtype": (5, 64, 1)},
    "a GPU in the capsule": {"device": (CUDA, 0), "said": (CPU, 0)},
    "a GPU in words": {"device": (CPU, 0), "said": (CUDA, 0)},
    "a GPU in both": {"device": (CUDA, 0)},
    "GPU 99": {"device": (CUDA, 99)},
    "GPU -1": {"device": (CUDA, -1)},
    "a GPU at a null pointer": {"device": (CUDA, 0), "data": 0},
    "a GPU at address 16": {"device": (CUDA, 0), "data": 16},
    "a GPU at no address": {"device": (CUDA, 0), "data": 1 << 62},
}
STRANGERS |= {
    f"q forged: {kind}": (lambda _, words=words: {"q": Forged(**({"shape": Q} | words))}, "q k")
    for kind, words in FORGED.items()
}
