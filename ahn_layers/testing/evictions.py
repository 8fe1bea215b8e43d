"""The contract of evictions as assertions, for your subclass and for ours."""

import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..compressors import GatedDeltaNet
from ..eviction import Eviction
from ..evictions.salient_slots import PRIORITY
from ..memory import MemoryStore
from ..ops.attention.between import Between
from ..state import MemoryState
from ..tokens import Later, Leaving, Tokens
from ..window import Window

_B, _H, _G, _D, _N, _T = 2, 4, 2, 8, 12, 29


def check_eviction(eviction: type[Eviction], **options: Any) -> None:
    """Run the contract of [`Eviction`][ahn_layers.Eviction] on a class, in float64 on the CPU.

    Checked: after every arrival each token that left the window is either seen or folded, exactly once, and as it came;
    what is carried has a fixed size and is never changed in place; key/value heads do not depend on each other;
    ``contest``, if there is one, decides as ``push`` does; through a store, any cutting of a sequence gives the same
    result, values and gradients, padding changes nothing, and a state that was saved goes on as if it had not been.

    Args:
        eviction: the class.
        **options: passed to its constructor.

    Raises:
        AssertionError: with what was expected, what was found, and where to look.
        TypeError: if ``eviction`` is no class.

    Examples:
        >>> from ahn_layers import FoldAll
        >>> check_eviction(FoldAll)
    """
    if not isinstance(eviction, type):
        raise TypeError(
            f"eviction=<{type(eviction).__name__} object>: expected the class; pass the arguments of its "
            "constructor beside it."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": _N, "num_heads": _H, "num_kv_heads": _G, "head_dim": _D, "value_dim": _D}
        policy = eviction(**options).for_layer(**sizes).double()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        x = torch.randn(_B, _T, _N, dtype=torch.float64)
        q = torch.randn(_B, _H, _T, _D, dtype=torch.float64)
        k, v = (torch.randn(_B, _G, _T, _D, dtype=torch.float64) for _ in range(2))
        _check_once(policy, k, v, x)
        _check_heads(policy, k, v, x)
        _check_contest(policy, k, v, x)
        compressor = GatedDeltaNet(_N, _H, _D, num_kv_heads=_G).double()
        with torch.no_grad():
            for parameter in compressor.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        store = MemoryStore(Window(5, num_sinks=2), compressor, eviction=policy)
        _check_cutting(store, q, k, v, x)
        _check_rows(store, q, k, v, x)
        _check_saving(store, q, k, v, x)


def _leaving(policy: Eviction, k: Tensor, v: Tensor, x: Tensor) -> Leaving:
    gates = {f"eviction.{name}": gate for name, gate in policy.gates(x, k, v).items()}
    for name, gate in gates.items():
        assert gate.shape == k.shape[:3], (
            f"gates(x, k, v)[{name.split('.')[1]!r}] has shape {tuple(gate.shape)}, expected (batch, key/value heads, "
            f"tokens) = {tuple(k.shape[:3])}."
        )
    return Leaving.of(0, Tokens(k, v, gates), None, torch.arange(_T))


def _check_once(policy: Eviction, k: Tensor, v: Tensor, x: Tensor) -> None:
    number = torch.arange(1.0, _T + 1, dtype=torch.float64)
    v = v.clone()
    v[..., 0] = number  # a name for each token
    everything = _leaving(policy, k, v, x)
    kept, folded = policy.init_kept(everything.tokens), torch.zeros(_B, _G, _T + 1, dtype=torch.long)
    for start, stop in ((0, 1), (1, 9), (9, _T)):
        before = {name: u.clone() for name, u in kept.items()}
        tokens = everything.tokens.columns(start, stop)
        pushed = policy.push(kept, Leaving.of(0, tokens, None, torch.arange(start, stop)))
        parts, kinds = pushed if isinstance(pushed, tuple) else (pushed,), (Between | None, Leaving, dict)
        assert len(parts) == 3 and all(map(isinstance, parts, kinds)), (
            f"push returned {', '.join(type(u).__name__ for u in parts)}: expected what queries see (Between, or "
            "None), what is folded (Leaving, as it was given or from Leaving.of) and what is carried (dict)."
        )
        seen, gone, after = pushed
        assert all(torch.equal(u, before[name]) for name, u in kept.items()), (
            "push changed what it was given: return new tensors, no in-place ops."
        )
        shapes = [{name: (tuple(u.shape), u.dtype) for name, u in held.items()} for held in (before, after)]
        assert shapes[0] == shapes[1], f"push turned {shapes[0]} into {shapes[1]}: what is carried has a fixed size."
        for name, u in after.items():
            held_bytes, needed = u.untyped_storage().nbytes(), u.numel() * u.element_size()
            assert held_bytes <= needed, (
                f"push returned {name!r} as a view of a tensor of {held_bytes} bytes, of which it needs {needed}: the "
                "state would hold all of them. Return a copy, u.clone()."
            )
        where = torch.ones(_B, _G, stop - start, dtype=torch.bool) if gone.where is None else gone.where
        names = (gone.tokens.v[..., 0] * where).long()
        own = {"k": gone.tokens.k, "v": gone.tokens.v}
        own |= {name: gone.tokens.gates[name].unsqueeze(3) for name in everything.tokens.gates}
        _check_unchanged("folded", own, everything.tokens, where)
        for i in range(stop - start):
            folded.scatter_add_(2, names[:, :, i : i + 1], torch.ones_like(folded[:, :, :1]))
            held = torch.zeros_like(folded)
            if seen is not None:
                shown = (seen.first <= i) & (i < seen.last)
                held.scatter_add_(2, (seen.v[..., 0] * shown).long(), shown.long())
                assert int(shown.sum(dim=2).max()) <= seen.most, f"more than most={seen.most} tokens are seen at once."
                _check_unchanged("seen", {"k": seen.k, "v": seen.v}, everything.tokens, shown)
            total = (held + folded)[:, :, 1:]
            expected = (number <= start + i + 1).long()
            assert torch.equal(total, expected.expand_as(total)), (
                f"after {start + i + 1} arrivals the tokens are seen or folded {total[0, 0].tolist()} times, expected "
                f"{expected.tolist()}: each exactly once, from its arrival on."
            )
        kept = after


def _check_unchanged(how: str, tensors: dict[str, Tensor], tokens: Tokens, where: Tensor) -> None:
    """What is seen or folded of the tokens, which ``v`` names, is what arrived."""
    index = (tensors["v"][..., :1].long() - 1).clamp(min=0)
    for name, u in tensors.items():
        whole = getattr(tokens, name) if name in ("k", "v") else tokens.gates[name].unsqueeze(3)
        came = whole.gather(2, index.expand(*index.shape[:3], whole.shape[3]))
        assert torch.equal(u[where], came[where].to(u)), (
            f"{name} of tokens that are {how} differ from what arrived: pass them on as they came."
        )


def _check_heads(policy: Eviction, k: Tensor, v: Tensor, x: Tensor) -> None:
    others = [torch.cat((u[:, :1], torch.randn_like(u[:, 1:])), dim=1) for u in (k, v)]
    found = []
    for keys, values in ((k, v), others):
        leaving = _leaving(policy, keys, values, x)
        _, gone, kept = policy.push(policy.init_kept(leaving.tokens), leaving)
        where = torch.ones(_B, _G, _T, dtype=torch.bool) if gone.where is None else gone.where
        found.append([(gone.tokens.v * where.unsqueeze(3))[:, 0], *(u[:, 0] for u in kept.values() if u.ndim > 1)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)), (
        "what a key/value head keeps or passes on depends on keys or values of another: heads must not mix."
    )


def _check_contest(policy: Eviction, k: Tensor, v: Tensor, x: Tensor) -> None:
    everything = _leaving(policy, k, v, x)
    kept = policy.init_kept(everything.tokens)
    for t in range(_T):
        token = everything.tokens.columns(t, t + 1)
        contest = policy.contest(Later(lambda token=token: token))  # type: ignore[misc]
        if contest is None:
            return
        assert f"gates.{PRIORITY}" in kept, (
            f"contest(), and no {PRIORITY!r} beside the kept tokens: keep each one's priority there, as SalientSlots "
            "does, or return None."
        )
        score = contest.given if contest.score is None else token.gates[contest.score]
        rate = contest.rate if contest.log_rate is None else contest.log_rate.exp().unsqueeze(1)
        assert score is not None, "contest(): expected the score of the token, as given or as the name of a gate."
        priority = torch.cat((kept[f"gates.{PRIORITY}"], (score + rate * t).to(k.dtype)), dim=2)
        is_full = kept["filled"] == priority.shape[2] - 1
        least = priority.sort(dim=2).values[..., :2]
        plain = is_full & (least[..., 1:] - least[..., :1] > 1e-4).all(dim=2)  # the kernel computes in float32
        _, gone, kept = policy.push(kept, Leaving.of(0, token, None, torch.tensor([t])))
        lost = torch.ones_like(is_full) if gone.where is None else gone.where[..., 0]
        is_new = (gone.tokens.k == token.k).all(dim=3)[..., 0]
        loses = priority.argmin(dim=2) == priority.shape[2] - 1
        assert torch.equal(lost, is_full) and torch.equal(is_new[plain], loses[plain]), (
            "contest() decides otherwise than push: on a GPU the kernel of a decode step goes by contest(). Say the "
            "same in both, or return None."
        )


def _call(
    store: MemoryStore, tensors: Iterable[Tensor], state: MemoryState | None = None, valid: Tensor | None = None
) -> tuple[Tensor, MemoryState]:
    q, k, v, x = tensors
    return store(q, k, v, x, state, valid=valid)


def _run(store: MemoryStore, tensors: list[Tensor], cuts: list[int]) -> tuple[Tensor, Any]:
    outs, state, start = [], None, 0
    for size in cuts:
        out, state = _call(store, (u.narrow(-2, start, size) for u in tensors), state)
        outs.append(out)
        start += size
    return torch.cat(outs, dim=2), state


def _check_cutting(store: MemoryStore, *tensors: Tensor) -> None:
    inputs = [u.clone().requires_grad_() for u in tensors]
    results = []
    for cuts in ([_T], [1] * _T, [6, 1, 1, 3, _T - 11], [7, _T - 7]):
        out, state = _run(store, inputs, cuts)
        total = out.square().sum() + state.memory.square().sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        assert all(g is not None and torch.isfinite(g).all() for g in gradients), "gradients do not reach every token."
        results.append((out, state.memory, *gradients))
        for one, whole in zip(results[-1], results[0], strict=True):
            error = float((one - whole).abs().max().detach())  # type: ignore[operator]
            assert error < 1e-8, (
                f"cut into {cuts} outputs, state or gradients differ by {error:.2g} from one pass: a priority must "
                "depend on its token alone, and push on nothing but what it is given and what it carried."
            )


def _check_rows(store: MemoryStore, *tensors: Tensor) -> None:
    valid = torch.rand(_B, _T) < 0.8
    valid[:, 0] = True
    with torch.no_grad():
        out, state = _call(store, tensors, valid=valid)
        for row in range(_B):
            real = valid[row].nonzero().squeeze(1)
            alone, end = _call(store, (u[row : row + 1].index_select(-2, real) for u in tensors))
            error = float((out[row : row + 1, :, real] - alone).abs().max())
            assert error < 1e-8, f"a padded row differs from the same row alone by {error:.2g}: rows must not mix."
            for name, u in end.tensors().items():
                assert torch.allclose(state.tensors()[name][row : row + 1].to(u), u), (
                    f"{name} of a padded row differs from the same row alone."
                )


def _check_saving(store: MemoryStore, *tensors: Tensor) -> None:
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, state = _call(store, (u.narrow(-2, 0, _T - 5) for u in tensors))
        state.save(f"{folder}/state.safetensors")
        rest = [u.narrow(-2, _T - 5, 5) for u in tensors]
        loaded = MemoryState.load(f"{folder}/state.safetensors")
        expected, found = (_call(store, rest, s)[0] for s in (state, loaded))
    assert torch.equal(found, expected), "a state that was saved and loaded goes on differently."
