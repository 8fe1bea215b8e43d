"""Softmax attention over what keepers of tokens show: the one place that chooses its form.

Dimensions: b batch, h query heads, g key/value heads, t queries, s sinks, c keys, d key size, e value size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..decode.step import slot_attention
from .between import Between
from .window_attention import masked_attention, together, window_attention

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


@dataclass(frozen=True)
class InWindow:
    """Tokens in the order of rank: every query sees the sinks, and the last ``window_size`` tokens up to its own.

    Attributes:
        pieces: makes the sinks (None if the context begins with them) and the context, see ``window_attention``.
        rank: makes the rank of each query's token, ``(t,)`` or ``(b, t)``.
        first_rank: rank of the first query, if it is the same in every row and known.
        window_size: tokens a query sees besides the sinks.
        num_sinks: how many tokens are sinks.
        whole: makes all tokens so far, as long as none has left.
    """

    pieces: Callable[[], tuple[Pair | None, Pair]]
    rank: Callable[[], Int[Tensor, "*b t"]]
    first_rank: int | None
    window_size: int
    num_sinks: int
    whole: Callable[[], Pair] | None = None


@dataclass(frozen=True)
class InSlots:
    """One query a row sees all slots that are filled, its own token's included.

    Attributes:
        slots: makes the keys and values by slot.
        rank: makes the rank of each query's token, ``(b, 1)``.
        seen: tokens seen in each row, this one included; slots are filled in order.
        full: whether every slot of every row is known to be filled.
        num_sinks: how many leading slots are sinks.
    """

    slots: Callable[[], Pair]
    rank: Callable[[], Int[Tensor, "b 1"]]
    seen: Int[Tensor, " b"]
    full: bool
    num_sinks: int


@dataclass(frozen=True)
class SoftmaxAttention:
    """How the base model attends: from queries and what they see to the output.

    Args:
        scale: logit factor, default ``d ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (arXiv 2408.00118).
        null_logits: one more logit of each head, which takes its part of the softmax and has no value: learned sink
            logits (arXiv 2508.10925, section 2.2), ``weights = exp(l_j) / (exp(null) + sum_i exp(l_i))``.
        dense: the base model's own causal attention ``(q, k, v, valid) -> out``, called instead of ours as long as no
            token has left the window, for bit-identical results. With padding (``valid``) only for the first tokens.
        ahead: the last of the new tokens that the query of each sees, as a column of the call, for images whose tokens
            see each other: never less than its own column, and never less than that of the token before. None for
            causal attention.

    Examples:
        >>> from ahn_layers import MemoryStore, Window
        >>> q, k, v = torch.randn(3, 1, 2, 9, 8)
        >>> out, state = MemoryStore(Window(4))(q, k, v, attention=SoftmaxAttention(softcap=30.0))
        >>> out.shape
        torch.Size([1, 2, 9, 8])
    """

    scale: float | None = None
    softcap: float | None = None
    dense: Callable[..., Tensor] | None = None
    null_logits: Float[Tensor, " h"] | None = None
    ahead: Int[Tensor, "b t"] | None = None

    def columns(self, start: int, stop: int) -> "SoftmaxAttention":
        """The same for some of the new tokens, among which no query sees one that comes later."""
        return self if self.ahead is None else replace(self, ahead=self.ahead[:, start:stop] - start)

    def reordered(self, order: Int[Tensor, "b t"]) -> "SoftmaxAttention":
        """The same for the new tokens in another order."""
        if self.ahead is None:
            return self
        place = order.argsort(dim=1)
        return replace(self, ahead=place.gather(1, self.ahead.clamp(max=place.shape[1] - 1)).gather(1, order))

    def later(self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"]) -> "Between | None":
        """The new tokens, as far as queries of earlier ones see them."""
        if self.ahead is None or k.shape[2] == 1:
            return None
        column = torch.arange(k.shape[2], device=k.device)
        first = torch.searchsorted(self.ahead.contiguous(), column.expand(len(k), -1).contiguous())
        most = int((self.ahead - column).amax())
        if most <= 0:
            return None
        first, last = (u.unsqueeze(1).expand(-1, k.shape[1], -1) for u in (first, column.expand_as(first)))
        return Between(k, v, first, last, most)

    @property
    def is_plain(self) -> bool:
        """Whether it is scaled dot-product attention, which has kernels."""
        return self.softcap is None and self.null_logits is None

    def __call__(
        self,
        q: Float[Tensor, "b h t d"],
        parts: Sequence[InWindow | InSlots | Between | None],
        q_sinks: Float[Tensor, "b h far d"] | None = None,
        q_kept: Float[Tensor, "b h t d"] | None = None,
        later: Between | None = None,
    ) -> Float[Tensor, "b h t e"]:
        """Attend.

        Args:
            q: queries.
            parts: what they see: first in the window, then elsewhere, what an eviction keeps.
            later: the new tokens that come after, as far as they are seen.
            q_sinks: queries to use against the sinks, for the last ``far`` queries.
            q_kept: queries to use against what an eviction keeps.
        """
        seen, *others = (part for part in (parts[0], later, *parts[1:]) if part is not None)
        beside = [part for part in others if isinstance(part, Between)]
        if isinstance(seen, InSlots):
            if beside:
                return self.over_slots(q, seen, [part.of(0, 1) for part in beside], q_sinks, q_kept)
            k, v = seen.slots()
            return slot_attention(
                q, k, v, seen.seen, full=seen.full, scale=self.scale, softcap=self.softcap, q_sinks=q_sinks,
                num_sinks=seen.num_sinks, null_logits=self.null_logits,
            )  # fmt: skip
        assert isinstance(seen, InWindow)
        if self.dense is not None and seen.whole is not None and len(beside) == (later is not None):
            return self.dense(q, *seen.whole())
        sinks, (k, v) = seen.pieces()
        sink_k, sink_v = sinks or (None, None)
        return window_attention(
            q, sink_k, sink_v, k, v, seen.rank(), window_size=seen.window_size, num_sinks=seen.num_sinks,
            scale=self.scale, softcap=self.softcap, q_sinks=q_sinks, beside=beside, q_kept=q_kept,
            first_rank=seen.first_rank if later is None else None, null_logits=self.null_logits,
        )  # fmt: skip

    def over_slots(
        self,
        q: Float[Tensor, "b h t d"],
        seen: InSlots,
        beside: list[tuple[Tensor, Tensor, Tensor]],
        q_sinks: Float[Tensor, "b h t d"] | None,
        q_kept: Float[Tensor, "b h t d"] | None = None,
    ) -> Float[Tensor, "b h t e"]:
        """Any queries over the filled slots and what is beside them (see ``Between.of``), in one softmax."""
        k, v = seen.slots()
        filled = torch.arange(k.shape[2], device=q.device) < seen.seen.clamp(min=1).unsqueeze(1)
        visible = filled[:, None, None]
        if beside:
            visible = visible.expand(-1, k.shape[1], q.shape[2], -1)
            visible = together(visible, *(part[2] for part in beside))
            k, v = (torch.cat((u, *(part[i] for part in beside)), dim=2) for i, u in ((0, k), (1, v)))
        return masked_attention(
            q, k, v, visible, scale=self.scale, softcap=self.softcap, q_sinks=q_sinks, num_sinks=seen.num_sinks,
            q_kept=q_kept, num_kept=sum(part[0].shape[2] for part in beside), null_logits=self.null_logits,
        )  # fmt: skip
