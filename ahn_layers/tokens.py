"""Tokens as a layer keeps them: keys, values and write gates, with the same operations on all three."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Keys, values and write gates of tokens along dimension 2.

    Attributes:
        k: ``(B, G, T, D)``, rotated.
        v: ``(B, G, T, E)``.
        gates: scalars per token by name, ``(B, num_states, T)`` each.
    """

    k: Float[Tensor, "b g t d"]
    v: Float[Tensor, "b g t e"]
    gates: dict[str, Float[Tensor, "b s t"]]

    def __len__(self) -> int:
        """How many tokens (columns) there are."""
        return self.k.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, keys first."""
        return [self.k, self.v, *self.gates.values()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """The function applied to every tensor."""
        return Tokens(function(self.k), function(self.v), {name: function(gate) for name, gate in self.gates.items()})

    def zip(self, function: Callable[..., Tensor], *others: "Tokens") -> "Tokens":
        """The function applied to every tensor together with its counterparts."""
        gates = {name: function(gate, *(o.gates[name] for o in others)) for name, gate in self.gates.items()}
        return Tokens(function(self.k, *(o.k for o in others)), function(self.v, *(o.v for o in others)), gates)

    def cat(self, *others: "Tokens") -> "Tokens":
        """These tokens followed by others."""
        return self.zip(lambda *u: torch.cat(u, dim=2), *others)

    def columns(self, start: int, stop: int) -> "Tokens":
        """A slice, as a view."""
        return self.map(lambda u: u[:, :, start:stop])

    def take(self, index: Int[Tensor, "*b t"]) -> "Tokens":
        """Columns by index, the same for every row ``(T,)`` or row by row ``(B, T)``."""
        return self.map(lambda u: take(u, index))

    def put(
        self, slot: Int[Tensor, " b"], token: "Tokens", where: Bool[Tensor, " b"] | None, *, inplace: bool
    ) -> "Tokens":
        """One token written into each row, at that row's slot; rows where the mask is False keep theirs."""
        rows = torch.arange(len(slot), device=slot.device).unsqueeze(1)

        def write(u: Tensor, new: Tensor) -> Tensor:
            at = (rows, torch.arange(u.shape[1], device=slot.device), slot.unsqueeze(1))
            value = new.squeeze(2)
            if where is not None:
                value = torch.where(where.view(-1, *[1] * (value.ndim - 1)), value, u[at])
            return u.index_put_(at, value) if inplace else u.index_put(at, value)

        return self.zip(write, token)


def join(*parts: Tokens) -> Tokens:
    """Tokens one after the other; a single part that is not empty comes back as it is, not copied."""
    filled = [part for part in parts if len(part)] or list(parts[:1])
    return filled[0].cat(*filled[1:]) if len(filled) > 1 else filled[0]


def take(u: Tensor, index: Int[Tensor, "*b t"]) -> Tensor:
    """Columns of dimension 2 by index, shared ``(T,)`` or per row ``(B, T)``."""
    if index.ndim == 1:
        return u.index_select(2, index)
    return u.gather(2, _spread(index, u))


def _spread(index: Int[Tensor, "b t"], like: Tensor) -> Tensor:
    """A per-row column index, as ``gather`` wants it: expanded to the other dimensions of ``like``."""
    shape = [*like.shape[:2], index.shape[1], *like.shape[3:]]
    return index.view(index.shape[0], 1, -1, *[1] * (like.ndim - 3)).expand(shape)
