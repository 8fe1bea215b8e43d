"""What happens to a token that leaves the window: the contract of evictions, and the policy of the paper."""

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .by_name import register
from .ops.attention.between import Between, Turn
from .ops.decode.kept import Contest
from .ops.slots.top_slots import running_top
from .tokens import Later, Leaving, Tokens, last

Kept = dict[str, Tensor]
"""What a policy carries between calls: tensors by name, each with the batch as its first dimension."""

RIDES = "eviction."
"""What the names of an eviction's own gates begin with, beside those of the compressor."""
RANK = f"{RIDES}rank"
"""Beside each kept token: its number among the real tokens of its row."""
LEFT_OUT = f"{RIDES}left_out"
"""Beside each kept token: how many tokens had been refused when it came."""
FOLDED = "folded"
"""Among what is kept: whether anything has been folded in each key/value head."""


class Eviction(nn.Module, ABC):
    """What happens to the tokens that leave the window: some are kept a while longer, the others are folded.

    Subclass it and write ``push``. A policy stands between window and compressor: it is handed the tokens that leave
    the window, at most one for each arriving token, and passes on at most one for each, its own in every key/value
    head. What it keeps, queries see as they see the window; what it passes on is folded into the memory. So every
    token is seen exactly once. [`check_eviction`][ahn_layers.check_eviction] tests a subclass.

    Policies that keep a fixed number of tokens by a priority need no more than [`keep_best`][ahn_layers.keep_best].

    Adapter files know a policy by its class name and by the arguments of its constructor, which are read from
    attributes of the same names.

    Raises:
        ValueError: where a subclass is defined, if there is another one of that name.

    Examples:
        >>> class BiggestValues(Eviction):
        ...     def __init__(self, num_slots):
        ...         super().__init__()
        ...         self.num_slots = num_slots
        ...
        ...     def init_kept(self, like):
        ...         return empty_slots(like, self.num_slots)
        ...
        ...     def push(self, kept, leaving):
        ...         return keep_best(kept, leaving, lambda tokens: tokens.v.norm(dim=-1))
    """

    by_name: ClassVar[MutableMapping[str, type["Eviction"]]] = WeakValueDictionary()
    free_options: tuple[str, ...] = ()
    """Arguments of the constructor that may differ between a model and the adapter that is loaded into it."""

    heads_apart: ClassVar[bool] = False
    """Whether each key/value head decides by itself, so that processes can hold some of the heads each (tensor
    parallelism). Each subclass says it for itself."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.heads_apart = vars(cls).get("heads_apart", False)
        register(Eviction.by_name, cls, "eviction")

    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, as JSON values: what files say of this policy.

        Raises:
            ValueError: if an argument is no JSON value, or there is no attribute of its name.
        """
        parameters = inspect.signature(type(self).__init__).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
        try:
            return json.loads(json.dumps({name: getattr(self, name) for name in named}))  # type: ignore[no-any-return]
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{type(self).__name__} cannot be described in a file ({error}): keep each argument of the constructor "
                "as an attribute of the same name, a number, a text or a list; or override options()."
            ) from error

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        try:
            return ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        except ValueError:
            return "..."

    def __str__(self) -> str:
        """The class with its options, in one line."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def for_layer(self, **sizes: int) -> "Eviction":
        """This policy for one layer of a model: ``retrofit`` calls it for each. Default: a copy.

        Args:
            **sizes: ``hidden_size``, ``num_heads``, ``num_kv_heads``, ``head_dim`` and ``value_dim`` of the layer.
        """
        return copy.deepcopy(self)

    @property
    def reads_hidden(self) -> bool:
        """Whether it needs the hidden states of the tokens. Default: if it has ``gates``."""
        return type(self).gates is not Eviction.gates

    @property
    def folds_all(self) -> bool:
        """Whether it keeps nothing at present: what leaves is folded, and ``push`` is not called. Default: no."""
        return False

    @property
    def whole_texts(self) -> bool:
        """Whether it has to see a text in one call at present, all tokens that leave the window. Default: no."""
        return False

    def gates(
        self, x: Float[Tensor, "b t n"], k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"]
    ) -> dict[str, Float[Tensor, "b g t"]]:
        """Scalars of arriving tokens, one per key/value head, that ride beside them: a score, say. Default: none.

        They come back in ``push`` as ``tokens.gates["eviction.<name>"]``, in the dtype that is returned here.

        Args:
            x: hidden states that enter the attention block.
            k: keys, rotated.
            v: values.
        """
        return {}

    def init_kept(self, like: Tokens) -> Kept:
        """What is carried before the first token. Default: nothing.

        Args:
            like: any tokens, for batch size, heads, sizes, dtype and device.
        """
        return {}

    def contest(self, leaving: Later[Tokens]) -> Contest | None:
        """How a single token that leaves competes with those in the slots, for the kernel of a decode step.

        It has to say the same as ``push``. Default: None, and ``push`` is called.

        Args:
            leaving: makes the token, one column.
        """
        return None

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

    heads_apart = True

    @property
    def folds_all(self) -> bool:
        """It does."""
        return True

    def push(self, kept: Kept, leaving: Leaving) -> tuple[Between | None, Leaving, Kept]:
        """Everything goes on."""
        return None, leaving, kept


def empty_slots(like: Tokens, num_slots: int, *, compact: bool = False) -> Kept:
    """Slots for ``keep_best``, all empty.

    Args:
        like: any tokens, for batch size, heads, sizes, dtype and device.
        num_slots: slots of each key/value head.
        compact: show kept tokens at distances that leave out the tokens that were refused at once: nearer than they
            are, in the same order. Without it, at their true distances.

    Raises:
        ValueError: if ``num_slots`` is not a whole number of at least 0.
    """
    if not isinstance(num_slots, int) or isinstance(num_slots, bool) or num_slots < 0:
        raise ValueError(f"num_slots={num_slots!r}: expected a whole number of at least 0.")
    none = torch.zeros(like.k.shape[:2], dtype=torch.long, device=like.k.device)
    numbers = (RANK, LEFT_OUT) if compact else (RANK,)
    like = replace(
        like, gates=like.gates | dict.fromkeys(numbers, like.k.new_zeros(like.k.shape[:3], dtype=torch.long))
    )
    slots = like.map(lambda u: u.new_zeros(*u.shape[:2], num_slots, *u.shape[3:]))
    return slots.named() | {"filled": none} | ({"refused": none.clone()} if compact else {})


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

    Raises:
        ValueError: if ``priority`` returns another shape.
    """
    slots, filled, arriving = Tokens.from_named(kept), kept["filled"], leaving.tokens
    count, size, compact = len(arriving), len(slots), "refused" in kept
    rank = (leaving.rank if leaving.rank.ndim == 1 else leaving.rank.unsqueeze(1)).expand(arriving.k.shape[:3])
    numbers = {RANK: rank} | ({LEFT_OUT: torch.zeros_like(rank)} if compact else {})
    every = slots.cat(replace(arriving, gates=arriving.gates | numbers))
    score = priority(every)
    if score.shape != every.k.shape[:3]:
        raise ValueError(
            f"priority returned {tuple(score.shape)}: expected a number for each token of each key/value head, "
            f"{tuple(every.k.shape[:3])}."
        )
    score = score.detach() if score.is_floating_point() else score.double()  # ranks, say, which float32 would round
    where = torch.ones((), dtype=torch.bool, device=score.device) if leaving.where is None else leaving.where
    where = (where.unsqueeze(1) if where.ndim == 2 else where).expand(*score.shape[:2], count)
    lost_at, loser, index, now = running_top(score, every.gates[RANK], filled, where)
    number = torch.arange(size + count, device=score.device)
    there = torch.cat((number[:size] < filled.unsqueeze(2), where), dim=2)
    turn, after = None, {"filled": now}
    if compact:
        refused = where & (lost_at[:, :, size:] == torch.arange(count, device=score.device))
        left_out = kept["refused"].unsqueeze(2) + refused.cumsum(dim=2)
        gates = every.gates | {LEFT_OUT: torch.cat((slots.gates[LEFT_OUT], left_out), dim=2)}
        every, after = replace(every, gates=gates), after | {"refused": last(left_out)}
        past = kept["refused"].unsqueeze(2).expand(-1, -1, leaving.first)
        turn = Turn(every.gates[LEFT_OUT], torch.cat((past, left_out), dim=2))
    seen = Between(
        every.k,
        every.v,
        first=(number - size + leaving.first).clamp(min=0).masked_fill(number < size, 0).expand_as(lost_at),
        last=torch.where(there, torch.where(lost_at < count, lost_at + leaving.first, Between.ALWAYS), 0),
        most=size,
        turn=turn,
    )
    lost = loser < size + count
    losers = every.take(loser.clamp(max=size + count - 1))
    empty = torch.arange(size, device=score.device) >= now.unsqueeze(2)
    held = every.take(index).zeroed(empty)
    return seen, Leaving.of(leaving.first, losers, lost, losers.gates[RANK]), held.named() | after


