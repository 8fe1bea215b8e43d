"""Texts that train a memory to recall: facts are stated in a real text and asked for later.

    python examples/planting.py

prints one such text: a stated value as ``[[1: value]]``, the answer to the question about it as ``<<1: answer>>``.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _common import Help, count, positive, user_errors
from facts import DRAWN, MARK, invent
from quickstart import load_text
from smollm2 import load_tokenizer
from texts import Crops
from torch import Tensor
from torch.utils.data import Dataset

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Asked:
    """A question about a fact.

    Attributes:
        value: first and end index of the tokens of the fact's value, where the fact was stated.
        answer: first and end index of the tokens of the answer, where it is asked for.
    """

    value: tuple[int, int]
    answer: tuple[int, int]


@dataclass(frozen=True)
class Planted:
    """A text with facts and questions about them.

    Repeated spans are no answers: nothing in a text says which of its spans will come again, so a memory of fixed size
    cannot choose to keep them, and as answers they would outweigh the facts.

    Attributes:
        tokens: int64, as many as the text had before.
        asked: one for each question, in the order of the answers.
        repeated: one for each span that comes again, from its eighth token on, in the order of the copies.
    """

    tokens: Tensor
    asked: list[Asked]
    repeated: list[Asked]

    @property
    def answers(self) -> Tensor:
        """True at the tokens of answers, as long as ``tokens``."""
        found = torch.zeros(len(self.tokens), dtype=torch.bool)
        for asked in self.asked:
            found[slice(*asked.answer)] = True
        return found

    def after(self, begin: list[int]) -> "Planted":
        """The same behind other tokens."""
        first, shift = torch.tensor(begin, dtype=self.tokens.dtype), len(begin)
        asked, repeated = (
            [Asked(*((a + shift, b + shift) for a, b in (u.value, u.answer))) for u in places]
            for places in (self.asked, self.repeated)
        )
        return Planted(torch.cat((first, self.tokens)), asked, repeated)


@dataclass
class _Insertion:
    """Tokens to insert; ``cut`` counts the tokens of the text before them, ``start`` all tokens before them."""

    tokens: list[int]
    values: list[tuple[int, int]]
    cut: int = 0
    start: int = 0

    def place_of(self, which: int) -> tuple[int, int]:
        first, end = self.values[which]
        return self.start + first, self.start + end


_Group = tuple[list[_Insertion], list[tuple[int, _Insertion]]]
"""The statements of a fact, and its questions with the value that each asks for."""


def plant(
    tokens: Tensor,
    encode: Encode,
    generator: torch.Generator,
    *,
    facts: tuple[int, int] = (6, 14),
    copies: tuple[int, int] = (0, 4),
    nearest: int = 200,
) -> Planted:
    """State facts in a text, ask for each of them later, and repeat spans of the text.

    At most half of the result is inserted: a short text gets fewer facts and copies.

    Args:
        tokens: token ids of the text, 1-D, at least ``2 * nearest + 128``.
        encode: from text to tokens, without special tokens.
        generator: source of randomness on the CPU.
        facts: least and most number of facts that are asked for; some have others beside them that are not.
        copies: least and most number of spans of 24 to 120 tokens that are repeated later.
        nearest: least number of tokens between a fact and its questions, and between a span and its copy.

    Returns:
        A text of the same length with the places of the values, of the answers and of the repeated spans.

    Raises:
        ValueError: if the text is too short.
    """
    length, least = len(tokens), 2 * nearest + 128
    if tokens.dim() != 1 or length < least:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: expected one dimension and at least {least} tokens "
            "(2 * nearest + 128). Pass a longer text, or lower nearest."
        )
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    budget = length // 2
    sizes: list[int] = []
    for _ in range(rng.randint(*copies)):
        size = rng.randint(24, 120)
        sizes += [size] if sum(sizes) + size <= budget // 3 else []
    groups = _groups(rng.randint(*facts), budget - sum(sizes), encode, rng)
    room = length - _cost(groups)
    spans = _spans(sizes, room - sum(sizes), nearest, rng)
    room -= sum(end - first for first, end in spans)
    text = tokens.tolist()[:room]

    for stated, questions in groups:
        for statement in stated:
            statement.cut = _outside(rng.randint(0, room - nearest), spans, -1)
        for _, question in questions:
            after = max(statement.cut for statement in stated) + nearest
            question.cut = _outside(_later(after, room, nearest, rng), spans, 1)
    copies_of = [_Insertion(text[a:b], [(7, b - a)]) for a, b in spans]
    for (_, end), copy in zip(spans, copies_of, strict=True):
        copy.cut = _outside(_later(end + nearest, room, nearest, rng), spans, 1)

    first = [u for stated, _ in groups for u in stated]
    second = [question for _, asked in groups for _, question in asked]
    result, starts = _assemble(text, [*first, *second, *copies_of])
    asked = [Asked(stated[-1].place_of(i), u.place_of(0)) for stated, questions in groups for i, u in questions]
    repeated = [
        Asked((starts[a] + 7, starts[a] + b - a), copy.place_of(0))
        for (a, b), copy in zip(spans, copies_of, strict=True)
    ]
    asked, repeated = (sorted(places, key=lambda u: u.answer) for places in (asked, repeated))
    return Planted(torch.tensor(result), asked, repeated)


def _groups(wanted: int, budget: int, encode: Encode, rng: random.Random) -> list[_Group]:
    """Encoded facts, as many as wanted or as fit in so many tokens."""
    groups: list[_Group] = []
    used: set[str] = set()
    asked = 0
    for _ in range(2 * wanted + 20):
        if asked >= wanted:
            break
        new = []
        for fact in invent(rng.choice(DRAWN), rng, used):
            stated = [_encode(text, encode) for text in fact.statements]
            new.append((stated, [(which, _encode(text, encode)) for which, text in fact.questions]))
        if _cost(new) > budget:  # ask less, without the distractors
            new = [(stated, questions[:1]) for stated, questions in new if questions][:1]
        if _cost(new) <= budget:
            budget -= _cost(new)
            groups += new
            asked += sum(bool(questions) for _, questions in new)
    return groups


def _cost(groups: list[_Group]) -> int:
    return sum(len(u.tokens) for stated, asked in groups for u in (*stated, *(question for _, question in asked)))


def _encode(text: str, encode: Encode) -> _Insertion:
    """Values are encoded apart from the text around them, so they have the same tokens wherever they stand."""
    tokens: list[int] = []
    values = []
    for i, part in enumerate(text.split(MARK)):
        new = encode(part) if part else []
        if i % 2:
            values.append((len(tokens), len(tokens) + len(new)))
        tokens += new
    return _Insertion(tokens, values)


def _spans(sizes: list[int], room: int, nearest: int, rng: random.Random) -> list[tuple[int, int]]:
    """Spans of the text that do not overlap, early enough to be repeated ``nearest`` tokens later."""
    spans: list[tuple[int, int]] = []
    for size in sizes:
        for _ in range(20):
            start = rng.randint(0, max(0, room - nearest - size))
            if start + size + nearest <= room and all(start >= b or start + size <= a for a, b in spans):
                spans.append((start, start + size))
                break
    return spans


def _outside(cut: int, spans: list[tuple[int, int]], direction: int) -> int:
    """The cut, moved to the begin or the end of the span that it would split."""
    for first, end in spans:
        if first < cut < end:
            return first if direction < 0 else end
    return cut


def _later(first: int, room: int, nearest: int, rng: random.Random) -> int:
    """A place from ``first`` on: all equally likely, or near ones more likely."""
    if rng.random() < 0.5:
        return rng.randint(first, room)
    scale = max(1, nearest)
    return first + int(scale * ((room - first + scale) / scale) ** rng.random() - scale)


def _assemble(text: list[int], insertions: list[_Insertion]) -> tuple[list[int], list[int]]:
    """The text with all insertions, which learn where they start, and the new index of each token of the text."""
    result: list[int] = []
    starts: list[int] = []
    done = 0
    for insertion in sorted(insertions, key=lambda u: u.cut):  # stable: statements come before questions
        starts += range(len(result), len(result) + insertion.cut - done)
        result += text[done : insertion.cut]
        done, insertion.start = insertion.cut, len(result)
        result += insertion.tokens
    starts += range(len(result), len(result) + len(text) - done)
    return result + text[done:], starts


class PlantedCrops(Dataset[dict[str, Any]]):
    """Random stretches of texts with facts in them; number ``i`` is always the same one.

    Each is a dictionary with ``input_ids``, ``answers`` (True at the tokens of answers, not of repeated spans) and
    ``asked``.

    Args:
        documents: token ids; texts shorter than ``length`` are joined end to end.
        length: tokens in each crop.
        count: how many crops there are.
        encode: from text to tokens, without special tokens.
        facts: as in :func:`plant`.
        copies: as in :func:`plant`.
        nearest: as in :func:`plant`.
        begin: tokens that every crop begins with, such as a model's token for the beginning of a text.
        seed: another seed, other crops and other facts.

    Raises:
        ValueError: if all texts together are shorter than one crop.
    """

    def __init__(
        self,
        documents: list[Tensor],
        length: int,
        count: int,
        encode: Encode,
        *,
        facts: tuple[int, int] = (6, 14),
        copies: tuple[int, int] = (0, 4),
        nearest: int = 200,
        begin: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.crops, self.encode = Crops(documents, length - len(begin), count, seed=seed), encode
        self.facts, self.copies, self.nearest, self.begin, self.seed = facts, copies, nearest, list(begin), seed

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> dict[str, Any]:
        planted = self.planted(index)
        return {"input_ids": planted.tokens, "answers": planted.answers, "asked": planted.asked}

    def planted(self, index: int) -> Planted:
        """Crop number ``index`` with the places of its values and answers."""
        text = self.crops[index]["input_ids"]
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + index + 2**40)
        planted = plant(text, self.encode, generator, facts=self.facts, copies=self.copies, nearest=self.nearest)
        return planted.after(self.begin)


def marked(planted: Planted, decode: Callable[[list[int]], str]) -> str:
    """The text with its values in square brackets, its answers in angle brackets, both with the question's number."""
    numbers: dict[tuple[int, int], list[str]] = {}
    for i, asked in enumerate(planted.asked, 1):
        numbers.setdefault(asked.value, []).append(str(i))
    edges = [(first, 1, f"[[{', '.join(found)}:") for (first, _), found in numbers.items()]
    edges += [(end, 0, "]]") for _, end in numbers]
    for i, asked in enumerate(planted.asked, 1):
        edges += [(asked.answer[0], 1, f"<<{i}:"), (asked.answer[1], 0, ">>")]
    return "".join(_between(planted.tokens.tolist(), sorted(edges), decode))


def _between(tokens: list[int], edges: list[tuple[int, int, str]], decode: Callable[[list[int]], str]) -> Iterator[str]:
    done = 0
    for place, _, mark in edges:
        yield decode(tokens[done:place])
        yield mark
        done = place
    yield decode(tokens[done:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print an example."""
    parser = argparse.ArgumentParser(description="Print a text with facts to recall.", formatter_class=Help)
    parser.add_argument("--tokens", type=positive, default=600, help="length of the text")
    parser.add_argument("--seed", type=count, default=0, help="of the random numbers")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(None)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    with user_errors("planting"):
        crops = PlantedCrops([torch.tensor(encode(load_text(None)))], options.tokens, 1, encode, seed=options.seed)
        planted = crops.planted(0)
    print(marked(planted, tokenizer.decode))


if __name__ == "__main__":
    main()
