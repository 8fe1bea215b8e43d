"""The attention and mask functions that retrofitted models are switched to.

A model names its attention implementation by a string; ours is ``hippocampal:<base>:<owned>``, where ``base`` is the
implementation it had before, and ``owned`` says whose masks are ours: ``full`` or ``local`` (native sliding windows) if
every layer of that kind is retrofitted, so that no other layer needs the dense mask.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import Attend
from .blocks import shown_by
from .call import is_running, texts_of_call
from .config_view import PREFIX
from .packing import mixes
from .weights import Weights, are_wanted

BASES = ("sdpa", "eager")
"""Base implementations that a retrofit supports."""
OWNED = ("none", "full", "local", "full+local")
"""Whose masks can be ours."""

_LARGEST_COMPARED = 1 << 26
"""Entries of a mask that is still made to see what it is."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments that say where packed texts begin."""

NULL_LOGITS = "s_aux"
"""What transformers calls learned sink logits: one a head, in the softmax but without a value."""
_REMEDIES = {
    "position_bias": "additive position biases are not supported",
    "encoder_hidden_states": "cross-attention is not supported",
    "head_mask": "head masks are not supported",
    "cu_seq_lens_q": "packed texts are found by the decoder as a whole: call it, not its layers, and not compiled",
    "cu_seq_lens_k": "packed texts are found by the decoder as a whole: call it, not its layers, and not compiled",
    "seq_idx": "packed texts are found by the decoder as a whole: call it, not its layers, and not compiled",
    "cache": "paged caches (continuous batching) are not supported: call generate",
}


def register_functions() -> None:
    """Make our functions known to transformers, by every name that a retrofitted model may use."""
    for base in BASES:
        for owned in OWNED:
            name = f"{PREFIX}{base}:{owned}"
            ALL_ATTENTION_FUNCTIONS.register(name, partial(attention, base=base))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(mask, base=base, owned=owned))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: through ``attend`` where the layer is retrofitted, else as the base model does it."""
    plain = base_attention(base, module)
    if attend is None:
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    valid, texts, ahead = _read_mask(attention_mask, query.shape[2])
    if texts is not None:
        kwargs = {name: value for name, value in kwargs.items() if name not in _PACKED}
    refuse_unsupported(dropout, kwargs, plain)

    def attend_as_base(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        window = kwargs.get("sliding_window")
        seen = _base_mask(base, module, q, k, window, real) if ahead is None else attention_mask
        return plain(module, q, k, v, seen, scaling=scaling, dropout=0.0, **kwargs)

    def dense(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        return attend_as_base(q, k, v, real)[0].transpose(1, 2)

    softcap, null_logits = kwargs.get("softcap"), null_logits_of(base, kwargs)
    asked: dict[str, Any] = {} if texts is None else {"texts": texts}
    weights = Weights(lambda *tokens: attend_as_base(*tokens)[1]) if are_wanted(kwargs) else None
    if weights is not None:
        asked["weights"] = weights
    if ahead is not None:
        asked["ahead"] = ahead
    asked |= {"scale": scaling, "softcap": softcap, "null_logits": null_logits}
    out = attend(query, key, value, valid=valid, dense=dense, **asked)
    return out.transpose(1, 2).contiguous(), None if weights is None else weights.value


def mask(*, base: str, owned: str, **kwargs: Any) -> Tensor | None:
    """Mask of one kind of layer: for ours ``(B, 1, 1, T)``, True at real new tokens, or None without padding."""
    kind, length = mask_kind(kwargs), kwargs["q_length"]
    plain = kwargs["mask_function"] is causal_mask_function if kind == "full" else not kwargs.get("use_vmap")
    overlaid = kind == "local" and length > 1 and not kwargs.get("allow_is_causal_skip", True)
    ours = is_running(kwargs["config"])
    texts = texts_of_call() if ours else None
    if kind not in owned.split("+") or not ours:
        native = ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)
        if texts is not None:
            if native is None or mixes(native, texts):
                raise ValueError(
                    "packed texts in a model of which some attention layers are not retrofitted: transformers would "
                    "mix them there. Pass position_ids that begin again with every text, and no attention_mask; if you "
                    "do, the masks of this model do not honour them: pass one text a row."
                )
            native.texts = texts  # type: ignore[attr-defined]  # so that retrofitted layers may read it
        elif native is not None:
            native = _note(native, kwargs, plain and not overlaid)
        return native
    if texts is not None:
        return texts[:, None, None, :]
    if not torch.compiler.is_compiling() and (not plain or overlaid) and not _is_only_causal(base, kwargs):
        native = ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)
        if native is not None and kind == "full":
            native = _note(native, kwargs, False)
        return native
    padding: Tensor | None = kwargs.get("attention_mask")
    if padding is None:
        return None
    new = padding[:, -length:].to(torch.bool)
    if not torch.compiler.is_compiling() and bool(new.all()):
        return None
    return new[:, None, None, :]


def _note(native: Tensor, kwargs: dict[str, Any], plain: bool) -> Tensor:
    """Let retrofitted layers know that a mask is not the caller's own, and where the new tokens begin in it."""
    if not torch.compiler.is_compiling():
        offset = kwargs["q_offset"]
        native = native.contiguous() if isinstance(offset, Tensor) else native  # as generate would, into another object
        first = int(offset) - int(kwargs["kv_offset"])
        if first + kwargs["q_length"] > native.shape[-1]:  # not every new token has a column
            return native
        native.first_column = first  # type: ignore[attr-defined]  # a static cache has columns to come
    if plain:
        native.is_causal_and_padding = True  # type: ignore[attr-defined]
    return native


