"""Needle tasks, made on the spot: a fact at a known place of a long text, and a question about it at the end.

The protocols of RULER (arXiv 2404.06654: one needle; many keys, values and questions; texts full of needles; variable
tracking; common and frequent words), InfiniteBench (arXiv 2402.13718: pass key, number string, key-value pairs) and
BABILong (arXiv 2406.10149: facts about people among real text). They are sized for small models: fewer keys and values
than RULER has, and uuids cut to 13 characters.
"""

import json
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle
from typing import Any
from uuid import UUID

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

# fmt: off
WORDS = (
    "amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo", "juniper", "kelp", "lagoon",
    "maple", "nectar", "onyx", "pollen",
)
# fmt: on
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
ROOMS = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
Encode = Callable[[str], list[int]]


@dataclass
class Needle:
    """A fact that is asked for.

    Attributes:
        position: index of its first token in the prompt.
        end: index behind its last token; equal to ``position`` where the text as a whole decides, not one place in it.
        answer: tokens of the answer's part that it decides.
        correct: greedy decoding would write the answer; set by :func:`score`.
        loss: nats per answer token, likewise.
    """

    position: int
    end: int
    answer: list[int]
    correct: bool = False
    loss: float = float("nan")

    def place(self, length: int, window_size: int, num_sinks: int) -> str:
        """Where the needle lies for the first token of the answer: ``sink``, ``window``, or how far it was evicted."""
        if self.position == self.end:
            return "the whole text"
        if self.end <= num_sinks:
            return "sink"
        behind = length - self.end - window_size
        if length - self.position <= window_size:
            return "window"
        if behind <= 0:
            return "edge of the window"
        far = next((limit for limit in (512, 2048, 8192, 32768) if behind <= limit), None)
        return f"evicted, up to {far:,} back" if far else "evicted, further back"


@dataclass
class Example:
    """One prompt with its needles.

    Attributes:
        task: name.
        prompt: tokens, the question last.
        needles: in the order in which the answer names them; the answer is their ``answer`` parts in a row.
    """

    task: str
    prompt: list[int]
    needles: list[Needle]


Part = tuple[str, str | None]
"""A text to hide, and the part of the answer that it decides; None for a distractor.

An empty text hides nothing: the haystack itself decides.
"""


def number(rng: random.Random, digits: int = 7) -> str:
    """A random number without leading zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def uuid(rng: random.Random) -> str:
    """The first 13 characters of a random uuid."""
    return str(UUID(int=rng.getrandbits(128)))[:13]


def coded(rng: random.Random) -> str:
    """A random word of six letters that is none."""
    return "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3)


def single(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: one key, one value."""
    key, value = rng.choice(WORDS), number(rng)
    part = (f" One of the special magic numbers for {key} is: {value}.", f" {value}")
    return [part], f"\nThe special magic number for {key} mentioned in the text is:"


