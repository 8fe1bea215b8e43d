"""Single facts in other wordings than those of the known benchmarks: does recall depend on how one asks?

``evaluate.py --tasks`` takes their names as well; they are not among its default. Facts of training (``facts.json``)
are asked for by "What is the ...?", too.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from needle_tasks import Part, number

PLACES = (
    "harbour", "lighthouse", "bakery", "museum", "stable", "observatory", "mill", "theatre", "chapel", "brewery",
    "depot", "quarry",
)  # fmt: skip
PASS_KEY = " The pass key is {v}. Remember it. {v} is the pass key."
MAGIC = " The magic number is {v}."


@dataclass(frozen=True)
class Wording:
    """How a fact is stated and asked for; ``{k}`` stands for its key, ``{v}`` for its value.

    Attributes:
        stated: the hidden text.
        asked: the end of the prompt, behind which the value comes.
        digits: of the value.
        facts: how many of this form are hidden, of which the first one is asked for.
    """

    stated: str
    asked: str
    digits: int = 5
    facts: int = 1

    def make(self, rng: random.Random) -> tuple[list[Part], str]:
        """What is hidden, with the answer, and what is asked."""
        keys = rng.sample(PLACES, self.facts)
        values = [number(rng, self.digits) for _ in keys]
        stated = [self.stated.format(k=key, v=value) for key, value in zip(keys, values, strict=True)]
        parts: list[Part] = [(text, None) for text in stated]
        parts[0] = (stated[0], f" {values[0]}")
        return parts, self.asked.format(k=keys[0])


WORDINGS: dict[str, Wording] = {
    "pass key, asked": Wording(PASS_KEY, "\nWhat is the pass key? The pass key is"),
    "pass key, answered": Wording(
        PASS_KEY, "\nQuestion: What is the pass key mentioned above?\nAnswer: The pass key is"
    ),
    "PIN": Wording(" Important: my PIN is {v}.", "\nMy PIN, as written above, is", digits=4),
    "magic number, answered": Wording(MAGIC, "\nQuestion: What is the magic number?\nAnswer: The magic number is"),
    "magic number, ChatML": Wording(
        MAGIC,
        "<|im_end|>\n<|im_start|>user\nWhat is the magic number?<|im_end|>\n<|im_start|>assistant\nThe magic number is",
    ),
    "telephone": Wording(
        " You can reach the {k} by phone at {v}.", "\nThe phone number of the {k} is", digits=6
    ),
    "one of four codes": Wording(
        " The code of the {k} is {v}.", "\nQ: What is the code of the {k}?\nA: The code of the {k} is", facts=4
    ),
    "one of four places": Wording(
        " One of the special magic numbers for {k} is: {v}.",
        "\nThe special magic number for {k} mentioned in the text is:",
        digits=7,
        facts=4,
    ),
}  # fmt: skip
TASKS: dict[str, Callable[[random.Random], tuple[list[Part], str]]] = {
    name: wording.make for name, wording in WORDINGS.items()
}
"""By name, as in ``needle_tasks.py``."""
