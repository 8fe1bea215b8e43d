"""The padding mask of a call, compared with what the cache has taken in."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .cache_layers import LayerCache, MemoryLayer
from .linear_rows import recurring
from .padding import Padding


def reconcile(cache: Any, mask: Any, rows: int, count: int) -> Bool[Tensor, "b t"] | None:
    """Compare a padding mask with what a cache has taken in, and take back what the mask hides.

    Args:
        cache: the cache, or None.
        mask: the 2-D padding mask over all tokens, past and new; any other kind is left alone.
        rows: rows of the new tokens.
        count: new tokens in each row.

    Returns:
        False at padding among the new tokens, None if there is none or the mask does not say.

    Raises:
        ValueError: if the mask does not fit, holds other numbers than 0 and 1, or contradicts what cannot be changed
            any more.
    """
    if not isinstance(mask, Tensor) or mask.ndim == 4:
        return None
    past = length_of(cache)
    if mask.shape != (rows, past + count):
        held = f"the {past} tokens in the cache and the {count} new ones" if past else f"the {count} tokens"
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: expected {(rows, past + count)}, a column for each of "
            f"{held}."
        )
    given, mask = mask[:, past:], mask.to(torch.bool)
    layers = memory_layers(cache)
    if past and layers:
        _compare(layers, mask[:, :past], recurs=bool(recurring(getattr(cache, "layers", ()))))
    new = mask[:, past:]
    is_odd = (given != new).any()  # neither 0 nor 1: transformers would take it for 1
    odd, whole = torch.stack((is_odd, new.all())).tolist()
    if odd:
        raise ValueError(
            f"attention_mask holds {given[given != new][:3].tolist()} among others: expected 1 at tokens and 0 at "
            "padding. Pass mask == 0 if yours is added to scores; if it numbers packed texts, pass no mask, and "
            "position_ids that begin again with each text."
        )
    return None if whole else new


def note_padding(cache: Any, real: Bool[Tensor, "b t"] | None, count: int, *, taken_in: bool) -> None:
    """Remember which of the new columns are padding.

    Args:
        cache: the cache.
        real: False at padding, None if there is none.
        count: new columns.
        taken_in: whether the cache holds them already.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
    before = layers[0].padding if layers else None
    if real is None and before is not None and before.is_open:  # real tokens after padding
        real = torch.ones(len(before.turns), 1, dtype=torch.bool)
    if real is not None and layers:
        start = int(layers[0].get_seq_length()) - (count if taken_in else 0)
        after = (before or Padding.none(len(real))).extended(real, start)
        for layer in layers:
            layer.padding = after


def check_memory(cache: Any, identity: str) -> None:
    """Raise a ValueError if the tokens of a cache were taken in by other memory weights than those that go on."""
    for layer in memory_layers(cache):
        kinds = {text.partition(" ")[0] for text in (identity, layer.made_with)}
        if len(kinds) == 1 and layer.made_with != identity:  # weights of another dtype are another error
            raise ValueError(
                "this cache was filled with other memory weights (another compressor or adapter, or before training "
                "went on): its states would be misread. Load the adapter that it was made with, or begin a new cache."
            )


def note_memory(cache: Any, identity: str) -> None:
    """Remember with which memory weights a cache was filled."""
    for layer in memory_layers(cache):
        layer.made_with = identity or layer.made_with


def _compare(layers: list[MemoryLayer], said: Bool[Tensor, "b c"], *, recurs: bool) -> None:
    first = layers[0]
    assert first.state is not None
    padding = first.padding or Padding.none(first.state.batch_size)
    counted = padding.real(said.shape[1], said.device)
    if said.shape[0] != first.state.batch_size:
        return  # the store names both numbers
    seen = first.state.seen.to(said.device)
    if not torch.equal(counted.sum(dim=1), seen):  # filled by compiled code, or from a file of an earlier version
        wrong = said.sum(dim=1) != seen
        if bool(wrong.any()):
            raise ValueError(
                f"attention_mask marks {said.sum(dim=1).tolist()} tokens of the past as real, the cache has taken in "
                f"{first.state.seen.tolist()}: rows {wrong.nonzero().flatten().tolist()} differ. Pass the mask that "
                "the cache was filled with, followed by the new tokens' own."
            )
        return
    unseen = (said & ~counted).any(dim=1)
    if bool(unseen.any()):
        raise ValueError(
            f"attention_mask marks tokens of rows {unseen.nonzero().flatten().tolist()} as real that the cache has "
            "never taken in, since they were padding when they came (generate pads rows that have finished): expected "
            "zeros there."
        )
    gone = counted & ~said
    if not bool(gone.any()):
        return
    if recurs:
        raise ValueError(
            f"attention_mask hides tokens of rows {gone.any(dim=1).nonzero().flatten().tolist()} that the cache has "
            "taken in as real: this model has convolutions or recurrences, from which no token can be taken back. "
            "Mask tokens when they come, begin a new cache, or go back to a clone."
        )
    for layer in layers:
        stuck = gone.any(dim=1) & ~layer.can_take_back(gone).to(gone.device)
        if bool(stuck.any()):
            window = layer.state.window.capacity if layer.state is not None else 0
            raise ValueError(
                f"attention_mask hides tokens of rows {stuck.nonzero().flatten().tolist()} that the cache has taken in "
                f"as real; these rows have outgrown the {window} tokens of sinks and window since, so what was folded "
                "cannot be undone. Mask tokens when they come, begin a new cache, or go back to a clone."
            )
    for layer in layers:
        layer.take_back(gone)


def length_of(cache: Any) -> int:
    """Columns that a cache holds, 0 without a cache."""
    return 0 if cache is None or not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())


def memory_layers(cache: Any) -> list[MemoryLayer]:
    """Our layers of a cache that hold tokens."""
    if isinstance(cache, LayerCache):
        return [cache.layer] if cache.layer.state is not None else []
    layers = getattr(cache, "layers", ())
    return [layer for layer in layers if isinstance(layer, MemoryLayer) and layer.state is not None]
