"""DeltaNet: a memory that corrects what it already holds under a key."""

from jaxtyping import Float
from torch import Tensor, nn

from ..layers import Scale, project
from ..recurrent import Recurrence, Recurrent


class DeltaNet(Recurrent):
    """The delta rule (arXiv 2406.06484), as in Artificial Hippocampus Networks (arXiv 2510.07318).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        beta = sigmoid(b_proj(x_j))
        S   <- S + k' (beta (v - S^T k'))^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    It takes the arguments of [`Compressor`][ahn_layers.Compressor]; with ``shared_state`` there is one ``beta`` per
    key/value head too.

    Examples:
        >>> import torch
        >>> DeltaNet(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))["beta"].shape
        torch.Size([1, 4, 3])
    """

    turns_freely = True

    def build(self) -> None:
        """Write gate, read gate, norm."""
        self.b_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t"]]:
        """The write strength ``beta``."""
        return {"beta": project(self.b_proj, x).sigmoid()}

    def recurrence(self) -> Recurrence:
        """Move what is stored under ``k'`` a step of ``beta`` towards ``v``."""
        return Recurrence(strength="beta", delta=True, read_scale=self.head_dim**-0.5)