def multi_key(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: four keys, one of them asked for."""
    keys, parts = rng.sample(WORDS, 4), []
    for i, key in enumerate(keys):
        value = number(rng)
        parts.append((f" One of the special magic numbers for {key} is: {value}.", f" {value}" if i == 0 else None))
    return parts, f"\nThe special magic number for {keys[0]} mentioned in the text is:"


def multi_value(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: one key with three values, all asked for; each is scored by its own place."""
    key, values = rng.choice(WORDS), [number(rng) for _ in range(3)]
    parts: list[Part] = [
        (f" One of the special magic numbers for {key} is: {v}.", f" {v}" if i == 0 else f", {v}")
        for i, v in enumerate(values)
    ]
    return parts, f"\nAll the special magic numbers for {key} mentioned in the text are, in their order:"


def passkey(rng: random.Random) -> tuple[list[Part], str]:
    """InfiniteBench: a five-digit pass key."""
    value = number(rng, 5)
    return [(f" The pass key is {value}. Remember it. {value} is the pass key.", f" {value}")], "\nThe pass key is"


def number_string(rng: random.Random) -> tuple[list[Part], str]:
    """InfiniteBench: a string of ten digits, each repeated."""
    value = "".join(digit * rng.randint(1, 3) for digit in number(rng, 10))
    hidden = f" The sequence of digits is {value}. Remember it. {value} is the sequence of digits."
    return [(hidden, f" {value}")], "\nThe sequence of digits is"


def key_value(rng: random.Random) -> tuple[list[Part], str]:
    """InfiniteBench: a pair of a JSON object among others."""
    pairs = [(uuid(rng), uuid(rng)) for _ in range(4)]
    parts: list[Part] = [(f' "{k}": "{v}",', f' "{v}"' if i == 0 else None) for i, (k, v) in enumerate(pairs)]
    return parts, f'\nJSON data: the value of the key "{pairs[0][0]}" is:'


def facts(rng: random.Random) -> tuple[list[Part], str]:
    """BABILong, task 1: where somebody went, among other people's moves."""
    people, rooms = rng.sample(PEOPLE, 3), rng.sample(ROOMS, 3)
    parts: list[Part] = [
        (f" {person} went to the {room}.", f" {room}" if person == people[0] else None)
        for person, room in zip(people, rooms, strict=True)
    ]
    return parts, f"\nQuestion: Where is {people[0]}?\nAnswer: {people[0]} is in the"


def single_uuid(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: one key, its value a uuid."""
    key, value = rng.choice(WORDS), uuid(rng)
    part = (f" One of the special magic uuids for {key} is: {value}.", f" {value}")
    return [part], f"\nThe special magic uuid for {key} mentioned in the text is:"


def key_pair(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: one key of two words; the text around it is full of others."""
    key, value = "-".join(rng.sample(WORDS, 2)), number(rng)
    part = (f" One of the special magic numbers for {key} is: {value}.", f" {value}")
    return [part], f"\nThe special magic number for {key} mentioned in the text is:"


def key_uuid(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: key and value are uuids; the text around them is full of others."""
    key, value = uuid(rng), uuid(rng)
    part = (f" One of the special magic uuids for {key} is: {value}.", f" {value}")
    return [part], f"\nThe special magic uuid for {key} mentioned in the text is:"


def multi_query(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: three keys, all of them asked for, in their order; each is scored by its own place."""
    keys = rng.sample(WORDS, 3)
    values = [number(rng) for _ in keys]
    parts: list[Part] = [
        (f" One of the special magic numbers for {key} is: {v}.", f" {v}" if i == 0 else f", {v}")
        for i, (key, v) in enumerate(zip(keys, values, strict=True))
    ]
    return parts, f"\nThe special magic numbers for {keys[0]}, {keys[1]} and {keys[2]} mentioned in the text are:"


def variable_tracking(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: a variable gets a number, two others get it from one to the next; asked for are their names."""
    value, names = number(rng, 5), [word.upper() for word in rng.sample(WORDS, 3)]
    values = [value, *(f"VAR {name}" for name in names)]
    parts: list[Part] = [
        (f" VAR {name} = {given}.", f" {name}" if i == 0 else f", {name}")
        for i, (name, given) in enumerate(zip(names, values, strict=False))
    ]
    return parts, f"\nAll variables (VAR) that are assigned the value {value}, in their order:"


def common_words(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: the word that a numbered list repeats ten times as often as any other one."""
    return [("", f" {rng.choice(WORDS)}")], "\nThe word that appears most often in the list above is:"


def frequent_words(rng: random.Random) -> tuple[list[Part], str]:
    """RULER: the three most frequent ones of many invented words, each half as frequent as the one before."""
    first, second, third = (coded(rng) for _ in range(3))
    parts: list[Part] = [("", f" {first}"), ("", f", {second}"), ("", f", {third}")]
    return parts, "\nThe three coded words that appear most often in the text above, the most frequent one first:"


def _noise(rng: random.Random, parts: list[Part]) -> Iterator[str]:
    sentences = (
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
    )
    return (f" {text}" for text in cycle(sentences))


def _other_pairs(rng: random.Random, parts: list[Part]) -> Iterator[str]:
    keys = [f"{first}-{second}" for first in WORDS for second in WORDS if first != second]
    keys = [key for key in keys if f" {key} " not in parts[0][0]]
    while True:
        for key in rng.sample(keys, len(keys)):
            yield f" One of the special magic numbers for {key} is: {number(rng)}."


def _other_uuids(rng: random.Random, parts: list[Part]) -> Iterator[str]:
    while True:
        yield f" One of the special magic uuids for {uuid(rng)} is: {uuid(rng)}."


def _list(rng: random.Random, parts: list[Part]) -> Iterator[str]:
    common = str(parts[0][1]).strip()
    words = [common] * 10 + [word for word in (*WORDS, *ROOMS) if word != common]
    numbers = count(1)
    while True:
        for word in rng.sample(words, len(words)):
            yield f" {next(numbers)}. {word}"


def _coded_text(rng: random.Random, parts: list[Part]) -> Iterator[str]:
    names = [str(answer).strip(", ") for _, answer in parts]
    while True:
        words = [name for name, times in zip(names, (8, 4, 2), strict=True) for _ in range(times)]
        words += [coded(rng) for _ in range(6)]
        rng.shuffle(words)
        yield from (f" {word}" for word in words)


TASKS: dict[str, Callable[[random.Random], tuple[list[Part], str]]] = {
    "RULER single": single,
    "RULER multi-key": multi_key,
    "RULER multi-value": multi_value,
    "pass key": passkey,
    "number string": number_string,
    "key-value": key_value,
    "facts": facts,
    "RULER single 1": single,
    "RULER single 3": single_uuid,
    "RULER multi-key 2": key_pair,
    "RULER multi-key 3": key_uuid,
    "RULER multi-query": multi_query,
    "RULER variable tracking": variable_tracking,
    "RULER common words": common_words,
    "RULER frequent words": frequent_words,
}
"""What each task hides and asks. ``RULER single`` and ``RULER multi-key`` are RULER's single 2 and multi-key 1."""
HAYSTACKS: dict[str, Callable[[random.Random, list[Part]], Iterator[str]]] = {
    "RULER single 1": _noise,
    "RULER multi-key 2": _other_pairs,
    "RULER multi-key 3": _other_uuids,
    "RULER common words": _list,
    "RULER frequent words": _coded_text,
}
"""Tasks that bring a text of their own: sentences without end, for what is hidden."""
IN_TURN = ("RULER multi-query", "RULER variable tracking", "RULER frequent words")
"""Tasks whose parts lie in the text in the order in which they are given."""


def make(
    task: str, encode: Encode, haystack: list[int], length: int, depth: float, rng: random.Random, *, recent: int = 0
) -> Example:
    """Hide a task's needles in a text, or in one that the task brings.

    Args:
        task: one of ``TASKS``.
        encode: from text to tokens, without special tokens.
        haystack: tokens of a real text, at least ``length`` long.
        length: tokens of the whole prompt.
        depth: where the first needle goes, from 0 (the very beginning) to 1 (just before the question).
        rng: source of randomness.
        recent: if above 0, the first needle goes somewhere in so many tokens before the question instead.

    Raises:
        ValueError: if the haystack is too short, or the length too small for the task.
    """
    parts, question = TASKS[task](rng)
    tail, hidden = encode(question), [encode(text) for text, _ in parts]
    room = length - len(tail) - sum(map(len, hidden))
    if room < 1 or (task not in HAYSTACKS and len(haystack) < room):
        raise ValueError(f"{task}: a prompt of {length} tokens does not fit ({len(haystack)} tokens of text given).")
    first = rng.randrange(max(0, room - recent), room + 1) if recent else round(depth * room)
    least = first if task in IN_TURN else 0
    places = [first if i == 0 else rng.randrange(least, room + 1) for i in range(len(parts))]
    if task in IN_TURN:
        places.sort()
    if task in HAYSTACKS:
        haystack, begins = _filled(encode, HAYSTACKS[task](rng, parts), room)
        places = [begins[bisect_right(begins, place) - 1] for place in places]
    cuts = sorted((place, i) for i, place in enumerate(places))
    prompt: list[int] = []
    needles: dict[int, Needle] = {}
    done = 0
    for cut, i in cuts:
        prompt += haystack[done:cut]
        answer = parts[i][1]
        if answer is not None:
            needles[i] = Needle(len(prompt), len(prompt) + len(hidden[i]), encode(answer))
        prompt += hidden[i]
        done = cut
    prompt += haystack[done:room] + tail
    order = sorted(needles, key=lambda i: needles[i].position)
    if len(order) > 1:  # several values are asked for in their order: the separators go with the place in the answer
        texts = [str(parts[i][1]).lstrip(", ") for i in order]
        for rank, (i, text) in enumerate(zip(order, texts, strict=True)):
            needles[i].answer = encode(f" {text}" if rank == 0 else f", {text}")
    return Example(task, prompt, [needles[i] for i in order])


def _filled(encode: Encode, sentences: Iterator[str], room: int) -> tuple[list[int], list[int]]:
    """Sentences that fill the room, the first one cut at its front, and where something may be hidden between them."""
    tokens: list[int] = []
    ends = [0]
    while len(tokens) < room:
        tokens += encode(next(sentences))
        ends.append(len(tokens))
    cut = len(tokens) - room
    return tokens[cut:], [0, *(end - cut for end in ends if end > cut)]


@torch.no_grad()
def score(model: Any, example: Example, chunk: int) -> list[Needle]:
    """Ask the model: would greedy decoding write each part of the answer, given the parts before it?

    Args:
        model: a causal language model of transformers.
        example: the prompt and its answers.
        chunk: tokens per call.

    Returns:
        The example's needles with ``correct`` and ``loss`` set.
    """
    answer = [token for needle in example.needles for token in needle.answer]
    device = next(model.parameters()).device
    ids = torch.tensor([example.prompt + answer[:-1]], device=device)
    begins = list(range(0, max(1, len(example.prompt) - 1), chunk))
    begins = [b for b in begins if b < len(example.prompt)]
    cache, logits = DynamicCache(config=model.config), torch.empty(0)
    for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True):
        out = model(ids[:, begin:end], cache=cache, use_cache=True, logits_to_keep=len(answer))
        logits = out.logits[0].float()
    return _judge(example.needles, logits[-len(answer) :], torch.tensor(answer, device=device))


def _judge(needles: list[Needle], logits: Tensor, answer: Tensor) -> list[Needle]:
    losses, right = F.cross_entropy(logits, answer, reduction="none"), logits.argmax(-1) == answer
    start, results = 0, []
    for needle in needles:
        part = slice(start, start + len(needle.answer))
        outcome = {"correct": bool(right[part].all()), "loss": float(losses[part].mean())}
        results.append(Needle(needle.position, needle.end, needle.answer, **outcome))
        start = part.stop
    return results


def tally(cell: dict[str, list[Needle]]) -> dict[str, Any]:
    """Share of right answers, their 95 % interval, and mean loss of the needles of one place, by arm.

    Args:
        cell: scored needles, by arm.
    """
    shares = {arm: sum(u.correct for u in found) / len(found) for arm, found in cell.items()}
    losses = {f"{arm} loss": sum(u.loss for u in found) / len(found) for arm, found in cell.items()}
    within = {arm: wilson(sum(u.correct for u in found), len(found)) for arm, found in cell.items()}
    return {**shares, **losses, "n": len(next(iter(cell.values()))), "interval": within}


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share of right answers (Wilson's, which holds for few answers and for none or all right).

    It takes the answers for independent: those of one prompt with several needles are not quite.
    """
    z = 1.96
    center, spread = right + z * z / 2, z * math.sqrt(right * (of - right) / of + z * z / 4)
    return max(0.0, (center - spread) / (of + z * z)), min(1.0, (center + spread) / (of + z * z))


def rank(place: str) -> tuple[int, int]:
    """Order of places: the text as a whole, sink, window, then further and further back."""
    order = ("the whole", "sink", "window", "edge")
    digits = "".join(c for c in place if c.isdigit())
    return next((i for i, name in enumerate(order) if place.startswith(name)), len(order)), int(digits or 10**9)


def describe(task: str, seed: int = 0) -> str:
    """What a task looks like, for the documentation."""
    parts, question = TASKS[task](random.Random(seed))
    return json.dumps({"hidden": [text for text, _ in parts], "asked": question, "answers": [a for _, a in parts if a]})
