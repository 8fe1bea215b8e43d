"""Texts as token sequences: random crops to train on, consecutive stretches to measure on."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ahn_layers.distillation import repeat_spans

SUFFIXES = (".txt", ".md", ".jsonl")
"""What is read of a folder."""


def read_texts(paths: Sequence[Path], column: str = "text") -> list[str]:
    """The contents of text files, and of all ``.txt``, ``.md`` and ``.jsonl`` files below folders.

    Args:
        paths: files and folders.
        column: the field of each line of a ``.jsonl`` file that holds its text.

    Raises:
        FileNotFoundError: if a path does not exist or a folder holds no text.
        ValueError: if a line of a ``.jsonl`` file is not an object with that field.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{path}: no such text file, and no folder with {', '.join(SUFFIXES)} files.")
        files += found
    return [text for file in files for text in _texts_of(file, column)]


def _texts_of(file: Path, column: str) -> Iterator[str]:
    content = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with the field {column!r} ({error!r}). Name another "
                "field by --column."
            ) from None
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}: the field {column!r} is {text!r}, expected text.")
        yield text


def read_dataset(name: str, config: str | None, split: str, column: str, streaming: bool) -> Iterable[str]:
    """The texts of a dataset of the hub, of a folder, or of a local data file.

    Args:
        name: hub id or folder, or a ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` file.
        config: configuration of the dataset, None if it has a single one.
        split: which part of it.
        column: which column holds the text.
        streaming: read it row by row while it is downloaded.

    Raises:
        ValueError: if there is no such dataset, configuration, split or column; the message lists those that exist.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("--dataset needs the package datasets: pip install datasets") from None
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    kind = kinds.get(Path(name).suffix) if Path(name).is_file() else None
    try:
        if kind:
            rows = load_dataset(kind, config, data_files=name, split=split, streaming=streaming)
        else:
            rows = load_dataset(name, config, split=split, streaming=streaming)
        first = next(iter(rows), {})
    except Exception as error:  # the library raises errors of many kinds
        raise ValueError(f"--dataset {name}: {error}") from error
    if not isinstance(first.get(column), str):
        raise ValueError(f"--column {column}: no column of text in {name}, expected one of {sorted(first)}.")
    return (row[column] for row in rows)


def tokenize(tokenizer: Any, texts: Iterable[str], name: str, enough: float = float("inf")) -> list[Tensor]:
    """Token ids of every text, int32, without special tokens; no further texts once there are enough tokens."""
    backend, documents, waiting = getattr(tokenizer, "backend_tokenizer", None), [], iter(texts)
    with tqdm(desc=name, unit=" texts") as bar:
        while enough > 0 and (batch := list(islice(waiting, 16))):  # several texts side by side
            if backend is not None:
                found = [encoding.ids for encoding in backend.encode_batch(batch, add_special_tokens=False)]
            else:
                found = [tokenizer(text, add_special_tokens=False).input_ids for text in batch]
            documents += [torch.tensor(ids, dtype=torch.int32) for ids in found]
            enough -= sum(map(len, found))
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


def stretches(documents: list[Tensor], length: int, count: int, begin: Sequence[int] = ()) -> list[dict[str, Tensor]]:
    """Up to ``count`` stretches that do not overlap, spread evenly over the texts, to measure on.

    Args:
        documents: token ids.
        length: tokens in each stretch.
        count: how many.
        begin: the tokens that each one begins with, such as a model's token for the beginning of a text.
    """
    size, first = length - len(begin), torch.tensor(list(begin), dtype=torch.long)
    pieces = [torch.cat((first, u[i : i + size].long())) for u in documents for i in range(0, len(u) - size + 1, size)]
    if not pieces:
        raise ValueError(f"no text has {length} tokens in one piece.")
    chosen = torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().long().tolist()
    return [{"input_ids": pieces[i]} for i in chosen]
