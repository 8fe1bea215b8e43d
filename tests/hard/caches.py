"""One random cache of a retrofitted model: read, cropped, forked, reordered, saved, interrupted, in any order.

Whatever was done, the next logits have to be those of each row's own text, read alone and without a cache.
"""

import copy
import functools
import pickle
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ahn_layers import DeltaNet, GatedDeltaNet, HippocampalCache, LinearAttention, Mamba2, SalientSlots
from ahn_layers.huggingface.decoder import CACHE
from tests.hard.stores import Interrupt, InterruptedError
from tests.methods import BiggestKeys
from tests.models import FAMILIES, VOCABULARY, logits, positions, retrofitted

FAMILY_NAMES = ("llama", "qwen3", "glm", "mistral_window", "phi3", "gpt_neox", "olmo2", "gpt2")
COMPRESSORS = {"none": None, "linear": LinearAttention, "delta": DeltaNet, "gdn": GatedDeltaNet, "mamba2": Mamba2}
EVICTIONS = {
    "none": None,
    "keys": lambda: BiggestKeys(3),
    "learned": lambda: SalientSlots(4),
    "values, absolute": lambda: SalientSlots(5, score="value_norm", rate=0.1, positions="absolute"),
}
LONGEST = 90
"""Columns of a text at most."""


@functools.cache
def model_of(family: str, compressor: str, eviction: str, window: int, sinks: int, positions: str) -> Any:
    """A small model with a memory that says something."""
    options: dict[str, Any] = {"memory_positions": positions} if FAMILIES[family].sinks == "turned back" else {}
    policy = EVICTIONS[eviction]
    return retrofitted(
        family, compressor=COMPRESSORS[compressor], window_size=window, num_sinks=sinks,
        eviction=None if policy is None else policy(), **options,
    )  # fmt: skip


models = st.tuples(
    st.sampled_from(FAMILY_NAMES),
    st.sampled_from(list(COMPRESSORS)),
    st.sampled_from(list(EVICTIONS)),
    st.sampled_from([1, 4, 6]),
    st.sampled_from([0, 2]),
    st.sampled_from(["absolute", "none"]),
).filter(lambda u: u[1] != "none" or u[5] == "absolute")

steps = st.one_of(
    st.tuples(st.just("read"), st.sampled_from([1, 1, 2, 3, 5, 8, 17]), st.sampled_from(["", "", "left", "holes"])),
    st.tuples(st.just("crop"), st.integers(0, 9)),
    st.tuples(st.just("rows"), st.integers(0, 99)),
    st.tuples(st.sampled_from(["save", "clone", "copy", "pickle", "fork"])),
    st.tuples(st.just("interrupt"), st.sampled_from([1, 4, 12]), st.integers(0, 900), st.sampled_from(["", "left"])),
    st.tuples(st.just("hide"), st.integers(1, 3)),
)


@dataclass
class CacheCase:
    """What is tried; hypothesis prints it when it fails."""

    model: tuple[str, str, str, int, int, str]
    rows: int
    kind: str
    records: bool
    seed: int
    steps: list[tuple[Any, ...]] = field(default_factory=list)


cache_cases = functools.partial(
    st.builds,
    CacheCase,
    model=models,
    rows=st.integers(1, 3),
    kind=st.sampled_from(["hippocampal", "hippocampal", "dynamic", "static"]),
    records=st.booleans(),
    seed=st.integers(0, 2**31),
    steps=st.lists(steps, min_size=1, max_size=9),
)


