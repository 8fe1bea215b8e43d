"""Rotations that depend on the length of the text: their prompts cannot be read in pieces."""

from typing import Any

from torch import nn

DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies change once a text outgrows its trained length."""


def longest_fixed_rotation(model: nn.Module) -> int | None:
    """Length up to which the model rotates every text in the same way; None if it does so for all lengths."""
    limits = [limit for module in model.modules() for limit in _limits(module)]
    return min(limits, default=None)


def _limits(module: nn.Module) -> list[int]:
    """For each rotation of a rotary embedding that changes, the length from which on it does."""
    kinds: Any = getattr(module, "rope_type", None)
    kinds = kinds if isinstance(kinds, dict) else {None: kinds}
    limits = []
    for layer_type, kind in kinds.items():
        if not isinstance(kind, str) or not any(name in kind for name in DEPENDENT):
            continue
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        parameters = parameters.get(layer_type, {}) if layer_type is not None else parameters
        original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
        limits.append(int(original or getattr(module, "original_max_seq_len", 0) or 0))
    return limits
