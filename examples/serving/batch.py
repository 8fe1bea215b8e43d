"""The rows that are being decoded, in one cache that rows join and leave."""

from typing import Any

import torch
from torch import Tensor

from ahn_layers import HippocampalCache


class Batch:
    """Up to ``size`` rows that take a token each at every step.

    Rows that nobody uses are decoded along, and what comes of it is thrown away. On a CPU there are at most twice as
    many rows as are used (their number is a power of two). With ``fixed`` there are always ``size`` rows at addresses
    that never change: on a GPU a step is then one CUDA graph, which is recorded once; and on any device no bit of a row
    depends on what the other rows hold.

    Args:
        model: a retrofitted model.
        size: rows at most.
        fixed: always keep that many.
    """

    def __init__(self, model: Any, size: int, *, fixed: bool) -> None:
        self.model, self.size, self.fixed = model, size, fixed
        self.cache: HippocampalCache | None = None
        self._blank: HippocampalCache | None = None
        self.users: list[Any] = []
        self.tokens: list[int] = []
        self.positions: list[int] = []
        records = fixed and model.device.type == "cuda"
        self._call = model.get_compiled_call(None) if records else model

    @property
    def active(self) -> list[int]:
        """Numbers of the rows that are used."""
        return [row for row, user in enumerate(self.users) if user is not None]

    def join(self, user: Any, cache: HippocampalCache, token: int) -> None:
        """Give a row to a user.

        Args:
            user: whoever gets its logits.
            cache: what it has read, one row, which stays as it is.
            token: what it reads next.

        Raises:
            ValueError: if the cache is not one of this model and memory. Nothing has changed.
        """
        if self.cache is None:
            self._begin()
        elif None not in self.users:
            more = min(self.size, 2 * len(self.users)) - len(self.users)
            self.cache = HippocampalCache.join([self.cache, *[cache] * more])
            self._rows(list(range(len(self.users))), more)
        row = self.users.index(None)
        assert self.cache is not None
        self.cache.put(row, cache)
        self.users[row], self.tokens[row], self.positions[row] = user, token, int(cache.get_seq_length())

    def leave(self, user: Any, *, keep: bool) -> HippocampalCache | None:
        """Take a row from a user; returns what the row holds, if it is to be kept."""
        row = self.users.index(user)
        assert self.cache is not None
        kept = self.cache.take(row) if keep else None
        self.users[row], self.positions[row] = None, 0
        active = self.active
        if not active:
            if not self.fixed:
                self.cache, self.users, self.tokens, self.positions = None, [], [], []
        elif not self.fixed and 2 * len(active) <= len(self.users):
            more = len(self.users) // 2 - len(active)
            self.cache = self.cache.take(active + active[-1:] * more)
            self._rows(active, more)
        return kept

    def step(self) -> Tensor:
        """Every row reads its token; returns the logits of what follows, ``(rows, V)``, unused rows included."""
        device = self.model.device
        out = self._call(
            input_ids=torch.tensor(self.tokens, device=device).unsqueeze(1),
            position_ids=torch.tensor(self.positions, device=device).unsqueeze(1),
            cache=self.cache,
            use_cache=True,
        )
        used = (user is not None for user in self.users)
        self.positions = [p + 1 if u else 0 for p, u in zip(self.positions, used, strict=True)]  # unused: never too far
        logits: Tensor = out.logits[:, -1]
        return logits

    def _begin(self) -> None:
        """The first rows: all that there will ever be, or a single one; of a cache of the model's own, to be replaced.

        So a row that does not fit is refused when it joins, also as the first one.
        """
        if self._blank is None:
            self._blank = HippocampalCache()
            token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            self.model(input_ids=token, cache=self._blank, use_cache=True)
        count = self.size if self.fixed else 1
        self.cache = HippocampalCache.join([self._blank], rows=count if self.fixed else None)
        self._rows([], count)

    def _rows(self, kept: list[int], more: int) -> None:
        """The users of these rows keep them; more rows have none."""
        self.users = [self.users[row] for row in kept] + [None] * more
        self.tokens = [self.tokens[row] for row in kept] + [0] * more
        self.positions = [self.positions[row] for row in kept] + [0] * more
