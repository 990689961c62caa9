"""torch.nn.MultiheadAttention on rtk's kernel: the same weights, and fewer key heads, windows, softcap and RoPE."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import rtk.torch
from rtk.errors import ArgumentError, UnsupportedError
from rtk.problem import is_bool, is_integer, is_real, window_bounds

Rope = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MultiheadAttention(torch.nn.Module):  # type: ignore[misc]  # torch is not read by mypy here
    """Projections, attention by rtk, and the output's projection.

    With num_kv_heads as num_heads, parameters have the names, shapes and first values of `torch.nn.MultiheadAttention`:
    a state_dict loads both ways, and one seed gives one module.

    Args:
        embed_dim: features of the query and of the result.
        num_heads: query heads; head_dim is embed_dim // num_heads.
        num_kv_heads: heads of k and v, of which num_heads is a multiple; None is num_heads. in_proj_weight then has
            (num_heads + 2 * num_kv_heads) * head_dim rows, those of q first, then k's, then v's.
        dropout: probability to drop a weight in training. Dropout is torch's, not the kernel's.
        bias: whether the projections add one.
        add_bias_kv, add_zero_attn: False; here for torch's callers.
        kdim, vdim: features of key and value; None is embed_dim. Where one differs from embed_dim there are
            q_proj_weight, k_proj_weight and v_proj_weight instead of in_proj_weight, as in torch.
        batch_first: (batch, seqlen, features) instead of (seqlen, batch, features).
        causal: in every call a query sees no key after its own position, the first query standing at the first key.
        window_size: (left, right) as in `rtk.attention`, the first query standing at the first key.
        softcap: as in `rtk.attention`.
        rope: called as rope(q, k) after the projections, with q (batch, num_heads, seqlen_q, head_dim) and k
            (batch, num_kv_heads, seqlen_k, head_dim); returns both in these shapes. If it is a module, its parameters
            and buffers are this module's too.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: values that do not fit each other.
        UnsupportedError: add_bias_kv or add_zero_attn.
    """

    # torch's TransformerEncoderLayer takes the weights of a module that says True, and passes its forward by.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        rope: Rope | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        kdim, vdim = (embed_dim if dim is None else dim for dim in (kdim, vdim))
        _check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, kdim=kdim, vdim=vdim)
        if embed_dim % num_heads:
            raise ArgumentError("embed_dim", f"{embed_dim} with {num_heads} heads", "a multiple of num_heads")
        if num_heads % num_kv_heads:
            raise ArgumentError("num_kv_heads", f"{num_kv_heads} with {num_heads} heads", "a divisor of num_heads")
        for name, value in (("bias", bias), ("batch_first", batch_first), ("causal", causal)):
            if not is_bool(value):
                raise ArgumentError(name, value, "True or False")
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value is not False:
                raise UnsupportedError(name, value, "False: all keys come from the call")
        if not is_real(dropout) or not 0 <= dropout <= 1:
            raise ArgumentError("dropout", dropout, "a probability from 0 to 1")
        if not is_real(softcap) or not 0 <= softcap < math.inf:
            raise ArgumentError("softcap", softcap, "0 for none, or a finite positive number")
        if rope is not None and not callable(rope):
            raise ArgumentError("rope", rope, "None or a callable (q, k) -> (q, k)")
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.dropout, self.batch_first, self.causal, self.softcap = dropout, batch_first, causal, softcap
        self.window_size = window_bounds(window_size)
        self.rope = rope
        self._rows = [heads * self.head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
        self._make_parameters(bias, {"device": device, "dtype": dtype})

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        """In torch's order: one seed gives the same numbers."""

        def parameter(*shape: int) -> Any:
            return torch.nn.Parameter(torch.empty(shape, **factory))

        packed = self.embed_dim == self.kdim == self.vdim
        self.register_parameter("in_proj_weight", parameter(sum(self._rows), self.embed_dim) if packed else None)
        separate = zip("qkv", self._rows, (self.embed_dim, self.kdim, self.vdim), strict=True)
        for name, rows, features in separate:
            self.register_parameter(f"{name}_proj_weight", None if packed else parameter(rows, features))
        self.register_parameter("in_proj_bias", parameter(sum(self._rows)) if bias else None)
        self.out_proj = torch.nn.Linear(self.embed_dim, self.embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the first values, as torch.nn.MultiheadAttention does: out_proj.weight keeps those of its Linear."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            torch.nn.init.zeros_(self.in_proj_bias)
            torch.nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{self.embed_dim}, {heads}, batch_first={self.batch_first}, causal={self.causal}"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
        kv_range: tuple[Any, Any] | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Attends from query to key and value.

        By `rtk.torch.scaled_dot_product_attention`, which hands to torch what rtk cannot serve; with window, softcap
        or kv_range by `rtk.attention`, whose limits of dtype and head_dim hold then, without masks and dropout.

        Args:
            query: (seqlen_q, batch, embed_dim), with batch_first (batch, seqlen_q, embed_dim), or, as one sequence,
                (seqlen_q, embed_dim).
            key: with seqlen_k and kdim, in the order of query; None is query.
            value: with seqlen_k and vdim, in the order of query; None is key.
            key_padding_mask: (batch, seqlen_k), or (seqlen_k,) for one sequence; bool, True where a key is padding, or
                floating, to be added to scores.
            need_weights: False: there are no weights to return.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k); bool, True where a query may
                not see a key, or floating, to be added to scores.
            average_attn_weights: of no effect; here for torch's callers.
            is_causal: True makes this call causal. An attn_mask given with it is then, as in torch, taken to be the
                causal one and not looked at. None and False leave it to the module's `causal`.
            kv_range: (first, end) as in `rtk.attention`, int32 (batch,): for batches padded on the left or right
                what key_padding_mask says at the kernel's full speed. One sequence is a batch of 1.

        Returns:
            (output, None); output in the shape of query. A query that sees no key has the bias of out_proj.

        Raises:
            ArgumentError: shapes or dtypes that do not fit.
            UnsupportedError: need_weights, masks or dropout with a window, softcap or kv_range, and what
                `rtk.attention` refuses.
        """
        if need_weights:
            raise UnsupportedError("need_weights", need_weights, "False: the weights are never in memory as a whole")
        key = query if key is None else key
        value = key if value is None else value
        self._check_inputs(query, key, value)
        if is_causal is not None and not is_bool(is_causal):
            raise ArgumentError("is_causal", is_causal, "None, True or False")
        if is_causal:
            attn_mask = None
        causal = bool(self.causal or is_causal)
        dropout = self.dropout if self.training else 0.0
        self._check_together(key_padding_mask, attn_mask, dropout, kv_range)
        q, k, v = (self._to_heads(x) for x in self._projected(query, key, value))
        if self.rope is not None:
            q, k = self._rotated(q, k, v.dtype)
        if self._beyond_torch(kv_range):
            o = rtk.attention(
                q,
                k,
                v,
                causal=causal,
                causal_align="top-left",
                window_size=self.window_size,
                softcap=self.softcap,
                kv_range=kv_range,
                layout="bhsd",
            )
        else:
            mask = _one_mask(q, k, key_padding_mask, attn_mask, causal)
            o = rtk.torch.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                enable_gqa=self.num_kv_heads != self.num_heads,
            )
        return self.out_proj(self._from_heads(o, query.dim())), None

    def _check_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        order = "(batch, seqlen, features)" if self.batch_first else "(seqlen, batch, features)"
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, features) in inputs.items():
            if not isinstance(x, torch.Tensor):
                raise ArgumentError(name, x, "a torch.Tensor")
            if x.dim() not in (2, 3) or x.shape[-1] != features:
                accepted = f"{order}, or (seqlen, features) for one sequence, with {features} features"
                raise ArgumentError(name, f"shape {tuple(x.shape)}", accepted)
        batch_dim = 0 if self.batch_first else 1
        if key.dim() != query.dim() or (key.dim() == 3 and key.shape[batch_dim] != query.shape[batch_dim]):
            accepted = f"the batch of query, which has shape {tuple(query.shape)}, in {order}"
            raise ArgumentError("key", f"shape {tuple(key.shape)}", accepted)
        if value.shape[:-1] != key.shape[:-1]:
            accepted = f"batch and seqlen of key, which has shape {tuple(key.shape)}"
            raise ArgumentError("value", f"shape {tuple(value.shape)}", accepted)

    def _check_together(self, key_padding_mask: Any, attn_mask: Any, dropout: float, kv_range: Any) -> None:
        """What needs scaled_dot_product_attention, against what only rtk.attention can do."""
        needs = {
            "key_padding_mask": key_padding_mask is not None,
            "attn_mask": attn_mask is not None,
            "dropout": bool(dropout),
        }
        asked, beside = [name for name, given in needs.items() if given], self._beyond_torch(kv_range)
        if asked and beside:
            hint = "Leave dropout to other layers, or call eval()." if asked == ["dropout"] else ""
            if "key_padding_mask" in asked and "kv_range" not in beside:
                hint = "Padding on the left or right can be given as kv_range."
            raise UnsupportedError(asked[0], f"{asked[0]} with {' and '.join(beside)}", "one without the other", hint)

    def _beyond_torch(self, kv_range: Any) -> list[str]:
        """What of this call scaled_dot_product_attention cannot express."""
        only = {
            "window_size": self.window_size != (None, None),
            "softcap": bool(self.softcap),
            "kv_range": kv_range is not None,
        }
        return [name for name, given in only.items() if given]

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        """q, k, v with heads * head_dim features each; of one input in one product."""
        if self.in_proj_weight is not None and query is key is value:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias).split(self._rows, -1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self._rows)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(self._rows)
        return map(functional.linear, (query, key, value), weights, biases)

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """A view (batch, heads, seqlen, head_dim) of a projection."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _from_heads(self, o: torch.Tensor, dims: int) -> torch.Tensor:
        """(batch, heads, seqlen, head_dim) in the order of a query with so many dimensions."""
        if dims == 2:
            return o[0].transpose(0, 1).flatten(1)
        return (o.transpose(1, 2) if self.batch_first else o.permute(2, 0, 1, 3)).flatten(2)

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.rope is not None
        rotated = self.rope(q, k)
        shapes = [tuple(getattr(x, "shape", ())) for x in rotated] if isinstance(rotated, (tuple, list)) else None
        if shapes != [tuple(q.shape), tuple(k.shape)]:
            accepted = f"a pair of tensors of the shapes it was given, {tuple(q.shape)} and {tuple(k.shape)}"
            raise ArgumentError("rope", f"shapes {shapes}" if shapes else type(rotated).__name__, f"{accepted}, back")
        # Angles are float32, and so is what they touch; the kernel wants v's dtype.
        return rotated[0].to(dtype), rotated[1].to(dtype)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not is_integer(value) or value < 1:
            raise ArgumentError(name, value, "an integer of at least 1")


