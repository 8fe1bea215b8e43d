"""A batch of prompts on a GPU: a few rows are read at a time, and their caches joined.

A launch of the GPU wants as many tokens as one long row has. Many rows at once would get short pieces each, and every
piece looks at the windows of all rows: on a GPU they are read faster one after the other, by code that was compiled for
one row, with the activations of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from .cache import HippocampalCache
from .cache_layers import MemoryLayer
from .decoder import CACHE
from .hybrid_layer import HybridMemoryLayer, StaticHybridMemoryLayer
from .linear_rows import linear_of
from .native_layer import SHARING
from .rows import join_layers
from .static_layer import StaticMemoryLayer

Read = Callable[[Tensor, Any, dict[str, Any]], Any]
"""Reads rows of ids into the cache among the keyword arguments: ``(ids, generation_config, model_kwargs)``."""
_OF_ANY_CACHE = {LinearAttentionLayer, *SHARING}
"""Layers of the same kind in caches that grow and in those that do not."""
_GROWING = {MemoryLayer, HybridMemoryLayer, DynamicLayer, DynamicSlidingWindowLayer}
_FIXED = {StaticMemoryLayer, StaticHybridMemoryLayer}
PER_TOKEN = ("attention_mask", "position_ids")
"""Arguments of ``generate`` with a row for each prompt and a column for each of its tokens."""
_RETURNED = {"logits", CACHE}


def rows_at_a_time(input_ids: Tensor, tokens: int, options: Any, model_kwargs: dict[str, Any]) -> int:
    """How many rows to read together: as many whole prompts as so many tokens hold, or all of them.

    All, where their caches cannot be joined to what ``generate`` would have got: a cache that holds tokens already or
    records them, layers of other kinds, arguments that are not one row each.
    """
    rows, length = input_ids.shape
    group = max(1, tokens // max(1, length))
    fits = all(
        u is None or (isinstance(u, Tensor) and u.shape == input_ids.shape) for u in map(model_kwargs.get, PER_TOKEN)
    )
    seen_later = options.return_dict_in_generate
    return group if group < rows and fits and _can_be_joined(model_kwargs.get(CACHE), seen_later=seen_later) else rows


def read_in_groups(read: Read, group: int, input_ids: Tensor, options: Any, model_kwargs: dict[str, Any]) -> Any:
    """Read so many rows at a time; returns the cache and the logits of the last token, all that ``generate`` looks at.

    If a model returns more than that, the rows are read together after all.
    """
    cache = model_kwargs[CACHE]
    outputs, layers = [], []
    for start in range(0, len(input_ids), group):
        part = slice(start, start + group)
        own = HippocampalCache()
        own.layers = [_empty(layer) for layer in cache.layers]
        given = {name: model_kwargs[name][part] for name in PER_TOKEN if model_kwargs.get(name) is not None}
        out = read(input_ids[part], options, model_kwargs | given | {CACHE: own})
        if out.keys() - _RETURNED:
            return read(input_ids, options, model_kwargs)
        outputs.append(out)
        layers.append(own.layers)
    fixed = any(isinstance(layer, StaticMemoryLayer) for layer in cache.layers)
    cache.layers[:] = join_layers(layers, len(input_ids) if fixed else None, consume=True)
    return type(outputs[0])(**{CACHE: cache, "logits": torch.cat([out.logits[:, -1:] for out in outputs])})


def _can_be_joined(cache: Any, *, seen_later: bool) -> bool:
    """Whether rows that were read alone can make up what would be in this cache."""
    if not isinstance(cache, HippocampalCache) or not cache.layers:
        return False
    kinds = {type(layer) for layer in cache.layers} - _OF_ANY_CACHE
    if any(_has_begun(layer) or getattr(layer, "record_past", False) for layer in cache.layers):
        return False
    if kinds and kinds <= _FIXED:  # nobody may ask a joined one to be empty again
        return not seen_later and not getattr(cache, "_is_user_defined", False)
    return bool(kinds & {MemoryLayer, HybridMemoryLayer}) and kinds <= _GROWING


def _has_begun(layer: Any) -> bool:
    """Whether a layer holds anything; one that never does counts as initialized to transformers."""
    linear = linear_of(layer)
    begun = linear is not None and any(linear.has_previous_state.values())
    return begun or (type(layer) not in _OF_ANY_CACHE and bool(layer.is_initialized))


def _empty(layer: Any) -> Any:
    """A growing layer for some of the rows that this one is to hold."""
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicSlidingWindowLayer(layer.sliding_window)
    linear = linear_of(layer)
    beside = None if linear is None else LinearAttentionLayer(number_of_states=linear.number_of_states)
    if isinstance(layer, MemoryLayer):
        return MemoryLayer() if beside is None else HybridMemoryLayer(beside)
    return type(layer)() if beside is None else beside
