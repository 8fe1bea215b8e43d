"""Whether attention blocks can be run on new tokens alone.

The cache of a retrofitted block hands back the new keys and values, and no earlier ones. What a block does to them
behind the cache must not depend on the others, nor on how many there are.
"""

import copy
from typing import Any

from torch import Tensor, nn

from .cache import self_attention
from .call import CACHE_NAMES
from .linear_rows import STATES, of_fixed_size, recurring
from .trial import AttentionCall, Trial

_SAME_INPUT, _SAME = 0.05, 0.2
"""Shares of the largest value: much more than rounding, much less than another rotation or another mean makes."""


def cache_of_two_tokens(model: Any, entry: Any) -> Any:
    """What a decoder that read two tokens hands back of them; None if nothing, then it cannot read in pieces."""
    return _cache_of(model, entry, (0, 2))


def goes_on(model: Any, entry: Any, near: Trial, moves: bool) -> bool:
    """Whether convolutions and recurrences go on from a cache when several tokens come at once.

    Those of some models begin anew then, and do what is expected with single tokens only.

    Args:
        model: the model.
        entry: what is called: the model, or a decoder in it.
        near: three tokens, read at once.
        moves: whether ``entry`` takes ``position_ids``.
    """
    first = _cache_of(model, entry, (0, 1))
    if not recurring(getattr(first, "layers", ())):
        return True
    whole = _cache_of(model, entry, (0, 3), replayed=near)
    after = _cache_of(model, entry, (1, 3), replayed=near, cache=first, start=1 if moves else 0)
    if after is None or whole is None:
        return after is not None
    return all(
        one.is_meta or bool((one - other).abs().max() <= _SAME * one.abs().max())
        for one, other in zip(_states(whole), _states(after), strict=True)
    )


def _cache_of(model: Any, entry: Any, tokens: tuple[int, int], **options: Any) -> Any:
    """The cache after some tokens, None if there is none."""
    try:
        output = Trial(model, entry=entry, use_cache=True, tokens=tokens, **options).output
    except Exception:
        return None
    return next((getattr(output, name) for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


def _states(cache: Any) -> list[Tensor]:
    """All states of convolutions and recurrences."""
    places = [(layer, name, i) for layer in recurring(cache.layers) for name in STATES for i in getattr(layer, name)]
    states = (of_fixed_size(layer, name, i) for layer, name, i in places)
    return [u for u in states if u is not None]


def what_others_change(model: Any, entry: Any, near: Trial, cache: Any, moves: bool) -> dict[nn.Module, str]:
    """Why blocks cannot be run on the last of three tokens alone, by block; those that can be are not named.

    Args:
        model: the model.
        entry: what is called: the model, or a decoder in it.
        near: three tokens, read at once.
        cache: the cache that the model filled with the first two of them. It is used up.
        moves: whether ``entry`` takes ``position_ids``.
    """
    for layer in getattr(self_attention(cache), "layers", ()):
        layer.update = _handed_through
    found = _judged(model, 2 if moves else 0, entry, near, copy.deepcopy(cache))
    if moves and any(found.values()):  # a model that counts on its own may count from another number
        found |= {block: reason for block, reason in _judged(model, 0, entry, near, cache).items() if not reason}
    return {block: reason for block, reason in found.items() if reason}


def _judged(model: Any, start: int, entry: Any, near: Trial, cache: Any) -> dict[nn.Module, str]:
    """What is wrong with each block that got what it gets in the whole text, empty if nothing is."""
    try:
        step = Trial(model, start, entry, use_cache=True, tokens=(2, 3), cache=cache, replayed=near)
    except Exception:  # such as a model that reads no single token
        return {}
    reasons: dict[nn.Module, str] = {}
    for call in step.calls:
        whole = [other for other in near.calls if other.module is call.module]
        if len(whole) == 1 and _same_input(step, near, call.module):
            reasons[call.module] = _how_they_differ(call, whole[0])
    return reasons


def _handed_through(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return keys, values


def _same_input(step: Trial, near: Trial, block: nn.Module) -> bool:
    x, whole = step.hidden.get(block), near.hidden.get(block)
    return x is not None and whole is not None and not x.is_meta and _is_last(x, whole, 1, _SAME_INPUT)


def _how_they_differ(call: AttentionCall, whole: AttentionCall) -> str:
    if call.k.shape[2] != call.q.shape[2]:
        return f"attends to {call.k.shape[2]} keys when it reads {call.q.shape[2]} token, beside those in its cache"
    for name in ("q", "k", "v"):
        if not _is_last(getattr(call, name), getattr(whole, name), 2, _SAME):
            what = {"q": "queries", "k": "keys", "v": "values"}[name]
            return (
                f"makes other {what} of a token when earlier ones are in the cache, so a memory cannot take it in alone"
            )
    numbers = isinstance(call.scaling, float) and isinstance(whole.scaling, float)
    if numbers and abs(call.scaling - whole.scaling) > _SAME_INPUT * abs(whole.scaling):
        return "scales by the number of keys, which a memory does not keep"
    return ""


def _is_last(found: Tensor, whole: Tensor, dim: int, tolerance: float) -> bool:
    """Whether these are the last tokens of the whole."""
    last = whole.narrow(dim, whole.shape[dim] - found.shape[dim], found.shape[dim])
    return bool((found - last).abs().max() <= tolerance * whole.abs().max())
