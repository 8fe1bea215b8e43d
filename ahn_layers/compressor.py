"""The contract of a long-term memory: tokens are folded into a state of fixed size, and queries read it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .by_name import register
from .layers import HeadwiseLinear, Scale, project
from .ops.decode.rule import StepRule
from .ops.pointwise.normalize import gated_rms_norm, rms_normalize

_UNROLLED = 16
"""Tokens that a compiler may see one by one: it repeats the code of ``fold`` and ``read`` for each of them."""

State = Tensor | dict[str, Tensor]
"""What a compressor carries: one tensor, or several by name, each with the batch as its first dimension."""


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to the tensor(s) of one or several states of the same structure."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    return {name: function(*(state[name] for state in states)) for name in first}  # type: ignore[index]


class Compressor(nn.Module, ABC):
    """Fixed-size long-term memory of an attention layer. Subclass it and write ``fold``.

    A token that leaves the window is *folded* into the state; a query *reads* the state; the reading passes through
    ``output`` and is added to the attention output, before the block's output projection. Everything but
    ``fold`` has a default:

    - ``build``: further parameters. Default: none.
    - ``gates``: write gates, computed once when a token arrives and kept beside its key and value. Default: none.
    - ``init_state``: an empty state. Default: a matrix ``(head_dim, value_dim)`` of zeros per state.
    - ``read``: what a query gets from the state. Default: ``S^T q``.
    - ``output``: from the reading to the output. Default: RMS norm, then a matrix per head that starts at zero. A
      layer ``g_proj`` and a module ``o_norm`` made in ``build`` give the norm a gate per head and factors per channel.
    - ``scan``: fold and read many tokens. Default: one after the other; override it with a faster form that gives
      the same result.

    Keys and queries come as the attention uses them (after the rotation). The state is float32, or float64 in a
    float64 model. A subclass is known to adapter files by its class name, so two classes cannot have the same; defining
    a class again (in a notebook) replaces it.

    Args:
        hidden_size: width of the hidden states that gates are computed from.
        num_heads: query heads, H.
        head_dim: size of queries and keys, D.
        num_kv_heads: key/value heads, G; ``num_heads`` must be a multiple. Default: ``num_heads``.
        value_dim: size of values, E. Default: ``head_dim``.
        shared_state: one state per key/value head instead of one per query head: G / H of the memory.

    Raises:
        ValueError: if a size is not positive, or ``num_heads`` is not a multiple of ``num_kv_heads``; where a subclass
            is defined, if there is another one of that name.

    Examples:
        >>> class Average(Compressor):
        ...     def fold(self, state, k, v):
        ...         return 0.99 * state + outer(k, v)
        >>> Average(hidden_size=64, num_heads=4, head_dim=16).init_state(2, torch.zeros(())).shape
        torch.Size([2, 4, 16, 16])
    """

    by_name: ClassVar[MutableMapping[str, type["Compressor"]]] = WeakValueDictionary()
    unused_parameters: ClassVar[tuple[str, ...]] = ()
    """Names that released weight files carry and the computation does not use: skipped in loading."""
    o_norm: Scale
    first_state: int = 0
    """The number of the first state in its layer; above 0 where other processes hold the ones before it."""
    turns_freely: ClassVar[bool] = False
    """Whether what is read stays the same if all keys and queries are rotated alike, as rotary positions that begin
    later do. Each subclass says it for itself; where it is not so, padded rows get positions as if they were alone."""
    rule_holds: ClassVar[bool] = False
    """Whether there is a ``rule``, and no subclass has changed what it describes."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        register(Compressor.by_name, cls, "compressor")
        cls.turns_freely = vars(cls).get("turns_freely", False)
        cls.rule_holds = cls.rule is not Compressor.rule and _is_latest(cls, "rule", ("fold", "read", "scan", "output"))

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        value_dim: int | None = None,
        shared_state: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.value_dim = head_dim if value_dim is None else value_dim
        self.shared_state = shared_state
        _check_sizes(self)
        self.o_proj = HeadwiseLinear(num_heads, self.value_dim)
        self.build()

    def build(self) -> None:
        """Create further parameters; the sizes are attributes by now. Default: none."""

    @property
    def num_states(self) -> int:
        """States per row: key/value heads if they are shared, else query heads."""
        return self.num_kv_heads if self.shared_state else self.num_heads

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_dim", "shared_state")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t *c"]]:
        """Write gates of arriving tokens, a scalar or a vector per state, by the names that ``fold`` gives them.

        They stay beside each token of the window: a vector of D numbers takes as many bytes as a key of that head.

        Args:
            x: hidden states that enter the attention block.
        """
        return {}

    def init_state(self, batch_size: int, like: Tensor) -> State:
        """An empty state: ``(batch_size, num_states, head_dim, value_dim)`` zeros.

        Args:
            batch_size: rows.
            like: a tensor with the state's device and dtype.
        """
        return like.new_zeros(batch_size, self.num_states, self.head_dim, self.value_dim)

    @abstractmethod
    def fold(self, state: Any, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Fold one token into the state and return the new state; the one given stays as it is.

        Args:
            state: what ``init_state`` or an earlier fold returned.
            k: key of the evicted token, ``(B, num_states, D)``, in the dtype of the state.
            v: its value, ``(B, num_states, E)``.
            *args: not used; subclasses take their write gates here, ``(B, num_states)`` or ``(B, num_states, C)`` each,
                as named parameters.
            **kwargs: likewise.
        """

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """What each query gets from the state; queries of a group read the same one if states are shared."""
        assert isinstance(state, Tensor), "a compressor whose state has several tensors overrides read()"
        grouped = q.unflatten(1, (state.shape[1], -1))
        return (grouped @ state).flatten(1, 2)

    def scan(
        self,
        state: State,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        gates: dict[str, Float[Tensor, "b s t *_"]],
        mask: Bool[Tensor, "b t"] | Bool[Tensor, "b g t"] | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], State]:
        """For each token in turn: fold ``k, v``, then read with ``q``.

        Args:
            state: the state before the first token.
            q: the query that arrives when ``k, v`` leaves.
            k: evicted keys, one per key/value head, or several states share them.
            v: evicted values, likewise.
            gates: their write gates.
            mask: False where there is nothing to fold, per row or, with an eviction that keeps other tokens in other
                heads, per key/value head: the state stays as it is.

        Returns:
            The readings, in the dtype of the state or of ``k``, and the state after the last token.
        """
        if torch.compiler.is_compiling() and q.shape[2] > _UNROLLED:
            return _scan_uncompiled(self, state, q, k, v, gates, mask)
        dtype = state_dtype(q)
        k, v = (u.repeat_interleave(self.num_states // u.shape[1], dim=1) for u in (k, v))
        folds = None if mask is None else self.per_state(mask)
        readings = []
        for t in range(q.shape[2]):
            gate = {name: value[:, :, t].to(dtype) for name, value in gates.items()}
            folded = self.fold(state, k[:, :, t].to(dtype), v[:, :, t].to(dtype), **gate)
            state = folded if folds is None else map_state(_select(folds[:, :, t]), folded, state)
            readings.append(self.read(state, q[:, :, t].to(dtype)))
        return torch.stack(readings, dim=2), state

    loop = scan
    """``scan``, token by token: its definition, whatever a subclass makes of it."""

    def per_state(self, mask: Bool[Tensor, "*b t"]) -> Bool[Tensor, "b s t"]:
        """The mask of a scan, ``(B, 1, T)`` or for each state ``(B, num_states, T)``, as it masks gates."""
        if mask.ndim == 2:
            return mask.unsqueeze(1)
        return mask.repeat_interleave(self.num_states // mask.shape[1], dim=1)

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule | None:
        """One decode step in the terms of a kernel, if its terms suffice; default: None, ``scan`` and ``output`` do it.

        The rule of a class is not used for a subclass that overrides ``fold``, ``read``, ``scan`` or ``output``.

        Args:
            x: hidden states of the query's token.
        """
        return None

    def read_gate(self, x: Float[Tensor, "b t n"], *, widen: bool = True) -> Float[Tensor, "b h t"] | None:
        """Logits of the gate of each reading; None without one."""
        linear = getattr(self, "g_proj", None)
        return None if linear is None else project(linear, x, widen=widen)

    def output(self, r: Float[Tensor, "b h t e"], x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t e"]:
        """From readings to what is added to the attention output. Must be zero at initialisation.

        Args:
            r: readings, as ``scan`` returned them.
            x: hidden states of the queries' own tokens.
        """
        gate = self.read_gate(x)
        return self.o_proj(rms_normalize(r) if gate is None else gated_rms_norm(r, self.o_norm.weight, gate))


def _scan_uncompiled(compressor: Compressor, *args: Any) -> tuple[Tensor, State]:
    """``Compressor.scan`` in the middle of compiled code, by Python."""
    from .uncompiled import uncompiled

    return uncompiled(Compressor.scan, compressor, *args)  # type: ignore[no-any-return]


def _is_latest(cls: type, method: str, others: tuple[str, ...]) -> bool:
    """Whether no subclass of the class that defines a method overrides one of the others."""
    made = {name: next(i for i, base in enumerate(cls.__mro__) if name in vars(base)) for name in (method, *others)}
    return made[method] == min(made.values())


def check_size(name: str, size: Any) -> None:
    """Raise a ValueError for what is not a size."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}={size!r}: expected a positive whole number.")


def _check_sizes(memory: Compressor) -> None:
    """Raise for sizes that are impossible."""
    for name in ("hidden_size", "num_heads", "head_dim", "num_kv_heads", "value_dim"):
        check_size(name, getattr(memory, name))
    if memory.num_heads % memory.num_kv_heads:
        raise ValueError(
            f"num_heads={memory.num_heads} is not a multiple of num_kv_heads={memory.num_kv_heads}: "
            "every key/value head must serve the same number of query heads."
        )


def state_dtype(like: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors: the dtype in which memories are kept and computed."""
    return torch.promote_types(like.dtype, torch.float32)


def _select(mask: Bool[Tensor, "b s"]) -> Callable[[Tensor, Tensor], Tensor]:
    def select(new: Tensor, old: Tensor) -> Tensor:
        if mask.shape[1] == 1:
            return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)
        if new.ndim < 2 or new.shape[1] != mask.shape[1]:
            raise ValueError(
                f"a tensor of the state has shape {tuple(new.shape)}, and heads fold different tokens: expected "
                f"(batch, {mask.shape[1]} states, ...). Override scan() to take such a mask."
            )
        return torch.where(mask.view(*mask.shape, *[1] * (new.ndim - 2)), new, old)

    return select
