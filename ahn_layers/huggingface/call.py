"""One forward of a retrofitted decoder: what its attention layers cannot see for themselves.

Hooks on the module that makes the masks open and close a call: they compare the padding mask with what the cache has
taken in, find packed texts, and make sure that a call that breaks off leaves the cache as it was.
"""

import inspect
import threading
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import HippocampalCache, fill
from .cache_layers import LayerCache, MemoryLayer
from .packing import find_texts
from .padding import Padding
from .transaction import begin, complete, settle

_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx", "cu_seq_lens_k")
"""Arguments that say where packed texts begin."""


class Call:
    """The running forward of one decoder.

    Attributes:
        module: the module whose hooks opened the call.
        cache: the cache that was passed, None without.
        real: False at padding among the new tokens, None if there is none.
        texts: the number of each token's text where rows hold several, else None.
    """

    def __init__(self, module: nn.Module, cache: Any) -> None:
        self.module, self.cache = module, cache
        self.real: Bool[Tensor, "b t"] | None = None
        self.texts: Int[Tensor, "b t"] | None = None


class _Running(threading.local):
    call: Call | None = None


_RUNNING = _Running()


def running() -> Call | None:
    """The call that this thread is in, None outside of retrofitted decoders."""
    return _RUNNING.call


class OpenCall:
    """Forward pre-hook of the module that makes the masks. An object, so that the model can be pickled.

    Args:
        all_layers: whether every attention layer of the decoder is retrofitted.
    """

    def __init__(self, all_layers: bool) -> None:
        self.all_layers = all_layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a call.

        Raises:
            ValueError: if mask, cache and tokens contradict each other, or packed texts cannot be kept apart.
        """
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if torch.compiler.is_compiling():
            _assert_one_text(kwargs)
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a recorded step: nothing but the model's own operations
        if not _is_on(module) or (_RUNNING.call is not None and _RUNNING.call.module is not module):
            return None  # inside another call of the same model
        _RUNNING.call = None
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return None
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        if isinstance(cache, HippocampalCache):
            fill(cache, module.config)
        if isinstance(cache, Cache):
            settle(cache)
        call = Call(module, cache)
        call.real = reconcile(cache, kwargs.get("attention_mask"), tokens.shape[0], tokens.shape[1])
        call.texts = self._texts(kwargs, tokens, call)
        if isinstance(cache, Cache):
            begin(cache)
        _RUNNING.call = call
        return (), kwargs

    def _texts(self, kwargs: dict[str, Any], tokens: Tensor, call: Call) -> Tensor | None:
        """Find packed texts, and arrange the arguments so that layers that are not retrofitted keep them apart too."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            positions = None  # generate has made the masks already, and what is padding cannot be told from a text
        cu_seq_lens = next((kwargs[name] for name in _PACKED[:2] if kwargs.get(name) is not None), None)
        texts = find_texts(
            *tokens.shape[:2], position_ids=positions, real=call.real, seq_idx=kwargs.get("seq_idx"),
            cu_seq_lens=cu_seq_lens, gaps_separate=mask is None and call.cache is None and not kwargs.get("use_cache"),
        )  # fmt: skip
        if texts is None:
            for name in _PACKED:
                kwargs.pop(name, None)  # they name the only text there is
            return None
        if call.cache is not None or kwargs.get("use_cache"):
            raise ValueError(
                "packed texts with a cache: several texts in one row (position_ids that begin again, cu_seq_lens or "
                "seq_idx) cannot be continued as one. Pass use_cache=False, or one text a row."
            )
        kwargs["use_cache"] = False  # a cache that nobody asked for would hold texts that must not be mixed
        if not self.all_layers and call.real is not None:
            raise ValueError(
                "packed texts with padding, in a model of which some attention layers are not retrofitted: these would "
                "mix the texts. Leave the padding out, or pad the texts row by row."
            )
        if call.real is None:
            kwargs["attention_mask"] = None  # it says nothing, and with it transformers does not look for texts
        if positions is None:
            kwargs["position_ids"] = _positions(texts)
        return texts


class CloseCall:
    """Forward hook of the module that makes the masks; it also runs if the forward raises an exception."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Close the call: remember the padding, or undo what was done to the cache."""
        call = None if torch.compiler.is_compiling() else _RUNNING.call
        if call is None or call.module is not module:
            return
        _RUNNING.call = None
        if output is None:
            settle(call.cache)
            return
        cache = call.cache if call.cache is not None else _cache_in(output)
        if isinstance(cache, Cache):
            complete(cache)
            if call.real is not None:
                note_padding(cache, call.real, _length(cache) - call.real.shape[1])


