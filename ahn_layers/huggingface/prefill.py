"""How ``generate`` reads the prompt: in pieces, where the result is the same."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import speedups
from .decoder import CACHE, DecoderAttention
from .model_method import ModelMethod
from .rotations import longest_fixed_rotation
from .while_decoding import note_read

PREFILL_CHUNK = 4096
"""Tokens that ``generate`` reads at a time, of all rows together, unless the caller asks for another size."""
GPU_PREFILL_CHUNK = 8192
"""The same on a GPU, which wants more work in each launch."""
SHORTEST_CHUNK = 256
"""Tokens of each row that are read at a time at least, however many rows there are."""

PER_TOKEN = ("attention_mask", "position_ids")
"""Arguments of ``generate`` with a column for each token of the prompt."""


class ChosenSize(int):
    """A size of pieces that the caller has not asked for."""


def piece_for(model: Any, rows: int) -> ChosenSize:
    """Tokens that so many rows read at a time, unless the caller asks for another size."""
    size = GPU_PREFILL_CHUNK if model.device.type == "cuda" else PREFILL_CHUNK
    return ChosenSize(min(size, max(SHORTEST_CHUNK, size // rows)))


class Prefill(ModelMethod):
    """Stands in for ``model._prefill``: the prompt is read without compiling the model, whatever the cache.

    Chunks have many lengths, decoding has one. On a cache that holds tokens already, the new ones are cut here:
    transformers 5.17 would begin again with the first.

    On a GPU a prompt that outgrows the window is read by compiled layers (see ``speedups``), unless the caller asked
    for a size of pieces.

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
        model: Any = self.model
        before, size = generation_config.disable_compile, generation_config.prefill_chunk_size
        reads = model
        if not are_off([module for module in model.modules() if isinstance(module, DecoderAttention)]):
            size = generation_config.prefill_chunk_size = _size_of_pieces(
                model, input_ids, generation_config, model_kwargs
            )
            if isinstance(size, ChosenSize) and self.reader is not None:
                reads = self.reader.reading_model(input_ids.shape[1], size, model_kwargs, generation_config)
            generation_config.disable_compile = True
        read = partial(type(model)._prefill, reads)
        try:
            for end in self._ends(input_ids, generation_config, model_kwargs):
                upto = {name: u[..., :end] for name, u in model_kwargs.items() if name in PER_TOKEN and u is not None}
                read(input_ids[:, :end], generation_config, model_kwargs | upto, *args, **kwargs)
            out = read(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.disable_compile, generation_config.prefill_chunk_size = before, size
        note_read(model, generation_config, model_kwargs.get(CACHE))
        return out

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


def are_off(blocks: list[DecoderAttention]) -> bool:
    """Inside ``full_attention`` everything is as it was before the retrofit."""
    return all(block.mode == "full" for block in blocks)


def is_plain_text(model_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which can be cut anywhere."""
    held = {name: tree_leaves(u) for name, u in model_kwargs.items() if name != CACHE}
    return all(name in PER_TOKEN or not any(isinstance(u, Tensor) for u in leaves) for name, leaves in held.items())
