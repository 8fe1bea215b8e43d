"""How ``generate`` reads the prompt: in pieces, where the result is the same."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin

from . import speedups
from .config_view import base_name, original
from .decoder import CACHE, DecoderAttention
from .first_prompt import compile_for
from .model_method import ModelMethod
from .rotations import longest_fixed_rotation
from .row_groups import PER_TOKEN, read_in_groups, rows_at_a_time
from .while_decoding import note_read

PREFILL_CHUNK = 4096
"""Tokens that ``generate`` reads at a time, of all rows together, unless the caller asks for another size."""
GPU_PREFILL_CHUNK = 8192
"""The same on a GPU, which wants more work in each launch."""
GPU_AT_ONCE = 32_768
"""Tokens on a GPU that are read at once, as the base model reads them, if they stay inside the window."""
SHORTEST_CHUNK = 256
"""Tokens of each row that are read at a time at least, however many rows there are."""


CUTS_BEHIND_A_CACHE = "prefill_ids" in GenerationMixin._prefill.__code__.co_varnames
"""Whether transformers cuts what a cache does not hold yet, and not the whole text again (as 5.17 and 5.20 do)."""


class ChosenSize(int):
    """A size of pieces that the caller has not asked for."""


def piece_for(model: Any, rows: int) -> ChosenSize:
    """Tokens that so many rows read at a time, unless the caller asks for another size."""
    size = GPU_PREFILL_CHUNK if model.device.type == "cuda" else PREFILL_CHUNK
    return ChosenSize(min(size, max(SHORTEST_CHUNK, size // rows)))


class Prefill(ModelMethod):
    """Stands in for ``model._prefill``: the prompt is read without compiling the model, whatever the cache.

    Chunks have many lengths, decoding has one. On a cache that holds tokens already, the new ones are cut here, where
    transformers would begin again with the first.

    On a GPU, unless the caller asked for a size of pieces, a batch is read a few rows at a time (see ``row_groups``), a
    prompt that outgrows the window by compiled layers (see ``speedups``), and one that does not is read at once.

    Rotations that depend on the length of the text (longrope, dynamic NTK) need the whole prompt at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.reader = speedups.reader(model)

    def __call__(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read the prompt as the model would.

        Raises:
            ValueError: if there is nothing to read, or pieces would change the result.
        """
        read = partial(self._read, how=(args, kwargs))
        group = len(input_ids)
        if isinstance(generation_config.prefill_chunk_size, ChosenSize) and self._is_on_gpu():
            group = rows_at_a_time(input_ids, GPU_PREFILL_CHUNK, generation_config, model_kwargs)
        if group < len(input_ids):
            out = read_in_groups(read, group, input_ids, generation_config, model_kwargs)
        else:
            out = read(input_ids, generation_config, model_kwargs)
        note_read(self.model, generation_config, model_kwargs.get(CACHE))
        return out

    def _is_on_gpu(self) -> bool:
        device: torch.device = self.model.device  # type: ignore[assignment]
        return device.type == "cuda"

    def _read(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *, how: tuple[Any, Any]
    ) -> Any:
        """Read rows together, ``how`` being what else ``_prefill`` was given."""
        model: Any = self.model
        args, kwargs = how
        before, asked = generation_config.disable_compile, generation_config.prefill_chunk_size
        columns = _columns(generation_config, model_kwargs)
        reads, size = model, asked
        if not are_off(_blocks(model)):
            reads, size = self._choose(input_ids, generation_config, model_kwargs)
            generation_config.disable_compile, generation_config.prefill_chunk_size = True, size
        read = partial(type(model)._prefill, reads)
        try:
            for end in self._ends(input_ids, generation_config, model_kwargs):
                upto = {name: u[..., :end] for name, u in model_kwargs.items() if name in PER_TOKEN and u is not None}
                generation_config._mask_length = end
                read(input_ids[:, :end], generation_config, model_kwargs | upto, *args, **kwargs)
            generation_config._mask_length = columns
            return read(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.disable_compile, generation_config.prefill_chunk_size = before, asked

    def _choose(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> tuple[nn.Module, int | None]:
        """What reads rows together, and how many of their tokens at a time."""
        rows, length = input_ids.shape
        size = _size_of_pieces(self.model, input_ids, generation_config, model_kwargs)
        if not isinstance(size, ChosenSize):
            return self.model, size
        size, blocks = piece_for(self.model, rows), _blocks(self.model)
        inside = length <= max(block.memory.window.capacity for block in blocks)
        if not inside and self._is_on_gpu() and not generation_config.disable_compile:
            compile_for(self.model, [block.attending for block in blocks], rows, length, size)
        if self.reader is not None:
            reads = self.reader.reading_model(length, size, model_kwargs, generation_config)
            if reads is not self.model:
                return reads, size
        at_once = inside and rows * length <= GPU_AT_ONCE and self._is_on_gpu()
        return self.model, None if at_once and _needs_no_mask(self.model, model_kwargs) else size

    def _ends(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> range:
        """Up to where to read before the rest is read in one go; nothing to do for an empty cache."""
        cache, size = model_kwargs.get(CACHE), generation_config.prefill_chunk_size
        columns, past = _columns(generation_config, model_kwargs), 0 if cache is None else int(cache.get_seq_length())
        cuts = CUTS_BEHIND_A_CACHE and model_kwargs.get("attention_mask") is None
        if size is None or past == 0 or columns < 0 or cuts:
            return range(0)
        generation_config.prefill_chunk_size = None
        whole = columns == input_ids.shape[1]  # else the ids are the new ones only
        return range(past + size, input_ids.shape[1], size) if whole else range(0)


def _columns(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Columns of the mask, which transformers drops and notes where nothing is hidden; -1 if it is not known."""
    mask = model_kwargs.get("attention_mask")
    return int(getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1])


def _size_of_pieces(
    model: nn.Module, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> int | None:
    """Tokens of the prompt to read at a time, None for all at once.

    Raises:
        ValueError: if there is nothing to read, or the size asked for would change how the prompt is rotated.
    """
    cache, size = model_kwargs.get(CACHE), generation_config.prefill_chunk_size
    past = 0 if cache is None else int(cache.get_seq_length())
    columns = _columns(generation_config, model_kwargs)
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


def _blocks(model: nn.Module) -> list[DecoderAttention]:
    return [module for module in model.modules() if isinstance(module, DecoderAttention)]


def _needs_no_mask(model: nn.Module, model_kwargs: dict[str, Any]) -> bool:
    """Whether PyTorch's attention reads a prompt at once without a mask of its size: of an empty cache, no padding."""
    cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
    config: Any = model.config
    return (
        base_name(original(config.get_text_config(decoder=True))._attn_implementation) == "sdpa"
        and (cache is None or int(cache.get_seq_length()) == 0)
        and (mask is None or bool(mask.all()))
    )


def are_off(blocks: list[DecoderAttention]) -> bool:
    """Inside ``full_attention`` everything is as it was before the retrofit."""
    return all(block.mode == "full" for block in blocks)


def is_plain_text(model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which can be cut anywhere."""
    held = {name: tree_leaves(u) for name, u in model_kwargs.items() if name != CACHE}
    return all(name in PER_TOKEN or not any(isinstance(u, Tensor) for u in leaves) for name, leaves in held.items())
