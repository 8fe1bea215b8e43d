"""One random memory store, fed one random text in random pieces: it has to equal the text read token by token."""

import copy
import pickle
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ahn_layers import FoldAll, MemoryState, MemoryStore, Rotary, SalientSlots, Window
from tests import oracle
from tests.methods import COMPRESSORS, BiggestKeys

LONGEST = 36
"""Tokens of the longest text: several times the window."""
TOLERANCE = 1e-9
ACTIONS = ("go on", "clone", "save", "pickle", "fork", "rows", "interrupt")
"""What happens to the state before a piece is read."""


class InterruptedError(Exception):
    """Raised in the middle of a call."""


class Interrupt(TorchDispatchMode):
    """Raises at the operation of this number.

    Args:
        number: how many operations run before.
        error: what is raised.
    """

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count down."""
        self.left -= 1
        if self.left < 0:
            raise self.error
        return function(*args, **(kwargs or {}))


@dataclass
class StoreCase:
    """What is tried; hypothesis prints it when it fails."""

    compressor: str
    shared: bool
    eviction: tuple[str, int, str, float, str]
    heads: tuple[int, int]
    sizes: tuple[int, int, int]
    rows: int
    window: tuple[int, int, str]
    rotation: tuple[bool, int, int, bool]
    memory_positions: str
    length: int
    padding: str
    cuts: list[int]
    actions: list[str]
    static: bool
    inplace: bool
    garbage: bool
    seed: int


@st.composite
def store_cases(draw: st.DrawFn) -> StoreCase:
    """Random shapes, windows, policies, rotations, paddings, cuttings, and what happens between the pieces."""
    length = draw(st.integers(1, LONGEST))
    cuts = draw(st.lists(st.integers(1, LONGEST), max_size=8))
    if draw(st.integers(0, 5)) == 0:
        cuts = list(range(1, length))
    rotates = draw(st.booleans())
    return StoreCase(
        compressor=draw(st.sampled_from(["", *(u.__name__ for u in COMPRESSORS)])),
        shared=draw(st.booleans()),
        eviction=(
            draw(st.sampled_from(["FoldAll", "BiggestKeys", "SalientSlots", "SalientSlots"])),
            draw(st.integers(0, 7)),
            draw(st.sampled_from(["learned", "recent", "key_norm", "value_norm"])),
            draw(st.sampled_from([0.0, 0.05, 3.0])),
            draw(st.sampled_from(["compact", "absolute"])),
        ),
        heads=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        sizes=(2 * draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 6))),
        rows=draw(st.integers(1, 3)),
        window=(
            draw(st.integers(1, 9)),
            draw(st.integers(0, 4)),
            draw(st.sampled_from(["trained", "streaming", "absolute"])),
        ),
        rotation=(rotates, draw(st.integers(1, 40)), draw(st.integers(0, 1)), draw(st.booleans())),
        memory_positions=draw(st.sampled_from(["absolute", "none"])) if rotates else "absolute",
        length=length,
        padding=draw(st.sampled_from(["none", "all real", "left", "right", "holes", "runs"])),
        cuts=sorted({cut for cut in cuts if cut < length}),
        actions=draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8)),
        static=draw(st.booleans()),
        inplace=draw(st.booleans()),
        garbage=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def make_store(case: StoreCase) -> MemoryStore:
    """The store, in float64, with a memory and scores that say something."""
    (groups, repeats), (d, e, n) = case.heads, case.sizes
    kind, slots, score, rate, positions = case.eviction
    compressor = eviction = rotary = None
    if case.compressor:
        cls = next(u for u in COMPRESSORS if u.__name__ == case.compressor)
        compressor = cls(n, groups * repeats, d, num_kv_heads=groups, value_dim=e, shared_state=case.shared)
    if kind == "BiggestKeys":
        eviction = BiggestKeys(slots)
    elif kind == "SalientSlots":
        made = SalientSlots(slots, score=score, rate=rate, positions=positions)  # type: ignore[arg-type]
        eviction = made.for_layer(hidden_size=n, num_kv_heads=groups, value_dim=e)
    rotates, trained, start, interleaved = case.rotation
    if rotates:
        pairs = max(1, d // 2 - start)
        inv_freq = 10.0 ** -torch.arange(0, 2, 2 / pairs, dtype=torch.float64)[:pairs]
        rotary = Rotary(inv_freq, trained, interleaved=interleaved, start=0 if d // 2 - start < 1 else 2 * start)
    store = MemoryStore(
        Window(case.window[0], case.window[1], case.window[2]),  # type: ignore[arg-type]
        compressor, rotary, eviction=eviction, memory_positions=case.memory_positions,  # type: ignore[arg-type]
    ).double()  # fmt: skip
    with torch.no_grad():
        for name, parameter in store.named_parameters():
            parameter.add_(0.4 * torch.randn_like(parameter) - (3 if "rate" in name else 0))
    return store


def make_valid(case: StoreCase) -> Tensor | None:
    """Which tokens are real."""
    rows, length = case.rows, case.length
    column, edge = torch.arange(length), torch.randint(0, length + 1, (rows, 1))
    made = {
        "none": None,
        "all real": torch.ones(rows, length, dtype=torch.bool),
        "left": column >= edge,
        "right": column < edge,
        "holes": torch.rand(rows, length) < torch.rand(rows, 1),
        "runs": (torch.rand(rows, length) < 0.2).cumsum(dim=1) % 2 == torch.randint(0, 2, (rows, 1)),
    }
    return made[case.padding]


def priority_of(store: MemoryStore, k: Tensor, v: Tensor, x: Tensor) -> Any:
    """What the oracle ranks tokens by, from the definition."""
    eviction = store.eviction
    if not isinstance(eviction, SalientSlots):
        return None
    if eviction.score == "learned":
        score = eviction.gates(x, k, v)["score"]
        assert eviction.learned is not None
        rate = eviction.learned.log_rate.exp()
        return lambda b, g, j, rank: float(score[b, g, j] + rate[g] * rank)
    score = {"recent": torch.zeros(k.shape[:3]), "key_norm": -k.norm(dim=-1), "value_norm": v.norm(dim=-1)}
    return lambda b, g, j, rank: float(score[eviction.score][b, g, j]) + eviction.rate * rank


def expected_of(store: MemoryStore, tokens: list[Tensor], valid: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Outputs and states by the oracle; None where it does not know the rotation."""
    if store.rotary is not None:
        return None
    window, eviction = store.window, store.eviction
    if isinstance(eviction, FoldAll) and store.compressor is not None and not store.compressor.shared_state:
        return oracle.memory_store(store.compressor, window.num_sinks, window.window_size, *tokens, valid)
    slots = 0 if isinstance(eviction, FoldAll) else eviction.num_slots
    return oracle.best_slots(
        store.compressor, window.num_sinks, window.window_size, slots, *tokens, valid,
        priority=priority_of(store, *tokens[1:]),
    )  # fmt: skip


