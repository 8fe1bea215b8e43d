"""Decays that differ between the channels of a key, inside a chunk: exact for any decay.

The product of a query with an earlier key, ``sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id)``, is a matrix product only
once the exponent is split between the two sides, and a split at a fixed token overflows: one side grows as fast as the
other decays. So the triangle of a chunk is assembled from squares, each split between its own rows and columns,
where neither side grows: between the halves of the chunk, of the halves, and so on down to pairs of tokens.

Dimensions: n chunks, c tokens a chunk (a power of two), m blocks of z tokens in a chunk.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Decays:
    """Log decays within a chunk, as sums of negative numbers only.

    Attributes:
        since: from the start of the chunk to after each token, ``(*b, c, d)``.
        before: from the start of the chunk to before each token.
        until: from after each token to the end of the chunk.
        squares: for blocks of 1, 2, 4, ... tokens, each second one with the one before it: the decays from the start of
            the later block to after and to before its tokens, and from after the tokens of the earlier block to its
            end, ``(*b, m, z, d)`` each.
    """

    since: Float[Tensor, "*b c d"]
    before: Float[Tensor, "*b c d"]
    until: Float[Tensor, "*b c d"]
    squares: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, g: Float[Tensor, "*b c d"]) -> "Decays":
        """Of the log decay of each token."""
        since = g.unsqueeze(-2)
        before = until = torch.zeros_like(since)
        squares = []
        while since.shape[-3] > 1:
            (early, late), (first, then), (rest, last) = (_halves(u) for u in (since, before, until))
            squares.append((late.exp(), then.exp(), rest.exp()))
            half, other = early[..., -1:, :], late[..., -1:, :]
            since = torch.cat((early, late + half), dim=-2)
            before = torch.cat((first, then + half), dim=-2)
            until = torch.cat((rest + other, last), dim=-2)
        return cls(since.squeeze(-3), before.squeeze(-3), until.squeeze(-3), squares)

    def read(self, q: Float[Tensor, "*r c d"], k: Float[Tensor, "*b c d"]) -> Float[Tensor, "*r c c"]:
        """``sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id)`` for ``j <= i``, else 0."""
        return self._triangle(q, k, (q * k).sum(dim=-1), 0)

    def stored(self, a: Float[Tensor, "*b c d"], k: Float[Tensor, "*b c d"]) -> Float[Tensor, "*b c c"]:
        """The same for ``j < i``: what earlier tokens of the chunk have left under the key ``a_i``."""
        return self._triangle(a, k, None, 0)

    def stored_before(self, a: Float[Tensor, "*b c d"], k: Float[Tensor, "*b c d"]) -> Float[Tensor, "*b c c"]:
        """The same before token ``i`` itself decays it: ``exp(g_{j+1,d} + ... + g_{i-1,d})``."""
        return self._triangle(a, k, None, 1)

    def _triangle(self, rows: Tensor, columns: Tensor, diagonal: Tensor | None, kind: int) -> Tensor:
        shape = torch.broadcast_shapes(rows.shape, columns.shape)[:-1]
        out = (rows.new_zeros(shape) if diagonal is None else diagonal)[..., None, None]
        for square in self.squares:
            (early, late), size = _halves(out), out.shape[-1]
            left, right = (u.unflatten(-2, (-1, 2, size)) for u in (columns, rows))
            between = (right[..., 1, :, :] * square[kind]) @ (left[..., 0, :, :] * square[2]).mT
            top = torch.cat((early, torch.zeros_like(early)), dim=-1)
            out = torch.cat((top, torch.cat((between, late), dim=-1)), dim=-2)
        return out.squeeze(-3)


def _halves(u: Float[Tensor, "*b m z y"]) -> tuple[Float[Tensor, "*b l z y"], Float[Tensor, "*b l z y"]]:
    """Every first and every second block."""
    early, late = u.unflatten(-3, (-1, 2)).unbind(-3)
    return early, late
