"""Texts as token sequences: random crops to train on, consecutive stretches to measure on."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ahn_layers.distillation import repeat_spans


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The contents of text files, and of all ``.txt`` and ``.md`` files below folders.

    Raises:
        FileNotFoundError: if a path does not exist or a folder holds no text.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md"))
        if not found:
            raise FileNotFoundError(f"{path}: no such text file, and no folder with .txt or .md files.")
        files += found
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def read_dataset(name: str, split: str, column: str) -> Iterable[str]:
    """The texts of a dataset of the hub, or of a folder that ``datasets`` can load."""
    from datasets import load_dataset

    return load_dataset(name, split=split)[column]  # type: ignore[no-any-return]


def tokenize(tokenizer: Any, texts: Iterable[str], name: str) -> list[Tensor]:
    """Token ids of every text, int32, without special tokens."""
    backend, documents, waiting = getattr(tokenizer, "backend_tokenizer", None), [], iter(texts)
    with tqdm(desc=name, unit=" texts") as bar:
        while batch := list(islice(waiting, 16)):  # several texts side by side
            if backend is not None:
                found = [encoding.ids for encoding in backend.encode_batch(batch, add_special_tokens=False)]
            else:
                found = [tokenizer(text, add_special_tokens=False).input_ids for text in batch]
            documents += [torch.tensor(ids, dtype=torch.int32) for ids in found]
            bar.update(len(batch))
    return documents


class Crops(Dataset[dict[str, Tensor]]):
    """Random stretches of texts; number ``i`` is always the same one, whatever was asked for before.

    Args:
        documents: token ids; texts shorter than ``length`` are joined end to end.
        length: tokens in each crop.
        count: how many crops there are.
        copies: share of the crops in which spans are repeated later.
        seed: another seed, other crops.

    Raises:
        ValueError: if all texts together are shorter than one crop.
    """

    def __init__(self, documents: list[Tensor], length: int, count: int, *, copies: float = 0.0, seed: int = 0) -> None:
        short = [u for u in documents if len(u) < length]
        self.documents = [u for u in documents if len(u) >= length]
        if short and sum(map(len, short)) >= length:
            self.documents.append(torch.cat(short))
        if not self.documents:
            raise ValueError(
                f"the texts hold {sum(map(len, short))} tokens: expected at least one stretch of {length}."
            )
        self.length, self.count, self.copies, self.seed = length, count, copies, seed
        self.starts = torch.tensor([len(u) - length + 1 for u in self.documents]).cumsum(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + index)
        place = int(torch.randint(int(self.starts[-1]), (), generator=generator))
        which = int(torch.searchsorted(self.starts, place, right=True))
        start = place - (int(self.starts[which - 1]) if which else 0)
        tokens = self.documents[which][start : start + self.length].long()
        if torch.rand((), generator=generator) < self.copies:
            tokens = repeat_spans(tokens, generator)
        return {"input_ids": tokens}


def stretches(documents: list[Tensor], length: int, count: int) -> list[dict[str, Tensor]]:
    """Up to ``count`` stretches that do not overlap, spread evenly over the texts, to measure on."""
    pieces = [u[i : i + length].long() for u in documents for i in range(0, len(u) - length + 1, length)]
    if not pieces:
        raise ValueError(f"no text has {length} tokens in one piece.")
    chosen = torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().long().tolist()
    return [{"input_ids": pieces[i]} for i in chosen]
