"""Linear attention: the simplest memory, a running sum."""

from ..recurrent import Recurrence, Recurrent


class LinearAttention(Recurrent):
    """``S <- S + k' v^T``, ``r = S^T q'``, with ``u' = u / |u|`` (arXiv 2006.16236).

    Nothing is ever forgotten or corrected, so it fills up; it is here to be read first. The reading passes through the
    default output: RMS norm (in place of the usual normaliser) and a matrix per head.

    Args:
        hidden_size: see ``ahn_layers.Compressor``, as for the other sizes and ``shared_state``.

    Examples:
        >>> import torch
        >>> memory = LinearAttention(hidden_size=64, num_heads=4, head_dim=16)
        >>> memory.fold(memory.init_state(1, torch.zeros(())), torch.ones(1, 4, 16), torch.ones(1, 4, 16))[0, 0, 0, 0]
        tensor(0.2500)
    """

    turns_freely = True

    def recurrence(self) -> Recurrence:
        """Add ``k' v^T``."""
        return Recurrence()
