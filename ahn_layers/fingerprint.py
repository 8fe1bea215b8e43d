"""Fingerprints of base models and of memory weights, by which adapters and caches are compared."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .attention import HippocampalAttention
from .eviction import FoldAll
from .files import digest
from .kinds import kind_of
from .memory import MemoryStore
from .record import Retrofitted, find_retrofitted

FACTS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "layer_types", "sliding_window", "rope_parameters",
)  # fmt: skip
"""What is compared of a base model's config."""
SAMPLED, VALUES = 32, 8
"""Parameters of the base that are sampled, and values of each."""

DTYPES = {str(u).removeprefix("torch."): u for u in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
"""Those of weights that are sampled, by name."""
_OF_PEFT = re.compile(r"(lora|ia3|vera)_|modules_to_save")


class _Weight(NamedTuple):
    """A weight of a memory: the dictionary that holds it, and what it was like when it was last looked at."""

    holder: dict[str, Any]
    key: str
    value: Tensor
    address: int
    version: int | None

    @classmethod
    def of(cls, holder: dict[str, Any], key: str) -> "_Weight":
        u = holder[key]
        return cls(holder, key, u, _local(u).data_ptr(), None if u.is_inference() else u._version)

    def is_as_it_was(self) -> bool:
        u = self.value
        same = self.holder.get(self.key) is u and _local(u).data_ptr() == self.address
        return same and (u.is_inference() or u._version == self.version)


class _Known(NamedTuple):
    """An identity, and what it was computed from."""

    weights: list[_Weight]
    evictions: list[tuple[MemoryStore, nn.Module]]
    identity: str
    steps: int

    def holds(self) -> bool:
        same = self.steps == _optimizers.steps and all(store.eviction is known for store, known in self.evictions)
        return same and all(weight.is_as_it_was() for weight in self.weights)


class _Optimizers:
    """Counts the steps of all optimisers: fused ones change weights without changing their version counters."""

    def __init__(self) -> None:
        self.steps, self.watched = 0, False

    def watch(self) -> None:
        """Begin to count."""
        if not self.watched:
            self.watched = True
            register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1


_optimizers = _Optimizers()


_identities: "WeakKeyDictionary[Retrofitted, _Known]" = WeakKeyDictionary()
"""What is known of the models that were looked at."""


def base_fingerprint(model: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What identifies a base model, as JSON values: facts of its config, and a few of its weights.

    All processes that hold parts of a sharded model have to call it.

    Args:
        model: a transformers model, retrofitted or not.
        given: a state dict whose weights count instead of the model's.
    """
    parameters = dict(_base_parameters(model, given or {}))
    chosen = sorted(parameters, key=lambda name: hashlib.sha256(name.encode()).digest())[:SAMPLED]
    weights = {name: _sample(parameters[name]) for name in sorted(chosen)}
    return {"config": _facts(model), "weights": weights}


def differences(recorded: dict[str, Any], model: Any, *, facts: bool = True) -> Iterator[str]:
    """What tells a model from the base that a fingerprint was taken of, in words.

    Weights are compared in the coarser one of the two dtypes. Those that cannot be read here (quantized, offloaded,
    sharded) are left out.

    Args:
        recorded: what ``base_fingerprint`` returned.
        model: a transformers model, retrofitted or not.
        facts: False compares weights alone.
    """
    if facts:
        yield from _other_facts(recorded["config"], _facts(model))
    parameters = dict(_base_parameters(model))
    for name, sample in recorded["weights"].items():
        u = parameters.get(name)
        if u is None or hasattr(u, "full_tensor"):
            continue
        if list(u.shape) != sample["shape"]:
            yield f"{name} has shape {sample['shape']} there, {list(u.shape)} here"
        elif not _agree(sample, u):
            yield f"other values in {name}"


def memory_identity(model: nn.Module) -> str:
    """A text that is the same for the same memory weights: what a cache can only be continued with.

    It depends on values and dtypes, not on the device, the process or the window. It is computed anew after the weights
    have changed or an optimiser has made a step; until then a call compares addresses and version counters only, to
    which values that are written through ``parameter.data`` are no change.

    Args:
        model: a retrofitted model, or one that contains it.

    Returns:
        The dtype of the weights and a hexadecimal digest; the empty text where weights cannot be read (on the meta
        device, or offloaded), and where there is nothing but the window.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    inner, record = find_retrofitted(model)
    return identity_of(inner, record)


def identity_of(module: nn.Module, record: Retrofitted) -> str:
    """``memory_identity``, of whatever module the retrofitted blocks are in."""
    known = _identities.get(record)
    if known is not None and known.holds():
        return known.identity
    _optimizers.watch()
    steps = _optimizers.steps
    stores = [block.store for block in module.modules() if isinstance(block, HippocampalAttention)]
    weights: list[_Weight] = []
    named: list[tuple[str, Tensor]] = []
    without: list[str] = []
    for place, store in enumerate(stores):
        share = "" if store.split is None else f" {store.split.index} of {store.split.shares}"
        kind, before = f"{kind_of(store)} {place}{share}", len(named)
        for name, part in _parts(store):
            for holder in (part._parameters, part._buffers):
                for key in (key for key, u in holder.items() if u is not None):
                    weights.append(_Weight.of(holder, key))
                    named.append((f"{kind} {name} {key}", _local(holder[key])))  # type: ignore[arg-type]
        without += [] if len(named) > before or isinstance(store.eviction, FoldAll) else [kind]
    if any(u.is_meta for _, u in named):
        return ""
    dtype = weights[0].value.dtype if weights else None
    identity = f"{dtype} {digest(named, ', '.join(without))}" if named or without else ""
    _identities[record] = _Known(weights, [(store, store.eviction) for store in stores], identity, steps)
    return identity


def _parts(store: MemoryStore) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights make the states of a store: of the compressor and of the eviction."""
    if store.compressor is not None:
        yield from store.compressor.named_modules()
    yield from store.eviction.named_modules(prefix="eviction")


def _local(u: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    here: Tensor = u.to_local() if hasattr(u, "to_local") else u
    return here


def whole(u: Tensor) -> Tensor:
    """A tensor in one piece: FSDP2 shards it, and all processes gather it together."""
    gathered: Tensor = u.full_tensor() if hasattr(u, "full_tensor") else u
    return gathered


def _facts(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    values = config.to_dict()
    own = {name: values.get(config.attribute_map.get(name, name)) for name in FACTS}
    return {name: value for name, value in own.items() if value is not None}


def _other_facts(theirs: dict[str, Any], ours: dict[str, Any], within: str = "") -> Iterator[str]:
    """Facts that both have, and that differ; another version of transformers may know more of them."""
    for name in theirs.keys() & ours.keys():
        if isinstance(theirs[name], dict) and isinstance(ours[name], dict):
            yield from _other_facts(theirs[name], ours[name], f"{within}{name}.")
        elif theirs[name] != ours[name]:
            yield f"{within}{name}={theirs[name]!r} there, {ours[name]!r} here"


def _base_parameters(model: Any, given: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters that can be read, by their names in the bare decoder without PEFT."""
    memories = tuple(f"{n}.memory." for n, module in model.named_modules() if isinstance(module, HippocampalAttention))
    for name, own in model.named_parameters():
        u = given.get(name, own)
        readable = u.dtype in DTYPES.values() and not u.is_meta and u.numel()
        plain = type(u.data) is Tensor or hasattr(u, "full_tensor")  # other classes hold quantized weights
        if readable and plain and not name.startswith(memories) and not _OF_PEFT.search(name):
            name = re.sub(r"\.(base_layer|original_module)\.", ".", name)
            yield name.removeprefix(f"{model.base_model_prefix}."), u.detach()


def _sample(u: Tensor) -> dict[str, Any]:
    values = _values(whole(u)).double().tolist()
    dtype = str(u.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(u.shape), "values": " ".join(map(repr, values))}


def _values(u: Tensor) -> Tensor:
    """A few values, from the first to the last."""
    at = torch.linspace(0, 1, VALUES, dtype=torch.float64).mul(u.numel() - 1).long()
    return u[torch.unravel_index(at.to(u.device), u.shape)].cpu()


def _agree(sample: dict[str, Any], u: Tensor) -> bool:
    """Whether the values are the same but for the rounding of the coarser dtype."""
    recorded = torch.tensor([float(value) for value in sample["values"].split()], dtype=torch.float64)
    found, dtype = _values(u), DTYPES[sample["dtype"]]
    if torch.equal(recorded.to(u.dtype), found) or torch.equal(recorded, found.to(dtype).double()):
        return True
    if {dtype, u.dtype} != {torch.bfloat16, torch.float16}:  # of which neither contains the other
        return False
    return torch.allclose(recorded, found.double(), rtol=2**-7, atol=2**-24)
