"""What needle tasks hide in a text, and what they ask for.

The protocols of RULER (arXiv 2404.06654: one needle; many keys, values and questions; texts full of needles; variable
tracking; common and frequent words), InfiniteBench (arXiv 2402.13718: pass key, number string, key-value pairs) and
BABILong (arXiv 2406.10149: facts about people among real text). They are sized for small models: fewer keys and values
than RULER has, and uuids cut to 13 characters.
"""

import json
import random
from collections.abc import Callable, Iterator
from itertools import count, cycle
from uuid import UUID

# fmt: off
WORDS = (
    "amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo", "juniper", "kelp", "lagoon",
    "maple", "nectar", "onyx", "pollen",
)
# fmt: on
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
ROOMS = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")

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


def describe(task: str, seed: int = 0) -> str:
    """What a task looks like, for the documentation."""
    parts, question = TASKS[task](random.Random(seed))
    return json.dumps({"hidden": [text for text, _ in parts], "asked": question, "answers": [a for _, a in parts if a]})
