"""The contract of compressors as assertions, for your subclass and for ours."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..compressor import Compressor, State, map_state
from ..memory import MemoryStore
from ..ops.decode.rule import follow
from ..rank_one import DiagonalPlusRankOne
from ..recurrent import Recurrent
from ..tokens import per_head
from ..window import Window

_B, _H, _G, _D, _N, _T = 2, 4, 2, 8, 12, 41  # more tokens than a chunk of the scans here


def check_compressor(compressor: type[Compressor], **options: Any) -> None:
    """Run the contract of [`Compressor`][ahn_layers.Compressor] on a class, in float64 on the CPU.

    Checked: gates and fold agree on names and shapes; folding leaves the old state alone and keeps its size; ``scan``
    equals ``fold`` and ``read`` one by one, values and gradients, without a mask, with one per row and with one per
    key/value head; a fresh memory adds exactly nothing; through a store, any cutting of a sequence gives the same
    result and padding changes nothing; ``rule``, if there is one, says the same as ``fold``, ``read`` and ``output``;
    gradients reach every parameter.

    Args:
        compressor: the class.
        **options: passed to its constructor.

    Raises:
        AssertionError: with what was expected, what was found, and where to look.
        TypeError: if ``compressor`` is no class.

    Examples:
        >>> from ahn_layers import Compressor, outer
        >>> class Average(Compressor):
        ...     def fold(self, state, k, v):
        ...         return 0.99 * state + outer(k, v)
        >>> check_compressor(Average)
    """
    if not isinstance(compressor, type):
        raise TypeError(
            f"compressor=<{type(compressor).__name__} object>: expected the class; pass the options of its "
            "constructor beside it."
        )
    _check_constructor(compressor, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = compressor(_N, _H, _D, num_kv_heads=_G, **options).double()
        x = torch.randn(_B, _T, _N, dtype=torch.float64)
        q = torch.randn(_B, _H, _T, _D, dtype=torch.float64)
        k, v = (torch.randn(_B, _G, _T, _D, dtype=torch.float64) for _ in range(2))
        _check_gates(memory, x)
        _check_fold(memory, k, v, x)
        _check_untrained(memory, q, k, v, x)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        _check_scan(memory, q, k, v, x)
        _check_splits(memory, q, k, v, x)
        _check_rule(memory, q, k, v, x)
        _check_padding(memory, q, k, v, x)
        _check_gradients(memory, q, k, v, x)


def _check_constructor(compressor: type[Compressor], options: dict[str, Any]) -> None:
    sizes = dict.fromkeys(("hidden_size", "num_heads", "head_dim", "num_kv_heads", "value_dim"))
    try:
        inspect.signature(compressor).bind(**sizes, **options)
    except TypeError as error:
        raise AssertionError(
            f"{compressor.__name__}(...) cannot be made with all sizes by name ({error}): take them and hand them on, "
            "def __init__(self, *sizes, decay=0.9, **others): super().__init__(*sizes, **others)."
        ) from error


def _check_gates(memory: Compressor, x: Tensor) -> None:
    gates = memory.gates(x)
    assert isinstance(gates, dict), f"gates(x) is of type {type(gates).__name__}, expected tensors by name in a dict."
    where, taken = "fold", list(inspect.signature(memory.fold).parameters)[3:]
    if isinstance(memory, Recurrent) and memory.declared:
        where, taken = "recurrence", memory.recurrence().gates
    if isinstance(memory, DiagonalPlusRankOne) and type(memory).fold is DiagonalPlusRankOne.fold:
        where, taken = "transition", list(inspect.signature(memory.transition).parameters)[2:]
    assert sorted(gates) == sorted(taken), (
        f"gates(x) returns {sorted(gates)}, {where} takes {sorted(taken)}: use the same names in both."
    )
    for name, gate in gates.items():
        expected = (_B, memory.num_states, _T)
        assert gate.shape[:3] == expected and gate.ndim in (3, 4), (
            f"gates(x)[{name!r}] has shape {tuple(gate.shape)}, expected (batch, num_states, tokens) = {expected}, or "
            "that with the size of a vector after it."
        )


def _check_fold(memory: Compressor, k: Tensor, v: Tensor, x: Tensor) -> None:
    state = memory.init_state(_B, k.new_zeros(()))
    assert isinstance(state, Tensor | dict), (
        f"init_state is of type {type(state).__name__}, expected a tensor, or several by name in a dict."
    )
    for name, u in _named(state):
        assert u.dim() >= 1 and u.shape[0] == _B, (
            f"init_state{name} has shape {tuple(u.shape)}, expected batch {_B} first."
        )
        assert u.dtype == k.dtype, f"init_state{name} is {u.dtype}, expected the dtype of its argument, {k.dtype}."
    before = map_state(torch.clone, state)
    folded = _fold(memory, state, k, v, memory.gates(x), 0)
    for (name, old), (_, kept), (_, new) in zip(_named(state), _named(before), _named(folded), strict=True):
        assert torch.equal(old, kept), (
            f"fold changed the state{name} it was given: return a new tensor, no in-place ops."
        )
        assert new.shape == old.shape and new.dtype == old.dtype, (
            f"fold turned state{name} from {tuple(old.shape)} {old.dtype} into {tuple(new.shape)} {new.dtype}: "
            "a memory has a fixed size and dtype."
        )


def _check_untrained(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    window = Window(5, num_sinks=2)
    out, plain = MemoryStore(window, memory)(q, k, v, x)[0], MemoryStore(window)(q, k, v)[0]
    assert torch.equal(out, plain), (
        f"a fresh memory changes the output by {float((out - plain).abs().max().detach()):.2g}, expected exactly 0: "
        "end output() with a projection whose weight starts at zero, as self.o_proj does."
    )


def _check_scan(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    masks = [None, torch.rand(_B, _T) < 0.7]
    if all(u.shape[1:2] == (memory.num_states,) for _, u in _named(memory.init_state(_B, k.new_zeros(())))):
        masks.append(torch.rand(_B, _G, _T) < 0.7)  # of an eviction
    for mask in masks:
        results = []
        for scan in (memory.scan, memory.loop):
            inputs = [u.clone().requires_grad_() for u in (q, k, v, x)]
            gates = memory.gates(inputs[3])
            state = memory.init_state(_B, k.new_zeros(()))
            r, state = scan(state, inputs[0], inputs[1], inputs[2], gates, mask)
            r = r if mask is None else r * per_head(mask, r)
            ends = [u for _, u in _named(state)]
            total = sum((u.square().sum() for u in ends), start=r.square().sum())
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
            results.append(
                [r, *ends, *(torch.zeros_like(u) if g is None else g for u, g in zip(inputs, gradients, strict=True))]
            )
        names = ["readings", *(f"state{name}" for name, _ in _named(state)), *(f"gradient of {n}" for n in "qkvx")]
        for name, fast, slow in zip(names, *results, strict=True):
            error = float(((fast - slow).abs().max() / slow.abs().max().clamp(min=1e-9)).detach())
            where = "" if mask is None else " with a mask" if mask.ndim == 2 else " with a mask per key/value head"
            assert error < 1e-8, (
                f"scan{where}: {name} differ from fold and read one by one by {error:.2g} (relative), expected < 1e-8."
            )


def _check_splits(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    store = MemoryStore(Window(5, num_sinks=2), memory)
    whole, end = store(q, k, v, x)
    for cuts in ([1] * _T, [6, 1, 1, 3, _T - 11], [7, _T - 7]):
        outs, state, start = [], None, 0
        for size in cuts:
            part = slice(start, start + size)
            out, state = store(q[:, :, part], k[:, :, part], v[:, :, part], x[:, part], state)
            outs.append(out)
            start += size
        error = float((torch.cat(outs, dim=2) - whole).abs().max().detach())
        assert error < 1e-8, (
            f"cut into {cuts} the output differs by {error:.2g} from one pass: output() must not mix tokens."
        )
        for (name, one), (_, other) in zip(_named(end.memory), _named(state.memory), strict=True):  # type: ignore[arg-type,union-attr]
            error = float((one - other).abs().max().detach())
            assert error < 1e-8, f"cut into {cuts} the state{name} differs by {error:.2g} from one pass."


def _check_rule(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    head, last = slice(0, _T - 1), slice(_T - 1, _T)
    rule = memory.rule(x[:, last]) if memory.rule_holds else None
    if rule is None:
        return
    with torch.no_grad():
        gates = memory.gates(x)
        before, one = ({name: u[:, :, part] for name, u in gates.items()} for part in (head, last))
        state = memory.loop(
            memory.init_state(_B, k.new_zeros(())), q[:, :, head], k[:, :, head], v[:, :, head], before
        )[1]
        assert isinstance(state, Tensor), "rule() describes memories of one tensor: return None."
        reading, after = memory.loop(state, q[:, :, last], k[:, :, last], v[:, :, last], one)
        out, found, folded = follow(rule, state, q[:, :, last], k[:, :, last], v[:, :, last], one)
        out = memory.output(found, x[:, last]) if out is None else out
        expected = memory.output(reading, x[:, last])
    for name, mine, other in (("output", out, expected), ("state", folded, after)):
        error = float((mine - other).abs().max())  # type: ignore[operator]
        assert error < 1e-8, f"rule(): the {name} of a step differs from fold, read and output by {error:.2g}."


def _check_padding(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    store = MemoryStore(Window(5, num_sinks=2), memory)
    valid = torch.rand(_B, _T) < 0.8
    valid[:, 0] = True
    out, state = store(q, k, v, x, valid=valid)
    for row in range(_B):
        real = valid[row].nonzero().squeeze(1)
        mine = slice(row, row + 1)
        alone, end = store(q[mine, :, real], k[mine, :, real], v[mine, :, real], x[mine, real])
        error = float((out[mine, :, real] - alone).abs().max().detach())
        assert error < 1e-8, f"a padded row differs from the same row alone by {error:.2g}: rows must not mix."
        for (name, padded), (_, single) in zip(_named(state.memory), _named(end.memory), strict=True):  # type: ignore[arg-type]
            assert torch.allclose(padded[mine], single), f"state{name} of a padded row differs from the same row alone."


def _check_gradients(memory: Compressor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    out, _ = MemoryStore(Window(5, num_sinks=2), memory)(q, k, v, x)
    out.square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches the parameter {name!r}: use it, or make it a buffer."
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name!r} is not finite."


def _fold(memory: Compressor, state: State, k: Tensor, v: Tensor, gates: dict[str, Tensor], t: int) -> State:
    repeats = memory.num_states // _G
    k, v = (u.repeat_interleave(repeats, dim=1) for u in (k, v))
    folded: State = memory.fold(state, k[:, :, t], v[:, :, t], **{name: gate[:, :, t] for name, gate in gates.items()})
    return folded


def _named(state: State) -> list[tuple[str, Tensor]]:
    return [("", state)] if isinstance(state, Tensor) else [(f"[{name!r}]", state[name]) for name in sorted(state)]
