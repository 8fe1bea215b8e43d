"""The gated delta rule over many tokens, in chunks: the recurrence of DeltaNet and GatedDeltaNet.

Dimensions as in ``gated_scan``.
"""

from jaxtyping import Float
from torch import Tensor

from .gated_scan import gated_scan


def gated_delta_scan(
    state: Float[Tensor, "b s d e"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b u t e"],
    beta: Float[Tensor, "b s t"],
    g: Float[Tensor, "b s t"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b s d e"]]:
    """``S <- exp(g_t) S; S <- S + k_t (beta_t (v_t - S^T k_t))^T; r_t = S^T q_t`` (arXiv 2406.06484, 2412.06464).

    Keys are normalised by the caller; the write strength ``beta`` is in [0, 1], and 0 with ``g = 0`` folds nothing.
    Chunks have 32 tokens by default, on a GPU 128. Else arguments and results are those of ``gated_linear_scan``.
    """
    return gated_scan(state, q, k, v, g, beta, chunk_size)
