"""Evictions: the contract, and a running choice of the best tokens against one made token by token."""

from itertools import pairwise

import pytest
import torch

from ahn_layers import (
    FoldAll,
    GatedDeltaNet,
    MemoryState,
    MemoryStore,
    SoftmaxAttention,
    Window,
    check_compressor,
    check_eviction,
    empty_slots,
    keep_best,
)
from ahn_layers.eviction import RANK
from ahn_layers.fingerprint import memory_identity
from ahn_layers.ops.slots.top_slots import running_top
from ahn_layers.tokens import Leaving, Tokens

from .. import oracle
from ..methods import COMPRESSORS, EVICTIONS, OPTIONS, BiggestKeys
from ..models import retrofitted

B, H, G, D, E, N, T = 2, 4, 2, 8, 6, 10, 26
SINKS, WINDOW = 2, 5


def make(compressor=COMPRESSORS[0], eviction=None, **options):
    """A store in float64 whose memory contributes, and tokens for it."""
    memory = compressor(N, H, D, num_kv_heads=G, value_dim=E, **OPTIONS.get(compressor, {}) | options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shapes = ((H, T, D), (G, T, D), (G, T, E), (T, N))
    inputs = [torch.randn(B, *shape, dtype=torch.float64) for shape in shapes]
    return MemoryStore(Window(WINDOW, num_sinks=SINKS), memory, eviction=eviction), inputs


def run(store, inputs, cuts=(), valid=None, inplace=False, state=None):
    outs = []
    with torch.no_grad():
        for a, b in pairwise([0, *cuts, inputs[0].shape[2]]):
            mask = None if valid is None else valid[:, a:b]
            if state is not None:
                state.inplace = inplace
            out, state = store(*(u[..., a:b, :] for u in inputs), state, valid=mask)
            outs.append(out)
    return torch.cat(outs, dim=2), state


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_the_contract(eviction):
    cls, options = EVICTIONS[eviction]
    check_eviction(cls, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shared_state", [False, True])
@pytest.mark.parametrize(
    "compressor, num_slots", [*((u, 1) for u in COMPRESSORS), *((GatedDeltaNet, n) for n in (0, 4, T))]
)
def test_any_cutting_equals_the_oracle(compressor, shared_state, num_slots, padded):
    store, inputs = make(compressor, BiggestKeys(num_slots), shared_state=shared_state)
    valid = torch.rand(B, T) < 0.7 if padded else None
    expected, states = oracle.best_slots(store.compressor, SINKS, WINDOW, num_slots, *inputs, valid)
    for cuts in ([], range(1, T), [3, 7, 8, 20, 21]):
        for inplace in (False, True) if cuts else (False,):
            out, state = run(store, inputs, list(cuts), valid, inplace)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(state.memory, states, rtol=0, atol=1e-10)


def test_no_slots_fold_everything_and_slots_for_all_lose_nothing():
    store, inputs = make(eviction=BiggestKeys(0))
    plain = MemoryStore(store.window, store.compressor)
    torch.testing.assert_close(run(store, inputs)[0], run(plain, inputs)[0], rtol=0, atol=1e-12)
    everything = MemoryStore(store.window, store.compressor, eviction=BiggestKeys(T))
    q, k, v, _ = inputs
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out, state = run(everything, inputs, [9])
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    assert not state.memory.any()


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": 0.1}], ids=str)
def test_scale_and_softcap_reach_the_slots(options):
    store, inputs = make(eviction=BiggestKeys(T))
    full, attention = MemoryStore(Window(T), None), SoftmaxAttention(**options)
    with torch.no_grad():
        expected, _ = full(*inputs, attention=attention)
        out, _ = store(*inputs, attention=attention)
        head, state = store(*(u[..., :15, :] for u in inputs), attention=attention)
        outs = [head]
        for t in range(15, T):
            one, state = store(*(u[..., t : t + 1, :] for u in inputs), state, attention=attention)
            outs.append(one)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slots", [0, 1, 5])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_the_running_choice_equals_one_made_token_by_token(slots, chunk, monkeypatch):
    """With ties, gaps, infinities and numbers that are none."""
    monkeypatch.setattr("ahn_layers.ops.slots.top_slots._CHUNK", {"cpu": chunk})
    count, rows, heads = 60, 2, 3
    priority = torch.randint(0, 9, (rows, heads, count)).double()
    priority[priority == 8], priority[priority == 7] = float("nan"), float("-inf")
    where = torch.rand(rows, heads, count) < 0.7
    held, filled = torch.zeros(rows, heads, slots).double(), torch.zeros(rows, heads, dtype=torch.long)
    lost_at, loser, kept, filled = _top(held, filled, priority, where)
    for b in range(rows):
        for h in range(heads):
            mine, value = [], priority[b, h].nan_to_num(nan=float("-inf"), neginf=float("-inf"))
            for t in range(count):
                lost = slots + count
                if where[b, h, t]:
                    mine.append(t)
                    if len(mine) > slots:
                        worst = min(value[i] for i in mine)
                        lost = max(i for i in mine if value[i] == worst)
                        mine.remove(lost)
                        assert lost_at[b, h, slots + lost] == t
                        lost += slots
                assert loser[b, h, t] == lost
            assert kept[b, h, : len(mine)].tolist() == [slots + i for i in mine] and filled[b, h] == len(mine)
            assert (lost_at[b, h, [slots + i for i in mine]] == count).all()


@pytest.mark.parametrize("slots", [0, 1, 4])
def test_one_arrival_equals_the_first_of_two(slots):
    """A single arrival has a shorter way; with ties, infinities, empty slots, and rows where none arrives."""
    for _ in range(100):
        filled = torch.randint(0, slots + 1, (2, 3))
        held, new = torch.randint(0, 5, (2, 3, slots)).double(), torch.randint(0, 7, (2, 3, 1)).double()
        held[held == 0] = float("-inf")
        new[new == 5], new[new == 6] = float("nan"), float("inf")
        where = torch.rand(2, 3, 1) < 0.7
        lost_at, loser, kept, now = _top(held, filled, new, where)
        nothing = torch.zeros_like(where)
        expected = _top(held, filled, torch.cat((new, new), dim=2), torch.cat((where, nothing), dim=2))
        assert torch.equal(now, expected[3])
        assert torch.equal(loser[..., 0], expected[1][..., 0].clamp(max=slots + 1))
        assert torch.equal(lost_at, expected[0][:, :, : slots + 1].clamp(max=1))
        there = torch.arange(slots) < now.unsqueeze(2)
        assert torch.equal(kept[there], expected[2][there])


def test_mistakes_are_named(unchecked):
    store, inputs = make(eviction=BiggestKeys(3))
    _, state = run(store, inputs)
    for other in (None, BiggestKeys(4)):
        with pytest.raises(ValueError, match="continue it with a store of the same eviction"):
            MemoryStore(store.window, store.compressor, eviction=other)(*inputs, state)
    with pytest.raises(ValueError, match="num_slots=-1"):
        make(eviction=BiggestKeys(-1))[0](*inputs)
    with pytest.raises(ValueError, match="priority returned"):
        keep_best(empty_slots(state.slots, 2), _leaving(state.slots), lambda t: t.k.norm(dim=(1, 3)))


def _top(held, filled, arriving, where):
    """Tokens in the order in which they came."""
    priority = torch.cat((held, arriving), dim=2)
    return running_top(priority, torch.arange(priority.shape[2]).expand(priority.shape), filled, where)


def _leaving(slots):
    from ahn_layers.tokens import Leaving

    return Leaving.of(0, slots, None, torch.arange(len(slots)))


def test_files_of_states_from_before_evictions_load(tmp_path):
    store, inputs = make()
    _, state = run(store, inputs)
    tensors, description = state.tensors(), state.description()
    assert not any(name.startswith("kept.") for name in tensors) and "kept" not in description
    loaded = MemoryState.from_tensors(tensors, description)
    assert torch.equal(store(*inputs, loaded)[0], store(*inputs, state)[0])


def test_a_score_rides_beside_the_tokens():
    """An eviction's own gates are kept with the tokens, and the compressor does not see them."""

    class Rated(BiggestKeys):
        def gates(self, x, k, v):
            return {"score": x[..., :1].transpose(1, 2).expand(-1, G, -1)}

        def push(self, kept, leaving):
            return keep_best(kept, leaving, lambda t: t.gates["eviction.score"])

    store, inputs = make(eviction=Rated(3))
    whole, _ = run(store, inputs)
    out, state = run(store, inputs, range(1, T), inplace=True)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-10)
    left = inputs[3][:, SINKS : T - WINDOW, 0]
    torch.testing.assert_close(state.kept["gates.eviction.score"][:, 0].sort().values, left.sort().values[:, -3:])


def test_without_memory_leaves_out_an_eviction_that_was_assigned():
    store = MemoryStore(Window(WINDOW, num_sinks=SINKS))
    assert store.without_memory() is store
    store.eviction = BiggestKeys(3)
    _, inputs = make()
    q, k, v, x = inputs
    plain, state = store.without_memory()(q, k, v)
    assert not state.kept and torch.equal(plain, MemoryStore(store.window)(q, k, v)[0])
    assert not torch.equal(plain, store(q, k, v, x)[0])


def test_memory_identity_covers_the_weights_of_an_eviction():
    def made(seed):
        model = retrofitted()
        for module in model.modules():
            if isinstance(module, MemoryStore):
                module.eviction = BiggestKeys(3)
                module.eviction.score = torch.nn.Parameter(torch.full((2,), float(seed)))
        return model

    assert memory_identity(made(1)) == memory_identity(made(1)) != memory_identity(made(2))


def test_fold_all_is_the_default():
    store, inputs = make()
    assert isinstance(store.eviction, FoldAll) and not list(store.eviction.parameters())
    assert not run(store, inputs)[1].kept


@pytest.mark.parametrize("size", [1, 13])
def test_whole_numbers_are_compared_exactly(size):
    """Beyond 2^24, where float32 rounds them."""
    tokens, rank = Tokens(*torch.randn(2, B, G, 13, D), {}), torch.arange(13) + (1 << 40)
    kept = empty_slots(tokens, 4)
    for a in range(0, 13, size):
        leaving = Leaving.of(0, tokens.columns(a, a + size), None, rank[a : a + size])
        _, _, kept = keep_best(kept, leaving, lambda u: u.gates[RANK])
    assert torch.equal(kept[f"gates.{RANK}"].sort(dim=2).values, rank[-4:].expand(B, G, 4))


def test_a_class_is_checked_and_no_object(unchecked):
    for check, made in ((check_eviction, FoldAll()), (check_compressor, GatedDeltaNet(8, 2, 4))):
        with pytest.raises(TypeError, match="expected the class"):
            check(made)
