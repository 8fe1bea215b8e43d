"""Which columns of a text are padding, as a cache remembers them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor


class Row(NamedTuple):
    """A row of a cache by itself.

    Attributes:
        length: columns that it has taken in, padding included.
        turns: the columns at which real tokens and padding alternate, real tokens first.
    """

    length: int
    turns: tuple[int, ...]


@dataclass(frozen=True)
class Padding:
    """The padding of every row, as the columns at which real tokens and padding alternate, real tokens first.

    A row that is padded on the left by two columns has the turns ``(0, 2)``, a row without padding has none. So what
    is kept grows with the number of paddings, not with the length of the text. Everything after the last turn is of
    the same kind.

    Rows of different lengths that were joined are aligned at their ends: the shorter ones stand behind columns of
    padding that they have never seen.

    Attributes:
        turns: increasing column numbers, one tuple for each row.
        before: columns that were put before each row when rows were joined; empty if there are none.
    """

    turns: tuple[tuple[int, ...], ...]
    before: tuple[int, ...] = ()

    @classmethod
    def none(cls, rows: int) -> "Padding":
        """No padding anywhere."""
        return cls(((),) * rows)

    @classmethod
    def aligned(cls, rows: Sequence[Row]) -> "Padding | None":
        """The padding of rows that end in the same column, None if there is none."""
        length, turns, before = max(row.length for row in rows), [], []
        for row in rows:
            behind = length - row.length
            own = tuple(turn + behind for turn in row.turns)
            if behind:  # real tokens begin behind the columns before the row, if it does not begin with padding itself
                own = (0, *own[1:]) if row.turns[:1] == (0,) else (0, behind, *own)
            turns.append(own)
            before.append(behind)
        if not any(turns):
            return None
        return cls(tuple(turns), tuple(before) if any(before) else ())

    def rows(self, length: int) -> list[Row]:
        """Every row by itself, of so many columns together with those before it."""
        found = []
        for turns, behind in zip(self.turns, self.before or (0,) * len(self.turns), strict=True):
            own = tuple(turn - behind for turn in turns)
            if behind:
                own = own[2:] if turns[1:2] == (behind,) else (0, *own[1:])
            found.append(Row(length - behind, own))
        return found

    @property
    def any(self) -> bool:
        """Whether any column of any row is padding."""
        return any(self.turns)

    @property
    def is_open(self) -> bool:
        """Whether a row ends with padding, so that the next column would count as padding too."""
        return any(len(row) % 2 for row in self.turns)

    def extended(self, real: Bool[Tensor, "b t"], start: int) -> "Padding":
        """With new columns from ``start`` on, True at real tokens."""
        turns = []
        for row, new in zip(self.turns, real.cpu(), strict=True):
            kept = tuple(turn for turn in row if turn < start)
            ends_real = torch.tensor([len(kept) % 2 == 0])
            changes = torch.cat((ends_real, new[:-1])) != new
            turns.append(kept + tuple((changes.nonzero().flatten() + start).tolist()))
        return Padding(tuple(turns), self.before)

    def real(self, length: int, device: torch.device | str = "cpu") -> Bool[Tensor, "b {length}"]:
        """True at the real tokens among the first columns."""
        flips = torch.zeros(len(self.turns), length + 1, dtype=torch.long)
        for row, turns in zip(flips, self.turns, strict=True):
            row[torch.tensor([turn for turn in turns if turn < length], dtype=torch.long)] = 1
        return (flips.cumsum(dim=1)[:, :length] % 2 == 0).to(device)

    def reorder(self, rows: Iterable[int]) -> "Padding":
        """The rows with these numbers, in that order."""
        rows = list(rows)
        return Padding(
            tuple(self.turns[row] for row in rows), tuple(self.before[row] for row in rows) if self.before else ()
        )

    def cropped(self, length: int) -> "Padding":
        """The first ``length`` columns."""
        turns = tuple(tuple(turn for turn in row if turn < length) for row in self.turns)
        return Padding(turns, tuple(min(behind, length) for behind in self.before))
