"""rtk.torch.MultiheadAttention on the CPU, against torch.nn.MultiheadAttention and against the definition."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yardstick import visible_keys

import rtk
from rtk.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")

import rtk.torch  # noqa: E402
from rtk.torch.multihead import MultiheadAttention  # noqa: E402

CLOSE = {"float64": {"rtol": 1e-10, "atol": 1e-12}, "float32": {"rtol": 1e-4, "atol": 1e-5}}
F64 = {"dtype": torch.float64}


def pair(*args: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """torch's module and ours, of one seed, with biases that are not 0."""
    modules = []
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(seed)
        modules.append(kind(*args, **options))
    theirs, ours = modules
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(*shapes: tuple[int, ...], seed: int = 0, dtype: str = "float64") -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=getattr(torch, dtype)) for shape in shapes]


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, **CLOSE[str(wanted.dtype).removeprefix("torch.")])


def defined(module: Any, x: Any, seen: Any = None, softcap: float = 0.0, rope: Any = None) -> Any:
    """Self-attention of a batch_first module straight from the definition, key heads repeated."""
    seqlen, rows = x.shape[1], [h * module.head_dim for h in (module.num_heads, module.num_kv_heads)]
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).split([rows[0], rows[1], rows[1]], -1)
    q, k, v = (y.reshape(*y.shape[:2], -1, module.head_dim).transpose(1, 2) for y in (q, k, v))
    if rope is not None:
        q, k = rope(q, k)
    k, v = (y.repeat_interleave(module.num_heads // module.num_kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / module.head_dim**0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool) if seen is None else torch.as_tensor(seen)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    o = (weights @ v).transpose(1, 2).reshape(x.shape)
    return o @ module.out_proj.weight.T + module.out_proj.bias


# --- against torch's module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 24}, {"vdim": 40}, {"kdim": 24, "vdim": 40}], ids=str
)
def test_same_parameters_from_the_same_seed(options: dict[str, Any]) -> None:
    states = []
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(7)
        states.append(kind(32, 4, **options).state_dict())
    theirs, ours = states
    assert list(theirs) == list(ours)
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 40}], ids=str)
def test_weights_load_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = torch.nn.MultiheadAttention(32, 4, **options), MultiheadAttention(32, 4, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    again = torch.nn.MultiheadAttention(32, 4, **options)
    again.load_state_dict(ours.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 24, "vdim": 40}], ids=str)
def test_cross_attention(dtype: str, batch_first: bool, options: dict[str, Any]) -> None:
    theirs, ours = pair(32, 4, batch_first=batch_first, dtype=getattr(torch, dtype), **options)
    query, key, value = inputs((5, 3, 32), (7, 3, ours.kdim), (7, 3, ours.vdim), dtype=dtype)
    if batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    with torch.no_grad():
        got, weights = ours(query, key, value)
        wanted = theirs(query, key, value, need_weights=False)[0]
    assert weights is None
    close(got, wanted)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    theirs, ours = pair(32, 4, batch_first=batch_first, **F64)
    query, key = inputs((5, 32), (7, 32))
    padding, hidden = torch.arange(7) > 4, torch.zeros(4, 5, 7, dtype=torch.bool)
    hidden[1, 2, 0] = True
    end = torch.tensor([5], dtype=torch.int32)
    with torch.no_grad():
        for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": hidden}):
            close(ours(query, key, **masks)[0], theirs(query, key, key, need_weights=False, **masks)[0])
        close(ours(query, key, kv_range=(None, end))[0], ours(query, key, key_padding_mask=padding)[0])


