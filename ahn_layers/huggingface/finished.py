"""Rows of a batch that finish before others: ``generate`` pads them, and their cache must not hold the pads."""

from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import StoppingCriteriaList

from .model_method import ModelMethod

T = TypeVar("T")
_ROWS = "_hippocampal_rows"
_BEAMS = "_hippocampal_beams"


class FinishedRows(StoppingCriteriaList):
    """The stopping criteria of one ``generate``, which also remember where each row ended.

    Attributes:
        ends: tokens of each row up to its end, -1 while it goes on; None before the first step.
    """

    ends: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done."""
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        ends = torch.full_like(done, -1, dtype=torch.long) if self.ends is None else self.ends
        self.ends = torch.where(done & (ends < 0), input_ids.shape[1], ends)
        return done

    @property
    def any(self) -> bool:
        """Whether a row has finished."""
        return self.ends is not None and bool((self.ends >= 0).any())

    def mask(self, given: Tensor | None, length: int, columns: int) -> Bool[Tensor, "b columns"]:
        """The padding mask of the next step, with zeros at what follows the end of a row.

        Args:
            given: the mask as ``generate`` knows it, None for ones.
            length: tokens that ``generate`` counts.
            columns: columns of the cache and the next token, more than ``length`` if the prompt was embeddings.
        """
        assert self.ends is not None
        column = torch.arange(columns, device=self.ends.device)
        ends = torch.where(self.ends < 0, columns, self.ends + columns - length)
        going = column < ends.unsqueeze(1)
        return going if given is None else going & given.to(torch.bool)


class StoppingCriteria(ModelMethod):
    """Stands in for ``model._get_stopping_criteria``: notes rows that finish, if the cache outlives ``generate``."""

    def __call__(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """The model's own criteria, in a list that takes notes if ``watch`` asked for it.

        Without an end token ``generate`` pads nothing: rows that other criteria have stopped go on until all stop.
        """
        model: Any = self.model
        criteria: StoppingCriteriaList = type(model)._get_stopping_criteria(model, *args, **kwargs)
        rows = getattr(kwargs.get("generation_config", args[0] if args else None), _ROWS, None)
        if rows is None or not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            return criteria
        rows.extend(criteria)
        return rows  # type: ignore[no-any-return]


def watch(generation_config: Any, cache: Any, mode: Any, rows: int) -> None:
    """Record which rows finish in the ``generate`` that begins, if the caller gets its cache.

    Beam search keeps no finished rows in its cache, a single row ends with ``generate`` itself.
    """
    seen_later = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    watched = seen_later and rows > 1 and str(getattr(mode, "value", mode)) in ("greedy_search", "sample")
    rows_of_this_one = FinishedRows() if watched else None
    setattr(generation_config, _ROWS, rows_of_this_one)
    setattr(cache, _ROWS, rows_of_this_one)


def note_beams(cache: Any, mode: Any) -> None:
    """Remember that the ``generate`` that begins on this cache is a beam search.

    Raises:
        ValueError: if an earlier one was.
    """
    if getattr(cache, _BEAMS, False):
        raise ValueError(
            "this cache was used by a beam search: its rows are the beams that were left at the end, and not the "
            "sequences that were returned. Begin a new cache, or go back to a clone from before."
        )
    if "beam" in str(getattr(mode, "value", mode)):
        setattr(cache, _BEAMS, True)


def note_beams_of(cache: T, copy: T) -> T:
    """What is known of a cache about beams, noted on a copy of it, which is returned."""
    setattr(copy, _BEAMS, getattr(cache, _BEAMS, False))
    return copy


def forget_beams(cache: T) -> T:
    """The cache, which was reset, or from which the caller has taken tokens back and answers for its rows."""
    setattr(cache, _BEAMS, False)
    return cache


def finished_rows(cache: Any) -> FinishedRows | None:
    """The notes of the ``generate`` that fills this cache, None if it takes none or no row has finished."""
    rows = getattr(cache, _ROWS, None)
    return rows if rows is not None and rows.any else None
