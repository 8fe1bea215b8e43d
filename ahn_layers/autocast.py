"""What ``torch.autocast`` means for a store: attention in its dtype; the memory chooses its own dtypes."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def as_autocast(u: Tensor) -> Tensor:
    """A query, key or value in the dtype of attention under autocast."""
    device = u.device.type
    if device == "meta" or u.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return u
    return u.to(torch.get_autocast_dtype(device))


def outside_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a ``forward(self, q, k, v, ...)`` without autocast, with the queries, keys and values that it asks for."""

    @wraps(forward)
    def run(self: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = q.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return forward(self, q, k, v, *args, **kwargs)
        q, k, v = (as_autocast(u) for u in (q, k, v))
        with torch.autocast(device, enabled=False):
            return forward(self, q, k, v, *args, **kwargs)

    return run
