"""Python between compiled code. Imported where it runs, since it imports PyTorch's compiler."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="tokens are folded one by one, since the compressor has no scan of its own: override scan, or leave out "
    "fullgraph=True"
)
def uncompiled(scan: Callable[..., Any], *args: Any) -> Any:
    """The scan of many tokens, token by token: a compiler would repeat its code for each of them."""
    return scan(*args)
