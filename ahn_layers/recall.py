"""Tokens that leave are folded into the memory, and queries read it."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .compressor import Compressor, State
from .eviction import RIDES, Eviction
from .ops.attention.window_attention import add_to_tail
from .ops.idle import with_idle
from .positions import Positions
from .tokens import Leaving, per_head

_SEGMENT = {"cpu": 1024}
"""Tokens folded in one go, by device type: bounds what the scan expands and converts at a time, within caches."""
_LONG_SEGMENT = 8192
"""Tokens folded at once on any other device, where kernel launches cost more than memory traffic."""


def recall(
    compressor: Compressor | None,
    memory: State | None,
    q: Float[Tensor, "b h u d"],
    x: Float[Tensor, "b t n"] | None,
    leaving: Leaving,
    rank: Callable[[], Int[Tensor, "*b t"]],
    positions: Positions,
) -> tuple[Float[Tensor, "b h u e"] | None, State | None]:
    """Fold each token that leaves and read with the query that pushed it out; before the first one, read nothing.

    Queries are those from ``leaving.first`` on; hidden states and ranks are those of all tokens of the call.

    Returns:
        What is added to the attention of these queries, None for nothing, and the state.
    """
    if compressor is None or memory is None or q.shape[2] == 0:
        return None, memory
    assert x is not None
    outputs, evicted, folds = [], leaving.tokens, leaving.where
    x, keys = x[:, leaving.first :] if leaving.first else x, evicted.k
    if positions.hidden:
        q, keys = positions.for_memory(q, rank()[..., leaving.first :]), positions.for_memory(keys, leaving.rank)
    size = _SEGMENT.get(q.device.type, _LONG_SEGMENT)
    gates = {n: gate for n, gate in evicted.gates.items() if not n.startswith(RIDES)}
    several = len(evicted) > size  # asked first: compiled code for one segment serves every length
    if not several:
        return _recall(compressor, memory, q, x, keys, evicted.v, gates, folds, leaving.reads)
    for start in range(0, len(evicted), size):
        part = slice(start, start + size)
        mask, reads = (None if u is None else u[..., part] for u in (folds, leaving.reads))
        own = {name: gate[:, :, part] for name, gate in gates.items()}
        qkv = (q[:, :, part], x[:, part], keys[:, :, part], evicted.v[:, :, part])
        output, memory = _recall(compressor, memory, *qkv, own, mask, reads)
        outputs.append(output)
    return torch.cat(outputs, dim=2), memory


def _recall(
    compressor: Compressor,
    memory: State,
    q: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    folds: Tensor | None,
    reads: Tensor | None,
) -> tuple[Tensor, State]:
    """The same in one go."""
    reading, memory = compressor.scan(memory, q, k, v, gates, folds)
    output = compressor.output(reading, x)
    return output if reads is None else output.masked_fill(~per_head(reads, output), 0), memory


def with_reading(
    out: Float[Tensor, "b h t e"],
    recalled: Float[Tensor, "b h u e"] | None,
    compressor: Compressor | None,
    eviction: Eviction,
) -> Float[Tensor, "b h t e"]:
    """Attention with what the memory adds to that of the last queries.

    Without a reading, the memory's parameters still get gradients, of zeros; so do those of an eviction that kept
    nothing.
    """
    out = with_idle(out, eviction.parameters())
    if recalled is not None:
        return add_to_tail(out, recalled.to(out.dtype))
    return out if compressor is None else with_idle(out, compressor.parameters())
