"""Which heads of a model this process holds, where transformers has split it over several (``tp_plan``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..split import INSTEAD, Split
from .trial import AttentionCall


def group_of(model: nn.Module) -> Any:
    """The process group over which a model, or the one that it is a part of, is split; None if it is not."""
    mesh: Any = None
    if (getattr(model, "tp_size", None) or 1) > 1:
        mesh = model._device_mesh
    else:
        mesh = next((u.device_mesh for u in model.parameters() if hasattr(u, "device_mesh")), None)
    if mesh is None or (mesh is not getattr(model, "_device_mesh", None) and _is_fsdp(model)):
        return None
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def _is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model: each process computes with whole weights then."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def find_splits(group: Any, calls: Sequence[AttentionCall]) -> list[Split | str]:
    """How the heads of each attention block are split; every process of the group has to call it.

    Heads that are the same in all processes are not split, others are.

    Args:
        group: the processes that share the model.
        calls: of the attention function in each block, for the same tokens in all processes.

    Returns:
        The split of each block, or why its memory cannot be split.
    """
    shares = torch.distributed.get_world_size(group)
    theirs: list[Any] = [None] * shares
    mine = [tuple(u[:, :, -1].float().cpu() for u in (call.q, call.k)) for call in calls]
    torch.distributed.all_gather_object(theirs, mine, group=group)
    index = torch.distributed.get_rank(group)
    return [_find_split([each[i] for each in theirs], index, group) for i in range(len(mine))]


def _find_split(theirs: list[tuple[Tensor, Tensor]], index: int, group: Any) -> Split | str:
    queries, keys = zip(*theirs, strict=True)
    if any(len({u.shape for u in one}) > 1 for one in (queries, keys)):
        return "has another number of heads in each of the processes that it is split over (tp_plan)"
    whole = [all(torch.allclose(u, one[0], rtol=1e-2, atol=1e-3) for u in one) for one in (queries, keys)]
    if all(whole):
        return Split(0, 1, group)
    if any(whole):
        return (
            "has its query heads split over several processes and its key/value heads not, or the other way round "
            f"(tp_plan): {INSTEAD}"
        )
    return Split(index, len(theirs), group)


def why_unsplit(model: Any) -> str:
    """Why a model that is split cannot run, as far as its config tells: heads that cannot be shared."""
    group = group_of(model)
    if group is None:
        return ""
    config, shares = model.config.get_text_config(decoder=True), torch.distributed.get_world_size(group)
    for kind, name in (("query", "num_attention_heads"), ("key/value", "num_key_value_heads")):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % shares:
            return f"{heads} {kind} heads cannot be shared equally by {shares} processes (tp_plan), use another number"
    return ""
