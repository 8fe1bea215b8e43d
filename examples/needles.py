"""Needles: a fact at a known place of a long text, a question about it at the end, and whether a model answers it.

``needle_tasks.py`` and ``needle_wordings.py`` say what is hidden and asked.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from needle_tasks import HAYSTACKS, IN_TURN
from needle_tasks import TASKS as BENCHMARKS
from needle_wordings import TASKS as WORDINGS
from torch import Tensor
from transformers import DynamicCache

TASKS = BENCHMARKS | WORDINGS
"""What can be hidden and asked, by name."""
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
        """Where the needle lies when the answer begins: in ``sink`` or ``window``, or how far it was evicted.

        A needle is evicted if no token of it is left in sinks and window; of one at their edge, some are.
        """
        first = max(num_sinks, length - window_size)  # of the window
        if self.position == self.end:
            return "the whole text"
        if self.end <= num_sinks:
            return "sink"
        if self.position >= first or first == num_sinks:
            return "window"
        if self.position < num_sinks:
            return "edge of the sinks"
        if self.end > first:
            return "edge of the window"
        far = next((limit for limit in (512, 2048, 8192, 32768) if first - self.end <= limit), None)
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


def make(
    task: str,
    encode: Encode,
    haystack: list[int],
    length: int,
    depth: float,
    rng: random.Random,
    *,
    recent: int = 0,
    evicted: tuple[int, int] | None = None,
    begin: Sequence[int] = (),
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
        evicted: all needles go where a memory of this window size and number of sinks has evicted them.
        begin: tokens that the prompt begins with, such as a model's token for the beginning of a text.

    Raises:
        ValueError: if the haystack is too short, or the length too small for the task.
    """
    parts, question = TASKS[task](rng)
    tail, hidden = encode(question), [encode(text) for text, _ in parts]
    room = length - len(begin) - len(tail) - sum(map(len, hidden))
    low, high = 0, room
    if evicted is not None:
        low = max(0, evicted[1] - len(begin))
        high = min(room, length - evicted[0] - len(begin) - sum(map(len, hidden)))
    if high < low or room < 1 or (task not in HAYSTACKS and len(haystack) < room):
        raise ValueError(f"{task}: a prompt of {length} tokens does not fit ({len(haystack)} tokens of text given).")
    first = rng.randrange(max(0, room - recent), room + 1) if recent else low + round(depth * (high - low))
    least = first if task in IN_TURN else low
    places = [first if i == 0 else rng.randrange(least, max(least, high) + 1) for i in range(len(parts))]
    if task in IN_TURN:
        places.sort()
    if task in HAYSTACKS:
        haystack, begins = _filled(encode, HAYSTACKS[task](rng, parts), room)
        places = [begins[bisect_right(begins, place) - 1] for place in places]
    cuts = sorted((place, i) for i, place in enumerate(places))
    prompt = list(begin)
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


def score(model: Any, example: Example, chunk: int) -> list[Needle]:
    """Ask the model one question; see ``score_all``."""
    return score_all(model, [example], chunk)[0]


@torch.no_grad()
def score_all(model: Any, examples: Sequence[Example], chunk: int) -> list[list[Needle]]:
    """Ask the model: would greedy decoding write each part of the answer, given the parts before it?

    Args:
        model: a causal language model of transformers.
        examples: prompts of one length with their answers; they run side by side.
        chunk: tokens per call.

    Returns:
        The needles of each example with ``correct`` and ``loss`` set.

    Raises:
        ValueError: if the prompts differ in their length.
    """
    lengths = {len(example.prompt) for example in examples}
    if len(lengths) != 1:
        raise ValueError(f"prompts of {sorted(lengths)} tokens: expected prompts of one length.")
    answers = [[token for needle in example.needles for token in needle.answer] for example in examples]
    most, length = max(map(len, answers)), lengths.pop()
    device = next(model.parameters()).device
    # what follows a shorter answer changes nothing before it
    rows = [u.prompt + answer + [0] * (most - len(answer)) for u, answer in zip(examples, answers, strict=True)]
    ids = torch.tensor(rows, device=device)[:, :-1]
    begins = list(range(0, max(1, length - 1), chunk))
    cache, logits = DynamicCache(config=model.config), torch.empty(0)
    for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True):
        logits = model(ids[:, begin:end], cache=cache, use_cache=True, logits_to_keep=most).logits
    return [
        _judge(example.needles, own[-most:][: len(answer)].float(), torch.tensor(answer, device=device))
        for example, own, answer in zip(examples, logits, answers, strict=True)
    ]


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
    order = ("the whole", "sink", "edge of the sinks", "window", "edge of the window")
    digits = "".join(c for c in place if c.isdigit())
    return next((i for i, name in enumerate(order) if place.startswith(name)), len(order)), int(digits or 10**9)
