"""One random batch of a retrofitted model: prompts continued by ``generate``, and texts packed into one row.

Each text has to be read and continued as if it were alone.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from ahn_layers import HippocampalCache
from ahn_layers.huggingface import prefill
from ahn_layers.huggingface.decoder import CACHE
from tests.hard.caches import model_of, models
from tests.models import FAMILIES, VOCABULARY, generate, greedy, logits


@dataclass
class GenerateCase:
    """A batch of prompts, and how it is continued."""

    model: tuple[str, str, str, int, int, str]
    lengths: list[int]
    count: int
    static: bool
    chunk: int | None
    turns: int
    groups: bool
    seed: int


generate_cases = functools.partial(
    st.builds,
    GenerateCase,
    model=models,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    count=st.integers(1, 9),
    static=st.booleans(),
    chunk=st.sampled_from([None, None, 1, 5, 16]),
    turns=st.integers(1, 2),
    groups=st.booleans(),
    seed=st.integers(0, 2**31),
)


@contextmanager
def read_in_groups(tokens: int = 11) -> Iterator[None]:
    """Prompts are read as on a GPU: a few rows at a time, inside the window at once; here with small pieces."""
    sizes = {"GPU_PREFILL_CHUNK": tokens, "PREFILL_CHUNK": tokens, "SHORTEST_CHUNK": 3, "GPU_AT_ONCE": 2 * tokens}
    with patch.multiple(prefill, **sizes), patch.object(prefill.Prefill, "_is_on_gpu", lambda _: True):
        yield


@torch.no_grad()
def check_generate(case: GenerateCase) -> None:
    """Raise an AssertionError unless each row of the batch equals greedy decoding of its text alone, by hand."""
    torch.manual_seed(case.seed)
    model = model_of(*case.model)
    texts = [torch.randint(1, VOCABULARY, (1, length)) for length in case.lengths]
    options: dict[str, Any] = {} if case.chunk is None else {"prefill_chunk_size": case.chunk}
    if case.static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    elif case.turns > 1 and len(texts) == 1:
        options |= {CACHE: HippocampalCache()}
    for _ in range(case.turns):
        longest = max(text.shape[1] for text in texts)
        ids, mask = (
            torch.cat([torch.nn.functional.pad(u, (longest - u.shape[1], 0)) for u in rows])
            for rows in (texts, [torch.ones_like(text) for text in texts])
        )
        with read_in_groups() if case.groups else nullcontext():
            out = generate(model, ids, case.count, attention_mask=mask, **options)
        texts = [greedy(model, text, case.count) for text in texts]
        for row, text in zip(out, texts, strict=True):
            assert torch.equal(row[-text.shape[1] :], text[0]), "another continuation"
        texts = [torch.cat((text, torch.randint(1, VOCABULARY, (1, 2))), dim=1) for text in texts]


@dataclass
class PackedCase:
    """Texts in one row, and how they are told apart."""

    model: tuple[str, str, str, int, int, str]
    lengths: list[int]
    how: str
    seed: int


packed_cases = functools.partial(
    st.builds,
    PackedCase,
    model=models,
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    how=st.sampled_from(["position_ids", "cu_seq_lens_q", "seq_idx"]),
    seed=st.integers(0, 2**31),
)


@torch.no_grad()
def check_packed(case: PackedCase) -> None:
    """Raise an AssertionError unless the texts of a row are read as if each were alone."""
    torch.manual_seed(case.seed)
    model = model_of(*case.model)
    texts = [torch.randint(1, VOCABULARY, (1, length)) for length in case.lengths]
    bounds = torch.tensor([0, *case.lengths]).cumsum(0)
    options = {
        "position_ids": torch.cat([torch.arange(length) for length in case.lengths])[None],
        "cu_seq_lens_q": bounds.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(case.lengths))[None].int(),
    }
    out = model(torch.cat(texts, dim=1), use_cache=False, **{case.how: options[case.how]}).logits
    expected = torch.cat([logits(model, text) for text in texts], dim=1)
    error = float((out - expected).abs().max())
    assert error <= FAMILIES[case.model[0]].tolerance, f"{error:.2g}"
