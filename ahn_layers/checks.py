"""Checks of a store's arguments, before anything has changed."""

from collections.abc import Mapping
from itertools import permutations
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .compressor import Compressor, State
from .eviction import Eviction, first_kept
from .positions import Rotary
from .state import MemoryState
from .tokens import Tokens
from .window import Window

LAYOUT = ("batch", "heads", "tokens", "size")


def check_kinds(parts: Mapping[str, tuple[object, type]]) -> None:
    """Raise a TypeError for a part that is not of its kind, by name."""
    for name, (part, kind) in parts.items():
        if not isinstance(part, kind):
            raise TypeError(f"{name}={part!r}: expected an object of {kind.__name__} or of a subclass.")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    valid: Tensor | None,
    compressor: Compressor | None,
    eviction: Eviction,
    rotary: Rotary | None,
) -> None:
    """Shapes, devices and dtypes of one call among themselves, and against the parts of the store."""
    for name, u in (("q", q), ("k", k), ("v", v)):
        if u.ndim != 4 or not u.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(u.shape)}, {u.dtype}: expected floating (batch, heads, tokens, size)."
            )
    batch, heads, count, size = q.shape
    groups = k.shape[1]
    if count == 0:
        raise ValueError("q has no tokens (shape[2] == 0): call the store with at least one.")
    for name, u in (("q", q), ("k", k), ("v", v)):
        if 0 in u.shape:
            raise ValueError(
                f"{name} has shape {tuple(u.shape)} (batch, heads, tokens, size), with nothing in it: expected at "
                "least 1 in each place. Do not call the store for an empty batch."
            )
    _check_order(compressor, q, k, v, x)
    if k.shape != (batch, groups, count, size) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected the same batch and tokens in all, "
            "the same size in q and k, the same heads in k and v. Pass the new tokens only, not the cached ones."
        )
    if heads % groups:
        raise ValueError(
            f"{heads} query heads and {groups} key/value heads: expected a multiple. Pass keys and values as they are "
            "projected, not repeated for the query heads."
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: expected one dtype "
            "and one device. Convert them before the call."
        )
    if valid is not None:
        _check_valid(valid, batch, count)
    if rotary is not None:
        _check_rotation(rotary, q)
    if compressor is not None:
        _check_compressor(compressor, q, k, v, x)
    elif eviction.reads_hidden:
        if x is None:
            name = type(eviction).__name__
            raise ValueError(f"x=None: {name} needs the hidden states that enter the attention block.")
        _check_hidden(x, q, x.shape[-1] if x.ndim else 0)


def _check_rotation(rotary: Rotary, q: Tensor) -> None:
    """Whether queries have the channels that are said to be rotated."""
    pairs, size = rotary.inv_freq.shape[0], q.shape[3]
    if rotary.start + 2 * pairs > size:
        raise ValueError(
            f"Rotary turns {2 * pairs} channels from channel {rotary.start} on, two for each of the {pairs} of "
            f"inv_freq, q has {size}: expected one frequency for each pair of rotated channels."
        )


