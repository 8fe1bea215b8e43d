"""KDA: the delta rule in which every channel of a key decays at its own pace."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LowRank, Scale, project
from ..recurrent import Recurrence, Recurrent
from .time_step import spread_decays


class KDA(Recurrent):
    """Kimi Delta Attention (arXiv 2510.26692).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        g    = -softplus(c U + b)  with  c = a_proj(x_j)          a vector of D log decays, made of 4 numbers
        beta = sigmoid(b_proj(x_j))
        S   <- diag(exp(g)) S;  S <- S + k' (beta (v - S^T k'))^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    The paper makes all decays of a token of D numbers, here those of every state are made of 4 of its own: these stay
    beside the token in the window. Its factor ``exp(A_log)`` is in the biases ``b``, which start with decays spread
    like those of [`GatedDeltaNet`][ahn_layers.GatedDeltaNet].

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> import torch
        >>> gates = KDA(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))
        >>> {name: tuple(gate.shape) for name, gate in gates.items()}
        {'g': (1, 4, 3, 4), 'beta': (1, 4, 3)}
    """

    rank: ClassVar[int] = 4
    """Numbers that the decays of a state are made of."""

    def build(self) -> None:
        """Decays, write gate, read gate, norm."""
        self.a_proj = LowRank(self.hidden_size, self.rank, spread_decays(self.num_states, self.head_dim))
        self.b_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t *_"]]:
        """What the log decays are made of, and the write strength ``beta``."""
        return {"g": self.a_proj(x), "beta": project(self.b_proj, x).sigmoid()}

    def expand(self, gates: dict[str, Float[Tensor, "b s t *_"]]) -> dict[str, Float[Tensor, "b s t *_"]]:
        """The log decays ``g`` in place of what they are made of."""
        return gates | {"g": -F.softplus(self.a_proj.expand(gates["g"]))}

    def recurrence(self) -> Recurrence:
        """Decay each channel by ``exp(g)``, then move what is stored under ``k'`` a step of ``beta`` towards ``v``."""
        return Recurrence(decay="g", strength="beta", delta=True, read_scale=self.head_dim**-0.5)
