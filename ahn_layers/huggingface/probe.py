"""Finds a model's attention blocks, and their properties, by running a few tokens through the model."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from ..positions import Rotary
from ..split import Split
from .attended import how_it_differs
from .call import CACHE_NAMES
from .config_view import configs_of, original
from .interface import refuse_unsupported
from .linear_rows import recurring
from .native_layer import SHARING
from .rotations import Frequencies, find_rotary
from .split_model import find_splits, group_of, why_unsplit
from .stepwise import cache_of_two_tokens, goes_on, what_others_change
from .trial import AttentionCall, MaskCall, Trial

_CACHES = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    *SHARING,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Layers of a cache that a memory can stand in for."""
_SHIFT = 5
"""How far the second probe stands behind the first."""


@dataclass
class AttentionBlock:
    """An attention block of a loaded model.

    Attributes:
        name: where it is in the model.
        module: the block.
        layer_idx: its index in the cache.
        kind: ``full``, ``sliding`` or ``chunked``.
        shares_with: index of an earlier layer whose keys and values it attends to, None for its own.
        native_window: the model's own window, None for full attention.
        sizes: hidden_size, num_heads, num_kv_heads, head_dim, value_dim.
        like: a tensor with the dtype and device of its queries.
        rotary: how its queries are rotated; None if they are not, or if ``fixed_positions`` says why it is unknown.
        frequencies: of that rotation, where the model keeps them.
        fixed_positions: why queries cannot be turned back, empty if they can.
        trained_length: tokens that the model was trained on, None if its config does not say.
        on_meta: whether the model had no values yet, so that its rotation is not known.
        elsewhere: whether it attends to something else than the text, so that its index in the cache means nothing.
        split: which of its heads this process holds, None if there is one process; sizes are those of the process.
        reason: why it cannot be retrofitted, empty if it can.
    """

    name: str
    module: nn.Module
    layer_idx: int
    kind: str = "full"
    shares_with: int | None = None
    native_window: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    like: Tensor | None = None
    rotary: Rotary | None = None
    frequencies: Frequencies | None = None
    fixed_positions: str = ""
    trained_length: int | None = None
    on_meta: bool = False
    elsewhere: bool = False
    split: Split | None = None
    reason: str = ""


@dataclass
class Probed:
    """What the attention of a model is like.

    Attributes:
        blocks: its blocks, in the order of the model; those that cannot be retrofitted say why.
        masks: the masks that it made.
        around: models around the decoder, if that had to be run alone.
        returns_cache: whether the model returns the cache that it filled.
        goes_on: whether its convolutions and recurrences go on from a cache with several tokens at once.
        recurs: whether it has any.
    """

    blocks: list[AttentionBlock]
    masks: list[MaskCall]
    around: list[nn.Module]
    returns_cache: bool
    goes_on: bool
    recurs: bool

    @property
    def mask_makers(self) -> list[nn.Module]:
        """The modules that make masks for attention blocks, or may make them."""
        return list(dict.fromkeys(u for u in (*self.around, *(made.maker for made in self.masks)) if u is not None))

    def renamed(self, chosen: list[AttentionBlock]) -> Callable[[Any], bool]:
        """Whether a config names the attention function of the chosen blocks, or of the masks."""
        configs = [config for block in chosen for config in configs_of(block.module).values()]
        configs = [original(config) for config in (*configs, *(made.config for made in self.masks))]
        return lambda config: any(config is u for u in configs)

    def owned(self, chosen: list[AttentionBlock]) -> str:
        """Whose masks are ours: ``full``, ``local`` (sliding windows), ``full+local`` or ``none``.

        Those that only the chosen blocks received; and if all blocks are chosen, those that the model does not make
        itself: ``generate`` may make them for it.
        """
        owners = [block.module for block in chosen]
        owned = []
        for name, kinds in {"full": ["full"], "local": ["sliding", "chunked"]}.items():
            made = [mask for mask in self.masks if mask.kind in kinds]
            receivers = [module for mask in made for module in mask.receivers]
            alone = all(any(u is owner for owner in owners) for u in receivers)
            if alone and (receivers or (not made and len(chosen) == len(self.blocks))):
                owned.append(name)
        return "+".join(owned) or "none"