MASKS: dict[str, Any] = {
    "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    "bool": {"attn_mask": torch.eye(6, dtype=torch.bool)},
    "numbers": {"attn_mask": torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6)},
    "each head": {"attn_mask": torch.linspace(-1, 1, 12 * 36, dtype=torch.float64).reshape(12, 6, 6)},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0], [0] * 6]).bool()},
    "padding as numbers": {"key_padding_mask": torch.linspace(-2, 2, 18, dtype=torch.float64).reshape(3, 6)},
}
MASKS["both"] = {**MASKS["bool"], **MASKS["padding"]}
MASKS["both, bool and numbers"] = {**MASKS["numbers"], "key_padding_mask": MASKS["padding"]["key_padding_mask"]}
MASKS["causal and padding"] = {**MASKS["causal"], **MASKS["padding"]}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_masks_and_gradients(masks: dict[str, Any]) -> None:
    theirs, ours = pair(32, 4, batch_first=True, **F64)
    results = []
    for module, options in ((theirs, {"need_weights": False}), (ours, {})):
        (x,) = inputs((3, 6, 32))
        x.requires_grad_()
        output = module(x, x, x, **masks, **options)[0]
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        close(got, wanted)


def test_numbers_of_another_dtype() -> None:
    ours = MultiheadAttention(32, 4, batch_first=True)
    (x,) = inputs((2, 6, 32), dtype="float32")
    numbers = torch.arange(36.0).reshape(6, 6)
    assert torch.equal(ours(x, attn_mask=numbers.double())[0], ours(x, attn_mask=numbers)[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "vdim": 40}], ids=str)
