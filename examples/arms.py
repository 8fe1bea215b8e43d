"""What a memory is compared with: full attention, the window alone, and each part of the memory alone.

Every arm but full attention keeps as many tokens without loss: an arm without slots gets a window that is longer by
their number.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from ahn_layers import FoldAll, HippocampalAttention, MemoryStore, SalientSlots, full_attention, window_only
from ahn_layers.evictions.scores import UNTRAINED


def arms_of(model: nn.Module) -> tuple[str, ...]:
    """The arms of a model, ``memory`` last; ``compressor`` and ``slots`` only where each is one part of the memory.

    Args:
        model: a retrofitted model.
    """
    both = slots_of(model) > 0 and any(store.compressor is not None for store in stores_of(model))
    return ("full", "window", *(("compressor", "slots") if both else ()), "memory")


@contextmanager
def use_arm(model: nn.Module, arm: str, window: tuple[int, int] | None = None) -> Iterator[None]:
    """Within this context the model is one arm. A cache belongs to the arm that filled it.

    Args:
        model: a retrofitted model.
        arm: ``full``, ``window`` (sinks and window alone), ``compressor`` (no slots: every token that leaves the window
            is folded), ``slots`` (no compressor: what the slots do not keep is lost), ``memory`` (as it is), or one of
            ``UNTRAINED``: ``slots`` with a score that needs no training.
        window: ``(window_size, num_sinks)`` of the memory, its own by default. The arms without slots get a longer one.

    Raises:
        ValueError: if there is no such arm, or the model has no memory.
    """

    def unlearned(model: nn.Module) -> AbstractContextManager[None]:
        if not slots_of(model):
            raise ValueError(f"{arm}: a score for slots, and this memory has none.")
        return _changed(model, "eviction", lambda store: _scored(store, arm))

    kinds: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
        "full": full_attention,
        "window": window_only,
        "compressor": lambda model: _changed(model, "eviction", lambda _: FoldAll()),
        "slots": lambda model: _changed(model, "compressor", lambda _: None),
        "memory": lambda _: nullcontext(),
        **dict.fromkeys(UNTRAINED, unlearned),
    }
    if arm not in kinds:
        raise ValueError(f"arm={arm!r}: expected one of {', '.join(kinds)}.")
    longer = arm in ("window", "compressor")

    mean = slots_of(model)

    def resized(store: MemoryStore) -> Any:
        size, sinks = window or (store.window.window_size, store.window.num_sinks)
        more = mean if longer else 0
        return replace(store.window, window_size=size + more, num_sinks=sinks)

    alone = _changed(model, "compressor", lambda _: None) if arm in UNTRAINED else nullcontext()
    with _changed(model, "window", resized), alone, kinds[arm](model):
        yield


def _scored(store: MemoryStore, score: str) -> Any:
    """The slots of a memory, filled by a score that needs no training; a layer without slots stays as it is.

    Raises:
        ValueError: if it keeps tokens in another way.
    """
    if store.eviction.folds_all:
        return store.eviction
    if not isinstance(store.eviction, SalientSlots):
        raise ValueError(f"{score}: a score for slots, and this memory has none.")
    return SalientSlots(store.eviction.num_slots, score=score, positions=store.eviction.positions)


def positioned(model: nn.Module, sink_positions: Any) -> AbstractContextManager[None]:
    """The model with another way to position its sinks."""
    return _changed(model, "window", lambda store: replace(store.window, sink_positions=sink_positions))


@contextmanager
def _changed(model: nn.Module, attribute: str, make: Callable[[MemoryStore], Any]) -> Iterator[None]:
    """The model with another window, eviction or compressor in every memory."""
    stores = stores_of(model)
    before = [getattr(store, attribute) for store in stores]
    try:
        for store in stores:
            setattr(store, attribute, make(store))
        yield
    finally:
        for store, value in zip(stores, before, strict=True):
            setattr(store, attribute, value)


def stores_of(model: nn.Module) -> list[MemoryStore]:
    """The memories of a model, by layer.

    Raises:
        ValueError: if there is none.
    """
    stores = [m.store for m in model.modules() if isinstance(m, HippocampalAttention)]
    if not stores:
        raise ValueError(f"{type(model).__name__} has no memory: call retrofit(model, ...) first.")
    return stores


def own_window(model: nn.Module, option: str = "--capacities") -> tuple[int, int]:
    """``(window_size, num_sinks)`` of a retrofitted model.

    Args:
        model: a retrofitted model.
        option: of the command line, by which one can be named.

    Raises:
        ValueError: if its layers differ.
    """
    found = sorted({(store.window.window_size, store.window.num_sinks) for store in stores_of(model)})
    if len(found) > 1:
        raise ValueError(f"the layers have different windows, {found}: expected one for all. Name one by {option}.")
    return found[0]


def slots_of(model: nn.Module) -> int:
    """Evicted tokens that each key/value head keeps, 0 without slots; where layers differ, the mean of all."""
    found = list(map(_slots, stores_of(model)))
    return math.ceil(sum(found) / len(found))


def set_slots(model: nn.Module, num_slots: int) -> None:
    """Let each key/value head keep another number of evicted tokens; what was learned does not depend on it.

    Where layers differ, it is the mean, and they differ in proportion.

    Raises:
        ValueError: if the model has no slots.
    """
    stores = stores_of(model)
    policies: list[Any] = [store.eviction for store in stores if hasattr(store.eviction, "num_slots")]
    total = sum(policy.num_slots for policy in policies)
    if not total:
        raise ValueError(f"--slots {num_slots}: this memory has no slots. Leave --slots out.")
    for policy in policies:
        policy.num_slots = policy.num_slots * num_slots * len(stores) // total


def set_rate(model: nn.Module, rate: float) -> None:
    """Let the priorities of all heads age at one rate; a small one lets all of them keep their tokens for good.

    Raises:
        ValueError: if the model has no slots with a learned score, or the rate is 0, which has no logarithm.
    """
    scores = [store.eviction.learned for store in stores_of(model) if isinstance(store.eviction, SalientSlots)]
    if not scores or None in scores or rate == 0:
        reason = "expected a number above 0" if rate == 0 else "this memory has no learned slots. Leave --rate out"
        raise ValueError(f"--rate {rate}: {reason}.")
    for score in scores:
        score.log_rate.detach().fill_(math.log(rate))


def _slots(store: MemoryStore) -> int:
    return int(getattr(store.eviction, "num_slots", 0))


def equal_window(model: nn.Module, window: tuple[int, int]) -> tuple[int, int]:
    """``(window_size, num_sinks)`` of the arms without slots, for a memory with this window."""
    return window[0] + slots_of(model), window[1]


def called(model: nn.Module, window: tuple[int, int]) -> str:
    """The capacity of a memory with this window, for tables."""
    slots = slots_of(model)
    return f"{window[0]}+{window[1]}" + (f"+{slots} slots" if slots else "")


def arm_bytes(model: nn.Module, arm: str, window: tuple[int, int], length: int) -> int:
    """Bytes of an arm's cache for one text, in the retrofitted layers.

    Args:
        model: a retrofitted model.
        arm: see ``use_arm``.
        window: ``(window_size, num_sinks)`` of the memory.
        length: tokens of the text; the other arms than ``full`` are counted with every window and slot full.
    """
    total = 0
    with use_arm(model, arm, window):
        for block in (m for m in model.modules() if isinstance(m, HippocampalAttention)):
            like, sizes = block.found.like, block.found.sizes
            if arm == "full":
                per_token = sizes["num_kv_heads"] * (sizes["head_dim"] + sizes["value_dim"])
                total += length * per_token * like.element_size()
            else:
                store = block.store.without_memory() if arm == "window" else block.store
                total += store.bytes_per_row(like, **sizes)
    return total
