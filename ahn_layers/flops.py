"""The paper's formulas: operations, numbers in a cache, parameters.

Letters as in arXiv 2510.07318: per layer N hidden size, H query and G key/value heads of size D, I MLP width; V
vocabulary, L tokens, C capacity (sinks + window).
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from .compressor import Compressor
from .layers import LowRank


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        num_layers: layers, all of one size.
        hidden_size: N.
        num_heads: query heads, H.
        num_kv_heads: key/value heads, G.
        head_dim: D.
        intermediate_size: I, of a gated MLP with three matrices.
        vocab_size: V.

    Examples:
        >>> qwen_3b = Sizes(36, 2048, 16, 2, 128, 11_008, 151_936)
        >>> f"{model_flops(qwen_3b, 128_000):.3e}"
        '3.286e+15'
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """From a transformers config.

        Raises:
            ValueError: if the config lacks one of them.
        """
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        for name in names:
            if not isinstance(getattr(config, name, None), int):
                raise ValueError(f"{type(config).__name__} has no whole number {name!r}: build Sizes(...) by hand.")
        layers, hidden, heads, intermediate, vocab = (getattr(config, name) for name in names)
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or hidden // heads
        return cls(layers, hidden, heads, groups, size, intermediate, vocab)


def num_gates(compressor: Compressor) -> int:
    """Scalars per head that a compressor computes from hidden states: write gates and read gate.

    Vectors count by their work: how many scalars per head would take as many products, rounded up.

    Examples:
        >>> from ahn_layers import GatedDeltaNet
        >>> num_gates(GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=16))
        3
    """
    size, heads = compressor.hidden_size, compressor.num_heads
    layers = [m for m in compressor.modules() if isinstance(m, nn.Linear)]
    scalars = [m for m in layers if m.in_features == size and m.out_features <= heads]
    work = sum(m.in_features * m.out_features for m in layers if m not in scalars)
    work += sum(m.up.numel() for m in compressor.modules() if isinstance(m, LowRank))
    return len(scalars) + math.ceil(work / (size * heads))


def mixing_flops(sizes: Sizes, length: int, capacity: int | None = None, gates: int | None = None) -> int:
    """FLOPs of token mixing in one layer for one sequence: projections, attention, memory.

    ``4 L N D (H + G) + 2 D H L^2`` for full attention; with a window the second term is
    ``2 D H C^2 + 4 (L - C) C D H``; a memory adds ``2 (L - C) (2 D^2 H + gates N H)``.

    Args:
        sizes: of the model.
        length: tokens, L.
        capacity: sinks + window, C; None, or at least ``length``, for full attention.
        gates: scalars per head of the memory, see ``num_gates``; None for the window alone.
    """
    n, h, g, d = sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    projections = 4 * length * n * d * (h + g)
    if capacity is None or capacity >= length:
        return projections + 2 * d * h * length**2
    flops = projections + 2 * d * h * capacity**2 + 4 * (length - capacity) * capacity * d * h
    if gates is not None:
        flops += 2 * (length - capacity) * (2 * d**2 * h + gates * n * h)
    return flops


def model_flops(sizes: Sizes, length: int, capacity: int | None = None, gates: int | None = None) -> int:
    """FLOPs of a forward pass: ``layers (mixing + 6 N I L) + 4 V N L``, arguments as in ``mixing_flops``.

    As in the paper the embedding look-up is counted as a product like the output layer.
    """
    mlp = 6 * sizes.hidden_size * sizes.intermediate_size * length
    ends = 4 * sizes.vocab_size * sizes.hidden_size * length
    return sizes.num_layers * (mixing_flops(sizes, length, capacity, gates) + mlp) + ends


def cache_ratio(sizes: Sizes, length: int, capacity: int, *, num_states: int | float | None = None) -> float:
    """Numbers held per layer, relative to a full cache: ``(2 C D G + D^2 H) / (2 L D G)``.

    Counts numbers, not bytes, and leaves out the write gates, as the paper does;
    [`cost_report`][ahn_layers.cost.cost_report] has the bytes.

    Args:
        sizes: of the model.
        length: tokens, L.
        capacity: sinks + window, C.
        num_states: matrices ``(D, D)``, one per query head by default, 0 for the window alone; what is no such matrix
            by its share of one.
    """
    states = sizes.num_heads if num_states is None else num_states
    full = 2 * length * sizes.head_dim * sizes.num_kv_heads
    if capacity >= length:
        return 1.0
    return (2 * capacity * sizes.head_dim * sizes.num_kv_heads + sizes.head_dim**2 * states) / full


def memory_parameters(sizes: Sizes, gates: int) -> int:
    """Parameters of the memory's matrices in all layers, ``layers (gates N H + D^2 H)``; without its vectors."""
    n, h, d = sizes.hidden_size, sizes.num_heads, sizes.head_dim
    return sizes.num_layers * (gates * n * h + d**2 * h)
