"""Compiles layers for training: one piece of code for all layers and all windows."""

from typing import Any

import torch
from torch import nn

from ..attention import HippocampalAttention

_VARIANTS = 32
"""Of one layer's code: teacher and student, the window alone, sizes known and unknown, with and without gradients."""


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile every layer that has a memory, attention and memory included; for training, in place.

    A training step of eager layers waits for Python more than for the GPU. Layers of one kind share their compiled
    code, except that the first one, whose input has no gradient if the base is frozen, has its own. Code for a second
    window serves windows of any size. All this is compiled when the first batches come, which should be of one shape.
    Meant for half precision on a GPU: for other dtypes, and on a CPU, PyTorch 2.13's Inductor fails on windows whose
    sizes it does not know.

    ``torch.compiler.set_stance("force_eager")`` goes back to eager layers for a while, as for an evaluation. With
    ``layer_weight`` layers run uncompiled. For the whole process, the compiler stops taking integers in modules for
    constants (``torch._dynamo.config.allow_unspec_int_on_nn_module``).

    Args:
        model: any model with [`HippocampalAttention`][ahn_layers.HippocampalAttention] blocks.
        **options: of ``torch.compile``.

    Raises:
        ValueError: if the model has no memory.
    """
    layers = [m for m in model.modules() if any(isinstance(child, HippocampalAttention) for child in m.children())]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no HippocampalAttention: call retrofit(model, ...) first.")
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # sizes of windows, which training draws
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, **options)  # type: ignore[method-assign]
