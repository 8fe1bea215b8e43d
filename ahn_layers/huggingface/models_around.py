"""Models that contain a retrofitted one: their own ``save_pretrained`` knows nothing of the memory, so it raises."""

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..record import Retrofitted


def guard_saving() -> None:
    """Let ``PreTrainedModel.save_pretrained`` refuse a model of which only a part is retrofitted.

    Such a folder would give a plain model back. The retrofitted part cannot know the models around it, hence the check
    stands in the class; for all other models it does nothing.
    """
    save = PreTrainedModel.save_pretrained
    if getattr(save, "refuses_parts_with_a_memory", False):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_parts_with_a_memory(self)
        return save(self, *args, **kwargs)

    save_pretrained.refuses_parts_with_a_memory = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained


def refuse_parts_with_a_memory(model: nn.Module) -> None:
    """Raise a ValueError if a part of the model is retrofitted, and not the model itself."""
    for name, part in model.named_modules():
        if name and isinstance(vars(part).get("hippocampus"), Retrofitted):
            raise ValueError(
                f"{type(model).__name__} contains a retrofitted model ({name}), whose memory save_pretrained would "
                "lose: a plain model would come back. Retrofit the whole model instead of its part and save that; or "
                "save the memory alone, save_adapter(model, folder), and the model after restore(model)."
            )
