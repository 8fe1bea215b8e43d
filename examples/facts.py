"""Facts of many kinds and wordings, with questions about them: what a memory learns to recall from.

The wordings are in ``facts.json``. They are others than those of ``needles.py``, which measures recall, and so are the
kinds. ``planting.py`` hides the facts in texts.
"""

import random
import re
from dataclasses import dataclass, replace
from typing import Any

from fact_values import DATA, MAKERS, Make, hexadecimal, label, name_in_code, number, person, price, words

MARK = "\x00"
"""Stands in a text before and after each value."""


@dataclass(frozen=True)
class Kind:
    """Facts of one kind in many wordings.

    The wordings hold ``{k}`` for the key, ``{a}`` and ``{b}`` for what is told about it, ``{v}`` for the value, and
    ``{K}`` for a key that begins with a capital letter.

    Attributes:
        key: makes a key, such as a thing or a person.
        value: makes a value.
        statements: how a fact is stated; those with the key before the value are also repeated as questions.
        sentences: sentences to complete.
        asks: questions, which get an answer in one of the ``FRAMES``.
        attributes: pairs for ``{a}`` and ``{b}``.
        quoted: share of the facts whose value is in quotation marks.
        code: wordings are lines of their own.
        seconds: how the second step of a chain is stated; ``{p}`` stands for a person, who links both.
        weight: how often it is chosen, others once.
    """

    key: Make
    value: Make
    statements: tuple[str, ...]
    sentences: tuple[str, ...]
    asks: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = (("", ""),)
    quoted: float = 0.0
    code: bool = False
    seconds: tuple[str, ...] = ()
    weight: int = 1

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Kind":
        """From its entry in ``facts.json``, which names the makers of key and value; an attribute may lack ``{b}``."""
        makers = {name: MAKERS[described[name]] for name in ("key", "value")}
        pairs = ((pair, "") if isinstance(pair, str) else tuple(pair) for pair in described.get("attributes", ("",)))
        texts = {name: tuple(u) for name, u in described.items() if isinstance(u, list)}
        return cls(**{**described, **texts, **makers, "attributes": tuple(pairs)})


FRAMES: tuple[str, ...] = tuple(DATA["frames"])
"""How a question and its answer stand in a text."""
REPEATS: tuple[str, ...] = tuple(DATA["repeats"])
"""How a value is said once more."""
KINDS: dict[str, Kind] = {name: Kind.of(described) for name, described in DATA["kinds"].items()}
LISTS: tuple[dict[str, Any], ...] = tuple(DATA["lists"])
"""What stands before the pairs, each pair, what between two and behind them, and whether values are quoted."""
TITLES: tuple[str, ...] = tuple(DATA["titles"])
"""What may stand above a list."""
LISTED = Kind.of(DATA["listed"])
"""Questions about the pairs of a list."""
CONTESTED = 0.6
"""Share of the facts that have one to four others of the same wording beside them."""
NAMES = (*KINDS, "list")
"""All kinds of facts."""
DRAWN = (*(name for name, kind in KINDS.items() for _ in range(kind.weight)), "list")
"""The same, each as often as it is to be chosen."""


@dataclass(frozen=True)
class Fact:
    """What is stated, and the questions about it.

    Attributes:
        statements: texts, all before the questions; the values are marked in the last one.
        questions: which value is asked for, and a text in which the answer is marked; none for a distractor.
    """

    statements: tuple[str, ...]
    questions: tuple[tuple[int, str], ...]


