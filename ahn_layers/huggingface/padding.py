"""Which columns of a text are padding: what a cache remembers of the masks it was filled with."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """The padding of every row, as the columns at which real tokens and padding alternate, real tokens first.

    A row that is padded on the left by two columns has the turns ``(0, 2)``, a row without padding has none. So what
    is kept grows with the number of paddings, not with the length of the text. Everything after the last turn is of
    the same kind.

    Attributes:
        turns: increasing column numbers, one tuple for each row.
    """

    turns: tuple[tuple[int, ...], ...]

    @classmethod
    def none(cls, rows: int) -> "Padding":
        """No padding anywhere."""
        return cls(((),) * rows)

    @property
    def any(self) -> bool:
        """Whether any column of any row is padding."""
        return any(self.turns)

    @property
    def is_open(self) -> bool:
        """Whether a row ends with padding, so that the next column would count as padding too."""
        return any(len(row) % 2 for row in self.turns)

    def extended(self, real: Bool[Tensor, "b t"], start: int) -> "Padding":
        """With new columns from ``start`` on.

        Args:
            real: True at real tokens.
            start: column of the first new token.
        """
        turns = []
        for row, new in zip(self.turns, real.cpu(), strict=True):
            kept = tuple(turn for turn in row if turn < start)
            ends_real = torch.tensor([len(kept) % 2 == 0])
            changes = torch.cat((ends_real, new[:-1])) != new
            turns.append(kept + tuple((changes.nonzero().flatten() + start).tolist()))
        return Padding(tuple(turns))

    def real(self, length: int, device: torch.device | str = "cpu") -> Bool[Tensor, "b {length}"]:
        """True at the real tokens among the first columns.

        Args:
            length: how many columns.
            device: of the result.
        """
        flips = torch.zeros(len(self.turns), length + 1, dtype=torch.long)
        for row, turns in zip(flips, self.turns, strict=True):
            row[torch.tensor([turn for turn in turns if turn < length], dtype=torch.long)] = 1
        return (flips.cumsum(dim=1)[:, :length] % 2 == 0).to(device)

    def reorder(self, rows: Iterable[int]) -> "Padding":
        """The rows with these numbers, in that order."""
        return Padding(tuple(self.turns[row] for row in rows))

    def cropped(self, length: int) -> "Padding":
        """The first ``length`` columns."""
        return Padding(tuple(tuple(turn for turn in row if turn < length) for row in self.turns))
