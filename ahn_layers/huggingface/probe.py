"""What a model's attention blocks are like, found by running a few tokens through them: nothing is guessed."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..positions import Rotary
from .interface import refuse_unsupported

_NAME = "hippocampal:probe"
_SHIFT = 5
"""How far the second probe stands behind the first."""


@dataclass
class Call:
    """One call of the attention function: whose it was, and what it got."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    dropout: float
    kwargs: dict[str, Any]


@dataclass
class AttentionBlock:
    """An attention block of a loaded model.

    Attributes:
        name: where it is in the model.
        module: the block.
        layer_idx: its index in the cache.
        kind: ``full``, ``sliding`` or ``chunked``.
        native_window: the model's own window, None for full attention.
        sizes: hidden_size, num_heads, num_kv_heads, head_dim, value_dim.
        like: a tensor with the dtype and device of its queries.
        rotary: how its queries are rotated; None if they are not, or if ``fixed_positions`` says why it is unknown.
        fixed_positions: why queries cannot be turned back, empty if they can.
        trained_length: tokens that the model was trained on, None if its config does not say.
        reason: why it cannot be retrofitted, empty if it can.
    """

    name: str
    module: nn.Module
    layer_idx: int
    kind: str = "full"
    native_window: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    like: Tensor | None = None
    rotary: Rotary | None = None
    fixed_positions: str = ""
    trained_length: int | None = None
    reason: str = ""


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


def find_attention_blocks(model: Any) -> list[AttentionBlock]:
    """Run three tokens through the model and describe every block that calls the attention interface.

    Args:
        model: a transformers model whose attention goes through the attention interface.

    Returns:
        The blocks in the order of the model; those that cannot be retrofitted say why.
    """
    config = model.config.get_text_config(decoder=True)
    near, hidden = _run(model, start=0)
    far, _ = _run(model, start=_SHIFT) if "position_ids" in inspect.signature(model.forward).parameters else ([], {})
    frequencies = _frequencies(model)
    blocks = []
    for name, module in model.named_modules():
        calls = [call for call in near if call.module is module]
        if calls:
            shifted = [call for call in far if call.module is module]
            block = AttentionBlock(name, module, getattr(module, "layer_idx", None) or 0)
            _describe(block, config, calls, hidden.get(module))
            block.trained_length = getattr(config, "max_position_embeddings", None)
            if not block.reason:
                _find_rotary(block, calls[0].q, shifted[0].q if shifted else None, frequencies)
            blocks.append(block)
    repeated = {b.layer_idx for b in blocks if sum(other.layer_idx == b.layer_idx for other in blocks) > 1}
    for block in blocks:
        if block.layer_idx in repeated and not block.reason:
            block.reason = f"several blocks share the cache index {block.layer_idx}"
    return blocks


def _describe(block: AttentionBlock, config: Any, calls: list[Call], x: Tensor | None) -> None:
    call = calls[0]
    types = getattr(config, "layer_types", None)
    window = call.kwargs.get("sliding_window") or getattr(block.module, "sliding_window", None)
    if types is not None and block.layer_idx < len(types):
        block.kind = types[block.layer_idx].removesuffix("_attention")
    elif window is not None:
        block.kind = "sliding"
    block.native_window = window if block.kind == "sliding" else None
    if len(calls) > 1:
        block.reason = f"calls the attention function {len(calls)} times in one forward, expected once"
    elif getattr(block.module, "layer_idx", None) is None:
        block.reason = "has no layer_idx, so its cache is unknown"
    elif block.kind not in ("full", "sliding"):
        block.reason = f"attends by {block.kind}, expected full or sliding attention"
    elif call.mask is not None:  # not ours, which is None
        block.reason = "makes a mask of its own, expected the one that transformers makes"
    elif x is None:
        block.reason = "takes no hidden_states"
    elif not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(block.module).forward).parameters.values()):
        block.reason = "passes no keyword arguments on to the attention function"
    elif call.q.shape[1] % call.k.shape[1]:
        block.reason = f"{call.q.shape[1]} query heads are no multiple of {call.k.shape[1]} key/value heads"
    else:
        try:
            refuse_unsupported(call.dropout, call.kwargs)
        except ValueError as error:
            block.reason = str(error)
    if x is not None:
        block.sizes = {
            "hidden_size": x.shape[-1],
            "num_heads": call.q.shape[1],
            "num_kv_heads": call.k.shape[1],
            "head_dim": call.q.shape[-1],
            "value_dim": call.v.shape[-1],
        }
    block.like = call.q.new_empty(0)


