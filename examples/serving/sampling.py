"""How the next tokens of all rows are chosen: one softmax, one transfer, and a draw of its own for each row."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_TOKEN = -1


@dataclass
class Sampling:
    """How one request wants its tokens chosen.

    Args:
        temperature: of the softmax; 0 takes the most probable token.
        top_p: only the most probable tokens that together have this probability are drawn from.
        seed: of the draws, None for another one each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    _random: random.Random | None = field(default=None, repr=False)

    def draw(self) -> float:
        """The next number in [0, 1) of this request."""
        if self._random is None:  # as text, since -1 and 1 are one seed as numbers
            self._random = random.Random(None if self.seed is None else str(self.seed))
        return self._random.random()


def choose(logits: Tensor, samplings: Sequence[Sampling | None]) -> list[int]:
    """The next token of each row, which depends on the logits and the draws of that row alone.

    Args:
        logits: ``(rows, V)``.
        samplings: how each row's token is chosen; None for a row that nobody uses.

    Returns:
        The tokens; ``NO_TOKEN`` for a row that nobody uses, or whose logits are not finite numbers.
    """
    best = logits.argmax(dim=1)
    tokens = best if all(u is None or u.temperature == 0 for u in samplings) else _drawn(logits, best, samplings)
    usable = logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite()  # nan is greater than any number to argmax
    chosen = tokens.masked_fill(~usable, NO_TOKEN).tolist()
    return [NO_TOKEN if u is None else token for u, token in zip(samplings, chosen, strict=True)]


def _drawn(logits: Tensor, best: Tensor, samplings: Sequence[Sampling | None]) -> Tensor:
    """Tokens ``(rows,)`` that are drawn, and ``best`` in rows of temperature 0.

    A draw is a number up to which probabilities are summed, in float64. All rows are computed whatever they ask for, so
    that the shapes, and with them the rounding on a GPU, are the same for each of them.
    """
    draws = [(u.temperature, u.draw()) if u is not None and u.temperature > 0 else (0.0, 0.0) for u in samplings]
    temperature, draw = torch.tensor(draws, dtype=torch.float64).to(logits.device).unsqueeze(2).unbind(dim=1)
    is_drawn = temperature > 0
    scaled = logits.float() / temperature.float().masked_fill(~is_drawn, 1)
    probabilities = scaled.softmax(dim=1)
    for row, sampling in enumerate(samplings):
        if sampling is not None and sampling.temperature > 0 and sampling.top_p < 1:
            _keep_top(probabilities[row], sampling.top_p)
    up_to = probabilities.double().cumsum(dim=1)
    token = torch.searchsorted(up_to, draw * up_to[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    # Sums round. Should one of them end at a token that has no probability, the best one is taken.
    is_drawn = is_drawn & (probabilities.gather(1, token) > 0)
    return torch.where(is_drawn, token, best.unsqueeze(1)).squeeze(1)


def _keep_top(probabilities: Tensor, top_p: float) -> None:
    """Set all of ``(V,)`` to 0 but the most probable tokens that together reach ``top_p``, in place."""
    ordered, index = probabilities.sort(descending=True, stable=True)
    before = ordered.double().cumsum(dim=0) - ordered
    probabilities[index] = ordered.masked_fill(before >= top_p, 0)
