"""Calls on joined rows of different lengths: each row continues at its own position."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .padding import Padding
from .reconcile import length_of, memory_layers
from .whole_call import positions_were_given


def align_rows(cache: Any, kwargs: dict[str, Any], tokens: Tensor, module: nn.Module) -> Any:
    """Add to the arguments of a call what the model cannot know: positions, and the mask of other layers.

    Returns:
        The mask of the call.

    Raises:
        ValueError: if the model does not take positions, or a model around it has made its own, the same in every row.
    """
    mask = kwargs.get("attention_mask")
    padding = _joined(cache)
    if padding is None:
        return mask
    past, count = length_of(cache), tokens.shape[1]
    if kwargs.get("position_ids") is not None and not positions_were_given():
        raise ValueError(
            f"the rows of the cache have different lengths ({_lengths(padding, past)}), and the model around "
            f"{type(module).__name__} counts their positions by itself, alike in every row: pass position_ids, each "
            "row's own."
        )
    if kwargs.get("position_ids") is None:
        if "position_ids" not in inspect.signature(type(module).forward).parameters:
            raise ValueError(
                f"{type(module).__name__} takes no position_ids: rows of different lengths ({_lengths(padding, past)}) "
                "cannot go on as a batch, each at its own position. Keep them in caches of their own."
            )
        before = torch.tensor(padding.before, device=tokens.device).unsqueeze(1)
        kwargs["position_ids"] = torch.arange(past, past + count, device=tokens.device) - before
    if mask is None and any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        new = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask = kwargs["attention_mask"] = torch.cat((padding.real(past, tokens.device), new), dim=1)
    return mask


def count_from_first(
    cache: Any, real: Tensor | None, kwargs: dict[str, Any], tokens: Tensor, module: nn.Module
) -> None:
    """Give rows that are padded on the left the positions that they would have alone, if the caller gives none.

    Attention does not tell them from the columns, by which the base model counts then; some memories do.
    """
    if (
        kwargs.get("position_ids") is not None
        or "position_ids" not in inspect.signature(type(module).forward).parameters
    ):
        return
    layers, (rows, count) = memory_layers(cache), tokens.shape[:2]
    padding, past = layers[0].padding if layers else None, length_of(cache)
    if real is None and (padding is None or not padding.any):
        return
    before = (padding or Padding.none(rows)).real(past, tokens.device)
    new = torch.ones(rows, count, dtype=torch.bool, device=tokens.device) if real is None else real.to(tokens.device)
    leading = (torch.cat((before, new), dim=1).cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    kwargs["position_ids"] = (torch.arange(past, past + count, device=tokens.device) - leading).clamp(min=0)


def refuse_unaligned(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError if compiled code would not know where the rows of a joined cache go on."""
    for name in ("cache", "past_key_values"):
        cache = kwargs.get(name)
        if cache is not None and kwargs.get("position_ids") is None and getattr(cache, "joined", False):
            raise ValueError(
                "a joined cache was given to a compiled model without position_ids: pass them, (batch, tokens), each "
                "row's own."
            )


def refuse_unmasked(cache: Any, mask: Any) -> None:
    """Raise a ValueError if ``generate`` would count the columns before the rows of a joined cache as tokens."""
    padding = _joined(cache)
    if padding is not None and (mask is None or (isinstance(mask, Tensor) and bool(mask.all()))):
        raise ValueError(
            f"the rows of the cache have different lengths ({_lengths(padding, length_of(cache))}), and attention_mask "
            "hides nothing: pass the ids padded on the left, and a mask with zeros there."
        )


def _joined(cache: Any) -> Padding | None:
    """The padding of a cache in which rows of different lengths were joined, None for any other cache."""
    if not getattr(cache, "joined", False):
        return None
    padding = next((layer.padding for layer in memory_layers(cache)), None)
    return padding if padding is not None and padding.before else None


def _lengths(padding: Padding, past: int) -> str:
    return ", ".join(str(row.length) for row in padding.rows(past))
