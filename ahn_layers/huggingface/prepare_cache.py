"""How ``generate`` gets its cache."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMode

from .cache import HippocampalCache, fill
from .cache_layers import MemoryLayer
from .decoder import CACHE, DecoderAttention
from .finished import note_beams, watch
from .fixed import can_be_fixed, release
from .joined import refuse_unmasked
from .model_method import ModelMethod
from .native_layer import reads_in_pieces
from .prefill import are_off, is_plain_text, piece_for
from .reconcile import length_of
from .row_groups import PER_TOKEN
from .transaction import settle_for_use
from .while_decoding import ask

WORTH_RECORDING = 32
"""New tokens for which a step is compiled and recorded unasked."""


class PrepareCache(ModelMethod):
    """Stands in for ``model._prepare_cache_for_generation``: the cache of ``generate`` gets our layers from the start.

    A prompt that may outgrow the window is read in chunks of ``PREFILL_CHUNK`` tokens, which rows share, so that not
    only the cache but the activations too stay bounded.
    """

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make the cache as the model would, then put our layers in."""
        model: Any = self.model
        prepare = partial(type(model)._prepare_cache_for_generation, model)
        mode = generation_mode  # some models pass it by its name
        args = (mode, batch_size, *args)
        blocks = [module for module in model.modules() if isinstance(module, DecoderAttention)]
        if are_off(blocks):
            return prepare(generation_config, model_kwargs, *args, **kwargs)
        kept = model_kwargs.get(CACHE)
        settle_for_use(kept)
        if kept is not None and generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False and a cache: each step would read the whole text into it once more. Pass one of them."
            )
        if kept is not None:
            note_beams(kept, mode)
        if mode == GenerationMode.ASSISTED_GENERATION:
            _refuse_past(kept)
        chunk, asked = generation_config.prefill_chunk_size, generation_config.cache_implementation
        generation_config.prefill_chunk_size = None  # else a static cache of full length is allocated at once
        gains = _gains_from_fixed_addresses(model, blocks, generation_config, model_kwargs, mode)
        if isinstance(kept, HippocampalCache):
            release(kept)  # if an earlier call could not
            model.get_compiled_call.forget(kept)
            generation_config.cache_implementation = None if asked == "dynamic" else asked  # which it is
        elif gains and kept is None and not generation_config.return_dict_in_generate:
            generation_config.cache_implementation = "static"
        try:
            result = prepare(generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.prefill_chunk_size, generation_config.cache_implementation = chunk, asked
        cache = model_kwargs.get(CACHE)
        if cache is None:
            return result
        if isinstance(cache, HippocampalCache):
            fill(cache, model.config.get_text_config(decoder=True))
            refuse_unmasked(cache, model_kwargs.get("attention_mask"))
        for block in blocks:
            if cache.layer_class_to_replicate is not None or block.layer_idx < len(cache.layers):
                block.cache_layer(cache)  # an early exit uses fewer layers
        if not getattr(cache, "_is_user_defined", False):
            model_kwargs[CACHE] = cache = HippocampalCache.of(cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        watch(generation_config, cache, mode, batch_size * copies)
        keeps_all = generation_config.output_hidden_states or generation_config.output_attentions
        if gains and not keeps_all and isinstance(cache, HippocampalCache) and can_be_fixed(cache):
            ask(generation_config)
        record = model.hippocampus
        cuts = record.returns_cache and record.goes_on and is_plain_text(model_kwargs)
        cuts = cuts and all(isinstance(u, MemoryLayer) or reads_in_pieces(u) for u in getattr(cache, "layers", ()))
        if chunk is None and cuts and not keeps_all:  # pieces would return the last one's
            generation_config.prefill_chunk_size = piece_for(model, batch_size * copies)
        return result


def _refuse_past(cache: Any) -> None:
    """Raise a ValueError for a cache with tokens: the first step of assisted decoding reads the whole text."""
    past = length_of(cache)
    if past:
        raise ValueError(
            f"assisted decoding (assistant_model, prompt_lookup_num_tokens) on a cache that holds {past} tokens: "
            "transformers would read them a second time. Pass an empty cache, or leave assisted decoding off in the "
            "turns that follow."
        )


def _gains_from_fixed_addresses(
    model: Any, blocks: list[DecoderAttention], options: Any, model_kwargs: dict[str, Any], mode: Any
) -> bool:
    """Whether the cache gets fixed addresses unasked: on a GPU, where a step then is one CUDA graph.

    A bounded cache has its size from the start, so nothing is lost by it but taking tokens back. A cache that nobody
    sees is a static one; one that outlives ``generate`` has fixed addresses while it decodes. Neither where tokens are
    taken back, nor where the caller says how to compile, or that nothing be compiled.
    """
    prompt = next((u.shape[-1] for u in map(model_kwargs.get, PER_TOKEN) if isinstance(u, Tensor)), 0)
    new = options.max_new_tokens or (options.max_length or 0) - prompt
    return (
        options.cache_implementation is None
        and options.use_cache is not False
        and not (options.disable_compile or options.is_assistant)
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and new >= WORTH_RECORDING
        and model.get_compiled_call.serves(options.compile_config)
        and len(blocks) == model.config.get_text_config(decoder=True).num_hidden_layers
        and getattr(getattr(model, "hf_quantizer", None), "is_compileable", True)
    )
