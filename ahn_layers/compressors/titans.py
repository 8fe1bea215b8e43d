"""Titans: gradient descent with momentum on what is stored."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Scale, project
from ..recurrent import Recurrence, Recurrent
from .time_step import decay_parameters


class Titans(Recurrent):
    """The neural memory of Titans with a matrix for its network (arXiv 2501.00663).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        alpha = sigmoid(a_proj(x_j) + dt_bias);  eta = sigmoid(m_proj(x_j))
        theta = sigmoid(b_proj(x_j)) (1 - eta)^2 / (1 + eta)
        Z    <- eta Z + theta k' (v - S^T k')^T                   a gradient step on |S^T k' - v|^2 / 2, with momentum
        S    <- (1 - alpha) S + Z
        r     = S^T q' / sqrt(D)
        out   = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    The state is two matrices, ``S`` and ``Z``. Without momentum (``eta = 0``) it is the delta rule with forgetting.

    The range of ``theta`` is not the paper's: with larger steps momentum makes the state grow without bound for some
    sequences of keys, rotated ones among them. Up to twice this range, without forgetting and with the same ``eta`` for
    all tokens, nothing grows: for ``v = 0``, ``|S + c Z|^2 + |c Z|^2 / eta`` with ``c = eta / (1 - eta)`` falls.

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> import torch
        >>> state = Titans(hidden_size=64, num_heads=4, head_dim=16).init_state(1, torch.zeros(()))
        >>> {name: tuple(u.shape) for name, u in state.items()}
        {'memory': (1, 4, 16, 16), 'momentum': (1, 4, 16, 16)}
    """

    turns_freely = True

    def build(self) -> None:
        """Decay, step size, momentum, read gate, norm."""
        _, self.dt_bias = decay_parameters(self.num_states)
        self.a_proj, self.b_proj, self.m_proj = (
            nn.Linear(self.hidden_size, self.num_states, bias=False) for _ in range(3)
        )
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t"]]:
        """``log(1 - alpha)``, the step size ``theta`` and ``log(eta)``."""
        a = project(self.a_proj, x)
        decay = -F.softplus(a + self.dt_bias.to(a.dtype).unsqueeze(-1))
        m = project(self.m_proj, x)
        largest = (-m).sigmoid().square() / (1 + m.sigmoid())  # (1 - eta)^2 / (1 + eta)
        return {"g": decay, "theta": project(self.b_proj, x).sigmoid() * largest, "eta": F.logsigmoid(m)}

    def recurrence(self) -> Recurrence:
        """A step of ``theta`` down the gradient, with momentum; what is stored decays by ``exp(g)``."""
        return Recurrence(decay="g", strength="theta", delta=True, momentum="eta", read_scale=self.head_dim**-0.5)