def _one_mask(
    q: torch.Tensor, k: torch.Tensor, key_padding_mask: Any, attn_mask: Any, causal: bool
) -> torch.Tensor | None:
    """The masks of a call as scaled_dot_product_attention reads one: True is seen, numbers are added; None for none."""
    (batch, heads, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
    masks = []
    shapes: list[tuple[int, ...]]
    if key_padding_mask is not None:
        shapes = [(batch, seqlen_k), (seqlen_k,)][: 2 if batch == 1 else 1]
        mask = _inverted("key_padding_mask", key_padding_mask, shapes, q.dtype)
        masks.append(mask.reshape(batch, 1, 1, seqlen_k))
    if attn_mask is not None:
        shapes = [(seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k)]
        mask = _inverted("attn_mask", attn_mask, shapes, q.dtype)
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if masks and causal:
        masks.append(torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril())
    return functools.reduce(functools.partial(_both, dtype=q.dtype), masks) if masks else None


def _inverted(name: str, mask: Any, shapes: list[tuple[int, ...]], dtype: Any) -> torch.Tensor:
    """A checked mask, where True is hidden, as scaled_dot_product_attention's, where True is seen."""
    if not isinstance(mask, torch.Tensor) or not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise ArgumentError(name, mask, "a bool or floating torch.Tensor")
    if tuple(mask.shape) not in shapes:
        raise ArgumentError(name, f"shape {tuple(mask.shape)}", " or ".join(map(str, shapes)))
    return ~mask if mask.dtype is torch.bool else mask.to(dtype)


def _both(a: torch.Tensor, b: torch.Tensor, dtype: Any) -> torch.Tensor:
    if a.dtype is torch.bool and b.dtype is torch.bool:
        return a & b
    return _numbers(a, dtype) + _numbers(b, dtype)


def _numbers(mask: torch.Tensor, dtype: Any) -> torch.Tensor:
    """A mask as numbers to add to scores: -inf where it hides."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