def probe_model(model: Any) -> Probed:
    """Run three tokens through the model and describe every block that calls the attention interface."""
    config = model.config.get_text_config(decoder=True)
    near, entry = _first_trial(model)
    moves = "position_ids" in inspect.signature(entry.forward).parameters
    far = Trial(model, _SHIFT, entry).calls if moves else []
    frequencies, layers, cache = _frequencies(model), _cache_layers(config), cache_of_two_tokens(model, entry)
    changed = {} if cache is None else what_others_change(model, entry, near, cache, moves)
    blocks = []
    for name, module in model.named_modules():
        calls = [call for call in near.calls if call.module is module]
        if calls:
            shifted = [call for call in far if call.module is module]
            block = AttentionBlock(name, module, getattr(module, "layer_idx", None) or 0)
            layer = layers[block.layer_idx] if block.layer_idx < len(layers) else None
            _describe(block, config, calls, near, layer)
            block.reason = block.reason or changed.get(module, "")
            block.trained_length = getattr(config, "max_position_embeddings", None)
            if not block.reason:
                near_q, far_q = calls[0].q, shifted[0].q if shifted else None
                found = find_rotary(near_q, far_q, _SHIFT, block.trained_length, frequencies)
                block.on_meta, (block.rotary, block.frequencies, block.fixed_positions) = near_q.is_meta, found
            blocks.append(block)
    its_call = {call.module: call for call in near.calls}
    _find_sources(blocks, {module: call.k for module, call in its_call.items()})
    group = group_of(model)
    if group is not None:
        for block, split in zip(blocks, find_splits(group, [its_call[b.module] for b in blocks]), strict=True):
            block.split = split if isinstance(split, Split) else None
            block.reason = block.reason or (split if isinstance(split, str) else "")
    repeated = [index for index, n in Counter(b.layer_idx for b in blocks if not b.elsewhere).items() if n > 1]
    for block in blocks:
        if block.layer_idx in repeated and not block.reason:
            block.reason = f"several blocks share the cache index {block.layer_idx}"
    around = [u for u in model.modules() if isinstance(u, PreTrainedModel) and any(v is entry for v in u.modules())]
    continues = cache is None or goes_on(model, entry, near, moves)
    recurs = bool(recurring([*layers, *getattr(cache, "layers", ())]))
    return Probed(blocks, near.masks, [u for u in around if u is not entry], cache is not None, continues, recurs)


def _first_trial(model: Any) -> tuple[Trial, Any]:
    """Three tokens of text through the model or, where it cannot read text alone, a decoder in it; and what read them.

    Raises:
        ValueError: if nothing can read them.
    """
    text = original(model.config.get_text_config(decoder=True))
    inner = [u for u in model.modules() if isinstance(u, PreTrainedModel) and original(u.config) is text]
    first: Exception | None = None
    for entry in dict.fromkeys([model, *inner]):
        try:
            return Trial(model, entry=entry), entry
        except Exception as error:
            first = error if first is None else first
    why = why_unsplit(model) or "retrofit its decoder, model.get_decoder(), or see whether the base model runs"
    raise ValueError(
        f"{type(model).__name__} could not read three tokens of text ({type(first).__name__}: {first}), so its "
        f"attention is unknown: {why}."
    ) from first


