"""Needle tasks, made on the spot: a fact at a known place of a long text, and a question about it at the end.

The protocols of RULER (arXiv 2404.06654: one needle, many keys, many values), InfiniteBench (arXiv 2402.13718: pass
key, number string, key-value pairs) and BABILong (arXiv 2406.10149: facts about people among real text).
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
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
        end: index behind its last token.
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
"""A text to hide, and the part of the answer that it decides; None for a distractor."""


def number(rng: random.Random, digits: int = 7) -> str:
    """A random number without leading zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


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
    pairs = [(str(UUID(int=rng.getrandbits(128)))[:13], str(UUID(int=rng.getrandbits(128)))[:13]) for _ in range(4)]
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


TASKS: dict[str, Callable[[random.Random], tuple[list[Part], str]]] = {
    "RULER single": single,
    "RULER multi-key": multi_key,
    "RULER multi-value": multi_value,
    "pass key": passkey,
    "number string": number_string,
    "key-value": key_value,
    "facts": facts,
}


def make(
    task: str, encode: Encode, haystack: list[int], length: int, depth: float, rng: random.Random, *, recent: int = 0
) -> Example:
    """Hide a task's needles in a text.

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
    if room < 1 or len(haystack) < room:
        raise ValueError(f"{task}: a prompt of {length} tokens does not fit ({len(haystack)} tokens of text given).")
    first = rng.randrange(max(0, room - recent), room + 1) if recent else round(depth * room)
    cuts = sorted((first if i == 0 else rng.randrange(room + 1), i) for i in range(len(parts)))
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


def describe(task: str, seed: int = 0) -> str:
    """What a task looks like, for the documentation."""
    parts, question = TASKS[task](random.Random(seed))
    return json.dumps({"hidden": [text for text, _ in parts], "asked": question, "answers": [a for _, a in parts if a]})
