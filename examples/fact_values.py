"""What facts are made of: things, people and codes, drawn from the words of ``facts.json``."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[[random.Random], str]

DATA: dict[str, Any] = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
"""Words and wordings."""
WORDS: dict[str, tuple[str, ...]] = {name: tuple(found) for name, found in DATA["words"].items()}
"""Words to draw from, by kind."""


def number(rng: random.Random) -> str:
    """Three to ten digits."""
    digits = rng.randint(3, 10)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def hexadecimal(rng: random.Random) -> str:
    """A string of hexadecimal digits, some with dashes as in a uuid."""
    digits = f"{rng.getrandbits(128):032x}"
    if rng.random() < 0.3:
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return digits[: rng.randint(6, 20)]


def thing(rng: random.Random) -> str:
    return f"the {rng.choice(WORDS['colours'])} {rng.choice(WORDS['nouns'])}"


def locked(rng: random.Random) -> str:
    return f"the {rng.choice(WORDS['colours'])} {rng.choice(WORDS['locked'])}"


def label(rng: random.Random) -> str:
    word = rng.choice(WORDS["labels"])
    return f"{rng.choice(WORDS['colours'])} {word}" if rng.random() < 0.3 else word


def secret(rng: random.Random) -> str:
    name = rng.choice(WORDS["secrets"])
    return f"{name} for {rng.choice(WORDS['towns'])}" if rng.random() < 0.5 else name


def person(rng: random.Random) -> str:
    return f"{rng.choice(WORDS['first'])} {rng.choice(WORDS['last'])}"


def town(rng: random.Random) -> str:
    return rng.choice(WORDS["towns"])


def title(rng: random.Random) -> str:
    return f'"The {rng.choice(WORDS["colours"]).title()} {rng.choice(WORDS["nouns"] + WORDS["labels"]).title()}"'


def event(rng: random.Random) -> str:
    return f"the {rng.choice(WORDS['events'])} of {rng.choice(WORDS['towns'])}"


def system(rng: random.Random) -> str:
    return f"the {rng.choice(WORDS['systems'])} of {rng.choice(WORDS['towns'])}"


def spot(rng: random.Random) -> str:
    return f"{rng.choice(('under', 'behind', 'above', 'beside', 'beneath'))} the {rng.choice(WORDS['spots'])}"


def words(rng: random.Random) -> str:
    """Two to four words, as in a password."""
    return rng.choice("-_ .").join(rng.sample(WORDS["labels"] + WORDS["nouns"], rng.randint(2, 4)))


def house(rng: random.Random) -> str:
    return str(rng.randint(2, 9999))


def telephone(rng: random.Random) -> str:
    form = rng.choice(("555-####", "+44 20 7### ####", "0## ### ## ##", "(0###) ######", "+1 ### 555 ####"))
    return re.sub("#", lambda _: str(rng.randrange(10)), form)


def year(rng: random.Random) -> str:
    return str(rng.randint(1200, 2030))


def date(rng: random.Random) -> str:
    day, month, y = rng.randint(1, 28), rng.randrange(12), year(rng)
    name = WORDS["months"][month]
    return rng.choice((f"{day} {name} {y}", f"{name} {day}, {y}", f"{y}-{month + 1:02}-{day:02}"))


def price(rng: random.Random) -> str:
    whole, cents = rng.randrange(2, 10 ** rng.randint(1, 5)), f"{rng.randrange(100):02}"
    return rng.choice((f"${whole:,}.{cents}", f"€{whole}.{cents}", f"{whole:,} pounds", f"{whole} euros", f"${whole}"))


def saying(rng: random.Random) -> str:
    one, other = rng.sample(WORDS["nouns"] + WORDS["labels"], 2)
    first, second = rng.sample(WORDS["verbs"], 2)
    forms = (
        f"Never {first} a {one} before you {second} the {other}",
        f"Anyone who can {first} the {one} may {second} any {other}",
        f"A {one} will not {first} itself, and no {other} can {second} it",
        f"First {first} the {one}, then {second} the {other}",
        f"I would rather {first} a {one} than {second} a {other}",
    )
    return rng.choice(forms)


def constant(rng: random.Random) -> str:
    words = (*WORDS["labels"], *WORDS["nouns"], "max", "size", "port", "limit", "rate")
    return "_".join(rng.sample([word.upper() for word in words], 2))


def name_in_code(rng: random.Random) -> str:
    return constant(rng).lower()


def literal(rng: random.Random) -> str:
    """A number in code."""
    return number(rng) if rng.random() < 0.8 else f"{rng.randrange(1000)}.{rng.randrange(1000):03}"


def text(rng: random.Random) -> str:
    """A string in code."""
    return rng.choice((hexadecimal, words, number))(rng)


MAKERS: dict[str, Make] = {
    make.__name__: make
    for make in (
        *(number, hexadecimal, thing, locked, label, secret, person, town, title, event, system, spot, words, house),
        *(telephone, year, date, price, saying, constant, name_in_code, literal, text),
    )
}
"""What makes keys and values, by the names that ``facts.json`` uses."""
