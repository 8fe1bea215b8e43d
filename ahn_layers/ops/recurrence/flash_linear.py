"""Kernels of flash-linear-attention (https://github.com/fla-org/flash-linear-attention) where they serve.

Its tensors are ``(B, T, H, D)``, with one state per query head.
"""

import math
import sys
from typing import Any

from torch import Tensor


def channel_scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scan of that name in kernels; readings come in the dtype of ``k``."""
    shared = q.shape[1] // state.shape[1]
    q, k, v, g = _per_query(q, k, v, g)
    options = {"scale": 1.0, "initial_state": _per_head(state, shared), "output_final_state": True}
    if beta is None:
        from fla.ops.gla import chunk_gla

        r, after = chunk_gla(q, k, v, g, **options)
    else:
        from fla.ops.kda import chunk_kda

        strength = beta.float().repeat_interleave(shared, dim=1).transpose(1, 2).contiguous()
        r, after = chunk_kda(q, k, v, g, strength, **options)
    return r.transpose(1, 2), after[:, ::shared].contiguous()


def rank_one_scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan of that name in kernels; readings come in the dtype of ``k``."""
    from fla.ops.rwkv7 import chunk_rwkv7

    shared = q.shape[1] // state.shape[1]
    a, b = (_per_time(u.to(k.dtype), q.shape[1]) for u in (a, b))
    q, k, v, g = _per_query(q, k, v, g)
    options = {"scale": 1.0, "initial_state": _per_head(state, shared), "output_final_state": True}
    r, after = chunk_rwkv7(q, g, k, v, a, b, **options)
    return r.transpose(1, 2), after[:, ::shared].contiguous()


def _per_query(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All as the kernels take them, one of each per query head; log decays in float32."""
    heads = q.shape[1]
    return _per_time(q, heads), _per_time(k, heads), _per_time(v.to(k.dtype), heads), _per_time(g.float(), heads)


def _per_time(u: Tensor, heads: int) -> Tensor:
    return u.repeat_interleave(heads // u.shape[1], dim=1).transpose(1, 2).contiguous()


def _per_head(state: Tensor, shared: int) -> Tensor:
    return state.repeat_interleave(shared, dim=1).contiguous()


def without_autotuning() -> int:
    """Let the kernels of this process run in one configuration each, instead of the fastest of many.

    Finding that takes minutes at the first call, since each configuration is compiled: worth it for hours of training,
    not for a short run. Call it before the first scan.

    Returns:
        How many kernels had a choice.

    Raises:
        ImportError: if flash-linear-attention or Triton is missing.
    """
    import fla.ops.gla
    import fla.ops.kda
    import fla.ops.rwkv7  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    kernels = {}
    for name, module in list(sys.modules.items()):
        for kernel in list(vars(module).values()) if name.startswith("fla.") and module is not None else ():
            while hasattr(kernel, "fn"):  # heuristics and the tuner lie around the kernel, in either order
                if isinstance(kernel, Autotuner) and len(kernel.configs) > 1:
                    kernels[id(kernel)] = kernel
                kernel = kernel.fn
    for kernel in kernels.values():
        kernel.configs = [min(kernel.configs, key=_moderate)]
    return len(kernels)


def _moderate(config: Any) -> float:
    """How far a configuration is from four warps, two stages and tiles of 64."""
    distance = abs(math.log2(config.num_warps) - 2) + abs(config.num_stages - 2)
    return distance + sum(
        abs(math.log2(size) - 6) for size in config.kwargs.values() if isinstance(size, int) and size > 0
    )
