"""The base class of replacements of a model's methods."""

from torch import nn


class ModelMethod:
    """A replacement of one of the model's methods, set on the instance; the class keeps the original.

    It is an object and not a function, so that the model can still be pickled and copied.

    Args:
        model: the retrofitted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
