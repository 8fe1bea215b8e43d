"""Teaching the scores of salient slots: which evicted tokens will be needed.

Three stages, a few minutes on a GPU for a small model. Compare Locret (arXiv 2410.01805) for the second one and
TRIM-KV (arXiv 2512.03324) for the last.

1. ``retrieval_heads``: which heads look up single tokens. Those keep theirs until better ones come, the slots of the
   others begin as a longer window; layers that look up get the slots of the others (``keeping.py``).
2. ``learn_scores``: each layer's score learns, on its own, the most attention that a distant query will pay to a token.
3. ``distillation_loss`` within ``soft_slots``: scores and rates learn together, from the model's own answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..evictions import SalientSlots
from .loss import check_ids
from .watching import Attended, watch_full_attention

_BLOCK = 512
"""Queries whose attention is looked at together."""
_LEAST = 3e-6
"""Smallest attention that is told apart from none."""
_NOTICED, _WEIGHT = 0.01, 5.0
"""Tokens that get more attention than this count so much more: they are few."""
_YOUNG = 256
"""Tokens that have left the window for less than this at the end of a text have no future to learn from."""

Span = tuple[int, int]
"""First index and end index of tokens."""


def salient_slots(model: nn.Module) -> list[SalientSlots]:
    """The policies with a learned score in a model, layer by layer.

    Args:
        model: any model with [`HippocampalAttention`][ahn_layers.HippocampalAttention] blocks.

    Raises:
        ValueError: if there are none.
    """
    policies = [block.store.eviction for block in model.modules() if isinstance(block, HippocampalAttention)]
    found = [policy for policy in policies if isinstance(policy, SalientSlots) and policy.learned is not None]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no slots with a learned score: call retrofit(model, ..., "
            "eviction=SalientSlots(num_slots)) first."
        )
    return found


def learn_scores(model: nn.Module, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, " layers"]:
    """Add to the gradients of each learned score those of its error, from one pass with full attention.

    The goal of a token's score is the logarithm of the largest attention that any query further away than the window
    pays to it, largest over the query heads of the key/value head. No gradient crosses a layer, and attention is looked
    at in blocks of queries: a batch costs little more than a forward pass. An untrained score begins at the mean of the
    first batch.

    Args:
        model: a retrofitted transformers model whose base is frozen.
        input_ids: token ids without padding, at least 256 more than the capacity of the largest window.

    Returns:
        The error (smooth L1) of each layer that has slots, without gradient.

    Raises:
        ValueError: if there is no learned score, no layer has slots, or the text is too short.
    """
    if all(policy.folds_all for policy in salient_slots(model)):
        raise ValueError("num_slots=0 in every layer: expected slots in one of them at least, for scores to choose.")
    check_ids(input_ids)
    windows = [block.store.window for block in model.modules() if isinstance(block, HippocampalAttention)]
    least, count = max(window.capacity for window in windows) + _YOUNG, input_ids.shape[1]
    if count <= least:
        raise ValueError(f"sequences of {count} tokens: expected more than {least}, the window's capacity and 256.")
    errors: list[Tensor] = []

    def look(seen: Attended) -> None:
        policy, window = seen.store.eviction, windows[seen.layer]
        if not isinstance(policy, SalientSlots) or policy.learned is None or policy.folds_all:
            return
        part = slice(window.num_sinks, count - window.window_size - _YOUNG)
        goal = _future_attention(seen, window.window_size)[:, :, part].clamp(min=_LEAST).log()
        weight = 1 + (_WEIGHT - 1) * (goal > torch.tensor(_NOTICED).log()).to(goal.dtype)
        if not policy.learned.is_trained:
            policy.learned.direct.bias.copy_(goal.mean(dim=(0, 2)))
        with torch.enable_grad():
            score = policy.learned(seen.x[:, part], seen.v[:, :, part])
            error = (weight * F.smooth_l1_loss(score, goal.to(score.dtype), reduction="none")).mean()
        error.backward()  # type: ignore[no-untyped-call]
        errors.append(error.detach())

    watch_full_attention(model, input_ids, look)
    return torch.stack(errors)


def _future_attention(seen: Attended, window_size: int) -> Float[Tensor, "b g t"]:
    """The largest attention to each token from a query that is at least the window away."""
    count = seen.k.shape[2]
    largest = seen.k.new_zeros(seen.k.shape[:3], dtype=torch.float32)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        weights, near = seen.weights(start, stop), max(0, start - window_size + 1)
        key, query = (torch.arange(a, stop, device=largest.device) for a in (near, start))
        weights[..., near:].masked_fill_(key > query.unsqueeze(1) - window_size, 0)
        largest[:, :, :stop] = torch.maximum(largest[:, :, :stop], weights.amax(dim=(2, 3)))
    return largest


def retrieval_heads(
    model: nn.Module, input_ids: Int[Tensor, "b t"], asked: Sequence[Sequence[tuple[Span, Span]]]
) -> Float[Tensor, "layers g"]:
    """How much attention each key/value head pays from answers to the facts that they repeat, with full attention.

    Args:
        model: a retrofitted transformers model.
        input_ids: token ids without padding, with facts that are asked for later.
        asked: for each row, the tokens of a fact and those of the answer, several times.

    Returns:
        For each layer with a memory and each key/value head, the mean over all answers of the attention that the most
        attentive query pays to the whole fact.

    Raises:
        ValueError: if nothing is asked, there is no memory, or a fact does not come before its answer in its row.
    """
    check_ids(input_ids)
    if not any(len(row) for row in asked):
        raise ValueError("asked has no answers: expected pairs ((first, end) of a fact, (first, end) of its answer).")
    if len(asked) != len(input_ids):
        raise ValueError(f"asked has {len(asked)} rows: expected {len(input_ids)}, one for each text, empty or not.")
    for row, spans in enumerate(asked):
        for (a, b), (start, end) in spans:
            if not 0 <= a < b <= start < end <= input_ids.shape[1]:
                raise ValueError(
                    f"asked, row {row}: fact {(a, b)}, answer {(start, end)}: expected (first, end) of a fact and, "
                    f"behind it, of its answer, within {input_ids.shape[1]} tokens."
                )
    found: list[Tensor] = []

    def look(seen: Attended) -> None:
        total = seen.k.new_zeros(seen.k.shape[1], dtype=torch.float32)
        for row, spans in enumerate(asked):
            own = seen._replace(q=seen.q[row : row + 1], k=seen.k[row : row + 1])
            for (a, b), (start, end) in spans:
                weights = own.weights(start - 1, end - 1)[0]  # the queries that predict the answer
                total += weights[..., a:b].sum(dim=-1).amax(dim=(1, 2))
        found.append(total / sum(map(len, asked)))

    watch_full_attention(model, input_ids, look)
    return torch.stack(found)


@contextmanager
def soft_slots(model: nn.Module, temperature: float = 0.5) -> Iterator[None]:
    """Within this context, evicted tokens are visible to a degree: the choice of the kept ones has a gradient.

    A token's logits get ``log sigmoid((priority - threshold) / temperature)``. The threshold is that of the slots, and
    its gradient the one that keeps the sum of the visibilities. For training on whole texts from their beginning: a
    call that continues a cache or a state beyond the window raises a ValueError, as does padding between tokens there.
    With gradient checkpointing the backward pass has to be inside as well: it runs the layers again.

    Args:
        model: a retrofitted model with learned scores.
        temperature: in units of the score (a natural logarithm of attention).

    Raises:
        ValueError: if there is no learned score, or the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a positive number.")
    policies = salient_slots(model)
    before = [policy.temperature for policy in policies]
    for policy in policies:
        policy.temperature = temperature
    try:
        yield
    finally:
        for policy, old in zip(policies, before, strict=True):
            policy.temperature = old
