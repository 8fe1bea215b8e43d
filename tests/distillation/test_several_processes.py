"""Training in two processes is training in one."""

import os
from pathlib import Path

import pytest
import torch

from ahn_layers import adapter_parameters, load_adapter, save_adapter
from ahn_layers.distillation import distillation_loss, use_window

from ..distilling import gradients, losses, small, text, trainer, weights


def meet(rank: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def sharded(rank: int, folder: str, device: str) -> None:
    from torch.distributed.fsdp import fully_shard

    meet(rank, folder, device)
    model = small(torch.float64).to(device)
    mesh = torch.distributed.device_mesh.init_device_mesh(device, (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with use_window(model, 7, 2):
        distillation_loss(model, text(4)[2 * rank : 2 * rank + 2].to(device), ce_weight=0.5).loss.backward()
    found = {name: p.grad.full_tensor().cpu() for name, p in adapter_parameters(model)}
    save_adapter(model, f"{folder}/adapter")
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.zero_()
    load_adapter(model, f"{folder}/adapter")
    loaded = {name: p.full_tensor().cpu() for name, p in adapter_parameters(model)}
    if rank == 0:
        torch.save((found, loaded), f"{folder}/result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_processes_with_fsdp2_are_one(device, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(sharded, (str(tmp_path), device), nprocs=2)
    model = small(torch.float64).to(device)
    with use_window(model, 7, 2):
        distillation_loss(model, text(4).to(device), ce_weight=0.5).loss.backward()
    both, loaded = torch.load(tmp_path / "result.pt")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(both[name], gradient.cpu(), rtol=1e-9, atol=1e-12)
    for name, value in weights(model).items():  # an adapter went out of the sharded model and back into it
        assert torch.equal(loaded[name], value.cpu()), name


def together(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    meet(rank, folder, "cpu")
    run = trainer(Path(folder) / "two", small(torch.float64), per_device_train_batch_size=1)
    run.train()
    metrics = run.evaluate()
    run.save_model(f"{folder}/adapter")
    if rank == 0:
        torch.save((weights(run.model), metrics, losses(run)), f"{folder}/result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_trainer_in_two_processes_is_one_with_twice_the_batch(tmp_path):
    """The same windows in both, other texts, one set of weights, and an evaluation of all texts."""
    torch.multiprocessing.spawn(together, (str(tmp_path),), nprocs=2)
    both, metrics, log = torch.load(tmp_path / "result.pt")
    run = trainer(tmp_path / "one", small(torch.float64), per_device_train_batch_size=2)
    run.train()
    assert log == pytest.approx(losses(run), rel=1e-6)
    for name, value in weights(run.model).items():
        torch.testing.assert_close(both[name], value, rtol=1e-6, atol=1e-9)
    expected = run.evaluate()
    assert {n: metrics[n] for n in expected} == pytest.approx(expected, rel=1e-5)
    assert load_adapter(small(), tmp_path / "adapter") is not None
