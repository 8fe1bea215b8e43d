"""Every way to call a store wrongly, refused before anything has changed."""

import torch
from torch import Tensor

from .compressor import Compressor
from .eviction import Eviction, FoldAll, first_kept
from .state import MemoryState
from .tokens import Tokens
from .window import Window


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    valid: Tensor | None,
    compressor: Compressor | None,
    eviction: Eviction,
) -> None:
    """Shapes, devices and dtypes of one call among themselves and against the compressor."""
    for name, u in (("q", q), ("k", k), ("v", v)):
        if u.ndim != 4 or not u.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(u.shape)}, {u.dtype}: expected floating (batch, heads, tokens, size)."
            )
    batch, heads, count, size = q.shape
    groups = k.shape[1]
    if count == 0:
        raise ValueError("q has no tokens (shape[2] == 0): call the store with at least one.")
    if k.shape != (batch, groups, count, size) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected the same batch and tokens in all, "
            "the same size in q and k, the same heads in k and v. Pass the new tokens only, not the cached ones."
        )
    if heads % groups:
        raise ValueError(f"{heads} query heads and {groups} key/value heads: expected a multiple.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: expected one dtype "
            "and one device."
        )
    if valid is not None and (valid.shape != (batch, count) or valid.dtype != torch.bool):
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}, {valid.dtype}: expected a boolean mask of shape {(batch, count)}."
        )
    if compressor is not None:
        _check_compressor(compressor, q, k, v, x)
    elif x is None and type(eviction).gates is not Eviction.gates:
        raise ValueError(f"x=None: {type(eviction).__name__} needs the hidden states that enter the attention block.")


def _check_compressor(compressor: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> None:
    name = type(compressor).__name__
    expected = (compressor.num_heads, compressor.num_kv_heads, compressor.head_dim, compressor.value_dim)
    given = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    for what, want, got in zip(("num_heads", "num_kv_heads", "head_dim", "value_dim"), expected, given, strict=True):
        # query-head states take any grouping of the keys that divides the heads
        if want != got and not (what == "num_kv_heads" and not compressor.shared_state):
            raise ValueError(f"{name} was made for {what}={want}, the attention has {got}: make it with {what}={got}.")
    if x is None:
        raise ValueError(f"x=None: {name} needs the hidden states that enter the attention block.")
    if x.shape != (q.shape[0], q.shape[2], compressor.hidden_size):
        raise ValueError(
            f"x has shape {tuple(x.shape)}: expected (batch, tokens, hidden_size) = "
            f"{(q.shape[0], q.shape[2], compressor.hidden_size)}."
        )


def check_state(
    state: MemoryState, new: Tokens, ours: Window, compressor: Compressor | None, eviction: Eviction
) -> None:
    """Whether a state can go on with these tokens in a store of this window and compressor.

    Args:
        state: the state.
        new: the tokens.
        ours: the window of the store.
        compressor: its compressor.
        eviction: its eviction.
    """
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
                f"{mine.shape[1]} heads of {mine.shape[3]}: it was made by another layer or model."
            )
    remembers = compressor is not None
    if remembers != (state.memory is not None):
        made, asked = ("without", "with") if remembers else ("with", "without")
        raise ValueError(
            f"the state was made {made} the long-term memory and is continued {asked} it: what left the window would "
            "be lost or seen twice. Keep to one mode, or begin with state=None."
        )
    if state.slots.gates.keys() != new.gates.keys():
        raise ValueError(
            f"the state holds the write gates {sorted(state.slots.gates)}, the compressor makes {sorted(new.gates)}: "
            "it was made by another compressor."
        )
    if isinstance(eviction, FoldAll) and not state.kept:
        return
    kept = first_kept(eviction, new.map(lambda u: u.to("meta")))
    sizes, expected = ({name: tuple(u.shape) for name, u in held.items()} for held in (state.kept, kept))
    if sizes != expected:
        raise ValueError(
            f"the state holds {sizes or 'nothing'} for the eviction, the store's eviction has {expected or 'nothing'}: "
            "continue it with a store of the same eviction."
        )
