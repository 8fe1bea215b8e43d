"""What happens to a token that leaves the window: the contract, and the policy of the paper."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .ops.attend import Between
from .ops.top_slots import running_top
from .tokens import Leaving, Tokens

Kept = dict[str, Tensor]
"""What a policy carries between calls: tensors by name, each with the batch as its first dimension."""

RIDES = "eviction."
"""What the names of an eviction's own gates begin with, beside those of the compressor."""
_FOLDED = "folded"
"""Among what is kept: whether anything has been folded in each key/value head."""


class Eviction(nn.Module, ABC):
    """What happens to the tokens that leave the window: some are kept a while longer, the others are folded.

    Subclass it and write ``push``. A policy stands between window and compressor: it is handed the tokens that leave
    the window, at most one for each arriving token, and passes on at most one for each, its own in every key/value
    head. What it keeps, queries see as they see the window; what it passes on is folded into the memory. So every
    token is seen exactly once. [`check_eviction`][ahn_layers.check_eviction] tests a subclass.

    Policies that keep a fixed number of tokens by a priority need no more than [`keep_best`][ahn_layers.keep_best].

    Examples:
        >>> class LargestKeys(Eviction):
        ...     def __init__(self, num_slots):
        ...         super().__init__()
        ...         self.num_slots = num_slots
        ...
        ...     def init_kept(self, like):
        ...         return empty_slots(like, self.num_slots)
        ...
        ...     def push(self, kept, leaving):
        ...         return keep_best(kept, leaving, lambda tokens: tokens.k.norm(dim=-1))
    """

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b g t"]]:
        """Scalars of arriving tokens, one per key/value head, that ride beside them: a score, say. Default: none.

        They come back in ``push`` as ``tokens.gates["eviction.<name>"]``.

        Args:
            x: hidden states that enter the attention block.
        """
        return {}

    def init_kept(self, like: Tokens) -> Kept:
        """What is carried before the first token. Default: nothing.

        Args:
            like: any tokens, for batch size, heads, sizes, dtype and device.
        """
        return {}

    @abstractmethod
    def push(self, kept: Kept, leaving: Leaving) -> tuple[Between | None, Leaving, Kept]:
        """Take the tokens that leave the window.

        Args:
            kept: what ``init_kept`` or the last call returned; it stays as it is.
            leaving: the tokens; column ``i`` leaves when arrival ``leaving.first + i`` comes.

        Returns:
            What the queries of this call see here, None for nothing; what is folded, with as many columns and the same
            ``first``; and what is carried on, of the same shapes as before.
        """


class FoldAll(Eviction):
    """Every token that leaves the window is folded into the memory at once (arXiv 2510.07318).

    Examples:
        >>> FoldAll().init_kept(Tokens(*torch.zeros(2, 1, 2, 0, 8), {}))
        {}
    """

    def push(self, kept: Kept, leaving: Leaving) -> tuple[Between | None, Leaving, Kept]:
        """Everything goes on."""
        return None, leaving, kept


def empty_slots(like: Tokens, num_slots: int) -> Kept:
    """Slots for ``keep_best``, all empty.

    Args:
        like: any tokens, for batch size, heads, sizes, dtype and device.
        num_slots: slots of each key/value head.

    Raises:
        ValueError: if ``num_slots`` is not a whole number of at least 0.
    """
    if not isinstance(num_slots, int) or isinstance(num_slots, bool) or num_slots < 0:
        raise ValueError(f"num_slots={num_slots!r}: expected a whole number of at least 0.")
    slots = like.map(lambda u: u.new_zeros(*u.shape[:2], num_slots, *u.shape[3:]))
    return slots.named() | {"filled": torch.zeros(like.k.shape[:2], dtype=torch.long, device=like.k.device)}


def keep_best(
    kept: Kept, leaving: Leaving, priority: Callable[[Tokens], Float[Tensor, "b g t"]]
) -> tuple[Between, Leaving, Kept]:
    """Keep the tokens of highest priority, in each key/value head its own; the one that is too many goes on.

    A token's priority must depend on that token alone. Then it does not matter how a text is cut into calls. Among
    equal ones the older token stays.

    Args:
        kept: what ``empty_slots`` or the last call returned.
        leaving: the tokens that leave the window.
        priority: from tokens to a number for each, ``(B, G, T)``.

    Returns:
        What ``Eviction.push`` returns.
    """
    slots, filled = Tokens.from_named(kept), kept["filled"]
    every, count, size = slots.cat(leaving.tokens), len(leaving.tokens), len(slots)
    score = priority(every)
    if score.shape != every.k.shape[:3]:
        raise ValueError(
            f"priority returned {tuple(score.shape)}: expected a number for each token of each key/value head, "
            f"{tuple(every.k.shape[:3])}."
        )
    where = torch.ones((), dtype=torch.bool, device=score.device) if leaving.where is None else leaving.where
    where = (where.unsqueeze(1) if where.ndim == 2 else where).expand(*score.shape[:2], count)
    lost_at, loser, index, now = running_top(score[:, :, :size].detach(), filled, score[:, :, size:].detach(), where)
    number = torch.arange(size + count, device=score.device)
    there = torch.cat((number[:size] < filled.unsqueeze(2), where), dim=2)
    seen = Between(
        every.k,
        every.v,
        first=(number - size + leaving.first).clamp(min=0).masked_fill(number < size, 0).expand_as(lost_at),
        last=torch.where(there, torch.where(lost_at < count, lost_at + leaving.first, Between.ALWAYS), 0),
        most=size,
    )
    lost = loser < size + count
    losers = every.take(loser.clamp(max=size + count - 1))
    empty = torch.arange(size, device=score.device) >= now.unsqueeze(2)
    held = every.take(index).zeroed(empty)
    return seen, Leaving.of(leaving.first, losers, lost), held.named() | {"filled": now}


def first_kept(eviction: Eviction, like: Tokens) -> Kept:
    """What a store carries for an eviction at first: beside its own, whether anything has been folded in each head."""
    kept = eviction.init_kept(like)
    if isinstance(eviction, FoldAll):
        return kept
    return kept | {_FOLDED: torch.zeros(like.k.shape[:2], dtype=torch.bool, device=like.k.device)}


def evict(eviction: Eviction, kept: Kept, leaving: Leaving, count: int) -> tuple[Between | None, Leaving, Kept]:
    """What leaves the window through an eviction; a head reads the memory once something has been folded in it.

    Args:
        eviction: the policy.
        kept: what ``first_kept`` or the last call returned.
        leaving: what leaves the window.
        count: tokens of the call; nothing leaves if ``leaving`` begins after them.
    """
    if isinstance(eviction, FoldAll) or leaving.first == count:
        return None, leaving, kept
    seen, leaving, after = eviction.push({name: u for name, u in kept.items() if name != _FOLDED}, leaving)
    ever, where = kept[_FOLDED].unsqueeze(2).expand(-1, -1, count - leaving.first), leaving.where
    if where is None:
        reads = torch.ones_like(ever)
    else:
        reads = ever | ((where if where.ndim == 3 else where.unsqueeze(1)).cumsum(dim=2) > 0)
    return seen, replace(leaving, reading=reads), after | {_FOLDED: reads[:, :, -1]}
