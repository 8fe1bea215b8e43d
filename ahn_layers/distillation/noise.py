"""Teacher and student without noise: dropout and the like of a base model that is frozen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..attention import HippocampalAttention
from ..record import find_retrofitted


def still(model: nn.Module) -> list[nn.Module]:
    """Base modules make no noise any more: the base is frozen, and noise would only blur the comparison.

    Many modules ask for nothing else whether they are training (``nn.Dropout``, ``functional.dropout``, routers that
    jitter).

    Returns:
        Those that go on training, since they recompute themselves in the backward pass only then.
    """
    blocks = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    left = {part for block in blocks for part in block.memory.modules()} | {model, find_retrofitted(model)[0]}
    recomputed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in {*model.modules()} - left - {*recomputed}:
        module.training = False
    return [module for module in recomputed if module.training]


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context, these modules do not train."""
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
