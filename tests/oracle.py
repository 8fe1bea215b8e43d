"""What a memory store computes, written once more: token by token, row by row, straight from the paper.

Shares no code with the library but a compressor's gates, read and output where ``fold`` is not the subject, and the
recurrences below where it is.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ahn_layers import (
    GLA,
    KDA,
    RWKV7,
    AveragePooling,
    Compressor,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    Mamba2,
    MaxPooling,
    RetNet,
    Titans,
)
from ahn_layers.compressor import map_state


def normal(u: Tensor) -> Tensor:
    """``u / sqrt(|u|^2 + 1e-6)``."""
    return u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def outer(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("hd,he->hde", k, v)


def stored(state: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("hde,hd->he", state, k)


def vectors(linear, x: Tensor) -> Tensor:
    """What a projection through a few numbers per state gives, ``(H, D)``."""
    numbers = (linear.down.weight @ x).view(len(linear.bias), 1, -1)
    return (numbers @ linear.up + linear.bias)[:, 0]


def fold(memory: Compressor, state, k: Tensor, v: Tensor, x: Tensor):
    """One token into the state of a row: ``k (H, D)``, ``v (H, E)``, ``state (H, D, E)`` or what the memory keeps."""
    kind = type(memory)
    if kind in (AveragePooling, MaxPooling):
        return [*state, (k, v)]
    if kind is Mamba2:
        dt = F.softplus(memory.dt_proj.weight @ x + memory.dt_proj.bias + memory.dt_bias)
        unit = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return torch.exp(-dt * memory.A_log.exp())[:, None, None] * state + outer(unit, dt[:, None] * v)
    if kind is GatedDeltaProduct:
        g = -memory.A_log.exp() * F.softplus(memory.a_proj.weight @ x + memory.dt_bias)
        state, beta = g.exp()[:, None, None] * state, 2 * torch.sigmoid(memory.b_proj.weight @ x).view(-1, 2)
        second = [torch.einsum("hd,hde->he", u, w[:, 0]) for u, w in ((k, memory.more_keys), (v, memory.more_values))]
        for i, (key, value) in enumerate(((k, v), second)):
            reflection = torch.eye(k.shape[1], dtype=k.dtype) - beta[:, i, None, None] * outer(normal(key), normal(key))
            state = reflection @ state + beta[:, i, None, None] * outer(normal(key), value)
        return state
    k = normal(k)
    if kind is LinearAttention:
        return state + outer(k, v)
    if kind is RetNet:
        gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(len(k))], dtype=k.dtype)
        return gamma[:, None, None] * state + outer(k, v)
    if kind is GLA:
        return torch.sigmoid(vectors(memory.a_proj, x)).pow(1 / 16)[..., None] * state + outer(k, v)
    if kind is RWKV7:
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(vectors(memory.w_proj, x)))
        a = torch.sigmoid(vectors(memory.a_proj, x))
        erased = normal(k * memory.k_erased[:, 0])
        written = k * (1 + (a - 1) * memory.k_written[:, 0])
        identity = torch.eye(k.shape[1], dtype=k.dtype)
        transition = w[..., None] * identity - outer(a * erased, erased)  # as one matrix, from the left
        return transition @ state + outer(written, v)
    if kind is Titans:
        matrix, momentum = state
        alpha = torch.sigmoid(memory.a_proj.weight @ x + memory.dt_bias)[:, None, None]
        eta = torch.sigmoid(memory.m_proj.weight @ x)[:, None, None]
        theta = torch.sigmoid(memory.b_proj.weight @ x)[:, None, None] * (1 - eta) ** 2 / (1 + eta)
        slope = outer(k, stored(matrix, k) - v)  # of |S^T k - v|^2 / 2
        momentum = eta * momentum - theta * slope
        return (1 - alpha) * matrix + momentum, momentum
    assert kind in (DeltaNet, GatedDeltaNet, KDA)
    if kind is GatedDeltaNet:
        g = -memory.A_log.exp() * F.softplus(memory.a_proj.weight @ x + memory.dt_bias)
        state = g.exp()[:, None, None] * state
    if kind is KDA:
        state = torch.exp(-F.softplus(vectors(memory.a_proj, x)))[..., None] * state
    beta = torch.sigmoid(memory.b_proj.weight @ x)
    return state + outer(k, beta[:, None] * (v - stored(state, k)))


def read(memory: Compressor, state, q: Tensor) -> Tensor:
    """What each query ``(H, D)`` gets."""
    size = math.sqrt(q.shape[-1])
    if isinstance(memory, AveragePooling):
        return read_pool(memory, state, q)
    if isinstance(memory, Mamba2):
        return stored(state, q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    state = state[0] if isinstance(memory, Titans) else state
    return stored(state, normal(q) if isinstance(memory, LinearAttention) else normal(q) / size)


def pools(memory: Compressor, tokens: list) -> list[tuple[Tensor, Tensor, int]]:
    """Keys, values and number of tokens of every pool there has been."""
    groups = [tokens[i : i + memory.rate] for i in range(0, len(tokens), memory.rate)]
    pool = (lambda u: u.amax(0)) if isinstance(memory, MaxPooling) else (lambda u: u.mean(0))
    return [(*(pool(torch.stack(u)) for u in zip(*group, strict=True)), len(group)) for group in groups]


def read_pool(memory: Compressor, tokens: list, q: Tensor) -> Tensor:
    found = pools(memory, tokens)
    open_ones = [u for u in found if u[2] < memory.rate]
    slots = [u for u in found if u[2] == memory.rate][-memory.num_slots :] + open_ones
    keys, values = (torch.stack([u[i] for u in slots], dim=1) for i in (0, 1))
    weights = (torch.einsum("hd,hnd->hn", q, keys) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("hn,hne->he", weights, values)


def first_state(memory: Compressor, q: Tensor, size: int):
    """Before any token: of queries ``(H, T, D)`` and values of a size."""
    empty = q.new_zeros(len(q), q.shape[-1], size)
    if isinstance(memory, AveragePooling):
        return []
    return (empty, empty) if isinstance(memory, Titans) else empty


def as_carried(memory: Compressor, state, like: Tensor, size: int):
    """The state of a row in the tensors that the library carries."""
    if isinstance(memory, Titans):
        return dict(zip(("memory", "momentum"), state, strict=True))
    if not isinstance(memory, AveragePooling):
        return state
    groups, repeats = memory.num_kv_heads, len(like) // memory.num_kv_heads
    found = pools(memory, state)
    full, rest = [u for u in found if u[2] == memory.rate][-memory.num_slots :], found and found[-1]
    sizes = {"keys": like.shape[-1], "values": size}
    held = {n: like.new_zeros(groups, memory.num_slots, width) for n, width in sizes.items()}
    held |= {f"open_{n}": like.new_zeros(groups, width) for n, width in sizes.items()}
    opened = rest[2] % memory.rate if rest else 0
    for i, name in enumerate(sizes):
        for place, u in enumerate(full, memory.num_slots - len(full)):
            held[name][:, place] = u[i][::repeats]
        if opened:
            held[f"open_{name}"] = rest[i][::repeats] * (1 if isinstance(memory, MaxPooling) else opened)
    count = {"filled": len(full), "opened": opened}
    return held | {name: torch.full((groups,), n, dtype=like.dtype) for name, n in count.items()}


def recurrence(memory: Compressor, state, q: Tensor, k: Tensor, v: Tensor, x_j: Tensor, x_t: Tensor):
    """One token folded and one query answered, per row: ``q (H, D)``, ``k (H, D)``, ``v (H, E)``.

    Written from the equations, with the parameters taken from the module; one state per query head.
    """
    state = fold(memory, state, k, v, x_j)
    r = read(memory, state, q)
    if isinstance(memory, Mamba2):
        y = (r * F.silu(memory.g_proj.weight @ x_t + memory.g_proj.bias)[:, None]).flatten()
        y = (y / (y.square().mean() + 1e-5).sqrt() * memory.norm.weight).view_as(r)
        return state, torch.einsum("he,hef->hf", y, memory.o_proj.weight)
    r = r / (r.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if not isinstance(memory, LinearAttention):
        r = r * memory.o_norm.weight * F.silu(memory.g_proj.weight @ x_t)[:, None]
    return state, torch.einsum("he,hef->hf", r, memory.o_proj.weight)


def stacked(states: list):
    """Rows side by side."""
    if isinstance(states[0], dict):
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return torch.stack(states)


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
    ahead: Tensor | None = None,
):
    """Outputs ``(B, H, T, E)`` and final states as the library carries them, ``(B, H, D, E)`` for one matrix.

    Each softmax also takes in a head's null logit, if there are any; queries see tokens up to the column ``ahead``.

    A query where ``valid`` is False sees what the last real token saw; its output is zero if there was none.
    """
    batch, heads, length, _ = q.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    k, v = (u.repeat_interleave(heads // u.shape[1], dim=1) for u in (k, v))
    out, states = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), []
    for b in range(batch):
        tokens = valid[b].nonzero().flatten().tolist()
        state = before = first_state(memory, q[b], v.shape[-1])
        for t in range(length):
            p = sum(j <= t for j in tokens) - 1
            if p < 0:
                continue
            seen = [j for i, j in enumerate(tokens[: p + 1]) if i < num_sinks or i > p - window_size]
            seen += [] if ahead is None else [j for j in tokens if t < j <= ahead[b, t]]
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
        states.append(as_carried(memory, state, q[b, :, 0], v.shape[-1]))
    return out, stacked(states)


def best_slots(
    memory: Compressor | None,
    num_sinks: int,
    window_size: int,
    num_slots: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    valid: Tensor | None = None,
    priority: Callable[[int, int, int, int], float] | None = None,
):
    """``memory_store`` in which every key/value head keeps, of the tokens that left the window, those of largest keys.

    For one state per query head, or, where they are shared, per key/value head; or for none. Another ``priority`` is a
    function of row, key/value head, column and rank; of equal ones the older token stays.
    """
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    repeats, shared = heads // groups, memory is not None and memory.num_states == groups
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    states = q.new_zeros(0) if memory is None else memory.init_state(batch, q.new_zeros(()))
    named = states if isinstance(states, dict) else {"": states}
    gates = {} if memory is None else memory.gates(x)
    worth = priority or (lambda b, g, j, rank: float(k[b, g, j].norm()))
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
                    gone = min(kept[g], key=lambda j, g=g, b=b, t=tokens: (worth(b, g, j, t.index(j)), -j))
                    kept[g].remove(gone)
                    ever[readers] = True
                    one = {name: gate[row, :, gone] for name, gate in gates.items()}
                    mine = slice(g, g + 1) if shared else readers
                    if memory is not None:
                        every = [u[row, :, gone].repeat_interleave(memory.num_states // groups, 1) for u in (k, v)]
                        folded = memory.fold(map_state(lambda u, row=row: u[row].clone(), states), *every, **one)
                        for name, u in (folded if isinstance(folded, dict) else {"": folded}).items():
                            named[name][b, mine] = u[0, mine]
                seen = window + kept[g]
                logits = q[b, readers, t] @ k[b, g, seen].T / math.sqrt(q.shape[-1])
                out[b, readers, t] = logits.softmax(-1) @ v[b, g, seen]
            if memory is not None:
                held = map_state(lambda u, row=row: u[row], states)
                added = memory.output(memory.read(held, q[row, :, t]).unsqueeze(2), x[row, t : t + 1])
                out[b, :, t] += added[0, :, 0] * ever[:, None]
    return out, states