def invent(name: str, rng: random.Random, used: set[str]) -> list[Fact]:
    """Facts of one kind: one or a few that are asked for, at times others of the same wording that are not.

    Args:
        name: one of ``NAMES``.
        rng: source of randomness.
        used: keys that the text has already; new ones are added.
    """
    if name == "list":
        return [_list(rng, used)]
    kind = KINDS[name]
    others = rng.randint(1, 4) if rng.random() < CONTESTED else 0
    wording, attribute = rng.choice(kind.statements), rng.choice(kind.attributes)
    quoted = rng.random() < kind.quoted
    asked = rng.randint(1, 1 + others // 2)
    facts = [_fact(kind, wording, attribute, quoted, rng, used, asked=i < asked) for i in range(1 + others)]
    rng.shuffle(facts)
    return facts


def _fact(
    kind: Kind,
    wording: str,
    attribute: tuple[str, str],
    quoted: bool,
    rng: random.Random,
    used: set[str],
    *,
    asked: bool,
) -> Fact:
    key, value = _unused(kind.key, rng, used), kind.value(rng)
    slots = {"k": key, "K": key[0].upper() + key[1:], "a": attribute[0], "b": attribute[1]}
    if kind.seconds:
        slots["p"] = _unused(person, rng, used)
        stated = [_fill(text, slots, value, quoted) for text in (wording, rng.choice(kind.seconds))]
    else:
        again = rng.choice(REPEATS) if not kind.code and rng.random() < 0.15 else ""
        stated = [_fill(wording + again, slots, value, quoted)]
    texts = [_question(kind, wording, rng) for _ in range(rng.randint(1, 3))] if asked else []
    questions = tuple((0, _apart(_fill(text, slots, value, quoted), rng, kind.code)) for text in texts)
    return Fact(tuple(_apart(text, rng, kind.code) for text in stated), questions)


def _question(kind: Kind, wording: str, rng: random.Random) -> str:
    """A sentence to complete, a question with its answer or a whole sentence, or a statement again."""
    if rng.random() < 0.2:
        again = kind.sentences if kind.seconds else [text for text in kind.statements if _key_first(text)]
        return "\n" * (rng.random() < 0.5) + f"{rng.choice(kind.asks)} {rng.choice(again)}"
    form = rng.random()
    if form < 0.4:
        return rng.choice(FRAMES).replace("{q}", rng.choice(kind.asks))
    if form < 0.55 and not kind.seconds:
        again = [text for text in kind.statements if _key_first(text)]
        return wording if _key_first(wording) and rng.random() < 0.5 else rng.choice(again)
    return rng.choice(kind.sentences)


def _key_first(text: str) -> bool:
    keys = [text.index(key) for key in ("{k}", "{K}") if key in text]
    return min(keys) < text.index("{v}")


def _list(rng: random.Random, used: set[str]) -> Fact:
    """A list of pairs, of which one or two are asked for."""
    form = rng.choice(LISTS)
    make_key, make_value = rng.choice((label, name_in_code, person)), rng.choice((number, hexadecimal, words, price))
    keys = [_unused(make_key, rng, used) for _ in range(rng.randint(4, 12))]
    pairs = [(key, make_value(rng)) for key in keys]
    quoted, row = form["quoted"], form["row"].replace('"{v}"', "{v}")  # the quotation marks come with the value
    rows = [_fill(row, {"k": key}, value, quoted) for key, value in pairs]
    questions = []
    for which in rng.sample(range(len(pairs)), rng.randint(1, 2)):
        key, value = pairs[which]
        for _ in range(rng.randint(1, 2)):
            text = _question(replace(LISTED, statements=(row,)), row, rng)
            questions.append((which, _apart(_fill(text, {"k": key}, value, quoted), rng, lines=True)))
    listed = f"{form['begin']}{form['between'].join(rows)}{form['end']}"
    return Fact((f"\n\n{rng.choice(TITLES)}{listed}\n",), tuple(questions))


def _unused(make: Make, rng: random.Random, used: set[str]) -> str:
    key = make(rng)
    for _ in range(1000):
        if key.lower() not in used:
            break
        key = make(rng)
    else:  # almost all are used
        key = f"{key} {len(used)}"
    used.add(key.lower())
    return key


def _fill(text: str, slots: dict[str, str], value: str, quoted: bool) -> str:
    """The text with its slots filled and its first value marked, which includes the space before it."""
    first, last = (f'"{MARK}', f'{MARK}"') if quoted else (f"{MARK} ", MARK)
    text = re.sub(r"\{([kKabp])\}", lambda match: slots[match[1]], text)
    before, *after = text.split("{v}")
    if not after:
        return text
    if not quoted:
        before = before.removesuffix(" ")
    plain = f'"{value}"' if quoted else value
    return f"{before}{first}{value}{last}" + plain.join(after)


def _apart(text: str, rng: random.Random, lines: bool) -> str:
    """The text with white space around it, as a sentence among others or as lines of their own."""
    before = "\n" if lines or text.startswith("\n") else rng.choice((" ", " ", "\n", "\n\n"))
    after = "\n" if lines else rng.choice(("", "", "", "\n", "\n\n"))
    return before + text.lstrip("\n") + after
