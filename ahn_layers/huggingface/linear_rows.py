"""Rows of convolutions and recurrences.

Their states have one size, however long the text is, so a row is an index. They never see the columns of padding that
align rows of different lengths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .cache_layers import MemoryLayer
from .native_layer import SHARING

STATES = ("conv_states", "recurrent_states")
"""What such a layer of transformers holds: for each, a dictionary of tensors ``(B, ...)``, None before the first."""
Part = tuple[LinearAttentionLayer, int]
"""A layer and the number of one of its rows."""


def linear_of(layer: Any) -> LinearAttentionLayer | None:
    """The convolution or recurrence of a cache layer: what stands beside its memory, or the layer itself, or None."""
    beside: LinearAttentionLayer | None = getattr(layer, "linear", None)
    return layer if type(layer) is LinearAttentionLayer else beside


def recurring(layers: Sequence[Any]) -> list[Any]:
    """The layers of a cache that hold a convolution or a recurrence, whatever else they hold."""
    return [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


def forget_states(layers: Sequence[Any]) -> None:
    """Convolutions and recurrences as they were before the first token, so that another number of rows may come.

    Where layers have fixed addresses they stay, and are filled with zeros by their own ``reset``.
    """
    if any(isinstance(layer, MemoryLayer) and not layer.grows for layer in layers):
        return
    for linear in filter(None, map(linear_of, layers)):
        records = linear.record_past
        LinearAttentionLayer.__init__(linear, linear.number_of_states)
        linear.record_past = records


def refuse_several(past: int, count: int) -> None:
    """Raise a ValueError for several tokens behind others, in a model whose recurrences begin anew then."""
    if past and count > 1:
        raise ValueError(
            f"{count} new tokens and a cache that holds {past}: the convolutions or recurrences of this model begin "
            "anew when several tokens come at once, also without a retrofit, so what they hold would be lost. Pass the "
            "new tokens one at a time, or the whole text with a new cache; leave prefill_chunk_size unset."
        )


@torch.no_grad()
def joined(parts: Sequence[Part]) -> LinearAttentionLayer:
    """A new layer with these rows, copied, in that order; it records no past."""
    first = parts[0][0]
    made = LinearAttentionLayer(number_of_states=first.number_of_states)
    made.device, made.dtype = first.device, first.dtype
    for i in range(first.number_of_states):
        made.conv_kernel_size[i], made.has_previous_state[i] = first.conv_kernel_size[i], first.has_previous_state[i]
        for name in STATES:
            if getattr(first, name)[i] is None:
                continue
            states = torch.stack([of_fixed_size(layer, name, i)[row] for layer, row in parts])
            torch._dynamo.mark_static_address(states, guard=False)
            getattr(made, name)[i], getattr(made, f"is_{name}_initialized")[i] = states, True
    return made


@torch.no_grad()
def put(layer: LinearAttentionLayer, rows: list[int], other: LinearAttentionLayer) -> None:
    """Replace rows by those of another layer, which ``check`` has found to fit. Tensors stay where they are."""
    for i in range(layer.number_of_states):
        for name in STATES:
            held = getattr(layer, name)[i]
            if held is None:
                continue
            states = of_fixed_size(layer, name, i)
            if states.is_inference() and not torch.is_inference_mode_enabled():
                states = states.clone()
            states.index_copy_(0, torch.tensor(rows, device=held.device), of_fixed_size(other, name, i))
            getattr(layer, name)[i] = states


def kept_elsewhere(layers: Sequence[Any]) -> list[int]:
    """The layers without a memory, if none of them holds anything after tokens were read: modules of the model do."""
    others = [i for i, u in enumerate(layers) if not isinstance(u, MemoryLayer) and type(u) not in SHARING]
    return [] if any(_holds_anything(layers[i]) for i in others) else others


def check(i: int, one: LinearAttentionLayer, other: LinearAttentionLayer) -> None:
    """Raise a ValueError unless the rows of two layers, the ``i``-th of their caches, may stand in one."""
    mine, its = _sizes(one), _sizes(other)
    if mine != its:
        raise ValueError(
            f"layer {i}: its convolution or recurrence holds {mine} in one cache and {its} in the other (the width of "
            "the convolution, whether it has begun, and dtype, device and shape of a row of each state): expected "
            "caches of the same model."
        )


def _holds_anything(layer: Any) -> bool:
    linear = linear_of(layer)
    return bool(layer.is_initialized) if linear is None else any(linear.has_previous_state.values())


def _sizes(layer: LinearAttentionLayer) -> list[Any]:
    found: list[Any] = []
    for i in range(layer.number_of_states):
        states = [of_fixed_size(layer, name, i) for name in STATES]
        rows = [None if u is None else (u.dtype, str(u.device), tuple(u.shape[1:])) for u in states]
        found.append((layer.conv_kernel_size[i], layer.has_previous_state[i], *rows))
    return found


def of_fixed_size(layer: LinearAttentionLayer, name: str, i: int) -> Tensor | Any:
    """A state as the next token needs it: while the past is recorded, a convolution keeps more, or less at first."""
    states, width = getattr(layer, name)[i], layer.conv_kernel_size[i]
    if states is None or name != "conv_states" or states.shape[-1] == width:
        return states
    return F.pad(states[..., -width:], (max(0, width - states.shape[-1]), 0)).clone()