def between(action: str, state: MemoryState, store: MemoryStore, part: list[Tensor], valid: Tensor | None) -> Any:
    """Something that must not change how a state goes on."""
    if action == "clone":
        return state.clone()
    if action == "save":
        with tempfile.TemporaryDirectory() as folder:
            state.save(f"{folder}/state", store)
            return MemoryState.load(f"{folder}/state", store=store)
    if action == "pickle":
        return pickle.loads(pickle.dumps(state))
    if action == "rows":
        order = torch.randperm(state.batch_size)
        return copy.deepcopy(state).reorder(order).reorder(order.argsort())
    if action == "fork":  # which goes its own way
        fork = state.clone()
        fork.inplace = True
        store(*(torch.randn_like(u) for u in part), fork, valid=valid)
    if action == "interrupt":
        state.inplace = False
        try:
            with Interrupt(int(torch.randint(0, 150, ())), InterruptedError()):
                store(*part, state, valid=valid)
        except InterruptedError:
            pass
    return state


@torch.no_grad()
def check_store(case: StoreCase) -> None:
    """Raise an AssertionError unless the text in pieces equals the text as a whole, and the oracle's answer."""
    torch.manual_seed(case.seed)
    store, valid = make_store(case), make_valid(case)
    (groups, repeats), (d, e, n) = case.heads, case.sizes
    heads = (groups * repeats, groups, groups)
    q, k, v = (
        torch.randn(case.rows, h, case.length, u, dtype=torch.float64) for h, u in zip(heads, (d, d, e), strict=True)
    )
    tokens = [q, k, v, torch.randn(case.rows, case.length, n, dtype=torch.float64)]
    if case.garbage and valid is not None:
        for u in tokens:
            u.masked_fill_(~(valid[:, None, :, None] if u.ndim == 4 else valid[..., None]), 1e30)
    whole, end = store(*tokens, valid=valid)
    state = store.init_state(store.arrive(*tokens[1:]).columns(0, 0), full=True) if case.static else None
    if state is not None and case.padding != "none" and case.static:
        state.padded = True
    outs = []
    for i, (a, b) in enumerate(zip([0, *case.cuts], [*case.cuts, case.length], strict=True)):
        part, mask = [u.narrow(-2, a, b - a) for u in tokens], None if valid is None else valid[:, a:b]
        if state is not None:
            action = case.actions[i % len(case.actions)]
            state = between(action, state, store, part, mask)
            state.inplace = case.inplace
        out, state = store(*part, state, valid=mask)
        outs.append(out)
    pieces = torch.cat(outs, dim=2)
    assert state is not None
    real = torch.ones(case.rows, case.length, dtype=torch.bool) if valid is None else valid
    close("pieces", pieces.transpose(1, 2)[real], whole.transpose(1, 2)[real])
    assert state.seen.tolist() == real.sum(dim=1).tolist()
    for name, u in end.tensors().items():
        mine = state.tensors()[name]
        assert case.static or mine.shape == u.shape or name.startswith(("k", "v", "gates")), name
        if name.startswith("memory"):
            close(name, mine, u)
    answer = expected_of(store, tokens, valid)
    if answer is not None:
        close("oracle", whole.transpose(1, 2)[real], answer[0].transpose(1, 2)[real])
        if isinstance(end.memory, Tensor):
            close("state of the oracle", end.memory, answer[1])
    elif valid is not None:  # the rotation follows ranks, so each row has to equal its real tokens alone
        for row in range(case.rows):
            if bool(valid[row].any()):
                alone = [u[row : row + 1].index_select(-2, valid[row].nonzero().flatten()) for u in tokens]
                close("row alone", whole[row, :, valid[row]], store(*alone)[0][0])


def close(what: str, found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = float((found - expected).abs().max()) if found.numel() else 0.0
    assert error <= TOLERANCE * max(1.0, float(expected.abs().max()) if found.numel() else 0.0), f"{what}: {error:.2g}"
