"""The record of a retrofit, and the mode that the retrofitted layers are in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from .positions import MemoryPositions
from .window import Window

Mode = Literal["memory", "window", "full"]
"""Attention through the memory, through sinks and window alone, or as the base model does it."""


@dataclass(eq=False)
class Retrofitted:
    """What ``retrofit`` did to a model, kept on the model as ``hippocampus``.

    Attributes:
        windows: the window of each retrofitted layer, by its cache index.
        compressor: name of the compressor class, None for the window alone.
        memory_positions: whether the memory's keys and queries are rotated.
        options: keyword arguments of the compressor, as the user gave them.
        skipped: why the other attention blocks were left alone, by name.
        owned: whose masks are ours: ``full``, ``local``, ``full+local`` or ``none``.
        mode: what all retrofitted layers do at present, in every thread.
        returns_cache: whether the model returns the cache that it filled.
        goes_on: whether its convolutions and recurrences go on from a cache with several tokens at once.
        recurs: whether it has any.
        tells_positions: whether a rotation of all keys and queries alike changes what a memory reads.
    """

    windows: dict[int, Window]
    compressor: str | None
    memory_positions: MemoryPositions
    options: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    owned: str = "none"
    mode: Mode = "memory"
    returns_cache: bool = True
    goes_on: bool = True
    recurs: bool = False
    tells_positions: bool = False
    _switches: list[list[Mode]] = field(default_factory=list, init=False, repr=False)

    @contextmanager
    def switched(self, mode: Mode) -> Iterator[None]:
        """Within this context, another mode. Contexts may overlap, those of several threads for instance."""
        switch = [mode]  # an object of its own: equal ones are told apart
        self._switches.append(switch)
        self.mode = mode
        try:
            yield
        finally:
            self._switches[:] = [other for other in self._switches if other is not switch]
            self.mode = self._switches[-1][0] if self._switches else "memory"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the switches of the original, which never end for a copy, are not its own."""
        return vars(self) | {"mode": "memory", "_switches": []}

    @property
    def layers(self) -> list[int]:
        """Cache indices of the retrofitted layers."""
        return list(self.windows)

    @property
    def window(self) -> Window:
        """The window of all retrofitted layers.

        Raises:
            ValueError: if they differ.
        """
        different = set(self.windows.values())
        if len(different) != 1:
            raise ValueError(
                f"the layers have {len(different)} different windows: expected one for all. Read the windows of the "
                "layers (model.hippocampus.windows), or retrofit them alike."
            )
        return different.pop()

    def attention_name(self, base: str | None) -> str | None:
        """The attention implementation of the retrofitted layers, where the config names ``base``."""
        return base if self.mode == "full" else f"hippocampal:{base}:{self.owned}"


def find_retrofitted(model: nn.Module) -> tuple[nn.Module, Retrofitted]:
    """The retrofitted transformers model in ``model`` (itself, or inside a wrapper), and what was done to it."""
    for module in model.modules():
        record = module.__dict__.get("hippocampus")
        if isinstance(record, Retrofitted):
            return module, record
    raise ValueError(f"{type(model).__name__} is not retrofitted: call retrofit(model, ...) first.")
