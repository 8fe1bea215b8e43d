"""How the next token of a row is chosen."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """The choice of tokens of one request, which depends on its own seed and on nothing else.

    Args:
        temperature: of the softmax; 0 takes the most probable token.
        top_p: only the most probable tokens that together have this probability are drawn from.
        seed: of the draws, None for another one each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator | None = field(default=None, repr=False)

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits ``(V,)``."""
        if self.temperature == 0:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator(logits.device)
            self._generator.seed() if self.seed is None else self._generator.manual_seed(self.seed)
        probabilities = (logits.float() / self.temperature).softmax(dim=0)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            before = ordered.cumsum(dim=0) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0)
            return int(index[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
