"""Stores with random weights, and tokens for them."""

from itertools import pairwise

import torch

from ahn_layers import GatedDeltaNet, MemoryStore, Window

from .methods import OPTIONS

WINDOWS = [(0, 1), (1, 3), (4, 8), (4, 5), (0, 8)]  # sinks, window


B, H, G, D, E, N, T = 2, 4, 2, 8, 6, 10, 31


def make(compressor=GatedDeltaNet, sinks=4, window=8, **options):
    """A store in float64 whose memory contributes, and tokens for it."""
    memory = None
    if compressor is not None:
        options = OPTIONS.get(compressor, {}) | options
        memory = compressor(N, H, D, num_kv_heads=G, value_dim=E, **options).double()
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    shapes = ((H, T, D), (G, T, D), (G, T, E), (T, N))
    tokens = [torch.randn(B, *shape, dtype=torch.float64) for shape in shapes]
    return MemoryStore(Window(window, num_sinks=sinks), memory), tokens


def run(store, tokens, cuts, valid=None, state=None, inplace=False, **options):
    """The sequence cut at the given places, one call a piece; ``inplace`` without gradients."""
    if inplace:
        with torch.no_grad():
            return _run(store, tokens, cuts, valid, state, True, **options)
    return _run(store, tokens, cuts, valid, state, False, **options)


def _run(store, tokens, cuts, valid, state, inplace, **options):
    q, k, v, x = tokens
    outs = []
    for a, b in pairwise([0, *cuts, q.shape[2]]):
        mask = None if valid is None else valid[:, a:b]
        if state is not None:
            state.inplace = inplace
        out, state = store(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], x[:, a:b], state, valid=mask, **options)
        outs.append(out)
    return torch.cat(outs, dim=2), state


def tensors_of(memory):
    """Those of a compressor's state, in a fixed order."""
    return [memory[name] for name in sorted(memory)] if isinstance(memory, dict) else [memory]


def per_state(name, u):
    """A weight of a memory with one state per key/value head, for one with a state per query head."""
    of_states = ("A_log", "dt_bias", "a_proj", "b_proj", "m_proj", "w_proj", "dt_proj", "more_keys", "more_values")
    if name.split(".")[0] not in (*of_states, "k_erased", "k_written"):
        return u
    rows = u.unflatten(0, (G, -1)) if u.ndim == 2 or name.endswith("weight") else u.unsqueeze(1)
    return rows.repeat_interleave(H // G, dim=0).flatten(0, 1)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
