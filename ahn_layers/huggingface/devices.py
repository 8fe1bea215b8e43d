"""On which device a model is."""

import torch
from torch import nn


def only_device(model: nn.Module) -> torch.device | None:
    """Where all of the model's parameters are, None if they are on several devices, or offloaded."""
    devices = {u.device for u in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
