"""Tokens as a layer keeps them: keys, values and write gates, with the same operations on all three."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

T = TypeVar("T")


class Later(Generic[T]):
    """A value that is made when it is first asked for, and once: if it is not needed, it costs nothing."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make

    def __call__(self) -> T:
        """The thing itself."""
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


@dataclass(frozen=True, eq=False)
class Tokens:
    """Keys, values and write gates of tokens along dimension 2.

    Attributes:
        k: ``(B, G, T, D)``, rotated.
        v: ``(B, G, T, E)``.
        gates: by name, scalars ``(B, num_states, T)`` or vectors ``(B, num_states, T, C)``; an eviction's own may be
            whole numbers.
    """

    k: Float[Tensor, "b g t d"]
    v: Float[Tensor, "b g t e"]
    gates: dict[str, Shaped[Tensor, "b s t *c"]]

    def __len__(self) -> int:
        """How many tokens (columns) there are."""
        return self.k.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, keys first."""
        return [self.k, self.v, *self.gates.values()]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach any of them."""
        return any(u.requires_grad for u in self.tensors)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        return {"k": self.k, "v": self.v} | {f"gates.{name}": gate for name, gate in self.gates.items()}

    @classmethod
    def from_named(cls, tensors: dict[str, Tensor]) -> "Tokens":
        """Inverse of ``named``; other names are left alone."""
        gates = {name.removeprefix("gates."): u for name, u in tensors.items() if name.startswith("gates.")}
        return cls(tensors["k"], tensors["v"], gates)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """The function applied to every tensor."""
        return Tokens(function(self.k), function(self.v), {name: function(gate) for name, gate in self.gates.items()})

    def zip(self, function: Callable[..., Tensor], *others: "Tokens") -> "Tokens":
        """The function applied to every tensor together with its counterparts."""
        k, v = (function(getattr(self, u), *(getattr(o, u) for o in others)) for u in ("k", "v"))  # before the gates
        return Tokens(
            k, v, {name: function(gate, *(o.gates[name] for o in others)) for name, gate in self.gates.items()}
        )

    def cat(self, *others: "Tokens") -> "Tokens":
        """These tokens followed by others."""
        return self.zip(lambda *u: torch.cat(u, dim=2), *others)

    def columns(self, start: int, stop: int) -> "Tokens":
        """A slice, as a view."""
        return self.map(lambda u: u[:, :, start:stop])

    def take(self, index: Int[Tensor, "*b t"]) -> "Tokens":
        """Columns by index: shared by all rows ``(T,)``, per row ``(B, T)`` or per key/value head ``(B, G, T)``."""
        return self.map(lambda u: take(u, index))

    def widened(self, count: int) -> "Tokens":
        """These tokens, followed by columns of zeros up to ``count``; the same object if there are as many already."""
        if len(self) >= count:
            return self
        return self.map(lambda u: torch.cat((u, u.new_zeros(*u.shape[:2], count - u.shape[2], *u.shape[3:])), dim=2))

    def zeroed(self, mask: Bool[Tensor, "b g t"]) -> "Tokens":
        """Zeros where the mask of each key/value head is True."""
        over = lambda u: mask.repeat_interleave(u.shape[1] // mask.shape[1], dim=1)  # noqa: E731
        return self.map(lambda u: u.masked_fill(over(u).unsqueeze(3) if u.ndim == 4 else over(u), 0))

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


@dataclass(frozen=True, eq=False)
class Leaving:
    """Tokens that arrivals push out of a keeper: at most one for each arrival.

    Attributes:
        first: the first arrival that may push one out, counted from the first of the call. The others follow it: one
            column each, to the last arrival.
        made: the tokens, every key/value head with its own.
        mask: True where a token leaves, ``(B, T)``, or ``(B, G, T)`` if heads differ; None if one leaves everywhere.
        ranks: the ranks of the tokens, ``(T,)`` or ``(B, T)``; meaningless where none leaves, None if not known.
        reading: True where a query reads the memory, likewise; by default where a token leaves.
    """

    first: int
    made: Later[Tokens]
    mask: Later[Bool[Tensor, "*b t"] | None]
    ranks: Later[Int[Tensor, "*b t"]] | None = None
    reading: Bool[Tensor, "*b t"] | None = None

    @classmethod
    def of(
        cls, first: int, tokens: Tokens, where: Bool[Tensor, "*b t"] | None, rank: Int[Tensor, "*b t"] | None = None
    ) -> "Leaving":
        """Of tokens that are there already; for the arguments see the attributes."""
        return cls(first, Later(lambda: tokens), Later(lambda: where), None if rank is None else Later(lambda: rank))

    @property
    def tokens(self) -> Tokens:
        """The tokens."""
        return self.made()

    @property
    def rank(self) -> Int[Tensor, "*b t"]:
        """The ranks of the tokens: their numbers among the real tokens of their rows."""
        if self.ranks is None:
            raise ValueError("these tokens leave without their ranks: pass rank to Leaving.of.")
        return self.ranks()

    @property
    def reads(self) -> Bool[Tensor, "*b t"] | None:
        """Where a query reads the memory."""
        return self.where if self.reading is None else self.reading

    @property
    def where(self) -> Bool[Tensor, "*b t"] | None:
        """Where a token leaves."""
        return self.mask()


def join(*parts: Tokens) -> Tokens:
    """Tokens one after the other; a single part that is not empty comes back as it is, not copied."""
    filled = [part for part in parts if len(part)] or list(parts[:1])
    return filled[0].cat(*filled[1:]) if len(filled) > 1 else filled[0]


def per_head(mask: Bool[Tensor, "*b t"], like: Float[Tensor, "b h t e"]) -> Bool[Tensor, "b _ t 1"]:
    """A mask ``(B, T)`` or per key/value head ``(B, G, T)``, for a tensor of query heads."""
    if mask.ndim == 2:
        return mask[:, None, :, None]
    return mask.repeat_interleave(like.shape[1] // mask.shape[1], dim=1).unsqueeze(3)


def take(u: Tensor, index: Int[Tensor, "*b t"]) -> Tensor:
    """Columns of dimension 2 by index, shared ``(T,)``, per row ``(B, T)`` or per key/value head ``(B, G, T)``."""
    if index.ndim == 1:
        return u.index_select(2, index)
    if index.ndim == 3:
        index = index.repeat_interleave(u.shape[1] // index.shape[1], dim=1)
        return u.gather(2, index[..., None].expand(*index.shape, u.shape[3]) if u.ndim == 4 else index)
    return u.gather(2, _spread(index, u))


def last(u: Tensor) -> Tensor:
    """The last column of dimension 2, without the memory of the others."""
    return u[:, :, -1].clone() if u.shape[2] > 1 else u[:, :, -1]


def _spread(index: Int[Tensor, "b t"], like: Tensor) -> Tensor:
    """A per-row column index, as ``gather`` wants it: expanded to the other dimensions of ``like``."""
    shape = [*like.shape[:2], index.shape[1], *like.shape[3:]]
    return index.view(index.shape[0], 1, -1, *[1] * (like.ndim - 3)).expand(shape)
