"""The steps of a retrofit: check the model, choose its layers, make the stores, replace the blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention import HippocampalAttention
from ..compressor import Compressor
from ..eviction import Eviction
from ..memory import MemoryStore
from ..positions import MemoryPositions
from ..record import Retrofitted
from ..split import check_splits
from ..window import Window
from .batching import METHODS, refuse_batching
from .cache_name import accept_cache, refuse_cache
from .call import ForwardHook, remove_hooks
from .config_view import base_name, give_views, take_views, view
from .decoder import DecoderAttention
from .decoding import CompiledCall, CreateMasks, PrepareInputs
from .finished import StoppingCriteria
from .interface import BASES
from .model_method import ModelMethod
from .prefill import Prefill
from .prepare_cache import PrepareCache
from .probe import AttentionBlock, Probed
from .saving import SavePretrained
from .weights import Recorded, are_installed
from .while_decoding import CompileCriteria, WhileDecoding
from .whole_call import WholeCallHook

REPLACED: dict[str, type[ModelMethod]] = {
    "_prepare_cache_for_generation": PrepareCache,
    "_prefill": Prefill,
    "prepare_inputs_for_generation": PrepareInputs,
    "get_compiled_call": CompiledCall,
    "_valid_auto_compile_criteria": CompileCriteria,
    "_optimize_model_for_decode": WhileDecoding,
    "_get_stopping_criteria": StoppingCriteria,
    "save_pretrained": SavePretrained,
}
"""Methods that ``retrofit`` replaces, beside ``create_masks_for_generate``, and what by."""


def check_model(model: Any) -> None:
    """Raise unless the model is a decoder of transformers that we can retrofit and that is not retrofitted yet."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is not a transformers model: pass the model inside a wrapper (PEFT: "
            "model.get_base_model()), or put HippocampalAttention around the blocks of your own architecture."
        )
    name = type(model).__name__
    if any(isinstance(module, HippocampalAttention) for module in model.modules()):
        raise ValueError(f"{name} is retrofitted already: call restore(model) first.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: expected a decoder-only language model.")
    config = model.config.get_text_config(decoder=True)
    base = base_name(config._attn_implementation)  # of a model that was made from a view
    if base not in BASES:
        raise ValueError(
            f"attn_implementation={base!r}: expected one of {BASES}. Load the model with attn_implementation='sdpa'."
        )


def check_blocks(model: Any, blocks: list[AttentionBlock]) -> None:
    """Raise a ValueError if attention was not found where the attention interface is not used."""
    if not blocks and not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use the attention interface of transformers: wrap its blocks in "
            "HippocampalAttention, or use a version of transformers in which it does."
        )


def choose(
    blocks: list[AttentionBlock], window_of: Callable[[int], Window], layers: list[int] | None
) -> tuple[list[AttentionBlock], dict[str, str]]:
    """The blocks to retrofit, and why each of the others is left alone.

    Raises:
        ValueError: if there are none, or a layer that was asked for is unsuitable.
    """
    reasons = {block.name: block.reason for block in blocks if block.reason}
    suitable = [block for block in blocks if not block.reason]
    if layers is None:
        full = [block for block in suitable if block.kind == "full"]
        if full:
            _check_sharing(blocks, full)
            reasons |= {b.name: "has a sliding window of its own" for b in suitable if b.kind == "sliding"}
            return full, reasons
    else:
        known = {block.layer_idx: block for block in blocks}
        for index in layers:
            if index not in known:
                raise ValueError(f"layers: no attention layer {index}, the model has {sorted(known)}.")
            if known[index].reason:
                raise ValueError(f"layers: layer {index} ({known[index].name}) {known[index].reason}.")
        reasons |= {b.name: "not among the layers asked for" for b in suitable if b.layer_idx not in layers}
        suitable = [block for block in suitable if block.layer_idx in layers]
    for block in suitable:
        capacity = window_of(block.layer_idx).capacity
        if block.native_window is not None and block.native_window < capacity:
            reasons[block.name] = (
                f"its own sliding window of {block.native_window} is smaller than num_sinks + window_size = {capacity}"
            )
    chosen = [block for block in suitable if block.name not in reasons]
    _check_sharing(blocks, chosen)
    wanted_but_small = [block for block in suitable if block.name in reasons] if layers is not None else []
    if not chosen or wanted_but_small:
        listing = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        listing = listing or (
            " no module calls the attention interface of transformers: the model has no attention, or one of its own."
        )
        raise ValueError(f"no suitable attention layer to retrofit; candidates:{listing}")
    return chosen, reasons


