"""What a type checker says of calls: ``test_package.py`` runs mypy on this file, nothing runs it."""

import torch
from typing_extensions import assert_type

from ahn_layers import GatedDeltaNet, HippocampalAttention, MemoryState, MemoryStore, Window

store = MemoryStore(Window(16, num_sinks=2), GatedDeltaNet(hidden_size=32, num_heads=4, head_dim=8))
q = k = v = torch.randn(1, 4, 10, 8)
x = torch.randn(1, 10, 32)

out, state = store(q, k, v, x)
assert_type(out, torch.Tensor)
assert_type(state, MemoryState)
out, state = store(q, k, v, x, state, valid=torch.ones(1, 10, dtype=torch.bool))

y, after = HippocampalAttention(torch.nn.Identity(), store)(x, state)
assert_type(after, MemoryState)

store(q, k)  # type: ignore[call-arg]
store(q, k, v, x, state=x)  # type: ignore[arg-type]