def _find_rotary(
    block: AttentionBlock, near: Tensor, far: Tensor | None, frequencies: list[tuple[Tensor, str]]
) -> None:
    """Try every rotation the model could use; the one that takes the far query to the near one is its own."""
    if far is None or near.is_meta:
        block.fixed_positions = "its positions could not be probed"
        return
    if torch.equal(near, far):
        return  # no positions in this layer, so nothing is ever too far
    distance = torch.full((near.shape[2],), _SHIFT, device=near.device)
    precision = max(torch.finfo(near.dtype).eps, torch.finfo(torch.float32).eps)  # of the angles, float32 in any model
    tolerance = 8 * precision * float(near.abs().max())
    for inv_freq, rope_type in frequencies:
        if 2 * len(inv_freq) > near.shape[-1]:
            continue
        for interleaved in (False, True):
            for start in sorted({0, near.shape[-1] - 2 * len(inv_freq)}):
                rotary = Rotary(
                    inv_freq.to(near.device), block.trained_length or 1, interleaved=interleaved, start=start
                )
                if torch.allclose(rotary.turn_back(far, distance), near, rtol=0, atol=tolerance):
                    if block.trained_length is None:
                        block.fixed_positions = "the config has no max_position_embeddings"
                    elif rope_type in ("dynamic", "longrope"):
                        block.fixed_positions = f"its rope_type {rope_type!r} changes its frequencies with the length"
                    else:
                        block.rotary = rotary
                    return
    block.fixed_positions = "its position embedding is not a rotation known here"


def _frequencies(model: nn.Module) -> list[tuple[Tensor, str]]:
    """Every vector of rotary frequencies in the model, with the kind of rotary embedding that it serves."""
    found: list[tuple[Tensor, str]] = []
    for module in model.modules():
        for name, u in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and u.ndim == 1:
                kind = getattr(module, "rope_type", "default")
                if isinstance(kind, dict):
                    kind = kind.get(name.removesuffix("_inv_freq"), "default")
                if not any(torch.equal(u, other) and kind == its for other, its in found if not u.is_meta):
                    found.append((u, kind))
    return found


def _run(model: Any, start: int) -> tuple[list[Call], dict[nn.Module, Tensor]]:
    """Three tokens at positions ``start, start + 1, start + 2``, with a stand-in for attention."""
    hidden: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(x, Tensor):
            hidden[module] = x

    calls: list[Call] = []
    tokens = torch.arange(3, device=_device(model)).unsqueeze(0)
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if start:
        arguments["position_ids"] = tokens + start
    takers = [m for m in model.modules() if "hidden_states" in inspect.signature(type(m).forward).parameters]
    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in takers]
    token = _calls.set(calls)
    try:
        with torch.no_grad(), _evaluating(model), _probing(model):
            model(**arguments)
    finally:
        _calls.reset(token)
        for hook in hooks:
            hook.remove()
    return calls, hidden


def _device(model: Any) -> Any:
    """Where the model takes its inputs: accelerate's hooks know it, if they hold weights elsewhere meanwhile."""
    hooks = [m._hf_hook for m in model.modules() if hasattr(m, "_hf_hook")]
    places = [getattr(hook, "execution_device", None) for one in hooks for hook in getattr(one, "hooks", [one])]
    known = [place for place in places if place is not None]
    return known[0] if model.device.type == "meta" and known else model.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def attention_configs(model: Any) -> list[Any]:
    """The config objects in which the decoder's blocks and its mask look the attention function up."""
    text = model.config.get_text_config(decoder=True)
    configs = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "model_type", None) == text.model_type:
            configs[id(config)] = config
    return list(configs.values())


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, dropout: float = 0.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """Stands in for attention: every query gets its own value, so that outputs do not depend on positions."""
    calls = _calls.get()
    assert calls is not None, "the probe's attention function was called outside the probe"
    kwargs.pop("scaling", None)
    calls.append(Call(module, q, k, v, attention_mask, dropout, kwargs))
    return v.repeat_interleave(max(1, q.shape[1] // v.shape[1]), dim=1).transpose(1, 2), None


def _mask(**kwargs: Any) -> None:
    return None