def first_kept(eviction: Eviction, like: Tokens) -> Kept:
    """What a store carries for an eviction at first: beside its own, whether anything has been folded in each head."""
    if eviction.folds_all:
        return {}
    return eviction.init_kept(like) | {FOLDED: torch.zeros(like.k.shape[:2], dtype=torch.bool, device=like.k.device)}


def evict(eviction: Eviction, kept: Kept, leaving: Leaving, count: int) -> tuple[Between | None, Leaving, Kept]:
    """What leaves the window through an eviction; a head reads the memory once something has been folded in it.

    Args:
        eviction: the policy.
        kept: what ``first_kept`` or the last call returned.
        leaving: what leaves the window.
        count: tokens of the call; nothing leaves if ``leaving`` begins after them.
    """
    if eviction.folds_all or leaving.first == count:
        return None, leaving, kept
    seen, leaving, after = eviction.push({name: u for name, u in kept.items() if name != FOLDED}, leaving)
    ever, where = kept[FOLDED].unsqueeze(2).expand(-1, -1, count - leaving.first), leaving.where
    if where is None:
        reads = torch.ones_like(ever)
    else:
        reads = ever | ((where if where.ndim == 3 else where.unsqueeze(1)).cumsum(dim=2) > 0)
    return seen, replace(leaving, reading=reads), after | {FOLDED: last(reads)}