def reconcile(cache: Any, mask: Any, rows: int, count: int) -> Bool[Tensor, "b t"] | None:
    """Compare a padding mask with what a cache has taken in, and take back what the mask hides.

    Args:
        cache: the cache, or None.
        mask: the 2-D padding mask over all tokens, past and new; any other kind is left alone.
        rows: rows of the new tokens.
        count: new tokens in each row.

    Returns:
        False at padding among the new tokens, None if there is none or the mask does not say.

    Raises:
        ValueError: if the mask does not fit, or contradicts what cannot be changed any more.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    past = _length(cache)
    if mask.shape != (rows, past + count):
        held = f"the {past} tokens in the cache and the {count} new ones" if past else f"the {count} tokens"
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: expected {(rows, past + count)}, a column for each of "
            f"{held}."
        )
    mask = mask.to(torch.bool)
    layers = _memory_layers(cache)
    if past and layers:
        _compare(layers, mask[:, :past])
    new = mask[:, past:]
    return None if bool(new.all()) else new


def note_padding(cache: Any, real: Bool[Tensor, "b t"], start: int) -> None:
    """Remember which columns of a cache, from ``start`` on, are padding."""
    layers = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
    if layers:
        after = (layers[0].padding or Padding.none(len(real))).extended(real, start)
        for layer in layers:
            layer.padding = after


def _compare(layers: list[MemoryLayer], said: Bool[Tensor, "b c"]) -> None:
    first = layers[0]
    assert first.state is not None
    padding = first.padding or Padding.none(first.state.batch_size)
    counted = padding.real(said.shape[1], said.device)
    if said.shape[0] != first.state.batch_size:
        return  # the store names both numbers
    if not bool((counted.sum(dim=1) == first.state.seen.to(said.device)).all()):
        counted = None  # filled where nobody could look: compiled, or by a file of an earlier version
    if counted is None:
        wrong = said.sum(dim=1) != first.state.seen.to(said.device)
        if bool(wrong.any()):
            raise ValueError(
                f"attention_mask marks {said.sum(dim=1).tolist()} tokens of the past as real, the cache has taken in "
                f"{first.state.seen.tolist()}: rows {wrong.nonzero().flatten().tolist()} differ. Pass the mask that "
                "the cache was filled with, followed by the new tokens' own."
            )
        return
    unseen = (said & ~counted).any(dim=1)
    if bool(unseen.any()):
        raise ValueError(
            f"attention_mask marks tokens of rows {unseen.nonzero().flatten().tolist()} as real that the cache has "
            "never taken in, since they were padding when they came (generate pads rows that have finished): expected "
            "zeros there."
        )
    gone = counted & ~said
    if not bool(gone.any()):
        return
    for layer in layers:
        stuck = gone.any(dim=1) & ~layer.can_take_back(gone).to(gone.device)
        if bool(stuck.any()):
            window = layer.state.window.capacity if layer.state is not None else 0
            raise ValueError(
                f"attention_mask hides tokens of rows {stuck.nonzero().flatten().tolist()} that the cache has taken in "
                f"as real; these rows have outgrown the {window} tokens of sinks and window since, so what was folded "
                "cannot be undone. Mask tokens when they come, begin a new cache, or go back to a clone."
            )
    for layer in layers:
        layer.take_back(gone)


def _assert_one_text(kwargs: dict[str, Any]) -> None:
    """In compiled code packed texts are not kept apart: assert that there are none."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] > 1:
        hidden = kwargs.get("attention_mask")
        step = positions.diff(dim=-1) > 0
        if isinstance(hidden, Tensor) and hidden.ndim == 2:
            step = step | ~hidden[:, -positions.shape[1] + 1 :].to(torch.bool)
        torch._assert_async(step.all(), "position_ids begin again within a row: packed texts need an uncompiled model")


def _is_on(module: nn.Module) -> bool:
    from .decoder import DecoderAttention

    return next((u.mode for u in module.modules() if isinstance(u, DecoderAttention)), "full") != "full"


def _length(cache: Any) -> int:
    return 0 if cache is None or not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())


def _memory_layers(cache: Any) -> list[MemoryLayer]:
    if isinstance(cache, LayerCache):
        return [cache.layer] if cache.layer.state is not None else []
    layers = getattr(cache, "layers", ())
    return [layer for layer in layers if isinstance(layer, MemoryLayer) and layer.state is not None]


def _cache_in(output: Any) -> Any:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((u for u in values if isinstance(u, Cache)), None)


def _positions(texts: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Positions that begin again with every text."""
    column = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
    begins = torch.nn.functional.pad(texts[:, 1:] != texts[:, :-1], (1, 0), value=True)
    return column - torch.where(begins, column, 0).cummax(dim=1).values
