"""Where a model needs its cache: which layers suffer from a window, which heads look things up."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..compressor import Compressor
from ..evictions import SalientSlots
from ..memory import MemoryStore
from ..retrofit import restore, retrofit
from ..window import Window
from .budgets import COVERAGE, Budgets, check_coverage, cost_at, rates_of, spend
from .hidden_states import output_head, run_hidden
from .loss import sliced_loss
from .retention import Span, retrieval_heads
from .windows import give_windows, refuse_sliding

Costs = Mapping[int, Mapping[int, float]]
"""What windowing a layer costs, by layer and capacity."""
BytesOf = Callable[[int, int | None], int]
"""From the place of a layer and its capacity, None for full attention, to the bytes of its cache."""
_SPAN = 64
"""Tokens that are repeated to see which heads look them up, where no answers are given."""
_STEPS = 4
"""Choices of a capacity between one and its double."""


def calibrate(
    model: nn.Module,
    input_ids: Int[Tensor, "b t"],
    *,
    bytes: int,
    window_size: int = 128,
    num_sinks: int = 32,
    slots: SalientSlots | None = None,
    compressor: type[Compressor] | None = None,
    asked: Sequence[Sequence[tuple[Span, Span]]] | None = None,
    layers: Sequence[int] | None = None,
    measured: Sequence[int] | None = None,
    coverage: float = COVERAGE,
) -> Budgets:
    """Measure what each layer loses by a window and which heads look things up, and spend bytes of cache accordingly.

    With every other layer at full attention, one layer at a time gets a window of a few capacities. Its cost is the
    divergence of the predictions from those of full attention, KL(full || windowed): the loss that this adds on
    average, with far less noise than a difference of losses. Costs are taken to add up, and turned into loss by a
    factor that one run with equal layers gives. The choice of least cost is then run and measured; where its loss
    is higher than with the same capacity in every layer, that is proposed instead. One pass through the model for each
    layer and capacity; nothing is trained.

    Args:
        model: a causal language model of transformers that is not retrofitted. It is the same afterwards.
        input_ids: texts without padding, as long as those that the budget is for, and no longer than the model was
            trained for: full attention is the goal.
        bytes: of the caches of all retrofitted layers, for one text. Layers left at full attention count for as many
            tokens as ``input_ids`` has.
        window_size: least window of each layer.
        num_sinks: sinks of each layer.
        slots: what keeps the tokens beyond ``window_size``, its ``num_slots`` and ``rate`` aside; None for longer
            windows.
        compressor: takes what is not kept; its states count.
        asked: for each text, tokens of facts and of answers that repeat them (see ``retrieval_heads``). Answers then
            count apart in loss and costs, with their own mean. Default: retrieval is measured on spans of the texts
            that are repeated at their ends.
        layers: which layers to choose for, the ones that ``retrofit`` chooses by default.
        measured: capacities at which costs are measured, each at least ``window_size + num_sinks``. Default: that one,
            and four times as many tokens each time.
        coverage: the fewest heads that together do this share of all looking up keep their tokens; those of the others
            age.

    Returns:
        The proposal, with what was measured.

    Raises:
        ValueError: if the model is retrofitted already, the texts are not longer than the smallest window, or longer
            than a layer's own sliding window, or the bytes are too few for that or enough for full attention.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ahn_layers import retrofit
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> budgets = calibrate(model, torch.arange(200)[None] % 64, bytes=60_000, window_size=8, num_sinks=2)
        >>> model = retrofit(model, None, **budgets.arguments)
    """
    length, least = input_ids.shape[1], window_size + num_sinks
    if length <= least + 2 * _SPAN:
        raise ValueError(
            f"sequences of {length} tokens: expected more than {least + 2 * _SPAN}, the window with its sinks and "
            f"{2 * _SPAN} tokens."
        )
    check_coverage(coverage)
    wrong = [size for size in measured or () if not least <= size < length]
    if wrong:
        raise ValueError(
            f"measured={list(measured or ())}: expected capacities from {least}, the window with its sinks, to "
            f"{length - 1}, less than the text. Leave {wrong} out."
        )
    training = {module: module.training for module in model.modules()}
    retrofit(model, None, window_size=window_size, num_sinks=num_sinks, layers=layers)  # type: ignore[type-var]
    try:
        model.eval()
        return _Measuring(model, input_ids, asked, num_sinks, least).propose(
            bytes, window_size, slots, compressor, coverage, measured
        )
    finally:
        restore(model)  # type: ignore[type-var]
        for module, mode in training.items():
            module.training = mode


class Measured(NamedTuple):
    """Of the next tokens, in nats: the loss, and the divergence of the predictions from those of full attention."""

    loss: float
    divergence: float


class _Measuring:
    """Losses of one model on one batch of texts, with windows by layer."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        asked: Sequence[Sequence[tuple[Span, Span]]] | None,
        num_sinks: int,
        least: int,
    ) -> None:
        self.model, self.ids, self.asked = model, input_ids, asked
        self.num_sinks, self.least, self.length = num_sinks, least, input_ids.shape[1]
        self.full: Tensor | None = None
        self.blocks: list[Any] = [m for m in model.modules() if isinstance(m, HippocampalAttention)]
        self.layers = [int(block.layer_idx) for block in self.blocks]
        refuse_sliding(self.blocks, self.length)

    @torch.no_grad()
    def measure(self, capacities: Mapping[int, int | None]) -> Measured:
        """Of the positions beyond the smallest window; the mean of the answers is added to that of all."""
        windows = [self._window(block, capacities.get(int(block.layer_idx))) for block in self.blocks]
        with give_windows([block.store for block in self.blocks], windows):
            hidden = run_hidden(self.model, self.ids)[0][:, self.least : -1]
        if self.full is None:
            self.full = hidden
        head, labels = output_head(self.model), self.ids[:, self.least + 1 :]
        loss = divergence = 0.0
        for part in (torch.ones_like(labels, dtype=torch.bool), self._answers()):
            if bool(part.any()):
                own = sliced_loss(hidden[part], head, teacher=self.full[part], labels=labels[part])
                loss, divergence = loss + float(own[2]), divergence + float(own[1])
        return Measured(loss, divergence)

    def _window(self, block: Any, capacity: int | None) -> Window:
        if capacity is None:  # nothing leaves
            return Window(self.length, 0, block.store.window.sink_positions)
        return Window(capacity - self.num_sinks, self.num_sinks, block.store.window.sink_positions)

    def _answers(self) -> Tensor:
        """True at the losses of answers."""
        found = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, spans in enumerate(self.asked or ()):
            for _, (start, end) in spans:
                found[row, start:end] = True
        return found[:, self.least + 1 :]

    def retrieval(self) -> Float[Tensor, "layers g"]:
        """How much each head looks up, in answers or in repeated spans."""
        if self.asked is not None:
            return retrieval_heads(self.model, self.ids, self.asked)
        ids, end = self.ids.clone(), self.length
        first = min(end // 8, end - 2 * _SPAN)  # the copy does not reach into what is copied
        ids[:, end - _SPAN :] = ids[:, first : first + _SPAN]
        # of the copy, what its first tokens cannot tell
        spans = [((first + i, first + i + 1), (end - _SPAN + i, end - _SPAN + i + 1)) for i in range(8, _SPAN)]
        return retrieval_heads(self.model, ids, [spans] * len(ids))

    def bytes_of(self, slots: SalientSlots | None, compressor: type[Compressor] | None, window_size: int) -> BytesOf:
        """Bytes of each layer's cache for one text."""

        def count(place: int, capacity: int | None) -> int:
            block = self.blocks[place]
            sizes, like = block.found.sizes, block.found.like
            if capacity is None:
                width = sizes["num_kv_heads"] * (sizes["head_dim"] + sizes["value_dim"])
                return int(self.length * width * like.element_size())
            window, memory, policy = Window(capacity - self.num_sinks, self.num_sinks), None, None
            with torch.device("meta"):
                if compressor is not None:
                    memory = compressor(**sizes).to(like.dtype)
                if slots is not None:
                    options = slots.options() | {"num_slots": capacity - self.least, "rate": 0.0}
                    window = Window(window_size, self.num_sinks)
                    policy = type(slots)(**options).for_layer(**sizes).to(like.dtype)
            return MemoryStore(window, memory, block.store.rotary, eviction=policy).bytes_per_row(like, **sizes)

        return count

    def propose(
        self,
        budget: int,
        window_size: int,
        slots: SalientSlots | None,
        compressor: type[Compressor] | None,
        coverage: float,
        measured: Sequence[int] | None,
    ) -> Budgets:
        """Measure, choose, and measure the choice."""
        bytes_of = self.bytes_of(slots, compressor, window_size)

        def total(capacities: Iterable[int | None]) -> int:
            return sum(bytes_of(place, size) for place, size in enumerate(capacities))

        every = len(self.layers)
        needs = [total([size] * every) for size in (self.least, None)]
        if not needs[0] <= budget < needs[1]:
            raise ValueError(
                f"bytes={budget:,}: expected at least {needs[0]:,}, which {self.least} tokens in each of {every} layers"
                f" take, and less than the {needs[1]:,} of full attention for {self.length} tokens."
            )
        full, points = self.measure({}).loss, list(measured or _powers(self.least, self.length))
        costs = {layer: {size: self.measure({layer: size}).divergence for size in points} for layer in self.layers}
        sizes = range(self.least, self.length)
        equal = sizes[bisect_right(sizes, budget, key=lambda size: total([size] * every)) - 1]
        equal_loss = self.measure(dict.fromkeys(self.layers, equal)).loss
        chosen = self._choose(costs, bytes_of, budget)
        factor = (equal_loss - full) / (self._predict(costs, dict.fromkeys(self.layers, equal)) or math.nan)
        expected = full + (factor if factor > 0 else 1.0) * self._predict(costs, chosen)
        loss = self.measure(chosen).loss
        if loss > equal_loss:
            chosen, expected, loss = dict.fromkeys(self.layers, equal), equal_loss, equal_loss
        found = self.retrieval().cpu()
        return Budgets(
            capacities=chosen, window_size=window_size, num_sinks=self.num_sinks, slots=slots,
            rates=dict(zip(self.layers, rates_of(found, coverage), strict=True)), retrieval=found, costs=costs,
            bytes=total(chosen.values()), equal_capacity=equal, full_loss=full, equal_loss=equal_loss,
            expected_loss=expected, loss=loss,
        )  # fmt: skip

    def _choose(self, costs: Costs, bytes_of: BytesOf, budget: int) -> dict[int, int | None]:
        """The capacities of least cost."""
        choices: list[int | None] = [*_choices(self.least, self.length), None]
        prices = [[self._predict(costs, {layer: size}) for size in choices] for layer in self.layers]
        sizes = [[bytes_of(place, size) for size in choices] for place in range(len(self.layers))]
        picks = spend(prices, sizes, budget)
        return {layer: choices[pick] for layer, pick in zip(self.layers, picks, strict=True)}

    def _predict(self, costs: Costs, capacities: Mapping[int, int | None]) -> float:
        """The sum of what windowing each layer costs."""
        windowed = ((layer, size) for layer, size in capacities.items() if size is not None)
        return sum((cost_at(costs[layer], size, self.length) for layer, size in windowed), 0.0)


def _powers(least: int, length: int) -> list[int]:
    """Capacities to measure at: the least, and four times as many tokens each time."""
    found = [least]
    while found[-1] * 4 < length:
        found.append(found[-1] * 4)
    return found


def _choices(least: int, length: int) -> list[int]:
    """Capacities to choose from."""
    found, i = [least], 1
    while (size := round(least * 2 ** (i / _STEPS))) < length:
        found.append(size)
        i += 1
    return sorted(set(found))