def test_gradients_without_masks(options: dict[str, Any]) -> None:
    theirs, ours = pair(32, 4, **F64, **options)
    results = []
    for module in (theirs, ours):
        leaves = [x.requires_grad_() for x in inputs((5, 3, 32), (7, 3, ours.kdim), (7, 3, ours.vdim))]
        output = module(*leaves, need_weights=False)[0]
        output.square().sum().backward()
        results.append([output, *(x.grad for x in leaves), *(p.grad for p in module.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        close(got, wanted)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched src_key_padding_mask")
def test_inside_torch_s_encoder(training: bool, causal: bool) -> None:
    """In eval torch's layer would take the weights and leave forward out; and it names is_causal in every call."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, **F64).train(training)
    swapped = copy.deepcopy(layer)
    swapped.self_attn = MultiheadAttention(32, 4, batch_first=True, causal=causal, **F64)
    swapped.self_attn.load_state_dict(layer.self_attn.state_dict(), strict=True)
    (x,) = inputs((2, 6, 32))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6, **F64) if causal else None
    padding = torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
    with torch.no_grad():
        for key_padding_mask in (None, padding):
            wanted = layer(x, src_mask=mask, src_key_padding_mask=key_padding_mask, is_causal=causal)
            close(swapped(x, src_key_padding_mask=key_padding_mask), wanted)


@given(
    st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(1, 20)] * 2),
    st.sampled_from([8, 24]),
    st.tuples(*[st.booleans()] * 4),
    st.sampled_from([(None, None), (16, None), (None, 40)]),
)
def test_any_shape(sizes: Any, head_dim: int, flags: Any, dims: Any) -> None:
    batch, kv_heads, group, seqlen_q, seqlen_k = sizes
    batch_first, bias, causal, padded = flags
    heads, options = kv_heads * group, {"batch_first": batch_first, "bias": bias, "kdim": dims[0], "vdim": dims[1]}
    theirs = torch.nn.MultiheadAttention(heads * head_dim, heads, **options, **F64)
    ours = MultiheadAttention(heads * head_dim, heads, kv_heads, causal=causal, **options, **F64)
    theirs.load_state_dict(with_repeated_heads(ours), strict=True)
    shapes = [(seqlen_q, batch, ours.embed_dim), (seqlen_k, batch, ours.kdim), (seqlen_k, batch, ours.vdim)]
    query, key, value = (x.transpose(0, 1) if batch_first else x for x in inputs(*shapes, seed=sum(sizes)))
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1) if causal else None
    padding = None
    if padded:  # the first key stays: a query without a key is not torch's strength
        padding = torch.rand(batch, seqlen_k, generator=torch.Generator().manual_seed(sum(sizes))) < 0.4
        padding[:, 0] = False
    with torch.no_grad():
        got = ours(query, key, value, key_padding_mask=padding)[0]
        wanted = theirs(query, key, value, key_padding_mask=padding, attn_mask=hidden, need_weights=False)[0]
    close(got, wanted)


# --- what torch's has not ---------------------------------------------------------------------------------------------


def with_repeated_heads(module: Any) -> dict[str, Any]:
    """The state of a torch module that does the same: each key head once for every query head that reads it."""
    state, rows = module.state_dict(), module._rows
    group = module.num_heads // module.num_kv_heads

    def repeated(x: Any) -> Any:
        heads = x.unflatten(0, (-1, module.head_dim))
        return heads.repeat_interleave(group, 0).flatten(0, 1)

    for name in state.keys() & {"in_proj_weight", "in_proj_bias"}:
        q, k, v = state[name].split(rows)
        state[name] = torch.cat([q, repeated(k), repeated(v)])
    for name in state.keys() & {"k_proj_weight", "v_proj_weight"}:
        state[name] = repeated(state[name])
    return state


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fewer_key_heads(kv_heads: int) -> None:
    ours = MultiheadAttention(32, 4, kv_heads, batch_first=True, **F64)
    assert ours.in_proj_weight.shape == ((4 + 2 * kv_heads) * 8, 32)
    (x,) = inputs((2, 6, 32))
    close(ours(x)[0], defined(ours, x))
    hidden = torch.eye(6, dtype=torch.bool)
    close(ours(x, attn_mask=hidden)[0], defined(ours, x, ~hidden))


def test_causal_window_softcap() -> None:
    (x,) = inputs((2, 9, 32))
    for mask, softcap in (({"causal": True}, 0.0), ({"window_size": (2, 1)}, 0.0), ({"window_size": (3, -1)}, 2.0)):
        ours = MultiheadAttention(32, 4, 2, batch_first=True, softcap=softcap, **mask, **F64)
        close(ours(x)[0], defined(ours, x, visible_keys(9, 9, **mask), softcap))


def test_the_first_query_stands_at_the_first_key() -> None:
    theirs, ours = pair(32, 4, **F64)
    ours.causal = True
    query, key = inputs((4, 2, 32), (7, 2, 32))
    hidden = torch.ones(4, 7, dtype=torch.bool).triu(1)
    wanted = theirs(query, key, key, attn_mask=hidden, need_weights=False)[0]
    close(ours(query, key)[0], wanted)
    close(ours(query, key, key_padding_mask=torch.zeros(2, 7, dtype=torch.bool))[0], wanted)
    ours.causal = False
    close(ours(query, key, is_causal=True)[0], wanted)


def test_a_causal_module_stays_causal() -> None:
    """Whoever calls with torch's default of is_causal, False, has not asked to see what comes later."""
    ours = MultiheadAttention(32, 4, batch_first=True, causal=True, **F64)
    (x,) = inputs((2, 6, 32))
    assert torch.equal(ours(x, is_causal=False)[0], ours(x)[0])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 1)}], ids=str)
def test_kv_range_is_padding(options: dict[str, Any]) -> None:
    ours = MultiheadAttention(32, 4, 2, batch_first=True, **options, **F64)
    (x,) = inputs((3, 9, 32))
    first, end = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 0, 0], [9, 5, 7]))
    seen = torch.as_tensor(visible_keys(9, 9, kv_range=(first, end), **options))
    rows = seen.any(-1)[:, 0]  # a window can leave a query in the padding without a key
    got = ours(x, kv_range=(first, end))[0]
    close(got[rows], defined(ours, x, seen)[rows])
    close(got[~rows], ours.out_proj.bias.expand_as(got[~rows]))
    if "window_size" not in options:
        padding = torch.arange(9) >= end[:, None]
        close(ours(x, key_padding_mask=padding)[0], got)


