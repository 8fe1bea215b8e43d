"""Several texts in one row: finding where each one begins, and attending within each one alone."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def find_texts(
    batch_size: int,
    length: int,
    *,
    position_ids: Tensor | None = None,
    real: Bool[Tensor, "b t"] | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    gaps_separate: bool = False,
) -> Int[Tensor, "b t"] | None:
    """The number of the text that each token belongs to, from whatever a collator says about it.

    Args:
        batch_size: rows, B.
        length: tokens in each row, T.
        position_ids: ``(B or 1, T)``; a text begins where positions begin again with 0. Positions of several dimensions
            are read if the first of four is that of the text, else passed over.
        real: False at padding, whose positions mean nothing.
        seq_idx: the number of each token's text, ``(B or 1, T)``.
        cu_seq_lens: where the texts of a single row begin, and its end, ``(texts + 1,)``.
        gaps_separate: whether a text also begins where positions jump ahead, as transformers takes it for calls with
            neither a mask nor a cache.

    Returns:
        Numbers from 1, 0 at padding; None if no row holds more than one text.

    Raises:
        ValueError: if the sources contradict each other or do not cover the tokens.
    """
    by_position = _restarts(position_ids, batch_size, length, real, gaps_separate)
    told = _told(batch_size, length, seq_idx, cu_seq_lens)
    begins = by_position if told is None else told
    if begins is None or not bool(begins.any()):
        return None
    if told is not None and by_position is not None and bool((by_position & ~told).any()):
        row, column = (by_position & ~told).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids begin again at column {column} of row {row}, where cu_seq_lens or seq_idx name no new text: "
            "expected the same texts in all of them."
        )
    texts = begins.cumsum(dim=1) + 1
    return texts if real is None else texts.masked_fill(~real, 0)


def attend_each(
    attend: Callable[..., Tensor],
    texts: Int[Tensor, "b t"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t e"],
    x: Float[Tensor, "b t n"],
) -> Float[Tensor, "b h t e"]:
    """Attention of every text alone, as if it were the only one.

    Returns:
        The outputs at the places of their tokens, zero at padding.
    """
    rows = []
    for row, numbers in enumerate(texts.tolist()):
        columns: dict[int, list[int]] = {}
        for column, number in enumerate(numbers):
            if number:
                columns.setdefault(number, []).append(column)
        order = [column for text in columns.values() for column in text]
        if not order:
            rows.append(q.new_zeros(1, q.shape[1], q.shape[2], v.shape[3]))
            continue
        outs = [
            attend(*(_pick(u[row : row + 1], text, 2) for u in (q, k, v)), _pick(x[row : row + 1], text, 1))
            for text in columns.values()
        ]
        out = torch.cat(outs, dim=2)
        if order != list(range(len(numbers))):
            index = torch.tensor(order, device=out.device)
            out = out.new_zeros(*out.shape[:2], len(numbers), out.shape[3]).index_copy(2, index, out)
        rows.append(out)
    return torch.cat(rows, dim=0)


def mixes(mask: Shaped[Tensor, "b 1 t t"], texts: Int[Tensor, "b t"]) -> bool:
    """Whether a mask, boolean or added to the scores, shows a token of one text to another text."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    apart = texts[:, None, :, None] != texts[:, None, None, :]
    return bool((shown & apart).any())


def positions_of(texts: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Positions that begin again with every text."""
    column = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
    begins = torch.nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
    return column - torch.where(begins, column, 0).cummax(dim=1).values


def _pick(u: Tensor, columns: list[int], dim: int) -> Tensor:
    """Columns of a tensor, as a view where they are neighbours."""
    first, count = columns[0], len(columns)
    if columns[-1] - first + 1 == count:
        return u.narrow(dim, first, count)
    return u.index_select(dim, torch.tensor(columns, device=u.device))


def _restarts(
    position_ids: Tensor | None, batch_size: int, length: int, real: Tensor | None, gaps_separate: bool
) -> Bool[Tensor, "b t"] | None:
    """True where the positions of real tokens begin again."""
    if position_ids is None or length == 1:
        return None
    if position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids.ndim == 1:
        position_ids = position_ids.unsqueeze(0)
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        return None
    positions = position_ids.expand(batch_size, -1)
    if real is None:
        before, follows = positions[:, :-1], torch.ones_like(positions[:, 1:], dtype=torch.bool)
    else:
        column = torch.arange(length, device=positions.device)
        last = torch.where(real.to(positions.device), column, -1).cummax(dim=1).values[:, :-1]
        before = positions.gather(1, last.clamp(min=0))
        follows = (last >= 0) & real[:, 1:].to(positions.device)
    step = positions[:, 1:] - before
    # generate counts on from the position of a pad, so positions may fall: only a text of its own begins with 0
    begins = (step != 1) if gaps_separate else (step < 1) & (positions[:, 1:] == 0)
    return torch.nn.functional.pad(begins & follows, (1, 0))


def _told(
    batch_size: int, length: int, seq_idx: Tensor | None, cu_seq_lens: Tensor | None
) -> Bool[Tensor, "b t"] | None:
    """True where a text begins, but the first of a row, as the collator says."""
    if cu_seq_lens is not None:
        bounds = cu_seq_lens.flatten()
        increase = bool((bounds.diff() >= 0).all())
        if batch_size != 1 or not increase or int(bounds[0]) != 0 or int(bounds[-1]) != length:
            raise ValueError(
                f"cu_seq_lens={bounds.tolist()} for {batch_size} rows of {length} tokens: expected one row, and "
                "increasing bounds from 0 to the number of tokens."
            )
        begins = torch.zeros(1, length + 1, dtype=torch.bool, device=bounds.device)
        begins[0, bounds[1:].long()] = True
        begins[0, 0] = False
        return begins[:, :length]
    if seq_idx is None:
        return None
    if seq_idx.ndim != 2 or seq_idx.shape[1] != length or seq_idx.shape[0] not in (1, batch_size):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}: expected {(batch_size, length)}.")
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0)).expand(batch_size, -1)
