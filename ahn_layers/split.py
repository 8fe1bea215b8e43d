"""A memory that is split by heads over several processes, as tensor parallelism splits its base model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .compressor import Compressor
from .eviction import RIDES, Eviction

INSTEAD = "load the model without tp_plan; device_map puts whole layers on several GPUs"
"""What to do where a memory cannot be split."""

_separate: "WeakKeyDictionary[type[Compressor], set[str]]" = WeakKeyDictionary()
"""Compressors that were tried, with the sizes and options that they were tried with."""


@dataclass(frozen=True, eq=False)
class Split:
    """The heads of a layer that this process holds: equal shares, in the order of the processes.

    Attributes:
        index: which share this process holds.
        shares: how many there are; 1 if every process of the group holds all heads.
        group: the process group of those that share the model.
        dims: of each weight that is made by heads, by its name in files, the dimension that is split; all others are
            whole in every process.
    """

    index: int
    shares: int
    group: Any
    dims: dict[str, int] = field(default_factory=dict)

    def whole_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """The sizes of the whole layer, from those of a share."""
        return sizes | {name: sizes[name] * self.shares for name in ("num_heads", "num_kv_heads")}

    def whole_shape(self, name: str, part: Tensor) -> tuple[int, ...]:
        """The shape of a weight for all heads."""
        return tuple(n * self.shares if i == self.dims.get(name) else n for i, n in enumerate(part.shape))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's share of a weight."""
        return _share(whole, self.dims.get(name), self.index, self.shares)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A weight for all heads; every process of the group has to call it."""
        if name not in self.dims:
            return part
        part = part.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.shares)]
        torch.distributed.all_gather(parts, part, group=self.group)
        return torch.cat(parts, dim=self.dims[name])

    def make(
        self, makers: Mapping[str, Callable[..., nn.Module]], sizes: dict[str, int]
    ) -> tuple[dict[str, nn.Module], "Split"]:
        """This process's share of modules, with the values that the first process gave to all heads.

        Args:
            makers: what makes each of them from sizes by name, a ``"compressor"`` and an ``"eviction"``.
            sizes: those of a share.

        Returns:
            The modules, and this split with the dimensions of their weights.
        """
        first, made = torch.distributed.get_global_rank(self.group, 0), {}
        dims: dict[str, int] = {}
        for kind, make in makers.items():
            whole = make(**self.whole_sizes(sizes))
            for u in _tensors(whole).values():
                torch.distributed.broadcast(u, first, group=self.group)
            made[kind], own = _cut(make, whole, sizes, self.index, self.shares)
            made[kind].requires_grad_(False)
            dims |= {(RIDES if kind == "eviction" else "") + name: dim for name, dim in own.items()}
        return made, replace(self, dims=dims)


def check_splits(
    compressor: type[Compressor] | None,
    options: dict[str, Any],
    eviction: Eviction | None,
    sizes: dict[str, int],
    shares: int,
) -> None:
    """Raise a ValueError if heads of a memory depend on each other, so that shares of them are another memory.

    Of a compressor this is tried, since nothing that it declares tells: a few tokens are folded and read with random
    weights, by all heads and by each share of them, on the CPU and in float64.

    Args:
        compressor: the class.
        options: what it is made with beside sizes.
        eviction: the policy.
        sizes: those of a share.
        shares: how many there are.
    """
    if eviction is not None and not eviction.heads_apart and shares > 1:
        raise _cannot(
            eviction,
            shares,
            "it does not say that each of them decides by itself. Set heads_apart = True in its class if that is so, "
            f"or {INSTEAD}",
        )
    if compressor is None or shares == 1:
        return
    known, case = _separate.setdefault(compressor, set()), f"{sizes} {shares} {options!r}"
    if case not in known:
        _check_separate(partial(compressor, **options), sizes, shares)
        known.add(case)


def _check_separate(make: Callable[..., Compressor], sizes: dict[str, int], shares: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # the same in every process, so that all of them come to the same end
        whole = make(**Split(0, shares, None).whole_sizes(sizes)).double()
        for u in whole.parameters():
            u.add_(torch.randn_like(u), alpha=0.1)
        heads, groups, size = whole.num_heads, whole.num_kv_heads, whole.head_dim
        shapes = ((1, heads, 8, size), (1, groups, 8, size), (1, groups, 8, whole.value_dim), (1, 8, whole.hidden_size))
        *qkv, x = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        expected = _read(whole, qkv, x)
        for index in range(shares):
            part, _ = _cut(make, whole, sizes, index, shares)
            alone = _read(part, (_share(u, 1, index, shares) for u in qkv), x)
            if not torch.allclose(alone, _share(expected, 1, index, shares), rtol=1e-6):
                raise _cannot(
                    whole,
                    shares,
                    "a share of its heads alone returns other values than among all heads, so they depend on each "
                    f"other, by a norm over all of them for instance. Use another compressor, or {INSTEAD}",
                )


def refuse_gradients(memory: nn.Module, x: Tensor) -> Tensor:
    """The hidden states as a memory that is split reads them: gradients would be those of a share of the heads.

    Args:
        memory: the memory.
        x: hidden states.

    Raises:
        RuntimeError: if the memory's weights require gradients; in the backward pass, if it comes to ``x``.
    """
    if not torch.is_grad_enabled():
        return x
    if any(u.requires_grad for u in memory.parameters()):
        raise _no_gradients()
    return _Refuse.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class _Refuse(torch.autograd.Function):
    """The identity, without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The same."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """There is none."""
        raise _no_gradients()


def _read(memory: Compressor, qkv: Iterable[Tensor], x: Tensor) -> Tensor:
    """What is added to the attention output while tokens are folded."""
    q, k, v = qkv
    readings, _ = memory.scan(memory.init_state(1, q.new_zeros(())), q, k, v, memory.gates(x))
    return memory.output(readings, x)


def _cut(
    make: Callable[..., nn.Module], whole: nn.Module, sizes: dict[str, int], index: int, shares: int
) -> tuple[Any, dict[str, int]]:
    """A share of a module, and the dimensions that are split."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # random numbers are used up for the whole, as in a single process
        try:
            part = make(**sizes).to(next(whole.parameters(), torch.empty(0)).dtype)
        except ValueError as error:
            raise _cannot(whole, shares, str(error)) from error
    dims = {}
    for key, u in _tensors(part).items():
        given = _tensors(whole)[key]
        differ = [i for i, (n, all_of) in enumerate(zip(u.shape, given.shape, strict=True)) if n != all_of]
        if differ:
            dims[key] = differ[0]
        if len(differ) > 1 or (differ and given.shape[differ[0]] != shares * u.shape[differ[0]]):
            raise _cannot(
                whole,
                shares,
                f"{key!r} has shape {tuple(given.shape)} for all heads and {tuple(u.shape)} for a share of them. Use "
                f"another one, or {INSTEAD}",
            )
        with torch.no_grad():
            u.copy_(_share(given, dims.get(key), index, shares))
    if isinstance(part, Compressor):
        part.first_state = index * part.num_states
    return part, dims


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: u.detach() for name, u in (*parameters, *buffers)}


def _share(whole: Tensor, dim: int | None, index: int, shares: int) -> Tensor:
    return whole if dim is None else whole.chunk(shares, dim=dim)[index].contiguous()


def _cannot(module: nn.Module, shares: int, why: str) -> ValueError:
    return ValueError(f"{type(module).__name__} cannot be split by heads over {shares} processes (tp_plan): {why}.")


def _no_gradients() -> RuntimeError:
    return RuntimeError(
        "gradients through a memory that is split over several processes (tp_plan) would be those of a share of the "
        "heads: train without tp_plan, with FSDP2 for instance; the adapter can be loaded into a model that is split."
    )
