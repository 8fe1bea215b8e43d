"""Which positions sinks and memory are shown, and the model's rotation, which this needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from .ops.attention.between import Between
from .ops.pointwise.rotary import turn_back
from .window import Window

MemoryPositions = Literal["absolute", "none"]
"""Whether keys and queries of the memory are rotated."""


class Rotary(nn.Module):
    """The rotary position embedding of a model (arXiv 2104.09864), so that its queries can be turned back.

    The window uses it to keep the attention sinks within the distance that the model was trained on
    (``Window.sink_positions``).

    Args:
        inv_freq: angular frequency of each rotated pair of channels, in radians a position, ``(R,)``.
        trained_length: tokens that the model was trained on.
        interleaved: pairs are neighbours ``(0, 1), (2, 3), ...`` instead of ``(i, i + R)``.
        start: first rotated channel.

    Raises:
        TypeError: if ``inv_freq`` is not a tensor.
        ValueError: if ``trained_length`` is not positive, ``start`` is negative, or ``inv_freq`` is no vector of
            floating-point numbers.

    Examples:
        >>> import torch
        >>> rotary = Rotary(10_000.0 ** (-torch.arange(0, 64, 2) / 64), trained_length=8192)
        >>> rotary.turn_back(torch.randn(1, 9, 1, 64), torch.tensor([5])).shape
        torch.Size([1, 9, 1, 64])
    """

    inv_freq: Tensor

    def __init__(
        self, inv_freq: Float[Tensor, " r"], trained_length: int, *, interleaved: bool = False, start: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(inv_freq, Tensor):
            raise TypeError(
                f"inv_freq is of type {type(inv_freq).__name__}: expected a tensor. Pass torch.tensor(...)."
            )
        if inv_freq.ndim != 1:
            raise ValueError(f"inv_freq has shape {tuple(inv_freq.shape)}: expected one frequency per rotated pair.")
        if not inv_freq.is_floating_point():
            raise ValueError(f"inv_freq is {inv_freq.dtype}: expected angular frequencies, floating-point numbers.")
        if not isinstance(trained_length, int) or trained_length < 1:
            raise ValueError(f"trained_length={trained_length}: expected a positive number of tokens.")
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"start={start}: expected the number of the first rotated channel, from 0.")
        self.trained_length = trained_length
        self.interleaved = interleaved
        self.start = start
        self._precise: Tensor | None = None
        self.register_buffer("inv_freq", inv_freq.detach().clone(), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, never to a lower precision: angles need all their digits."""
        precise = self.inv_freq if self._precise is None else self._precise
        super()._apply(fn, recurse)
        lost = self.inv_freq.is_meta and not precise.is_meta  # kept until the model comes back
        self._precise = precise if lost else None
        if not (precise.is_meta or lost):
            self.inv_freq = precise.to(self.inv_freq.device)
        return self

    def extra_repr(self) -> str:
        """The layout, for ``print(model)``."""
        return f"trained_length={self.trained_length}, interleaved={self.interleaved}, start={self.start}"

    def turn_back(self, q: Float[Tensor, "b h t d"], distance: Int[Tensor, "*b t"]) -> Float[Tensor, "b h t d"]:
        """Queries as if each stood ``distance`` positions earlier, see ``ops.pointwise.rotary.turn_back``."""
        return turn_back(q, distance, self.inv_freq, interleaved=self.interleaved, start=self.start)


@dataclass(frozen=True)
class Positions:
    """How queries and keys look to the sinks and to the memory; to the window they always look as the model made them.

    Args:
        window: the short-term memory.
        rotary: how the model rotates; None if it is not known or it does not.
        memory: what the memory is told of positions, see ``MemoryStore``.
    """

    window: Window
    rotary: Rotary | None
    memory: MemoryPositions

    def facing_sinks(
        self, q: Float[Tensor, "b h t d"], rank: Callable[[], Int[Tensor, "*b t"]], length: int | None
    ) -> Float[Tensor, "b h far d"] | None:
        """Queries as the sinks see them, from the first one that is too far away; None while all are near.

        The length counts the tokens so far, these included; None if it is not known.
        """
        limit = None if self.rotary is None else self.window.farthest_sink(self.rotary.trained_length)
        if limit is None or self.rotary is None or (length is not None and length - 1 <= limit):
            return None
        far = q.shape[2] if length is None else min(q.shape[2], length - 1 - limit)
        return self.rotary.turn_back(q[:, :, -far:], (rank()[..., -far:] - limit).clamp(min=0))

    def facing_kept(
        self, q: Float[Tensor, "b h t d"], seen: Between | None
    ) -> tuple[Float[Tensor, "b h t d"] | None, Between | None]:
        """Queries as the tokens that an eviction keeps see them, None for as they are; and these tokens, likewise."""
        if seen is None or seen.turn is None or self.rotary is None:
            return None, seen
        k = _turn_each(self.rotary, seen.k, seen.turn.keys)
        return _turn_each(self.rotary, q, seen.turn.queries), replace(seen, k=k)

    @property
    def hidden(self) -> bool:
        """Whether the memory is shown other queries and keys than the attention."""
        return self.memory == "none" and self.rotary is not None

    def for_memory(self, u: Float[Tensor, "b h t d"], rank: Int[Tensor, "*b t"]) -> Float[Tensor, "b h t d"]:
        """Queries or keys of these ranks, ``(T,)``, ``(B, T)`` or ``(B, G, T)``, as the memory is told them."""
        if not self.hidden or self.rotary is None:
            return u
        return _turn_each(self.rotary, u, rank) if rank.ndim == 3 else self.rotary.turn_back(u, rank)


def _turn_each(rotary: Rotary, u: Float[Tensor, "b h t d"], distance: Int[Tensor, "b g t"]) -> Float[Tensor, "b h t d"]:
    """Queries or keys turned back by a distance of each key/value head's own."""
    grouped = u.unflatten(1, (distance.shape[1], -1)).flatten(0, 1)
    return rotary.turn_back(grouped, distance.flatten(0, 1)).reshape(u.shape)
