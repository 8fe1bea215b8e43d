"""Copied spans in training text, which reward remembering."""

import torch
from jaxtyping import Int
from torch import Tensor


def repeat_spans(
    tokens: Int[Tensor, " t"],
    generator: torch.Generator | None = None,
    *,
    spans: tuple[int, int] = (4, 12),
    sizes: tuple[int, int] = (32, 256),
) -> Int[Tensor, " t"]:
    """A copy of the text in which a few spans appear again later, in place of what stood there.

    Args:
        tokens: one sequence of token ids; the result is as long.
        generator: source of randomness on the CPU, the global one by default.
        spans: least and most number of copies.
        sizes: least and most tokens in each; at most a quarter of the sequence.

    Returns:
        The changed copy. A sequence shorter than four spans of the least size comes back as it is.

    Examples:
        >>> repeat_spans(torch.arange(4096), torch.Generator().manual_seed(0)).unique().numel() < 4096
        True
    """
    tokens, length = tokens.clone(), len(tokens)
    most = min(sizes[1], length // 4)
    if most < sizes[0]:
        return tokens
    for _ in range(_between(*spans, generator)):
        size = _between(sizes[0], most, generator)
        source = _between(0, length - 2 * size, generator)
        target = _between(source + size, length - size, generator)
        tokens[target : target + size] = tokens[source : source + size].clone()
    return tokens


def _between(low: int, high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
