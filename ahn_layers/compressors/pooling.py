"""AveragePooling and MaxPooling: no recurrence, evicted tokens pooled into a few slots that queries attend to."""

from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..compressor import Compressor, State, check_size, state_dtype
from ..layers import Scale
from ..ops.slots.pooling import Pool, pool_read, pool_scan, pool_step


class AveragePooling(Compressor):
    """The pooling of Compressive Transformers (arXiv 1911.05507), a baseline of arXiv 2510.07318.

    Every ``rate`` evicted tokens become one slot: the mean of their keys and the mean of their values. Queries attend
    to the slots and to the one that is being filled; when all slots are full, the oldest is dropped.

        r   = softmax( q^T keys / sqrt(D) ) values
        out = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    Nothing differs between the heads of a group, so there is one pool per key/value head in any case.

    Args:
        hidden_size: see [`Compressor`][ahn_layers.Compressor], as for the other sizes.
        num_heads: see there.
        head_dim: see there.
        num_kv_heads: see there.
        value_dim: see there.
        shared_state: makes no difference, see above.
        num_slots: slots of each key/value head. Default: as many as take the bytes of a matrix ``(D, E)``.
        rate: tokens of a slot.

    Raises:
        ValueError: if ``num_slots`` or ``rate`` is not a positive number.

    Examples:
        >>> import torch
        >>> AveragePooling(hidden_size=64, num_heads=4, head_dim=16).init_state(1, torch.zeros(()))["keys"].shape
        torch.Size([1, 4, 8, 16])
    """

    turns_freely = True

    pool: ClassVar[Pool] = "mean"

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, *, num_kv_heads: int | None = None,
        value_dim: int | None = None, shared_state: bool = False, num_slots: int | None = None, rate: int = 16,
    ) -> None:  # fmt: skip
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "value_dim": value_dim, "shared_state": shared_state}
        super().__init__(hidden_size, num_heads, head_dim, **sizes)
        matrix = self.head_dim * self.value_dim // (self.head_dim + self.value_dim)
        self.num_slots, self.rate = max(1, matrix) if num_slots is None else num_slots, rate
        for name in ("num_slots", "rate"):
            check_size(name, getattr(self, name))

    def build(self) -> None:
        """Read gate, norm."""
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    @property
    def num_states(self) -> int:
        """Pools per row: key/value heads."""
        return self.num_kv_heads

    def init_state(self, batch_size: int, like: Tensor) -> State:
        """An empty pool."""
        sizes = {"keys": (self.num_slots, self.head_dim), "values": (self.num_slots, self.value_dim), "filled": ()}
        sizes |= {"open_keys": (self.head_dim,), "open_values": (self.value_dim,), "opened": ()}
        return {name: like.new_zeros(batch_size, self.num_states, *size) for name, size in sizes.items()}

    def fold(self, state: dict[str, Tensor], k: Tensor, v: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Pool the token with those before it."""
        return pool_step(state, k, v, self.rate, self.pool)

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """Attend to the slots."""
        assert isinstance(state, dict)
        return pool_read(state, q, self.head_dim**-0.5, self.pool)

    def scan(
        self, state: State, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor],
        mask: Bool[Tensor, "b t"] | Bool[Tensor, "b g t"] | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], State]:  # fmt: skip
        """The same for many tokens, block by block."""
        if q.shape[2] == 1:
            return self.loop(state, q, k, v, gates, mask)
        assert isinstance(state, dict)
        q, k, v = (u.to(state_dtype(u)) for u in (q, k, v))
        folds = k.new_ones(k.shape[:3]).bool() if mask is None else self.per_state(mask).expand(k.shape[:3])
        return pool_scan(state, q, k, v, folds, rate=self.rate, pool=self.pool, scale=self.head_dim**-0.5)


class MaxPooling(AveragePooling):
    """As [`AveragePooling`][ahn_layers.AveragePooling], with the largest of each channel in place of the mean.

    It takes the same arguments.

    Examples:
        >>> MaxPooling(hidden_size=64, num_heads=4, head_dim=16, num_slots=4).num_slots
        4
    """

    pool = "max"