def turned(q: Any, k: Any) -> Any:
    """A rotation by position, in float32 as such things are."""

    def turn(x: Any) -> Any:
        angle = torch.arange(x.shape[2])[:, None] / 10.0 ** torch.arange(x.shape[3] // 2)
        (a, b), cos, sin = x.float().chunk(2, -1), angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    return turn(q), turn(k)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rope(batch_first: bool) -> None:
    asked = []

    def rope(q: Any, k: Any) -> Any:
        asked.append((tuple(q.shape), tuple(k.shape)))
        return turned(q, k)

    ours = MultiheadAttention(32, 4, 2, batch_first=batch_first, rope=rope, **F64)
    (x,) = inputs((3, 6, 32))
    got = ours(x if batch_first else x.transpose(0, 1))[0]
    assert asked == [((3, 4, 6, 8), (3, 2, 6, 8))]
    assert got.dtype == torch.float64
    wanted = defined(ours, x, rope=lambda q, k: [y.double() for y in turned(q, k)])
    close(got if batch_first else got.transpose(0, 1), wanted)


def test_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(32, 4, dropout=0.5, batch_first=True, **F64)
    (x,) = inputs((2, 6, 32))
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    close(ours(x)[0], defined(ours, x))


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """scaled_dot_product_attention, which chooses; rtk.attention for what torch's function cannot express."""
    calls, sdpa = [], "scaled_dot_product_attention"

    def spied(name: str, original: Any) -> Any:
        def spy(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        return spy

    for home, name in ((rtk, "attention"), (rtk.torch, sdpa)):
        monkeypatch.setattr(home, name, spied(name, getattr(home, name)))
    ours = MultiheadAttention(32, 4, 2, dropout=0.1, batch_first=True, causal=True).eval()
    (x,) = inputs((2, 6, 32), dtype="float32")
    with torch.no_grad():
        ours(x)
        ours(x, attn_mask=torch.eye(6).bool().logical_not(), is_causal=True)
        ours(x, key_padding_mask=torch.zeros(2, 6).bool())
        ours.train()(x)
        assert calls == [sdpa] * 4
        calls.clear()
        ours.eval()(x, kv_range=(None, torch.tensor([3, 6], dtype=torch.int32)))
        MultiheadAttention(32, 4, window_size=(2, 0))(x)
    assert calls == ["attention"] * 2


def test_autocast() -> None:
    ours = MultiheadAttention(32, 4, 2, batch_first=True, rope=turned)
    (x,) = inputs((2, 6, 32), dtype="float32")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x)[0]
        masked = ours(x, key_padding_mask=torch.zeros(2, 6))[0]
    assert got.dtype == masked.dtype == torch.bfloat16
    torch.testing.assert_close(got, masked, rtol=0.05, atol=0.02)
    torch.testing.assert_close(got.float(), defined(ours, x, rope=turned), rtol=0.05, atol=0.02)


def test_copies_and_pickles() -> None:
    ours = MultiheadAttention(32, 4, 2, window_size=(3, None), batch_first=True)
    (x,) = inputs((2, 6, 32), dtype="float32")
    with torch.no_grad():
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x)[0], ours(x)[0])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"embed_dim": 0}, ArgumentError, "embed_dim: received 0"),
        ({"embed_dim": 33}, ArgumentError, "33 with 4 heads"),
        ({"num_heads": 4.0}, ArgumentError, "num_heads"),
        ({"num_kv_heads": 3}, ArgumentError, "num_kv_heads: received 3 with 4 heads"),
        ({"num_kv_heads": 0.1}, ArgumentError, "num_kv_heads"),  # torch's third argument is dropout
        ({"kdim": 0}, ArgumentError, "kdim"),
        ({"vdim": "24"}, ArgumentError, "vdim"),
        ({"dropout": 1.5}, ArgumentError, "dropout"),
        ({"dropout": "0"}, ArgumentError, "dropout"),
        ({"softcap": -1.0}, ArgumentError, "softcap"),
        ({"softcap": float("nan")}, ArgumentError, "softcap"),
        ({"window_size": 3}, ArgumentError, "window_size"),
        ({"causal": 1}, ArgumentError, "causal"),
        ({"bias": None}, ArgumentError, "bias"),
        ({"batch_first": "yes"}, ArgumentError, "batch_first"),
        ({"rope": 3}, ArgumentError, "rope"),
        ({"add_bias_kv": True}, UnsupportedError, "add_bias_kv"),
        ({"add_zero_attn": True}, UnsupportedError, "add_zero_attn"),
    ],
)
def test_what_makes_no_module(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        MultiheadAttention(**{"embed_dim": 32, "num_heads": 4, **options})


X = torch.zeros(2, 6, 32)
NOTHING = torch.zeros(2, 6, dtype=torch.bool)
ENDS = torch.full((2,), 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("module", "call", "error", "said"),
    [
        ({}, {"need_weights": True}, UnsupportedError, "need_weights"),
        ({}, {"query": X.numpy()}, ArgumentError, "query.*ndarray"),
        ({}, {"query": X[..., :31]}, ArgumentError, r"query.*\(2, 6, 31\).*32 features"),
        ({}, {"query": X[None]}, ArgumentError, "query"),
        ({}, {"key": X[0]}, ArgumentError, r"key.*\(6, 32\).*batch of query"),
        ({}, {"key": X[:1]}, ArgumentError, r"key.*\(1, 6, 32\).*batch of query"),
        ({}, {"value": X[:, :5]}, ArgumentError, r"value.*seqlen of key"),
        ({"kdim": 24}, {}, ArgumentError, "key.*24 features"),
        ({}, {"is_causal": 1}, ArgumentError, "is_causal"),
        ({}, {"key_padding_mask": NOTHING[0]}, ArgumentError, r"key_padding_mask.*\(2, 6\)"),
        ({}, {"key_padding_mask": NOTHING.int()}, ArgumentError, "key_padding_mask.*int32"),
        ({}, {"attn_mask": NOTHING}, ArgumentError, r"attn_mask.*\(2, 6\).*\(6, 6\) or \(8, 6, 6\)"),
        ({}, {"attn_mask": True}, ArgumentError, "attn_mask"),
        ({}, {"kv_range": (None, ENDS.long())}, ArgumentError, r"kv_range\[1\]"),
        ({}, {"kv_range": (None, ENDS), "key_padding_mask": NOTHING}, UnsupportedError, "with kv_range"),
        ({"window_size": (3, 0)}, {"key_padding_mask": NOTHING}, UnsupportedError, "with window_size.*as kv_range"),
        ({"softcap": 2.0}, {"attn_mask": torch.zeros(6, 6)}, UnsupportedError, "attn_mask with softcap"),
        ({"softcap": 2.0, "dropout": 0.1}, {}, UnsupportedError, r"dropout with softcap.*eval\(\)"),
        ({"dropout": 0.1}, {"kv_range": (None, ENDS)}, UnsupportedError, "dropout with kv_range"),
        ({"rope": lambda q, k: q}, {}, ArgumentError, "rope.*Tensor"),
        ({"rope": lambda q, k: (q, k[:, :1])}, {}, ArgumentError, "rope.*shapes"),
        ({"rope": lambda q, k: (q, None)}, {}, ArgumentError, "rope.*shapes"),
        ({"embed_dim": 16, "softcap": 1.0}, {"query": X[..., :16]}, UnsupportedError, "head_dim 4"),
    ],
)
def test_what_is_no_call(module: dict[str, Any], call: dict[str, Any], error: type[Exception], said: str) -> None:
    ours = MultiheadAttention(**{"embed_dim": 32, "num_heads": 4, "batch_first": True, **module})
    with pytest.raises(error, match=said), torch.no_grad():
        ours(**{"query": X, **call})
