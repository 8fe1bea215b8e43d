"""Rotary position embeddings, turned back: the one rotation the window needs (arXiv 2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import forms


def turn_back(
    q: Float[Tensor, "b h t d"],
    distance: Int[Tensor, "*b t"],
    inv_freq: Float[Tensor, " r"],
    *,
    interleaved: bool = False,
    start: int = 0,
) -> Float[Tensor, "b h t d"]:
    """Rotate queries as if each stood ``distance`` positions earlier.

    Rotations compose, so a query at position ``p`` multiplied by the rotation of ``-distance`` is the query at
    ``p - distance``, whatever attention scaling the model applied. Angles are computed in float64: at a distance of
    a million tokens float32 would already be off by 0.03 rad.

    Args:
        q: rotated queries, any floating dtype.
        distance: how many positions to go back, per token, shared by the batch ``(T,)`` or per row ``(B, T)``.
        inv_freq: angular frequency of each rotated pair, in radians a position.
        interleaved: pairs are neighbours ``(0, 1), (2, 3), ...`` instead of ``(i, i + r)``.
        start: first rotated channel; channels outside ``[start, start + 2 r)`` are left alone.

    Returns:
        The turned queries, in the dtype of ``q``.
    """
    pairs = inv_freq.shape[0]
    angle = distance.double()[..., None] * inv_freq.double()
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (f(angle).to(dtype) for f in (torch.cos, torch.sin))
    if forms.turns_in_triton(q):
        from . import triton_rotary

        return triton_rotary.turn(q, cos, sin, interleaved, start)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    before, turned, after = q.split((start, 2 * pairs, q.shape[-1] - start - 2 * pairs), dim=-1)
    shape = (pairs, 2) if interleaved else (2, pairs)
    first, second = turned.to(dtype).unflatten(-1, shape).unbind(-1 if interleaved else -2)
    rotated = torch.stack((first * cos + second * sin, second * cos - first * sin), -1 if interleaved else -2)
    return torch.cat((before, rotated.flatten(-2).to(q.dtype), after), dim=-1)