def _check_sharing(blocks: list[AttentionBlock], chosen: list[AttentionBlock]) -> None:
    """Raise a ValueError if layers that share keys and values are not all chosen, or all left alone."""
    taken = {block.layer_idx for block in chosen}
    for block in blocks:
        source = block.shares_with
        if source is not None and (source in taken) != (block.layer_idx in taken):
            reason = f": {block.name} {block.reason}" if block.reason else ""
            raise ValueError(
                f"layers {source} and {block.layer_idx} share keys and values, so both need a memory, or none"
                f"{reason}. Choose them with layers=[...]."
            )


def make_store(
    block: AttentionBlock,
    window: Window,
    compressor: type[Compressor] | None,
    eviction: Eviction | None,
    memory_positions: MemoryPositions,
    options: dict[str, Any],
) -> MemoryStore:
    """The store for one block, on the device and in the dtype of its queries.

    Raises:
        ValueError: if its rotation is to be undone and is not known.
    """
    if memory_positions == "none" and block.fixed_positions:
        raise ValueError(
            f"memory_positions='none': {block.name} cannot have its rotation undone, since {block.fixed_positions}. "
            "Leave these layers out with layers=[...], or use memory_positions='absolute'."
        )
    if memory_positions == "none" and block.rotary is None:
        memory_positions = "absolute"  # this layer rotates nothing
    like = block.like
    assert like is not None

    def make_policy(**sizes: int) -> nn.Module:
        with torch.device(like.device):
            return eviction.for_layer(**sizes).to(like.device, like.dtype)  # type: ignore[union-attr]

    def make_memory(**sizes: int) -> nn.Module:
        with torch.device(like.device):
            return compressor(**sizes, **options).to(like.dtype)  # type: ignore[misc,arg-type]

    makers = {"eviction": make_policy} if eviction is not None else {}
    makers |= {"compressor": make_memory} if compressor is not None else {}
    split = block.split
    if split is None:
        parts: dict[str, Any] = {name: make(**block.sizes) for name, make in makers.items()}
    else:
        check_splits(compressor, options, eviction, block.sizes, split.shares)
        parts, split = split.make(makers, block.sizes)
    store = MemoryStore(window, rotary=block.rotary, memory_positions=memory_positions, **parts)
    store.split = split
    return store


def replace_blocks(
    model: Any, found: Probed, chosen: list[AttentionBlock], stores: list[MemoryStore], record: Retrofitted
) -> None:
    """Put [`DecoderAttention`][] around the chosen blocks, and give this model what it needs to run them."""
    renamed = found.renamed(chosen)
    give_views([*(block.module for block in chosen), *found.mask_makers], record, renamed)
    for module in found.mask_makers:
        ForwardHook(record).register(module)
    if model not in found.mask_makers:
        WholeCallHook().register(model)
    for block, store in zip(chosen, stores, strict=True):
        parent_name, _, name = block.name.rpartition(".")
        recorded = Recorded(model, block.name, block.module)
        setattr(model.get_submodule(parent_name), name, DecoderAttention(block, store, record, recorded))
    model.hippocampus = record
    for name, method in REPLACED.items():
        setattr(model, name, method(model))
    model.create_masks_for_generate = CreateMasks(model, view(model.config, record, renamed))
    accept_cache(model)
    refuse_batching(model)


def take_back(model: Any, record: Retrofitted) -> None:
    """Undo what `replace_blocks` did, except that the blocks still have to be unwrapped."""
    complete_hooks(model)
    take_views(model.modules(), record)
    remove_hooks(model)
    refuse_cache(model)
    refusing = [method for method in METHODS if method in vars(model)]
    for name in ("hippocampus", "create_masks_for_generate", *REPLACED, *refusing):
        delattr(model, name)


def complete_hooks(model: nn.Module) -> None:
    """Give the blocks the hooks that transformers has installed on all other modules since the retrofit."""
    for owner in model.modules():
        for block in owner.modules() if are_installed(owner) else ():
            if isinstance(block, DecoderAttention):
                block.recorded.install(block.block)
