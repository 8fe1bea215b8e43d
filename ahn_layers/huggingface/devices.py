"""On which device a model is."""

import torch
from torch import nn


def only_device(model: nn.Module) -> torch.device | None:
    """Where all of the model's parameters are, None if on several devices, offloaded, or in other processes too."""
    devices = {None if hasattr(u, "device_mesh") else u.device for u in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
