"""Layer by layer: each memory learns on the teacher's own hidden states, without a pass through the model."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..retrofit import full_attention, memory_attention
from ..undo import hooked
from .loss import check_ids
from .passes import least_capacity, relative_error


def align_layers(model: nn.Module, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, " layers"]:
    """Add to the memory's gradients those of each layer's own error, from one pass of the teacher, uncompiled.

    In the pass with full attention every retrofitted block also runs with its memory, on the same input, and
    ``|memory - full|^2 / |full|^2`` of its output beyond the capacity is differentiated at once. No gradient crosses a
    layer: a batch costs little more than the teacher's forward pass, and one layer's graph exists at a time. A cheap
    first stage before distillation (compare Taylor-Calibrate, arXiv 2606.16429).

    Args:
        model: a retrofitted transformers model whose base is frozen.
        input_ids: token ids without padding, longer than the capacity.

    Returns:
        The relative error of each layer, without gradient.

    Raises:
        ValueError: if the model is not retrofitted, or the text is not longer.
    """
    start = least_capacity(model)
    check_ids(input_ids)
    if input_ids.shape[1] <= start:
        raise ValueError(f"sequences of {input_ids.shape[1]} tokens, window of {start}: expected longer sequences.")
    errors: list[Tensor] = []

    def learn(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if getattr(block, "mode", None) != "full":
            return  # our own call below
        with torch.enable_grad(), memory_attention(model):
            out = block(*args, **{**kwargs, "attention_mask": None})  # the mask is the teacher's, and nothing is padded
            error = relative_error(out[0][:, start:], output[0][:, start:])
        error.backward()  # type: ignore[no-untyped-call]
        errors.append(error.detach())

    blocks = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    hooks = hooked(block.register_forward_hook(learn, with_kwargs=True) for block in blocks)
    with torch.compiler.set_stance("force_eager"), hooks, torch.no_grad(), full_attention(model):
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return torch.stack(errors)
