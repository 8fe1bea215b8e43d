"""Gated linear attention over many tokens: the recurrence of Mamba2 and of plain linear attention, in chunks.

Dimensions as in ``gated_scan``.
"""

from jaxtyping import Float
from torch import Tensor

from .gated_scan import gated_scan


def gated_linear_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    g: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, read after folding: ``r_t = S_t^T q_t`` (arXiv 2405.21060, section 6).

    Args:
        state: the state before the first token; its dtype is the dtype of the computation.
        q: queries, one per folded token; queries of one group share a state.
        k: folded keys; states of one group share them.
        v: folded values, likewise.
        g: log decay per token, None for no decay.
        chunk_size: tokens folded at once, by default 64.

    Returns:
        What each query reads, in the dtype of the state (of ``k`` in kernels), and the state after the last token.
    """
    return gated_scan(state, q, k, v, g, None, chunk_size)
