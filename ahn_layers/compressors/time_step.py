"""How decays start: the initialisation of Mamba2 (arXiv 2405.21060), which GatedDeltaNet shares."""

import math

import torch
from torch import Tensor, nn


def decay_parameters(
    num_states: int, shortest: float = 1e-3, longest: float = 1e-1
) -> tuple[nn.Parameter, nn.Parameter]:
    """``A_log`` with ``A`` uniform in [1, 16], and ``dt_bias`` with ``softplus(dt_bias)`` log-uniform in its range.

    Returns:
        Two vectors ``(num_states,)``.
    """
    a = torch.empty(num_states).uniform_(1, 16)
    step = torch.empty(num_states).uniform_(math.log(shortest), math.log(longest)).exp()
    return nn.Parameter(a.log()), nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus, inverted


def spread_decays(
    num_states: int, size: int, *, factor: float = 1.0, shortest: float = 1e-3, longest: float = 1.0
) -> Tensor:
    """Biases ``b`` with ``softplus(b) / factor`` log-uniform in a range: channels decay at different paces.

    Args:
        num_states: rows.
        size: channels.
        factor: see above.
        shortest: the slowest decay: half of it is left after ``log(2) / shortest`` tokens.
        longest: the fastest one.

    Returns:
        ``(num_states, size)``.
    """
    step = factor * torch.empty(num_states, size).uniform_(math.log(shortest), math.log(longest)).exp()
    return step + torch.log(-torch.expm1(-step))  # softplus, inverted
