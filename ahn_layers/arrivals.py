"""The tokens of one call as they arrive: with their queries, their hidden states and the way in which they attend."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .ops.attention.attend import InSlots, InWindow, SoftmaxAttention
from .ops.attention.between import Between
from .positions import Positions
from .tokens import Tokens, take


@dataclass(frozen=True, eq=False)
class Arrivals:
    """New tokens of a store, with what belongs to each of them.

    Attributes:
        q: their queries.
        tokens: their keys, values and gates.
        x: their hidden states, None if nothing asks for them.
        valid: False at padding, None if there is none.
        attention: how the base model attends.
        order: where padding was put last: the column of each token among those given, else None.
        out: what the base model itself made of them, None where the store attends.
    """

    q: Float[Tensor, "b h t d"]
    tokens: Tokens
    x: Float[Tensor, "b t n"] | None
    valid: Bool[Tensor, "b t"] | None
    attention: SoftmaxAttention
    order: Int[Tensor, "b t"] | None = None
    out: Float[Tensor, "b h t e"] | None = None

    def __len__(self) -> int:
        """How many tokens (columns) there are."""
        return len(self.tokens)

    def columns(self, start: int, stop: int) -> "Arrivals":
        """Some of them, among which no query sees a token that comes later."""
        return replace(
            self,
            q=self.q[:, :, start:stop],
            tokens=self.tokens.columns(start, stop),
            x=None if self.x is None else self.x[:, start:stop],
            valid=None if self.valid is None else self.valid[:, start:stop],
            attention=self.attention.columns(start, stop),
        )

    def ordered(self, order: Int[Tensor, "b t"]) -> "Arrivals":
        """The same tokens in another order."""
        return replace(
            self,
            q=take(self.q, order),
            tokens=self.tokens.take(order),
            x=None if self.x is None else self.x.gather(1, order.unsqueeze(-1).expand_as(self.x)),
            valid=None if self.valid is None else self.valid.gather(1, order),
            attention=self.attention.reordered(order),
            order=order,
        )

    def attend(
        self, q: Float[Tensor, "b h t d"], seen: InWindow | InSlots, kept: Between | None, positions: Positions,
        length: int | None,
    ) -> Float[Tensor, "b h t e"]:  # fmt: skip
        """Softmax attention over what the queries see."""
        if self.out is not None:
            return self.out
        q_kept, kept = positions.facing_kept(self.q, kept)
        facing, later = positions.facing_sinks(q, seen.rank, length), self.attention.later(self.tokens.k, self.tokens.v)
        return self.attention(q, [seen, kept], facing, q_kept, later)
