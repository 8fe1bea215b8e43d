"""Keys that are visible to an interval of queries: what an eviction shows of the tokens that it keeps.

Dimensions: b batch, g key/value heads, t queries, c keys, d key size, e value size.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..slots.soft_slots import soft_visibility


class Turn(NamedTuple):
    """How many positions nearer tokens are shown than they are: query minus key.

    Attributes:
        keys: of each key, ``(b, g, c)``.
        queries: of each query, for the keys of each key/value head, ``(b, g, t)``.
    """

    keys: Int[Tensor, "b g c"]
    queries: Int[Tensor, "b g t"]


class Soft(NamedTuple):
    """The choice of the kept tokens, softened for training (see ``soft_visibility``).

    Attributes:
        priority: of each key, with gradient, ``(b, g, c)``.
        temperature: in units of the priority.
    """

    priority: Float[Tensor, "b g c"]
    temperature: float


@dataclass(frozen=True)
class Between:
    """Keys that are seen for a while, in every key/value head its own: query ``i`` sees those with first <= i < last.

    Attributes:
        k: keys.
        v: values.
        first: the first query of the call that sees each key.
        last: the first one that sees it no more.
        most: at most so many are seen by a query; one more may come with each query.
        turn: at which positions keys and queries are shown to each other; None for their true ones.
        soft: in training, every key stays visible to a degree.
    """

    k: Float[Tensor, "b g c d"]
    v: Float[Tensor, "b g c e"]
    first: Int[Tensor, "b g c"]
    last: Int[Tensor, "b g c"]
    most: int
    turn: Turn | None = None
    soft: Soft | None = None

    ALWAYS: ClassVar[int] = 1 << 40
    """After every query."""

    def of(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values that some of these queries see, and which query sees which, ``(b, g, stop - start, n)``.

        The latter is True or False, or what is added to the logits if the choice is soft.
        """
        k, v, first, last = self.k, self.v, self.first, self.last
        if self.soft is not None:
            return self._softly(self.soft, start, stop)
        size = self.most + stop - start
        if size < k.shape[2]:
            alive = (first < stop) & (last > start)
            index = (~alive).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :size]
            first, last = first.gather(2, index), last.gather(2, index)
            k, v = (u.gather(2, index[..., None].expand(*index.shape, u.shape[3])) for u in (k, v))
        query = torch.arange(start, stop, device=k.device).unsqueeze(1)
        return k, v, (first.unsqueeze(2) <= query) & (query < last.unsqueeze(2))

    def in_chunks(self, queries: int, size: int) -> tuple[Int[Tensor, "b g n c"], Int[Tensor, "b g n"]]:
        """For each chunk of ``size`` queries the keys that one of them sees, by number and in order; and how many.

        Args:
            queries: of the call.
            size: queries of a chunk.
        """
        start = torch.arange(0, queries, size, device=self.k.device).unsqueeze(1)
        alive = (self.first.unsqueeze(2) < start + size) & (self.last.unsqueeze(2) > start)
        alive &= (self.first < self.last).unsqueeze(2)
        most = min(self.k.shape[2], self.most + size)
        place = torch.where(alive, alive.cumsum(dim=3, dtype=torch.int32) - 1, most)
        index = torch.zeros(*alive.shape[:3], most + 1, dtype=torch.int32, device=alive.device)
        number = torch.arange(self.k.shape[2], dtype=torch.int32, device=alive.device)
        index.scatter_(3, place.long(), number.expand(alive.shape))
        return index[..., :most], alive.sum(dim=3, dtype=torch.int32)

    def _softly(self, soft: Soft, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best candidates, twice as many as there are slots and some more, with their visibilities."""
        value = soft.priority.detach().masked_fill(self.first >= stop, float("-inf"))
        index = value.topk(min(value.shape[2], 2 * self.most + stop - start), dim=2).indices
        k, v = (u.gather(2, index[..., None].expand(*index.shape, u.shape[3])) for u in (self.k, self.v))
        priority, first = soft.priority.gather(2, index), self.first.gather(2, index)
        queries = torch.arange(start, stop, device=k.device)
        return k, v, soft_visibility(priority, first, queries, self.most, soft.temperature)
