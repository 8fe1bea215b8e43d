"""How ``generate`` decodes: the call of one token, its inputs and its masks."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from . import speedups
from .call import running
from .config_view import original
from .decoder import CACHE, DecoderAttention
from .devices import only_device
from .finished import finished_rows
from .model_method import ModelMethod
from .prefill import is_plain_text
from .reconcile import length_of, note_padding, reconcile


class CompiledCall(ModelMethod):
    """Stands in for ``model.get_compiled_call``: on a CUDA GPU a decoding step is one CUDA graph (see ``speedups``).

    With a ``compile_config``, and on any other device, transformers decides what is compiled. A model on several
    devices runs as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.recorder = speedups.recorder(model)

    def serves(self, compile_config: Any) -> bool:
        """Whether steps are recorded: on one CUDA GPU, unless the caller says how to compile."""
        device = only_device(self.model)
        there = self.recorder is not None and device is not None and device.type == "cuda"
        return there and compile_config is None

    def known_inputs(self, cache: Any) -> dict[str, Any] | None:
        """What the step that is decoding on this cache is called with from now on, None if that is not known."""
        return None if self.recorder is None else self.recorder.known_inputs(cache)

    def forget(self, cache: Any) -> None:
        """Another ``generate`` begins on this cache: what an earlier one knew does not hold any longer."""
        if self.recorder is not None:
            self.recorder.forget(cache)

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        """The call of one token; each ``generate`` makes a new one."""
        model: Any = self.model
        usual = partial(type(model).get_compiled_call, model, compile_config)
        if not all(block.owns_mask for block in model.modules() if isinstance(block, DecoderAttention)):
            return model.__call__  # type: ignore[no-any-return]  # compiled code cannot read another layer's mask
        if self.recorder is not None and self.serves(compile_config):
            return self.recorder.step(usual)
        as_it_is = compile_config is None and only_device(model) is None
        call: Callable[..., Any] = model.__call__ if as_it_is else usual()
        return call


class CreateMasks(ModelMethod):
    """Stands in for ``model.create_masks_for_generate``: a static cache gets its masks before the model is called."""

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

    Only the ids and positions of the next token change; to prepare all inputs again takes the host as long as several
    layers take the GPU.
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
            call: Any = self.model.get_compiled_call
            known = call.known_inputs(cache)
            known = known if known is not None and is_plain_text(kwargs) else None
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