def _is_only_causal(base: str, kwargs: dict[str, Any]) -> bool:
    """Whether a mask that may be anything is causal after all: that of a text without the images that it allows for."""
    rows, queries, keys, window = (kwargs.get(n) for n in ("batch_size", "q_length", "kv_length", "local_size"))
    assert rows is not None and queries is not None and keys is not None
    if rows * queries * keys > _LARGEST_COMPARED:
        return False
    causal = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    asked, wanted = (
        ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs | {"mask_function": function, "allow_is_causal_skip": False})
        for function in (kwargs["mask_function"], causal)
    )
    return asked is not None and wanted is not None and torch.equal(asked, wanted)


def null_logits_of(base: str | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Learned sink logits among the arguments of the attention function, if the base implementation honours them."""
    return kwargs.get(NULL_LOGITS) if base == "eager" else None


def mask_kind(call: dict[str, Any]) -> str:
    """What a mask function of transformers is asked for: ``full``, ``local`` or ``bidirectional``."""
    if call.get("allow_is_bidirectional_skip") is not None:
        return "bidirectional"
    return "full" if call.get("local_size") is None else "local"


def base_attention(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module used before; ``eager`` lives beside the module's class."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager_attention_forward beside it: load the model with 'sdpa'.")


def refuse_unsupported(dropout: float, kwargs: dict[str, Any], plain: Callable[..., Any] | None = None) -> None:
    """Refuse arguments that the memory does not support and that would change the result.

    Args:
        dropout: of the attention weights.
        kwargs: what else the attention function was given.
        plain: the base model's attention function. A tensor that it does not name makes no difference to it either:
            arguments of the whole model, such as labels of the loss, come by here.
    """
    if dropout:
        raise ValueError(
            f"attention dropout={dropout}: expected 0, since a token that is dropped here is folded later all the same."
            " Set config.attention_dropout = 0 or call model.eval()."
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False: expected causal attention, tokens are folded in their order.")
    known = plain is None or torch.compiler.is_compiling()
    for name, value in kwargs.items():
        if name in _REMEDIES and value is not None and value is not False:
            raise ValueError(f"{name} was passed to a retrofitted layer: {_REMEDIES[name]}.")
        if not known and isinstance(value, Tensor) and name != NULL_LOGITS and name in _named(plain):  # type: ignore[arg-type]
            raise ValueError(f"unknown tensor argument {name!r} reached a retrofitted layer: it would be ignored.")


@functools.cache
def _named(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _read_mask(attention_mask: Any, length: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Which new tokens are real, the text of each, and how far its query sees ahead; from our own or a native mask."""
    if attention_mask is None:
        return None, None, None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
        raise ValueError(f"attention_mask is {type(attention_mask).__name__}: expected a 2-D padding mask, or none.")
    texts = getattr(attention_mask, "texts", None)
    if texts is not None:
        return None, texts, None
    rows, keys = attention_mask.shape[2:]
    if rows == 1 and keys == length and attention_mask.dtype == torch.bool:
        return attention_mask[:, 0, 0], None, None
    if rows == 1 and keys == length and attention_mask.dtype == torch.long:
        return None, attention_mask[:, 0, 0], None
    if rows == length and (torch.compiler.is_compiling() or getattr(attention_mask, "is_causal_and_padding", False)):
        first = getattr(attention_mask, "first_column", keys - length)
        diagonal = attention_mask.diagonal(first, dim1=2, dim2=3).squeeze(1)
        return (diagonal if diagonal.dtype == torch.bool else diagonal == 0), None, None
    if rows == length and hasattr(attention_mask, "first_column"):
        shown = shown_by(attention_mask, attention_mask.first_column)
        if shown is not None:
            return shown.valid, None, shown.ahead
    raise ValueError(
        f"attention_mask has shape {tuple(attention_mask.shape)}, {attention_mask.dtype}: the memory honours "
        "causality, padding and images whose tokens see each other, not a mask of your own or a mask function. Pass a "
        "2-D mask (batch, tokens)."
    )


def _base_mask(
    base: str, module: nn.Module, q: Tensor, k: Tensor, sliding_window: int | None, real: Tensor | None = None
) -> Tensor | None:
    """The causal mask that the base model would have made; ``real`` is False at padding."""
    function = causal_mask_function if sliding_window is None else sliding_window_causal_mask_function(sliding_window)
    return ALL_MASK_ATTENTION_FUNCTIONS[base](
        batch_size=q.shape[0],
        q_length=q.shape[2],
        kv_length=k.shape[2],
        q_offset=k.shape[2] - q.shape[2],
        kv_offset=0,
        mask_function=function,
        attention_mask=real,
        local_size=sliding_window,
        allow_is_causal_skip=True,
        dtype=q.dtype,
        device=q.device,
        config=module.config,
    )
