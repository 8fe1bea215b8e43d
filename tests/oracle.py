"""What a memory store computes, written once more: token by token, row by row, straight from the paper.

Shares no code with the library but a compressor's gates, read and output where ``fold`` is not the subject, and the
recurrences below where it is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn_layers import Compressor, DeltaNet, GatedDeltaNet, LinearAttention, Mamba2


def recurrence(memory: Compressor, state: Tensor, q: Tensor, k: Tensor, v: Tensor, x_j: Tensor, x_t: Tensor):
    """One token folded and one query answered, per row: ``q (H, D)``, ``k (H, D)``, ``v (H, E)``, ``state (H, D, E)``.

    Written from the equations, with the parameters taken from the module; one state per query head.
    """
    head_dim = q.shape[-1]
    normalise = lambda u: u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    if isinstance(memory, Mamba2):
        unit = lambda u: u / u.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        dt = F.softplus(memory.dt_proj.weight @ x_j + memory.dt_proj.bias + memory.dt_bias)
        decay = torch.exp(-dt * memory.A_log.exp())
        state = decay[:, None, None] * state + torch.einsum("hd,he->hde", unit(k), dt[:, None] * v)
        r = torch.einsum("hde,hd->he", state, unit(q))
        y = (r * F.silu(memory.g_proj.weight @ x_t + memory.g_proj.bias)[:, None]).flatten()
        y = (y / (y.square().mean() + 1e-5).sqrt() * memory.norm.weight).view_as(r)
        return state, torch.einsum("he,hef->hf", y, memory.o_proj.weight)
    k, q = normalise(k), normalise(q)
    if isinstance(memory, LinearAttention):
        state = state + torch.einsum("hd,he->hde", k, v)
        r = torch.einsum("hde,hd->he", state, q)
        r = r / (r.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return state, torch.einsum("he,hef->hf", r, memory.o_proj.weight)
    assert isinstance(memory, DeltaNet | GatedDeltaNet)
    if isinstance(memory, GatedDeltaNet):
        g = -memory.A_log.exp() * F.softplus(memory.a_proj.weight @ x_j + memory.dt_bias)
        state = g.exp()[:, None, None] * state
    beta = torch.sigmoid(memory.b_proj.weight @ x_j)
    error = v - torch.einsum("hde,hd->he", state, k)
    state = state + torch.einsum("hd,he->hde", k, beta[:, None] * error)
    r = torch.einsum("hde,hd->he", state, q / math.sqrt(head_dim))
    r = r / (r.square().mean(-1, keepdim=True) + 1e-5).sqrt() * memory.o_norm.weight
    return state, torch.einsum("he,hef->hf", r * F.silu(memory.g_proj.weight @ x_t)[:, None], memory.o_proj.weight)


def memory_store(
    memory: Compressor,
    num_sinks: int,
    window_size: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    valid: Tensor | None = None,
    null_logits: Tensor | None = None,
):
    """Outputs ``(B, H, T, E)`` and final states ``(B, H, D, E)``; each softmax also takes in a head's null logit.

    A query where ``valid`` is False sees what the last real token saw; its output is zero if there was none.
    """
    batch, heads, length, _ = q.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    k, v = (u.repeat_interleave(heads // u.shape[1], dim=1) for u in (k, v))
    out, states = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), []
    for b in range(batch):
        tokens = valid[b].nonzero().flatten().tolist()
        state = before = q.new_zeros(heads, q.shape[-1], v.shape[-1])
        for t in range(length):
            p = sum(j <= t for j in tokens) - 1
            if p < 0:
                continue
            seen = [j for i, j in enumerate(tokens[: p + 1]) if i < num_sinks or i > p - window_size]
            logits = torch.einsum("hd,hjd->hj", q[b, :, t], k[b][:, seen]) / math.sqrt(q.shape[-1])
            weights = logits.exp()
            total = weights.sum(-1, keepdim=True)
            total = total if null_logits is None else total + null_logits.exp().unsqueeze(-1)
            y = torch.einsum("hj,hje->he", weights / total, v[b][:, seen])
            if p >= num_sinks + window_size:
                j = tokens[p - window_size]
                before = state if valid[b, t] else before
                state, added = recurrence(memory, before, q[b, :, t], k[b, :, j], v[b, :, j], x[b, j], x[b, t])
                y = y + added
            out[b, :, t] = y
        states.append(state)
    return out, torch.stack(states)


def best_slots(
    memory: Compressor,
    num_sinks: int,
    window_size: int,
    num_slots: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    valid: Tensor | None = None,
):
    """``memory_store`` in which every key/value head keeps, of the tokens that left the window, those of largest keys.

    For one state per query head, or, where they are shared, per key/value head.
    """
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    repeats, shared = heads // groups, memory.shared_state
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    states = q.new_zeros(batch, groups if shared else heads, q.shape[-1], v.shape[-1])
    gates = memory.gates(x)
    for b in range(batch):
        tokens, row = valid[b].nonzero().flatten().tolist(), slice(b, b + 1)
        kept, ever = [[] for _ in range(groups)], torch.zeros(heads, dtype=torch.bool)
        for t in range(length):
            p = sum(j <= t for j in tokens) - 1
            if p < 0:
                continue
            window = [j for i, j in enumerate(tokens[: p + 1]) if i < num_sinks or i > p - window_size]
            for g in range(groups):
                readers = slice(g * repeats, (g + 1) * repeats)
                if p >= num_sinks + window_size and valid[b, t]:
                    kept[g].append(tokens[p - window_size])
                if len(kept[g]) > num_slots:
                    gone = min(kept[g], key=lambda j, g=g: float(k[b, g, j].norm()))
                    kept[g].remove(gone)
                    one = {name: gate[row, :, gone] for name, gate in gates.items()}
                    every = [u[row, :, gone].repeat_interleave(states.shape[1] // groups, 1) for u in (k, v)]
                    mine = slice(g, g + 1) if shared else readers
                    states[b, mine] = memory.fold(states[row].clone(), *every, **one)[0, mine]
                    ever[readers] = True
                seen = window + kept[g]
                logits = q[b, readers, t] @ k[b, g, seen].T / math.sqrt(q.shape[-1])
                out[b, readers, t] = logits.softmax(-1) @ v[b, g, seen]
            added = memory.output(memory.read(states[row], q[row, :, t]).unsqueeze(2), x[row, t : t + 1])
            out[b, :, t] += added[0, :, 0] * ever[:, None]
    return out, states
