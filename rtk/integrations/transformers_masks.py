"""What transformers asks of a mask, as bands along the diagonal and ranges of keys.

transformers describes a mask by a function of (batch, head, query position, key position), composed of a few known
ones, by the positions of the first query and the first key (`q_offset`, `kv_offset`), and by a padding mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

HOLES = "padding with holes"
PATTERN = "a mask that is no band along the diagonal"
PLACE = "a mask whose diagonal does not end at the last key"
TRACED = "a mask made in a trace or a capture, or given to a compiled model"


@dataclass(frozen=True)
class Band:
    """Query position i sees key position j iff i - left <= j <= i + right; None is unbounded."""

    left: int | None = None
    right: int | None = None


@dataclass(frozen=True)
class Seen:
    """Of k and v the first `keys`, through `band`, whose diagonal ends at the last of these; in `kv_range`, if any.

    kv_range: (first, end), int32 (batch,) on the mask's device, as rtk.attention takes it.
    """

    band: Band
    keys: int
    kv_range: tuple[Tensor, Tensor] | None = None


class BandMask(Tensor):  # type: ignore[misc]
    """A boolean mask (batch, 1, seqlen_q, seqlen_k), True where a query sees a key, that stays a description.

    `seen` is what rtk.attention needs. A mask must be a tensor of four dimensions for transformers to pass it on, and a
    model may do with it what it likes: the first operation that looks at elements builds the tensor it stands for.
    """

    seen: Seen
    _build: Callable[[], Tensor]
    _dense: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(seen: Seen, shape: tuple[int, ...], device: Any, build: Callable[[], Tensor]) -> BandMask:
        """`build` makes the tensor that is described."""
        mask: BandMask = Tensor._make_wrapper_subclass(BandMask, shape, dtype=torch.bool, device=device)
        mask.seen, mask._build, mask._dense = seen, build, None
        return mask

    def dense(self) -> Tensor:
        """The tensor described; built once."""
        if self._dense is None:
            self._dense = self._build()
        return self._dense

    def _on(self, device: Any) -> BandMask:
        """The same on another device: a model spread over several moves its masks."""
        ranges = self.seen.kv_range
        moved = None if ranges is None else (ranges[0].to(device), ranges[1].to(device))
        build = partial(_moved, self.dense, device)
        return BandMask.of(replace(self.seen, kv_range=moved), tuple(self.shape), device, build)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool) and "device" in kwargs:
            return args[0]._on(kwargs["device"])
        args, kwargs = tree_map_only(BandMask, BandMask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"BandMask(shape={tuple(self.shape)}, {self.seen})"


def _moved(build: Callable[[], Tensor], device: Any) -> Tensor:
    return build().to(device)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **options: Any,
) -> Tensor | None:
    """transformers' mask interface: arguments as masking_utils.sdpa_mask has them. One of

    None            what None means to "sdpa": nothing is masked, or what follows from the module's is_causal
    BandMask        a band along the diagonal, and padding that is a range
    int32           (2, 1, 1, batch), the first key and the one after the last that the only query of a sequence sees: a
                    plain tensor, because generate() hands the masks of a decode step to compiled code
    bool            (batch, 1, q_length, kv_length): transformers' own mask, for all else
    """
    if isinstance(q_offset, Tensor) and q_length > 1 and not is_tracing(q_offset):
        q_offset = int(q_offset)  # waits; and a static cache counts its tensor up before a mask may be looked at
    build = partial(
        masking_utils.sdpa_mask,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **options,
    )
    band = band_of(mask_function)
    if band is None or not _is_padding(attention_mask, batch_size, kv_offset):
        return _because(PATTERN, build())
    if is_tracing(attention_mask) and (attention_mask is not None or (isinstance(q_offset, Tensor) and q_length > 1)):
        return _because(TRACED, build())
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if isinstance(q_offset, Tensor) or (q_length == 1 and band.right == 0 and not allow_is_causal_skip):
        ranges = _one_query(band, q_offset - kv_offset, padding, batch_size, kv_length, device)
        return _because(HOLES, build()) if ranges is None else torch.stack(ranges)[:, None, None]
    seen = _several_queries(band, q_offset - kv_offset, padding, q_length, kv_length)
    if isinstance(seen, str):
        return _because(seen, build())
    if (allow_is_causal_skip or allow_is_bidirectional_skip) and _is_plain(seen, q_length, kv_length):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a capture may have it: it does nothing on the GPU
        return _because(TRACED, build())
    return BandMask.of(seen, (batch_size, 1, q_length, kv_length), device, build)


def _is_padding(attention_mask: Tensor | None, batch_size: int, kv_offset: int) -> bool:
    """Whether it is None or a padding mask (batch, n) that says something about the keys."""
    if attention_mask is None:
        return True
    if attention_mask.dim() != 2:
        return False
    batch, length = attention_mask.shape
    return bool(batch == batch_size and length > kv_offset)


# --- patterns --------------------------------------------------------------------------------------------------------

_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_WINDOW_BOTH = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_AND = masking_utils.and_masks().__code__


def band_of(mask_function: Callable[..., Any]) -> Band | None:
    """The band that one of transformers' mask functions describes; None for any that is not known to be one.

    Composed functions are known by their code and read through their closures: calling them could show what they do at
    some positions, and never that they do it at all.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Band(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Band()
    code = None if torch.compiler.is_compiling() else getattr(mask_function, "__code__", None)
    if code not in (_WINDOW, _WINDOW_BOTH, _AND):  # a trace cannot follow what is read of closures
        return None
    (bound,) = (cell.cell_contents for cell in mask_function.__closure__ or ())
    if code is _AND:
        return _all_of([band_of(function) for function in bound])
    if not isinstance(bound, int) or bound < 1:
        return None
    return Band(left=bound - 1) if code is _WINDOW else Band(left=bound, right=bound)


def _all_of(bands: list[Band | None]) -> Band | None:
    """What all of them let through; None where one is unknown."""
    left = right = None
    for band in bands:
        if band is None:
            return None
        left, right = _least(left, band.left), _least(right, band.right)
    return Band(left, right)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


# --- places ----------------------------------------------------------------------------------------------------------


def _several_queries(band: Band, place: int, padding: Tensor | None, q_length: int, kv_length: int) -> Seen | str:
    """What the queries of a forward see, or the reason for which that cannot be said.

    place: where among the keys the first query's own position is. padding: bool (batch, n), keys from n on are padding.
    """
    keys = _keys(band, place, q_length, kv_length)
    if keys is None:
        return PLACE
    seen = _padded(Seen(_without_idle_bounds(band, q_length, keys), keys), padding)
    return HOLES if seen is None else seen


def _keys(band: Band, place: int, q_length: int, kv_length: int) -> int | None:
    """How many keys to hand over, so that the last query stands at the last of them; None where no number would do.

    The keys that a static cache has behind the last query's own are seen by no causal query.
    """
    if band == Band():
        return kv_length
    keys = place + q_length
    return keys if keys == kv_length or (band.right == 0 and 0 < keys < kv_length) else None


def _without_idle_bounds(band: Band, q_length: int, keys: int) -> Band:
    """The band less bounds that no key is beyond, when the last query stands at the last key."""
    left = None if band.left is not None and band.left >= keys - 1 else band.left
    right = None if band.right is not None and band.right >= q_length - 1 else band.right
    return Band(left, right)


def _is_plain(seen: Seen, q_length: int, kv_length: int) -> bool:
    """Whether "sdpa" would do the same without a mask: all keys, or the causal triangle from the first key on."""
    if seen.kv_range is not None or seen.band.left is not None:
        return False
    return seen.keys == kv_length if seen.band.right is None else seen.keys == q_length


# --- padding ---------------------------------------------------------------------------------------------------------


_FULL, _RANGES, _HOLED = range(3)
checks_padding = True  # False: it is taken to be ranges, and nothing waits


def _padded(seen: Seen, padding: Tensor | None) -> Seen | None:
    """`seen` less the padding, bool (batch, n), keys from n on are padding too; None where it has holes."""
    if padding is None:
        return seen
    padding = padding[:, : seen.keys]
    state = _state(padding)
    if state == _HOLED:
        return None
    return seen if state == _FULL and padding.shape[1] == seen.keys else replace(seen, kv_range=_range_of(padding))


def _one_query(
    band: Band, place: int | Tensor, padding: Tensor | None, batch_size: int, kv_length: int, device: Any
) -> tuple[Tensor, Tensor] | None:
    """The keys that a sequence's only query sees, int32 (batch,) each; None where padding has holes.

    place: where among the keys the query's own position is; on the device, in a static cache.
    """
    if padding is not None and _state(padding) == _HOLED:
        return None
    if padding is None:
        first, end = (torch.full((batch_size,), n, dtype=torch.int32, device=device) for n in (0, kv_length))
    else:
        first, end = _range_of(padding)
    if band.right is not None:
        end = end.clamp(max=place + band.right + 1)
    if band.left is not None:
        first = first.clamp(min=place - band.left)
    return first.to(torch.int32), end.to(torch.int32)


def _range_of(padding: Tensor) -> tuple[Tensor, Tensor]:
    """(first, end), int32 (batch,), of the ones in each row of bool (batch, n), where they are contiguous."""
    ones = padding.to(torch.int32)
    first = ones.argmax(dim=1).to(torch.int32)
    return first, first + ones.sum(dim=1, dtype=torch.int32)


def _state(padding: Tensor) -> int:
    """Of bool (batch, n): whether all are ones, or each row's ones contiguous, or neither. Waits, where it looks."""
    if not checks_padding:
        return _RANGES
    starts = padding[:, :1].sum(dim=1) + (padding[:, 1:] & ~padding[:, :-1]).sum(dim=1)
    return int(torch.where((starts > 1).any(), _HOLED, (~padding).any().to(torch.int64)))


def _because(reason: str, mask: Tensor) -> Tensor:
    """The mask, with the reason for which it is no description."""
    if not is_tracing(mask):
        mask.rtk_reason = reason
    return mask