def _cache_layers(config: Any) -> list[Any]:
    """The layers of a cache for this config; none where transformers cannot make one."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception:
        return []


def _find_sources(blocks: list[AttentionBlock], keys: dict[nn.Module, Tensor]) -> None:
    """Which blocks attend to the keys of another one."""
    for i, block in enumerate(blocks):
        shared = (other for other in blocks[:i] if keys[other.module] is keys[block.module])
        block.shares_with = next((other.layer_idx for other in shared), None)


def _describe(block: AttentionBlock, config: Any, calls: list[AttentionCall], trial: Trial, layer: Any) -> None:
    call, x = calls[0], trial.hidden.get(block.module)
    made = next((made for made in trial.masks if made.is_given(call.mask)), None)
    types = getattr(config, "layer_types", None)
    its_type = types[block.layer_idx] if types is not None and block.layer_idx < len(types) else None
    window = call.kwargs.get("sliding_window") or getattr(block.module, "sliding_window", None)
    if made is not None and not (made.kind == "full" and window is not None and its_type == "sliding_attention"):
        block.kind, window = made.kind, made.size
    elif its_type is not None:
        block.kind = its_type.removesuffix("_attention")
    elif window is not None:
        block.kind = "sliding"
    block.native_window = window if block.kind == "sliding" else None
    causal = call.mask is not None or getattr(block.module, "is_causal", call.kwargs.get("is_causal")) is not False
    block.elsewhere = not causal or call.q.shape[2] != call.k.shape[2]
    if len(calls) > 1:
        block.reason = f"calls the attention function {len(calls)} times in one forward, expected once"
    elif getattr(block.module, "layer_idx", None) is None:
        block.reason = "has no layer_idx, so its cache is unknown"
    elif layer is not None and type(layer) not in _CACHES:
        block.reason = (
            f"is a {its_type!r} layer, whose cache ({type(layer).__name__}) holds more than keys and values, or not "
            "in their order: expected full or sliding attention"
        )
    elif call.q.shape[2] != call.k.shape[2]:
        block.reason = f"attends to {call.k.shape[2]} keys when it reads {call.q.shape[2]} tokens: expected one a token"
    elif call.mask is not None and made is None:
        block.reason = "changes the mask that transformers makes for it, and a memory could not honour that"
    elif block.kind not in ("full", "sliding"):
        block.reason = f"attends by {block.kind}, expected full or sliding attention"
    elif x is None:
        block.reason = "takes no hidden_states"
    elif not any(name in inspect.signature(type(block.module).forward).parameters for name in CACHE_NAMES):
        block.reason = "takes no cache, so it may keep earlier tokens in a place of its own"
    elif not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(block.module).forward).parameters.values()):
        block.reason = "passes no keyword arguments on to the attention function"
    elif call.q.shape[1] % call.k.shape[1]:
        block.reason = f"{call.q.shape[1]} query heads are no multiple of {call.k.shape[1]} key/value heads"
    elif isinstance(call.scaling, Tensor):
        block.reason = "scales its scores by a tensor, expected a number"
    elif not configs_of(block.module):
        block.reason = "holds no config of its own, so its attention function cannot be changed alone"
    else:
        try:
            refuse_unsupported(call.dropout, call.kwargs)
        except ValueError as error:
            block.reason = str(error)
        else:
            block.reason = how_it_differs(call, block.native_window)
    if x is not None:
        block.sizes = {
            "hidden_size": x.shape[-1],
            "num_heads": call.q.shape[1],
            "num_kv_heads": call.k.shape[1],
            "head_dim": call.q.shape[-1],
            "value_dim": call.v.shape[-1],
        }
    block.like = call.q.new_empty(0)


def _frequencies(model: nn.Module) -> list[Frequencies]:
    """Every vector of rotary frequencies in the model, with the kind of rotary embedding that it serves."""
    found: list[Frequencies] = []
    for module in model.modules():
        for name, u in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and u.ndim == 1:
                kind = getattr(module, "rope_type", "default")
                if isinstance(kind, dict):
                    kind = kind.get(name.removesuffix("_inv_freq"), "default")
                if not any(torch.equal(u, other.values) and kind == other.kind for other in found if not u.is_meta):
                    found.append(Frequencies(module, name, kind))
    return found
