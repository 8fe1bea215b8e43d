"""A pass key hidden in a text, and the question for it: the simplest test of whether a memory recalls."""

from typing import Any

import torch
from torch import Tensor

KEY = "71432"
"""The number that is hidden."""
PLACE = 1000
"""Tokens of the text before it."""
SENTENCE = f"\nThe pass key is {KEY}. Remember it. {KEY} is the pass key.\n"
"""How it is stated."""
QUESTION = "\nWhat is the pass key? The pass key is"
"""How it is asked for, at the end."""


def hide(tokenizer: Any, ids: Tensor, kept: int) -> Tensor:
    """The text with the pass key in it, as long as before, if the key leaves the window well before the end.

    Args:
        tokenizer: of the model.
        ids: token ids, shape (1, T).
        kept: tokens that a bounded cache keeps.

    Returns:
        Token ids of the same shape; the text itself if it is shorter than ``PLACE + 2 * kept``.
    """
    if ids.shape[1] < PLACE + 2 * kept:
        return ids
    sentence = _tokens(tokenizer, SENTENCE, ids)
    return torch.cat((ids[:, :PLACE], sentence, ids[:, PLACE:]), dim=1)[:, : ids.shape[1]]


def ask(model: Any, tokenizer: Any, ids: Tensor, cache: Any) -> str:
    """What the model says the pass key is.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        ids: the text, shape (1, T).
        cache: has seen all of it but the last token; it is written to.
    """
    asked = torch.cat((ids, _tokens(tokenizer, QUESTION, ids)), dim=1)
    mask = torch.ones_like(asked)
    out = model.generate(asked, attention_mask=mask, cache=cache, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(out[0, asked.shape[1] :])).strip().split("\n")[0]


def _tokens(tokenizer: Any, text: str, like: Tensor) -> Tensor:
    found: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return found.to(like.device)
