"""How a model rotates its queries, and up to which length of the text it rotates them in the same way."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..positions import Rotary

DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies change once a text outgrows its trained length."""


class Frequencies(NamedTuple):
    """The frequencies of a rotary embedding.

    Attributes:
        module: the rotary embedding.
        name: of its buffer.
        kind: ``"default"``, ``"yarn"``, ...
    """

    module: nn.Module
    name: str
    kind: str

    @property
    def values(self) -> Tensor:
        """As the model rotates with them now."""
        return getattr(self.module, self.name)  # type: ignore[no-any-return]

    @property
    def are_read(self) -> bool:
        """Whether the rotary embedding reads its buffer, and does not compute frequencies anew in every call."""
        forward = inspect.unwrap(type(self.module).forward)
        return "rope_init_fn" not in getattr(forward, "__code__", forward).co_names


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


def find_rotary(
    near: Tensor, far: Tensor | None, shift: int, trained_length: int | None, frequencies: list[Frequencies]
) -> tuple[Rotary | None, Frequencies | None, str]:
    """Try every rotation that the model could use: its own takes the far queries to the near ones.

    Args:
        near: queries of a few tokens.
        far: those of the same tokens, ``shift`` positions later; None if they are not known.
        shift: see there.
        trained_length: tokens that the model was trained on, None if its config does not say.
        frequencies: those in the model.

    Returns:
        The rotation and its frequencies, None without one; and why it is not known or cannot be undone, else nothing.
    """
    if far is None or near.is_meta:
        return None, None, "its positions could not be probed"
    distance = torch.full((near.shape[2],), shift, device=near.device)
    precision = max(torch.finfo(near.dtype).eps, torch.finfo(torch.float32).eps)  # of the angles, float32 in any model
    tolerance = 8 * precision * float(near.abs().max())
    if torch.allclose(near, far, rtol=0, atol=tolerance):
        return None, None, ""  # no positions in this layer, so nothing is ever too far
    near, far = near.double(), far.double()  # whose rotation no kernel has to be compiled for
    for own in frequencies:
        inv_freq = own.values.to(torch.promote_types(own.values.dtype, torch.float32))
        if 2 * len(inv_freq) > near.shape[-1]:
            continue
        for interleaved in (False, True):
            for start in sorted({0, near.shape[-1] - 2 * len(inv_freq)}):
                rotary = Rotary(inv_freq.to(near.device), trained_length or 1, interleaved=interleaved, start=start)
                if torch.allclose(rotary.turn_back(far, distance), near, rtol=0, atol=tolerance):
                    if trained_length is None:
                        return None, None, "the config has no max_position_embeddings"
                    if own.kind in DEPENDENT:
                        return None, own, f"its rope_type {own.kind!r} changes its frequencies with the length"
                    return rotary, own if own.are_read else None, ""
    return None, None, "its position embedding is not a rotation known here"