class Texts:
    """The rows so far, and the cache that has read them.

    Args:
        model: the model.
        cache: a new cache.
        rows: how many texts.
    """

    def __init__(self, model: Any, cache: Any, rows: int) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.mask = torch.zeros(rows, 0, dtype=torch.long)

    def copied(self, cache: Any) -> "Texts":
        """The same rows in another cache."""
        other = copy.copy(self)
        other.cache = cache
        return other

    def new(self, count: int, padding: str) -> tuple[Tensor, Tensor]:
        """The next columns, and which are real."""
        ids = torch.randint(1, VOCABULARY, (len(self.ids), count))
        column = torch.arange(count).expand_as(ids)
        real = {
            "": torch.ones_like(ids),
            "left": (column >= torch.randint(0, count + 1, (len(ids), 1))).long(),
            "holes": (torch.rand(ids.shape) < 0.7).long(),
        }[padding]
        return ids, real

    def call(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits of the next columns."""
        mask = torch.cat((self.mask, real), dim=1)
        at = positions(mask)[:, -ids.shape[1] :]
        given = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": at}
        return self.model(ids, use_cache=True, **given, **{CACHE: self.cache}).logits

    def read(self, ids: Tensor, real: Tensor, tolerance: float) -> None:
        """Read the next columns, and compare what comes out."""
        out = self.call(ids, real)
        self.ids, self.mask = (torch.cat(pair, dim=1) for pair in ((self.ids, ids), (self.mask, real)))
        assert int(self.cache.get_seq_length()) == self.ids.shape[1]
        for row in range(len(ids)):
            text = self.ids[row : row + 1, self.mask[row].bool()]
            count = int(real[row].sum())
            if count:
                expected = logits(self.model, text)[0, -count:]
                error = float((out[row, real[row].bool()] - expected).abs().max())
                assert error <= tolerance, f"row {row}: {error:.2g}"


def new_cache(case: CacheCase, model: Any) -> Any:
    """A cache of the kind."""
    if case.kind == "static":
        return StaticCache(model.config, 2 * LONGEST)
    return DynamicCache() if case.kind == "dynamic" else HippocampalCache()


@torch.no_grad()
def check_cache(case: CacheCase) -> None:
    """Raise an AssertionError unless all logits are those of the rows alone."""
    torch.manual_seed(case.seed)
    model, tolerance = model_of(*case.model), FAMILIES[case.model[0]].tolerance
    texts = Texts(model, new_cache(case, model), case.rows)
    if case.records and case.kind != "static":
        texts.cache.activate_past_recording()
    for name, *arguments in case.steps:
        if texts.ids.shape[1] > LONGEST:
            break
        STEPS[name](texts, tolerance, *arguments)
    texts.read(*texts.new(1, ""), tolerance)


def expect(error: Exception, text: str) -> None:
    """Raise anything else."""
    if text not in str(error):
        raise error


def _read(texts: Texts, tolerance: float, count: int, padding: str) -> None:
    texts.read(*texts.new(count, padding), tolerance)


def _crop(texts: Texts, tolerance: float, count: int) -> None:
    keep = max(0, texts.ids.shape[1] - count)
    if isinstance(texts.cache, StaticCache) or texts.ids.shape[1] == 0:
        return
    before = copy.deepcopy(texts.cache)
    try:
        texts.cache.crop(keep - texts.ids.shape[1])
    except RuntimeError as error:
        expect(error, "which cannot be undone")
        texts.cache = before
        return
    texts.ids, texts.mask = texts.ids[:, :keep], texts.mask[:, :keep]


def _rows(texts: Texts, tolerance: float, number: int) -> None:
    if texts.ids.shape[1] == 0 or isinstance(texts.cache, StaticCache):
        return
    index = torch.randint(0, len(texts.ids), (1 + number % 3,))
    if number % 2 or len(index) != len(texts.ids):
        texts.cache.batch_select_indices(index)
    else:
        texts.cache.reorder_cache(index)
    texts.ids, texts.mask = texts.ids[index], texts.mask[index]


def _save(texts: Texts, tolerance: float) -> None:
    if isinstance(texts.cache, HippocampalCache):
        with tempfile.TemporaryDirectory() as folder:
            texts.cache.save(f"{folder}/cache")
            texts.cache = HippocampalCache.load(f"{folder}/cache")


def _clone(texts: Texts, tolerance: float) -> None:
    if isinstance(texts.cache, HippocampalCache):
        texts.cache = texts.cache.clone()


def _copy(texts: Texts, tolerance: float) -> None:
    texts.cache = copy.deepcopy(texts.cache)


def _pickle(texts: Texts, tolerance: float) -> None:
    texts.cache = pickle.loads(pickle.dumps(texts.cache))


def _fork(texts: Texts, tolerance: float) -> None:
    """The fork goes on with another text; nothing of it is in ours."""
    fork = texts.copied(copy.deepcopy(texts.cache))
    for count in (3, 1, 9):
        fork.read(*fork.new(count, ""), tolerance)


def _interrupt(texts: Texts, tolerance: float, count: int, operation: int, padding: str) -> None:
    """The call breaks off; the cache goes on as before, or says that it cannot."""
    before = copy.deepcopy(texts.cache)
    ids, real = texts.new(count, padding)
    error: BaseException = (InterruptedError, torch.OutOfMemoryError, KeyboardInterrupt)[operation % 3]("here")
    behind: list[None] = []
    handle = texts.model.base_model.register_forward_hook(lambda *_: behind.append(None))
    try:
        with Interrupt(operation, error):
            texts.call(ids, real)
        texts.cache = before  # it went through
        return
    except type(error):
        pass
    finally:
        handle.remove()
    overwritten = any(getattr(layer, "overwritten", False) for layer in texts.cache.layers)
    if isinstance(texts.cache, HippocampalCache) and not behind and not overwritten:
        assert int(texts.cache.get_seq_length()) == texts.ids.shape[1]
    if isinstance(error, KeyboardInterrupt) and behind:
        texts.ids, texts.mask = (torch.cat(pair, dim=1) for pair in ((texts.ids, ids), (texts.mask, real)))
        return  # behind the last layer
    try:
        after = copy.copy(texts)
        after.read(ids, real, tolerance)
    except RuntimeError as refused:
        expect(refused, "this cache is unusable")
        texts.cache = before
        return
    texts.ids, texts.mask, texts.cache = after.ids, after.mask, after.cache


def _hide(texts: Texts, tolerance: float, count: int) -> None:
    """A mask that takes tokens back: it is followed, or refused by naming the rows."""
    hidden = texts.mask.clone()
    hidden[:, -count:] = 0
    if texts.ids.shape[1] == 0:
        return
    before, after = copy.deepcopy(texts.cache), copy.copy(texts)
    after.mask = hidden
    try:
        after.read(*after.new(2, ""), tolerance)
    except ValueError as error:
        expect(error, "cannot be undone")
        texts.cache = before
        return
    texts.ids, texts.mask = after.ids, after.mask


STEPS = {
    "read": _read, "crop": _crop, "rows": _rows, "save": _save, "clone": _clone, "copy": _copy, "pickle": _pickle,
    "fork": _fork, "interrupt": _interrupt, "hide": _hide,
}  # fmt: skip