def _check_order(compressor: Compressor | None, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> None:
    """Dimensions in another order, where the sizes that are known give it away."""
    if compressor is not None and x is not None and x.ndim == 3:
        known = (x.shape[0], compressor.num_heads, x.shape[1], compressor.head_dim)
        for order in permutations(range(4)) if (q.shape[1], q.shape[3]) != (known[1], known[3]) else ():
            if tuple(q.shape[i] for i in order) == known:
                _refuse_order("q", q, order, "k and v too")
    count = q.shape[2]
    for name, u in (("k", k), ("v", v)):
        if u.shape[2] != count != 1 and u.shape[1] == count and q.shape[1] % max(1, u.shape[2]) == 0:
            _refuse_order(name, u, (0, 2, 1, 3))
    if q.shape[1] == k.shape[1] == v.shape[1] and 0 < k.shape[2] == v.shape[2] < count and count % k.shape[2] == 0:
        _refuse_order("q", q, (0, 2, 1, 3), "k and v too")  # grouped heads where tokens should be


def _refuse_order(name: str, u: Tensor, order: tuple[int, ...], others: str = "") -> NoReturn:
    """Raise for a tensor that ``u.permute(order)`` would put right."""
    looks = ", ".join(LAYOUT[order.index(i)] for i in range(4))
    raise ValueError(
        f"{name} has shape {tuple(u.shape)}, which looks like ({looks}): expected ({', '.join(LAYOUT)}). Pass "
        f"{name}.permute{order}{', ' if others else ''}{others}."
    )


def _check_valid(valid: Tensor, batch: int, count: int) -> None:
    """A boolean mask of the new tokens."""
    if valid.shape == (batch, count) and valid.dtype == torch.bool:
        return
    remedy = ""
    if valid.ndim == 2 and valid.shape[0] == batch and valid.shape[1] > count:
        remedy = f" Pass the new tokens' part, valid[:, -{count}:]."
    elif valid.shape == (batch, count):
        remedy = " It is True at real tokens: pass valid.bool() if yours is 1 there and 0 at padding."
    raise ValueError(
        f"valid has shape {tuple(valid.shape)}, {valid.dtype}: expected a boolean mask of shape {(batch, count)}."
        f"{remedy}"
    )


def _check_compressor(compressor: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> None:
    name = type(compressor).__name__
    expected = (compressor.num_heads, compressor.num_kv_heads, compressor.head_dim, compressor.value_dim)
    given = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    for what, want, got in zip(("num_heads", "num_kv_heads", "head_dim", "value_dim"), expected, given, strict=True):
        if want == got:
            continue
        if what != "num_kv_heads":
            raise ValueError(f"{name} was made for {what}={want}, the attention has {got}: make it with {what}={got}.")
        if compressor.shared_state:  # query-head states take any grouping of the keys that divides the heads
            raise ValueError(
                f"{name} was made for num_kv_heads={want}, the attention has {got}: pass keys and values as they are "
                f"projected, not repeated for the query heads, or make it with num_kv_heads={got}."
            )
    if x is None:
        raise ValueError(
            f"x=None: {name} needs the hidden states that enter the attention block. Pass them, or call "
            "store.without_memory()."
        )
    _check_hidden(x, q, compressor.hidden_size)


def _check_hidden(x: Tensor, q: Tensor, size: int) -> None:
    """The hidden states of the tokens that these are the queries of."""
    shape = (q.shape[0], q.shape[2], size)
    if x.shape != shape or not x.is_floating_point():
        remedy = ""
        if x.ndim == 3 and (x.shape[1], x.shape[0], x.shape[2]) == shape:
            remedy = " Pass x.transpose(0, 1)."
        elif x.ndim == 3 and x.shape[1] > shape[1]:
            remedy = f" Pass those of the new tokens, x[:, -{shape[1]}:]."
        raise ValueError(
            f"x has shape {tuple(x.shape)}, {x.dtype}: expected floating (batch, tokens, hidden_size) = {shape}."
            f"{remedy}"
        )
    if x.device != q.device:
        raise ValueError(f"x is on {x.device}, q on {q.device}: expected one device. Pass x.to(q.device).")


def check_state(
    state: MemoryState, new: Tokens, ours: Window, compressor: Compressor | None, eviction: Eviction
) -> None:
    """Whether a state can go on with these tokens in a store of this window, compressor and eviction."""
    if not isinstance(state, MemoryState):
        raise TypeError(
            f"state is a {type(state).__name__}: expected the state that the last call returned beside its output, or "
            "None to begin."
        )
    theirs = state.window
    if (ours.num_sinks, ours.window_size) != (theirs.num_sinks, theirs.window_size):
        raise ValueError(
            f"the state belongs to {theirs}, the store has {ours}: continue it with a store of the same window."
        )
    if state.batch_size != len(new.k):
        raise ValueError(
            f"the state has {state.batch_size} rows, the tokens have {len(new.k)}: use state.reorder(index) to select "
            "or repeat rows, or state=None to begin."
        )
    for name, mine, its in (("k", new.k, state.slots.k), ("v", new.v, state.slots.v)):
        if (mine.dtype, mine.device) != (its.dtype, its.device):
            raise ValueError(
                f"the state is {its.dtype} on {its.device}, {name} is {mine.dtype} on {mine.device}: move the state "
                "with state.to(device), a cache with cache.clone(device); one of another dtype has to be computed anew."
            )
        if (mine.shape[1], mine.shape[3]) != (its.shape[1], its.shape[3]):
            raise ValueError(
                f"the state holds {name} with {its.shape[1]} heads of {its.shape[3]}, the tokens have "
                f"{mine.shape[1]} heads of {mine.shape[3]}: it was made by another layer or model, or from keys "
                "and values that were repeated for the query heads. Continue it as it was begun."
            )
    _check_memory(state, new, compressor)
    if state.slots.gates.keys() != new.gates.keys():
        raise ValueError(
            f"the state holds the write gates {sorted(state.slots.gates)}, the compressor makes {sorted(new.gates)}: "
            "it was made by another compressor."
        )
    _check_kept(state, new, eviction)


def _check_memory(state: MemoryState, new: Tokens, compressor: Compressor | None) -> None:
    """Whether the compressor can go on with the memory of a state."""
    remembers = compressor is not None
    if remembers != (state.memory is not None):
        made, asked = ("without", "with") if remembers else ("with", "without")
        raise ValueError(
            f"the state was made {made} the long-term memory and is continued {asked} it: what left the window would "
            "be lost or seen twice. Keep to one mode, or begin with state=None."
        )
    if compressor is not None and state.memory is not None:
        shapes = _shapes_of(compressor), _shapes(state.memory)
        if shapes[0] != shapes[1]:
            expected_shape, held = (u.get("", u) for u in shapes)
            raise ValueError(
                f"the state holds a memory of shape {held} in each row, the compressor has {expected_shape}: it was "
                "made by another compressor."
            )


def _check_kept(state: MemoryState, new: Tokens, eviction: Eviction) -> None:
    """Whether the eviction can go on with what a state keeps for it."""
    if eviction.folds_all and not state.kept:
        return
    kept = first_kept(eviction, new.map(lambda u: u.to("meta")))
    sizes, expected = ({name: tuple(u.shape) for name, u in held.items()} for held in (state.kept, kept))
    if sizes != expected:
        raise ValueError(
            f"the state holds {sizes or 'nothing'} for the eviction, the store's eviction has {expected or 'nothing'}: "
            "continue it with a store of the same eviction."
        )


_shapes_known: "WeakKeyDictionary[Compressor, dict[str, tuple[int, ...]]]" = WeakKeyDictionary()
"""Of compressors that were asked: this takes as long as a small layer."""


def _shapes_of(compressor: Compressor) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a compressor's state, without their rows."""
    if torch.compiler.is_compiling():
        return _shapes(compressor.init_state(1, torch.empty((), device="meta")))
    known = _shapes_known.get(compressor)
    if known is None:
        known = _shapes_known[compressor] = _shapes(compressor.init_state(1, torch.empty((), device="meta")))
    return known


def _shapes(memory: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(u.shape[1:]) for name, u in (memory if isinstance(memory, dict) else {"": memory}).items()}


def check_whole(state: MemoryState, eviction: Eviction) -> None:
    """Whether a policy that has to see a text in one call can begin with this state."""
    if eviction.whole_texts and (state.length is None or state.length > state.window.capacity):
        past = "an unknown number of" if state.length is None else f"{state.length}"
        raise ValueError(
            f"{type(eviction).__name__} with a soft choice (soft_slots) goes on after {past} tokens, more than the "
            f"{state.window.capacity} of sinks and window: it would not see those that were lost. Pass whole texts "
            "from their beginning, without padding inside, or leave soft_slots."
        )
