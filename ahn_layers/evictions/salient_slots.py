"""Keeps the evicted tokens of highest score without loss, and folds the others."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..eviction import RIDES, Eviction, Kept, empty_slots, keep_best
from ..ops.attention.between import Between, Soft
from ..ops.decode.kept import Contest
from ..tokens import Later, Leaving, Tokens
from .scores import SCORES, UNTRAINED, LearnedScore, key_difference

SlotPositions = Literal["compact", "absolute"]
"""At which distances kept tokens are shown."""
SCORE, PRIORITY = f"{RIDES}score", f"{RIDES}priority"
"""Beside each token its score, if it is learned; beside each kept one its priority."""
KEY_SUM = "key_sum"
"""Among what is kept for the score ``"key_difference"``: the sum of the directions of all keys that left the window."""


class SalientSlots(Eviction):
    """Every key/value head keeps the evicted tokens of highest priority in slots of its own and folds the others.

        priority = score + rate * rank

    A token that leaves the window competes with those in the slots, and the loser is folded into the compressor's state
    (or forgotten, without a compressor). The rank is the token's number in its text. A priority never changes, so two
    tokens never change places, and the result does not depend on how a text is cut into calls. With a rate of 0 a token
    stays until better ones come; a large rate makes the slots a longer window.

    Distances to kept tokens leave out the tokens that were refused at once, so that they grow with the tokens that were
    once kept and not with the text, and stay in the range that the model was trained on.

    Priorities are float32 (float64 in a float64 model), so at a rank ``r`` scores are told apart down to
    ``rate * r / 2^23``: with a rate of 0.05 and a million tokens, down to 0.006.

    Compare TRIM-KV (arXiv 2512.03324), Locret (arXiv 2410.01805) and IndexMem (arXiv 2605.25475).

    Args:
        num_slots: tokens that each key/value head keeps.
        score: ``"learned"``, or a score that needs no training: ``"recent"`` (all tokens alike), ``"key_norm"`` (small
            keys first, arXiv 2406.11430), ``"value_norm"`` (large values first, arXiv 2406.12335),
            ``"key_difference"`` (keys unlike the ones before them first, arXiv 2504.15364).
        rate: priority that each further token of the text is worth more than the one before it; for all key/value
            heads, or one for each. A learned score has rates of its own: they begin with this one where it is above 0,
            else with 1, and training changes them.
        score_size: hidden units of a learned score.
        positions: ``"compact"`` as said above, where the model's rotation is known; ``"absolute"`` shows kept tokens at
            their true distances.

    Attributes:
        temperature: in training, how soft the choice is (see [`soft_slots`][ahn_layers.distillation.soft_slots]); None
            for a hard one.

    Raises:
        ValueError: if an argument is out of range or unknown.

    Examples:
        >>> import torch
        >>> from ahn_layers import GatedDeltaNet, MemoryStore, SalientSlots, Window
        >>> sizes = {"hidden_size": 32, "num_kv_heads": 2, "value_dim": 8}
        >>> eviction = SalientSlots(8).for_layer(**sizes)
        >>> store = MemoryStore(Window(4), GatedDeltaNet(num_heads=2, head_dim=8, **sizes), eviction=eviction)
        >>> q, k, v = torch.randn(3, 1, 2, 20, 8)
        >>> out, state = store(q, k, v, torch.randn(1, 20, 32))
        >>> state.kept["k"].shape
        torch.Size([1, 2, 8, 8])
    """

    heads_apart = True

    def __init__(
        self,
        num_slots: int,
        *,
        score: str = "learned",
        rate: float | Sequence[float] = 0.0,
        score_size: int = 64,
        positions: SlotPositions = "compact",
    ) -> None:
        super().__init__()
        for name, value, least in (("num_slots", num_slots, 0), ("score_size", score_size, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}.")
        if score not in (*UNTRAINED, "learned"):
            raise ValueError(f"score={score!r}: expected 'learned' or one of {sorted(UNTRAINED)}.")
        rates = list(rate) if isinstance(rate, Sequence) else [rate]
        if not rates or not all(map(_is_rate, rates)):
            raise ValueError(f"rate={rate!r}: expected a number of at least 0, or one for each key/value head.")
        if positions not in get_args(SlotPositions):
            raise ValueError(f"positions={positions!r}: expected one of {get_args(SlotPositions)}.")
        self.num_slots, self.score, self.score_size, self.positions = num_slots, score, score_size, positions
        self.rate = rates if isinstance(rate, Sequence) else rate
        self.free_options = ("num_slots", "rate") if score == "learned" else ("num_slots",)
        self.learned: LearnedScore | None = None
        self.temperature: float | None = None

    def for_layer(self, **sizes: int) -> "SalientSlots":
        """A copy for a layer of these sizes, with a score to be trained if it is learned.

        Args:
            **sizes: ``hidden_size``, ``num_kv_heads`` and ``value_dim``; others are not needed.

        Raises:
            ValueError: if there are rates for another number of key/value heads.
        """
        copied, heads = copy.deepcopy(self), sizes["num_kv_heads"]  # of a subclass too
        copied.temperature = None
        if isinstance(self.rate, list) and len(self.rate) != heads:
            raise ValueError(f"rate={self.rate!r}: expected one number, or {heads}, one for each key/value head.")
        if self.score == "learned":
            copied.learned = LearnedScore(sizes["hidden_size"], heads, sizes["value_dim"], self.score_size)
            rates = torch.tensor(self.rate).expand(heads)
            with torch.no_grad():
                copied.learned.log_rate.copy_(torch.where(rates > 0, rates, 1.0).log())
        return copied

    @property
    def folds_all(self) -> bool:
        """Without slots."""
        return self.num_slots == 0 and type(self).push is SalientSlots.push

    @property
    def reads_hidden(self) -> bool:
        """A learned score does."""
        return self.score == "learned" and not self.folds_all

    @property
    def _sums_keys(self) -> bool:
        return self.score == "key_difference"

    @property
    def whole_texts(self) -> bool:
        """A soft choice weighs all tokens against each other, also those that were lost."""
        return self.temperature is not None and not self.folds_all

    def __str__(self) -> str:
        """Slots and score, in one line."""
        untrained = self.learned is not None and not self.learned.is_trained
        score = "untrained score: a longer window" if untrained else self.score
        return f"{self.num_slots:,} slots ({score})"

    def gates(
        self, x: Float[Tensor, "b t n"], k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"]
    ) -> dict[str, Float[Tensor, "b g t"]]:
        """The score of each token, if it is learned.

        Raises:
            ValueError: if the score has not been made for a layer, or for one of other sizes.
        """
        if not self.reads_hidden:
            return {}
        if self.learned is None:
            raise ValueError(
                "this SalientSlots has a learned score and does not know its layer: use SalientSlots(...).for_layer("
                "hidden_size=..., num_kv_heads=..., value_dim=...), or a score without training."
            )
        return {"score": self.learned(x, v)}

    def priority(
        self, tokens: Tokens, rank: Int[Tensor, "*b t"], score: Float[Tensor, "b g t"] | None = None
    ) -> Float[Tensor, "b g t"]:
        """Score plus rate times rank.

        Args:
            tokens: the tokens.
            rank: their numbers among the real tokens of their rows.
            score: theirs, where it does not come from the tokens alone.
        """
        if self.learned is None:
            score = SCORES[self.score](tokens) if score is None else score
            rate, heads = torch.tensor(self.rate, device=tokens.k.device), tokens.k.shape[1]
            if rate.ndim and len(rate) != heads:
                raise ValueError(f"rate={self.rate!r}: expected one number, or {heads}, one for each key/value head.")
            rate = rate if rate.ndim == 0 else rate.unsqueeze(1)
        else:
            score, rate = tokens.gates[SCORE], self.learned.rate.unsqueeze(1)
        return score + rate.to(score.dtype) * (rank if rank.ndim == 1 else rank.unsqueeze(1)).to(score.dtype)

    def contest(self, leaving: Later[Tokens]) -> Contest | None:
        """By the priority.

        There is no kernel for a soft choice, for a score that looks at earlier tokens, for given rates by head, and for
        a subclass that chooses otherwise.
        """
        ours = type(self)
        chooses_alike = ours.push is SalientSlots.push and ours.priority is SalientSlots.priority
        if self.temperature is not None or self._sums_keys or not chooses_alike:
            return None
        if self.learned is not None:
            weights = self.learned.weights() if ours.gates is SalientSlots.gates else None  # else they are given
            return Contest(score=SCORE, log_rate=self.learned.log_rate, weights=weights)
        if isinstance(self.rate, list):
            return None
        return Contest(given=SCORES[self.score](leaving()).float(), rate=self.rate)

    def init_kept(self, like: Tokens) -> Kept:
        """Empty slots."""
        like = like.columns(0, 0)
        none = like.k.new_zeros(like.k.shape[:3], dtype=torch.promote_types(like.k.dtype, torch.float32))
        like = _with(like, none)
        slots = empty_slots(like, self.num_slots, compact=self.positions == "compact")
        return slots | ({KEY_SUM: none.new_zeros(*like.k.shape[:2], like.k.shape[3])} if self._sums_keys else {})

    def push(self, kept: Kept, leaving: Leaving) -> tuple[Between | None, Leaving, Kept]:
        """Each token that leaves the window competes with those in the slots; the loser is folded."""
        score, more = None, {}
        if self._sums_keys:
            score, more[KEY_SUM] = key_difference(kept[KEY_SUM], leaving)
        tokens = _with(leaving.tokens, self.priority(leaving.tokens, leaving.rank, score))
        seen, leaving, after = keep_best(
            kept, replace(leaving, made=Later(lambda: tokens)), lambda u: u.gates[PRIORITY]
        )
        if self.temperature is not None:
            priority = torch.cat((kept[f"gates.{PRIORITY}"], tokens.gates[PRIORITY]), dim=2)
            # empty slots never become visible
            first = seen.first.masked_fill(seen.last == 0, Between.ALWAYS)
            seen = replace(seen, first=first, soft=Soft(priority, self.temperature))
        return seen, leaving, after | more


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _with(tokens: Tokens, priority: Float[Tensor, "b g t"]) -> Tokens:
    """The tokens with their priorities beside them."""
    return replace(tokens, gates=tokens.gates | {PRIORITY: priority})
