"""The stages in which a memory with slots learns what to keep, as ``learn_to_recall.py`` and ``train.py`` run them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planting import PlantedCrops
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ahn_layers import adapter_parameters
from ahn_layers.distillation import learn_scores, retrieval_heads, salient_slots

STAGE = "stage.pt"
"""The file that says how far a stage is."""
SAVED_EVERY = 25
"""Steps between two states of a stage that is resumed."""


def parameters_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """``scores`` and ``rates`` of the slots, and ``others``: the compressor."""
    found: dict[str, list[nn.Parameter]] = {"scores": [], "rates": [], "others": []}
    for name, parameter in adapter_parameters(model):
        kind = "rates" if name.endswith("log_rate") else "scores" if ".eviction." in name else "others"
        found[kind].append(parameter)
    return found


def answer_groups(model: nn.Module, decay: float = 0.01, lr: float = 2e-3) -> list[dict[str, Any]]:
    """What the last stage trains, with a learning rate for each kind.

    Args:
        model: a retrofitted model; parameters that need no gradient are left out.
        decay: weight decay of everything but the rates.
        lr: learning rate of the compressor.
    """
    rates = {"scores": 1e-3, "rates": 0.03, "others": lr}
    groups = [
        {"params": [p for p in own if p.requires_grad], "lr": rates[kind], "weight_decay": decay * (kind != "rates")}
        for kind, own in parameters_of(model).items()
    ]
    return [group for group in groups if group["params"]]


def steps(
    title: str,
    crops: PlantedCrops,
    batch: int,
    device: Any,
    *,
    groups: Sequence[dict[str, Any]] = (),
    workers: int = 0,
    folder: Path | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Batches with a progress bar; after each, a step of AdamW under a cosine schedule.

    Several processes take turns with the batches, and gradients are averaged.

    Args:
        title: of the progress bar.
        crops: ``batch`` of them for each step and process.
        batch: crops a step and process.
        device: where tensors go.
        groups: of the optimiser; none to change nothing.
        workers: processes that make crops.
        folder: where to write how far it is, and to go on from there.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    count = len(crops) // (batch * world)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = schedule = None
    if groups:
        optimizer = torch.optim.AdamW([dict(group) for group in groups])
        highest = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, count + 1, pct_start=0.1)
    state = Progress(folder, parameters, optimizer, schedule)
    done = state.load()
    mine = [i for i in range(done * batch * world, count * batch * world) if i // batch % world == rank]
    loader = DataLoader(Subset(crops, mine), batch, num_workers=workers, collate_fn=collate)
    bar = tqdm(loader, desc=title, unit=" steps", initial=done, total=count, disable=rank > 0)
    for step, items in enumerate(bar, done + 1):
        yield bar, {name: u.to(device) if isinstance(u, Tensor) else u for name, u in items.items()}
        if optimizer is None or schedule is None:
            continue
        if world > 1:
            average(parameters, world, everything=step == 1)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % SAVED_EVERY == 0 or step == count:
            state.save(step, rank)


def average(parameters: list[nn.Parameter], world: int, *, everything: bool) -> None:
    """Give all processes the mean of their gradients; ``everything``: and the parameters of the first one."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
        if everything:  # scores begin at the mean of their first batch
            dist.broadcast(parameter.data, 0)


class Progress:
    """How far a stage is, in a file: weights, optimiser, schedule and steps.

    Args:
        folder: where; None for nowhere.
        parameters: what is trained.
        optimizer: None if nothing is.
        schedule: likewise.
    """

    def __init__(self, folder: Path | None, parameters: list[nn.Parameter], optimizer: Any, schedule: Any) -> None:
        self.path = None if folder is None else folder / STAGE
        self.parameters, self.parts = parameters, {"optimizer": optimizer, "schedule": schedule}

    def load(self) -> int:
        """Go on from the file, if there is one; returns the steps done."""
        if self.path is None or not self.path.exists():
            return 0
        found = torch.load(self.path, map_location="cpu")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, found["parameters"], strict=True):
                parameter.copy_(value)
        for name, part in self.parts.items():
            part.load_state_dict(found[name])
        return int(found["step"])

    def save(self, step: int, rank: int) -> None:
        """Write the file; a crash meanwhile leaves the earlier one."""
        if self.path is None or rank > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "parameters": [p.detach().cpu() for p in self.parameters]}
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors side by side, lists as they are."""
    return {
        name: torch.stack([item[name] for item in items]) if isinstance(u, Tensor) else [item[name] for item in items]
        for name, u in items[0].items()
    }


def tensors(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors side by side, and nothing else."""
    return {name: u for name, u in collate(items).items() if isinstance(u, Tensor)}


def learn_attention(
    model: nn.Module, title: str, crops: PlantedCrops, batch: int, device: Any, **how: Any
) -> list[float]:
    """The second stage: scores learn the attention to come. Returns the error of each step.

    Args:
        model: a retrofitted model with learned scores.
        title: of the progress bar.
        crops: ``batch`` of them for each step and process.
        batch: crops a step and process.
        device: where they go.
        **how: as in ``steps``.
    """
    groups = [{"params": parameters_of(model)["scores"], "lr": 2e-3, "weight_decay": 0.01}]
    errors: list[float] = []
    for bar, items in steps(title, crops, batch, device, groups=groups, **how):
        errors.append(learn_scores(model, items["input_ids"]).mean().item())
        bar.set_postfix(error=f"{mean(errors[-20:]):.3f}")
    return errors


def find_heads(model: nn.Module, title: str, crops: PlantedCrops, batch: int, device: Any, **how: Any) -> Tensor | None:
    """How much each head looks facts up.

    Returns:
        What ``retrieval_heads`` found, the mean over all crops, or None if no crop asks for anything.
    """
    scores = [policy.learned for policy in salient_slots(model) if policy.learned is not None]
    total, number = torch.zeros(len(scores), len(scores[0].log_rate), device=device), torch.zeros(1, device=device)
    for bar, items in steps(title, crops, batch, device, **how):
        asked = [[(a.value, a.answer) for a in row] for row in items["asked"]]
        if any(asked):
            total, number = total + retrieval_heads(model, items["input_ids"], asked), number + 1
            bar.set_postfix(best=f"{float(total.max() / number):.2f}")
    if dist.is_available() and dist.is_initialized():  # also where this process had no question
        dist.all_reduce(total)
        dist.all_reduce(number)
    return total / number if float(number) else None


def mean(values: list[float]) -> float:
    """Of at least one number."""
    return sum(values) / len(values)
