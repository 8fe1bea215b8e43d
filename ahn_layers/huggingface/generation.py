"""How ``generate`` gets its cache, and how it reads the prompt."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from .cache import HippocampalCache, fill
from .call import running
from .compiled.reading import Reader
from .compiled.region import compiled_region, decoding_backend, only_device
from .compiled.step_graph import Step, can_record
from .config_view import original
from .decoder import CACHE, DecoderAttention
from .finished import finished_rows, watch
from .joined import refuse_unmasked
from .model_method import ModelMethod
from .reconcile import length_of, note_padding, reconcile
from .rotations import longest_fixed_rotation
from .transaction import settle_for_use

PREFILL_CHUNK = 4096
"""Tokens that ``generate`` reads at a time, of all rows together, unless the caller asks for another size."""
GPU_PREFILL_CHUNK = 8192
"""The same on a GPU, which wants more work in each launch."""
SHORTEST_CHUNK = 256
"""Tokens of each row that are read at a time at least, however many rows there are."""

WORTH_RECORDING = 32
"""New tokens for which a step is compiled and recorded unasked."""

PER_TOKEN = ("attention_mask", "position_ids")
"""Arguments of ``generate`` with a column for each token of the prompt."""

REPLACED = (
    "_prepare_cache_for_generation",
    "_prefill",
    "prepare_inputs_for_generation",
    "get_compiled_call",
    "create_masks_for_generate",
    "_get_stopping_criteria",
    "save_pretrained",
)
"""Methods that ``retrofit`` replaces."""


class ChosenSize(int):
    """A size of pieces that the caller has not asked for."""


class PrepareCache(ModelMethod):
    """Stands in for ``model._prepare_cache_for_generation``: the cache of ``generate`` gets our layers from the start.

    A prompt that may outgrow the window is read in chunks of ``PREFILL_CHUNK`` tokens, which rows share, so that not
    only the cache but the activations too stay bounded.

    Args:
        model: the retrofitted model.
    """

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make the cache as the model would, then put our layers in."""
        model: Any = self.model
        prepare = partial(type(model)._prepare_cache_for_generation, model)
        args = (mode, batch_size, *args)
        blocks = [module for module in model.modules() if isinstance(module, DecoderAttention)]
        if _are_off(blocks):
            return prepare(generation_config, model_kwargs, *args, **kwargs)
        settle_for_use(model_kwargs.get(CACHE))
        chunk, asked = generation_config.prefill_chunk_size, generation_config.cache_implementation
        generation_config.prefill_chunk_size = None  # else a static cache of full length is allocated at once
        if _gains_from_fixed_addresses(model, blocks, generation_config, model_kwargs, mode):
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
        cuts = model.hippocampus.returns_cache and _is_plain_text(model_kwargs)
        if chunk is None and cuts and not keeps_all:  # pieces would return the last one's
            size = GPU_PREFILL_CHUNK if model.device.type == "cuda" else PREFILL_CHUNK
            share = max(SHORTEST_CHUNK, size // (batch_size * copies))
            generation_config.prefill_chunk_size = ChosenSize(min(size, share))
        return result


class Prefill(ModelMethod):
    """Stands in for ``model._prefill``: the prompt is read without compiling the model, whatever the cache.

    Chunks have many lengths, decoding has one. On a cache that holds tokens already, the new ones are cut here:
    transformers 5.17 would begin again with the first.

    A prompt that outgrows the window is read by a ``Reader``, unless the caller asked for a size of pieces.

    Rotations that depend on the length of the text (longrope, dynamic NTK) need the whole prompt at once.

    Args:
        model: the retrofitted model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.reader = Reader(model)

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read the prompt as the model would.

        Raises:
            ValueError: if there is nothing to read, or pieces would change the result.
        """
        model: Any = self.model
        before, size = generation_config.disable_compile, generation_config.prefill_chunk_size
        reads = model
        if not _are_off([module for module in model.modules() if isinstance(module, DecoderAttention)]):
            size = generation_config.prefill_chunk_size = _size_of_pieces(
                model, input_ids, generation_config, model_kwargs
            )
            if isinstance(size, ChosenSize):
                reads = self.reader.reading_model(input_ids.shape[1], size, model_kwargs, generation_config)
            generation_config.disable_compile = True
        read = partial(type(model)._prefill, reads)
        try:
            for end in self._ends(input_ids, generation_config, model_kwargs):
                upto = {name: u[..., :end] for name, u in model_kwargs.items() if name in PER_TOKEN and u is not None}
                read(input_ids[:, :end], generation_config, model_kwargs | upto, *args, **kwargs)
            return read(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.disable_compile, generation_config.prefill_chunk_size = before, size

    def _ends(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> range:
        """Up to where to read before the rest is read in one go; nothing to do for an empty cache."""
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        size, past = generation_config.prefill_chunk_size, 0 if cache is None else int(cache.get_seq_length())
        if size is None or past == 0 or mask is None:
            return range(0)
        generation_config.prefill_chunk_size = None
        whole = mask.shape[1] == input_ids.shape[1]  # else the ids are the new ones only
        return range(past + size, input_ids.shape[1], size) if whole else range(0)


def _size_of_pieces(
    model: nn.Module, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> int | None:
    """Tokens of the prompt to read at a time, None for all at once.

    Raises:
        ValueError: if there is nothing to read, or the size asked for would change how the prompt is rotated.
    """
    cache, mask, size = (
        model_kwargs.get(CACHE),
        model_kwargs.get("attention_mask"),
        generation_config.prefill_chunk_size,
    )
    past = 0 if cache is None else int(cache.get_seq_length())
    columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    new = input_ids.shape[1] - past if columns == input_ids.shape[1] else input_ids.shape[1]
    if model_kwargs.get("inputs_embeds") is not None:
        return size  # type: ignore[no-any-return]
    if past and new <= 0:
        raise ValueError(
            f"the cache holds {past} tokens and the prompt has {input_ids.shape[1]}: there is nothing new to read. "
            "Pass the whole text with at least one token that is not in the cache, or take the last one back with "
            "cache.crop(-1)."
        )
    fixed = longest_fixed_rotation(model)
    if size is None or fixed is None or past + new <= fixed or size >= new:
        return size  # type: ignore[no-any-return]
    if isinstance(size, ChosenSize):
        return None
    raise ValueError(
        f"prefill_chunk_size={size}: this model rotates texts of more than {fixed} tokens in another way, so a prompt "
        f"of {past + new} tokens has to be read at once. Leave prefill_chunk_size unset."
    )


class CompiledCall(ModelMethod):
    """Stands in for ``model.get_compiled_call``: on a CUDA GPU a decoding step is one CUDA graph.

    Whoever passes a ``compile_config``, and every other device, gets what transformers makes of it; a model on several
    devices runs as it is.

    Args:
        model: the retrofitted model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._region: Callable[..., Any] | None = None
        self._steps: WeakKeyDictionary[Any, ReferenceType[Step]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__(**state)  # type: ignore[misc]

    def serves(self, compile_config: Any) -> bool:
        """Whether steps are recorded: on one CUDA GPU, unless the caller says how to compile."""
        device = only_device(self.model)
        return compile_config is None and device is not None and device.type == "cuda"

    def step_on(self, cache: Any) -> Step | None:
        """The step of the ``generate`` that is decoding on this cache, if there is one."""
        step = None if cache is None else self._steps.get(cache)
        return None if step is None else step()

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        """What ``generate`` calls for every token, made anew for each ``generate``."""
        model: Any = self.model
        usual = partial(type(model).get_compiled_call, model, compile_config)
        if not all(block.owns_mask for block in model.modules() if isinstance(block, DecoderAttention)):
            return model.__call__  # type: ignore[no-any-return]  # compiled code cannot read another layer's mask
        if not self.serves(compile_config):
            as_it_is = compile_config is None and only_device(model) is None
            call: Callable[..., Any] = model.__call__ if as_it_is else usual()
            return call
        if self._region is None:
            self._region = compiled_region(dynamic=False, backend=decoding_backend)
        step = Step(model, self._region)

        def run(**inputs: Any) -> Any:
            cache = inputs.get(CACHE)
            if not can_record(cache):
                return usual()(**inputs)
            self._steps[cache] = ref(step)  # which lives as long as this function: until generate returns
            return step(**inputs)

        return run


class CreateMasks(ModelMethod):
    """Stands in for ``model.create_masks_for_generate``: masks for a static cache are made before the model is called.

    Args:
        model: the retrofitted model.
        config: a view of its config, whose text config names our functions.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model)
        self.config = config

    def __call__(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The masks that the model would make, from the view of its config."""
        model: Any = self.model
        own = inspect.getattr_static(type(model), "create_masks_for_generate", None)
        make = create_masks_for_generate if own is None else own.__get__(model, type(model))
        with running(model.hippocampus):
            return make(self.config if original(config) is original(self.config) else config, *args, **kwargs)


class PrepareInputs(ModelMethod):
    """Stands in for ``model.prepare_inputs_for_generation``: once a step is recorded, its inputs are known.

    All but the ids and positions of the next token are what they were; to find that out anew takes the host as long as
    the GPU takes for several layers.

    Args:
        model: the retrofitted model.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own method: ``generate`` looks at it."""
        return inspect.signature(self._usual())

    def _usual(self) -> partial[Any]:
        model: Any = self.model
        return partial(type(model).prepare_inputs_for_generation, model)

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Inputs of the next step."""
        known, usual, cache = None, self._usual(), kwargs.get(CACHE)
        rows = finished_rows(cache)
        if rows is not None:
            columns = length_of(cache) + (kwargs.get("next_sequence_length") or 1)
            mask = rows.mask(kwargs.get("attention_mask"), input_ids.shape[1], columns)
            kwargs["attention_mask"] = mask
        steps = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        if isinstance(cache, Cache) and cache.is_compileable and (rows is not None or not steps):
            _reconcile_early(cache, input_ids, kwargs)
        if (
            rows is None
            and usual.func is GenerationMixin.prepare_inputs_for_generation
            and kwargs.get("next_sequence_length") == 1
        ):
            step = self.model.get_compiled_call.step_on(kwargs.get(CACHE))  # type: ignore[union-attr, operator]
            known = None if step is None or not _is_plain_text(kwargs) else step.known_inputs
        positions = kwargs.get("position_ids")
        if known is None or ("position_ids" in known) != (positions is not None):
            return usual(input_ids, *args, **kwargs)
        inputs = known | {"input_ids": input_ids[:, -1:], CACHE: kwargs[CACHE]}
        if positions is not None:
            inputs["position_ids"] = positions[..., -1:]
        return inputs


def _reconcile_early(cache: Cache, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
    """For a static cache ``generate`` makes the mask before the call: compare the padding while it can be seen."""
    mask, count = kwargs.get("attention_mask"), kwargs.get("next_sequence_length")
    if mask is None or mask.ndim != 2:
        return
    count = min(input_ids.shape[1], mask.shape[1]) if count is None else count
    note_padding(cache, reconcile(cache, mask, len(mask), count), count, taken_in=False)


def _gains_from_fixed_addresses(
    model: Any, blocks: list[DecoderAttention], options: Any, model_kwargs: dict[str, Any], mode: Any
) -> bool:
    """Whether the cache is made a static one unasked: on a GPU, where a step then is one CUDA graph.

    A bounded cache has its size from the start, so nothing is lost by it but taking tokens back; so not where that is
    needed, nor where the caller gets the cache, or says how to compile, or that nothing be compiled.
    """
    prompt = next((u.shape[-1] for u in map(model_kwargs.get, PER_TOKEN) if isinstance(u, Tensor)), 0)
    new = options.max_new_tokens or (options.max_length or 0) - prompt
    return (
        model_kwargs.get(CACHE) is None
        and options.cache_implementation is None
        and options.use_cache is not False
        and not (options.disable_compile or options.return_dict_in_generate or options.is_assistant)
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and new >= WORTH_RECORDING
        and model.get_compiled_call.serves(options.compile_config)
        and len(blocks) == model.config.get_text_config(decoder=True).num_hidden_layers
        and getattr(getattr(model, "hf_quantizer", None), "is_compileable", True)
    )


def _are_off(blocks: list[DecoderAttention]) -> bool:
    """Inside ``full_attention`` everything is as it was before the retrofit."""
    return all(block.mode == "full" for block in blocks)


def _is_plain_text(model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which can be cut anywhere."""
    held = {name: tree_leaves(u) for name, u in model_kwargs.items() if name != CACHE}
    return all(name in PER_TOKEN or not any(isinstance(u, Tensor) for u in leaves) for name, leaves in held.items())
