"""How generation by a retrofitted model is compared with calls of the model."""

import pytest

from ..models import CAPACITY, SINKS, tokens

LONG = 3 * CAPACITY + 1
NEW = CAPACITY + 2
STATIC = {"cache_implementation": "static"}
SOME = ["llama", "qwen3", "mistral_window", "gemma2"]
LENGTHS = {"one": 1, "sinks": SINKS, "brim": CAPACITY, "past": CAPACITY + 1, "long": LONG}
some = pytest.mark.parametrize("name", SOME)


@pytest.fixture(autouse=True)
def fast(unchecked):
    """Shapes are not checked: there are many calls of small models."""


def left_padded(*lengths):
    """Rows of different lengths as one batch: their ids, the mask, and each row alone."""
    ids = tokens(len(lengths), max(lengths), seed=5)
    for row, length in zip(ids, lengths, strict=True):
        row[: max(lengths) - length] = 0
    return ids, (ids != 0).long(), [row[row != 0][None] for row in ids]


def calls_of(model):
    """The number of tokens in each forward of the model from now on."""
    seen = []

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids")
        seen.append((kwargs["inputs_embeds"] if ids is None else ids).shape[1])

    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    return seen
