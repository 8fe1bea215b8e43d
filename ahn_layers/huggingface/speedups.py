"""What speeds up the base model on a GPU, from the folder ``compiled``: the one place that asks for it.

The folder may be missing: then prompts are read and steps run as transformers does it.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .compiled.reading import Reader
    from .compiled.recorder import Recorder

THERE = find_spec(f"{__package__}.compiled") is not None


def reader(model: nn.Module) -> "Reader | None":
    """What chooses the model that reads a long prompt, None for the model itself."""
    if not THERE:
        return None
    from .compiled.reading import Reader

    return Reader(model)


def recorder(model: nn.Module) -> "Recorder | None":
    """What makes one CUDA graph of a decoding step, None without."""
    if not THERE:
        return None
    from .compiled.recorder import Recorder

    return Recorder(model)
