"""Continuous batching of transformers, which a retrofitted model refuses before it begins."""

from typing import Any

from torch import nn

from .model_method import ModelMethod

METHODS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""What transformers calls it by."""


class RefuseBatching(ModelMethod):
    """Stands in for a method of continuous batching: its paged cache has no place for a state of fixed size."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__(model)
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method inside ``full_attention``.

        Raises:
            ValueError: outside of it.
        """
        model: Any = self.model
        if model.hippocampus.mode == "full":
            return getattr(type(model), self.method)(model, *args, **kwargs)
        raise ValueError(
            f"{self.method}: continuous batching keeps keys and values in pages of its own, and a memory has a state "
            "of fixed size. Call generate with a padded batch, or use full_attention(model)."
        )


def refuse_batching(model: Any) -> None:
    """Let the methods of continuous batching say why they do not work."""
    for method in METHODS:
        if hasattr(type(model), method):
            setattr(model, method, RefuseBatching(model, method))
