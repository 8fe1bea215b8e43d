"""Salient slots: against a computation token by token, in retrofitted models, in files, and what may not be asked."""

import pytest
import torch

from ahn_layers import (
    FoldAll,
    GatedDeltaNet,
    HippocampalAttention,
    HippocampalCache,
    MemoryStore,
    Rotary,
    SalientSlots,
    Window,
    adapter_parameters,
    load_adapter,
    memory_report,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.distillation import distillation_loss, freeze_base, soft_slots, use_window

from ..methods import KINDS, BiggestKeys
from ..models import FAMILIES, base, generate, logits, retrofitted, tokens

B, H, G, D, N, T = 2, 4, 2, 8, 10, 40
SINKS, WINDOW = 2, 5
FREQUENCIES = 10.0 ** -torch.arange(0, 2, 0.5, dtype=torch.float64)
SCORES = ("learned", "recent", "key_norm", "value_norm", "key_difference")


def rotate(u, position):
    """``(..., D)`` rotated to a position each."""
    angle = torch.as_tensor(position, dtype=torch.float64)[..., None] * FREQUENCIES
    a, b = u.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def policy(num_slots, **options):
    """A policy in float64 whose score, if it is learned, says something."""
    made = SalientSlots(num_slots, **options).for_layer(hidden_size=N, num_kv_heads=G, value_dim=D).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4 - (3 if "rate" in name else 0))
    return made


def token_by_token(eviction, q, k, v, x):
    """Outputs of a store without a compressor, from queries and keys that are not rotated; and what each head keeps."""
    out, kept = torch.zeros(B, H, T, D, dtype=torch.float64), {}
    rank = torch.arange(T)
    gates = eviction.gates(x, rotate(k, rank), v)
    if eviction.score == "learned":
        score = gates.get("score", 0) + eviction.learned.rate[:, None] * rank
    else:
        score = {"recent": torch.zeros(B, G, T), "key_norm": -k.norm(dim=-1), "value_norm": v.norm(dim=-1)}
        score["key_difference"] = -torch.ones(B, G, T).double()
        for p in range(SINKS, T):
            unit = [u / u.norm(dim=-1, keepdim=True) for u in rotate(k, rank)[:, :, SINKS : p + 1].unbind(2)]
            score["key_difference"][:, :, p] = -torch.cosine_similarity(unit[-1], sum(unit), dim=-1)
        rates = torch.tensor(eviction.rate, dtype=torch.float64).expand(G)[:, None]
        score = score[eviction.score] + rates * rank
    score = score.expand(B, G, T)
    for b in range(B):
        for g in range(G):
            mine, refused, left_out = [], 0, {}
            for p in range(T):
                if p - WINDOW >= SINKS:
                    new = p - WINDOW
                    mine.append(new)
                    if len(mine) > eviction.num_slots:
                        worst = min(score[b, g, j] for j in mine)
                        lost = max(j for j in mine if score[b, g, j] == worst)
                        mine.remove(lost)
                        refused += lost == new
                    left_out[new] = refused
                near = [j for j in range(p + 1) if j < SINKS or j > p - WINDOW]
                nearer = refused if eviction.positions == "compact" else 0
                shown = [j - (left_out[j] if eviction.positions == "compact" else 0) for j in mine]
                keys = torch.cat(
                    (rotate(k[b, g, near], torch.tensor(near)), rotate(k[b, g, mine], torch.tensor(shown)))
                )
                for h in range(g * H // G, (g + 1) * H // G):
                    facing = torch.cat(
                        (
                            rotate(q[b, h, p], p).expand(len(near), D),
                            rotate(q[b, h, p], p - nearer).expand(len(mine), D),
                        )
                    )
                    weights = ((facing * keys).sum(-1) * D**-0.5).softmax(0)
                    out[b, h, p] = weights @ v[b, g, near + mine]
            kept[b, g] = sorted(mine)
    return out, kept


@pytest.mark.parametrize("positions", ["compact", "absolute"])
@pytest.mark.parametrize("num_slots", [0, 1, 6])
@pytest.mark.parametrize("score", SCORES)
def test_token_by_token_and_under_any_cutting(score, num_slots, positions):
    rate = {"key_norm": 0.0, "value_norm": [0.02, 0.2]}.get(score, 0.05)
    eviction = policy(num_slots, score=score, positions=positions, rate=rate)
    store = MemoryStore(Window(WINDOW, SINKS), None, Rotary(FREQUENCIES, 1000), eviction=eviction)
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64) for heads in (H, G, G))
    x = torch.randn(B, T, N, dtype=torch.float64)
    with torch.no_grad():
        expected, kept = token_by_token(eviction, q, k, v, x)
        inputs = [rotate(q, torch.arange(T)), rotate(k, torch.arange(T)), v, x]
        for sizes in ([T], [1] * T, [9, 1, 4, 1, T - 15]):
            state, outs, start = None, [], 0
            for size in sizes:
                out, state = store(*(u.narrow(-2, start, size) for u in inputs), state)
                outs.append(out)
                start += size
            torch.testing.assert_close(torch.cat(outs, dim=2), expected, rtol=0, atol=1e-11)
            assert (state.kept == {}) == (num_slots == 0)
            for (b, g), ranks in kept.items() if num_slots else ():
                assert state.kept["gates.eviction.rank"][b, g, : len(ranks)].tolist() == ranks
                assert state.kept["filled"][b, g] == len(ranks)


def test_layers_without_slots_fold_everything():
    """They cost what a layer without an eviction costs, and their scores get gradients of zeros, not none."""
    sizes = {"window_size": 6, "num_sinks": 2}
    slots = {0: SalientSlots(0), 1: SalientSlots(3), 2: SalientSlots(0)}
    model, ids = retrofit(base(), GatedDeltaNet, eviction=slots, **sizes), tokens(2, 40)
    plain = retrofit(base(), GatedDeltaNet, eviction={1: SalientSlots(3)}, **sizes)
    torch.testing.assert_close(logits(model, ids, [30, 1, 9]), logits(plain, ids), rtol=0, atol=1e-12)
    rows = [[line.split()[-1] for line in memory_report(u).splitlines()[2:5]] for u in (model, plain)]
    assert rows[0] == rows[1]
    freeze_base(model)
    with soft_slots(model):
        distillation_loss(model, ids).loss.backward()
    grads = {name: p.grad for name, p in adapter_parameters(model) if ".eviction." in name}
    assert all((grad is not None) and (".1." in name or not grad.any()) for name, grad in grads.items())


def test_untrained_slots_are_a_longer_window():
    model, ids = retrofit(base(), None, window_size=6, num_sinks=2, eviction=SalientSlots(7)), tokens(2, 40)
    found = logits(model, ids)
    window = next(m for m in model.modules() if isinstance(m, MemoryStore)).window
    with use_window(model, window.window_size + 7, window.num_sinks), window_only(model):
        expected = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert "untrained score: a longer window" in memory_report(model)


@pytest.mark.parametrize("compressor", [None, *KINDS])
def test_slots_and_every_compressor(compressor):
    model, ids = retrofitted(compressor=compressor, eviction=SalientSlots(5)), tokens(2, 50)
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, [13, 1, 36]), whole, rtol=0, atol=1e-9)
    assert (whole - logits(retrofitted(compressor=compressor), ids)).abs().max() > 1e-4


def test_layers_may_differ():
    eviction = {0: SalientSlots(3, score="key_norm"), 2: BiggestKeys(4)}
    model, cache = retrofitted(eviction=eviction), HippocampalCache()
    whole = logits(model, tokens(1, 40))
    torch.testing.assert_close(logits(model, tokens(1, 40), 7, cache), whole, rtol=0, atol=1e-9)
    assert [layer.state.kept["k"].shape[2] if layer.state.kept else 0 for layer in cache.layers] == [3, 0, 4]
    report = memory_report(model)
    assert "3 slots (key_norm)" in report and "BiggestKeys(num_slots=4)" in report and "FoldAll()" in report


@pytest.mark.parametrize("compressor", [None, GatedDeltaNet])
def test_an_adapter_knows_the_slots(compressor, tmp_path):
    model, ids = retrofitted(compressor=compressor, eviction=SalientSlots(5, score_size=12)), tokens(1, 50)
    save_adapter(model, tmp_path)
    other = load_adapter(base(), tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    fresh = retrofit(base(), compressor, window_size=6, num_sinks=2, eviction=SalientSlots(5, score_size=12))
    assert torch.equal(logits(load_adapter(fresh, tmp_path), ids), logits(model, ids))
    more = retrofit(base(), compressor, window_size=6, num_sinks=2, eviction=SalientSlots(9, score_size=12))
    load_adapter(more, tmp_path)  # the weights do not depend on the number of slots
    for module in model.modules():
        if isinstance(module, SalientSlots):
            module.num_slots = 9
    assert torch.equal(logits(more, ids), logits(model, ids))
    for wrong in (SalientSlots(5), SalientSlots(5, score_size=12, positions="absolute"), None):
        with pytest.raises(ValueError, match="the adapter has evictions="):
            load_adapter(retrofit(base(), compressor, window_size=6, num_sinks=2, eviction=wrong), tmp_path)


def test_a_saved_model_knows_the_slots(tmp_path):
    from transformers import AutoModelForCausalLM

    for compressor in (None, GatedDeltaNet):
        model, ids = retrofitted(compressor=compressor, eviction=SalientSlots(5)), tokens(1, 50)
        model.save_pretrained(tmp_path)
        other = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(other, ids), logits(model, ids))


def test_an_adapter_without_an_eviction_keeps_its_format(tmp_path):
    save_adapter(retrofitted(), tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    assert '"format_version": 1' in text and "eviction" not in text


def test_a_cache_belongs_to_its_slots():
    ids, cache = tokens(1, 40), HippocampalCache()
    logits(retrofitted(eviction=SalientSlots(5)), ids, 20, cache)
    with pytest.raises(ValueError):
        logits(retrofitted(eviction=SalientSlots(5, positions="absolute")), ids, 20, cache)


def test_bytes_are_reported_and_constant():
    model, cache = retrofitted(eviction=SalientSlots(9)), HippocampalCache()
    logits(model, tokens(1, 40), 10, cache)
    held = cache.nbytes
    logits(model, tokens(1, 40), 10, cache)
    assert cache.nbytes == held
    assert f"{held:,}" in memory_report(model).splitlines()[-1]


@pytest.mark.parametrize("score", SCORES)
def test_no_more_memory_is_held_than_is_reported(score):
    """No view of what one call computed for all of its tokens."""
    model, cache = retrofitted(eviction=SalientSlots(9, score=score)), HippocampalCache()
    logits(model, tokens(1, 40), 40, cache)
    parts = [u for layer in cache.layers for u in layer.state.tensors().values()]
    assert sum(u.untyped_storage().nbytes() for u in parts) == cache.nbytes


@pytest.mark.parametrize("score", ["learned", "recent"])
def test_rates_by_head(score, tmp_path):
    eviction = SalientSlots(5, score=score, rate=(0.5, 0.0))
    with pytest.raises(ValueError, match=r"rate=\[0.5, 0.0\]: expected one number, or 3, one for each"):
        eviction.for_layer(hidden_size=8, num_kv_heads=3, value_dim=4)
    assert eviction.options()["rate"] == [0.5, 0.0]
    own = eviction.for_layer(hidden_size=8, num_kv_heads=2, value_dim=4)
    if score == "learned":  # a rate of 0 would not know which of two equal tokens is newer
        torch.testing.assert_close(own.learned.rate.detach(), torch.tensor([0.5, 1.0]))
    model = retrofitted(compressor=GatedDeltaNet, eviction=eviction)
    save_adapter(model, tmp_path)
    ids = tokens(1, 40)
    assert torch.equal(logits(load_adapter(base(), tmp_path), ids), logits(model, ids))
    other = retrofit(base(), GatedDeltaNet, window_size=6, num_sinks=2, eviction=SalientSlots(5, score=score))
    if score == "learned":  # the weights say the rates
        assert torch.equal(logits(load_adapter(other, tmp_path), ids), logits(model, ids))
    else:
        with pytest.raises(ValueError, match="the adapter has evictions="):
            load_adapter(other, tmp_path)


def test_the_sum_of_keys_knows_no_padding():
    model, ids = retrofitted(eviction=SalientSlots(5, score="key_difference")), tokens(2, 40)
    padded = torch.cat((torch.zeros(2, 7, dtype=torch.long), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    alone = generate(model, ids, 8)[:, 40:]
    assert torch.equal(generate(model, padded, 8, attention_mask=mask)[:, 47:], alone)
    assert torch.equal(generate(model, ids, 8, cache_implementation="static")[:, 40:], alone)


def test_a_learned_score_has_to_know_its_layer():
    store = MemoryStore(Window(4), eviction=SalientSlots(3))
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    with pytest.raises(ValueError, match="does not know its layer"):
        store(q, k, v, torch.randn(1, 9, 12))
    with pytest.raises(ValueError, match="x=None: SalientSlots needs the hidden states"):
        store(q, k, v)
    MemoryStore(Window(4), eviction=SalientSlots(3, score="key_norm"))(q, k, v)  # needs none


@pytest.mark.parametrize(
    "eviction, error, message",
    [
        (SalientSlots, TypeError, "expected an object of a subclass of Eviction"),
        ({0: "slots"}, TypeError, "eviction='slots'"),
        ({7: SalientSlots(3)}, ValueError, r"no memory in the layers \[7\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_retrofit_refuses(eviction, error, message):
    model = base()
    with pytest.raises(error, match=message):
        retrofit(model, GatedDeltaNet, window_size=6, eviction=eviction)
    assert not any(isinstance(module, HippocampalAttention) for module in model.modules())


def test_generation_past_the_window():
    model, ids = retrofitted(eviction=SalientSlots(5)), tokens(2, 30)
    assert torch.equal(generate(model, ids, 20), generate(model, ids, 20, use_cache=False))


def test_every_layer_has_its_own_policy():
    given = SalientSlots(3)
    model = retrofitted(eviction=given)
    policies = [module.memory.eviction for module in model.modules() if isinstance(module, HippocampalAttention)]
    assert len({id(policy) for policy in policies} | {id(given)}) == len(policies) + 1
    assert not any(isinstance(policy, FoldAll) for policy in policies)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """One pass equals token by token, and padded rows equal the rows alone."""
    model, ids = retrofitted(name, eviction=SalientSlots(5)), tokens(1, 40)
    tolerance = FAMILIES[name].tolerance
    whole = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, [25, *[1] * 15]), whole, rtol=0, atol=tolerance)
    assert (whole - logits(retrofitted(name), ids)).abs().max() > 10 * tolerance


@pytest.mark.parametrize("positions", ["compact", "absolute"])
def test_packed_texts_equal_texts_alone(positions):
    model = retrofitted(eviction=SalientSlots(5, positions=positions))
    one, two = tokens(1, 30, seed=1), tokens(1, 25, seed=2)
    place = torch.cat((torch.arange(30), torch.arange(25)))[None]
    packed = logits(model, torch.cat((one, two), dim=1), position_ids=place)
    torch.testing.assert_close(packed[:, :30], logits(model, one), rtol=0, atol=1e-9)
    torch.testing.assert_close(packed[:, 30:], logits(model, two), rtol=0, atol=1e-9)


def test_inside_the_window_the_model_is_the_base_model_bit_by_bit():
    ids = tokens(2, 8)
    assert torch.equal(logits(retrofitted(eviction=SalientSlots(5)), ids), logits(base(), ids))


def test_slots_for_everything_are_full_attention():
    model, ids = retrofitted(compressor=None, eviction=SalientSlots(60)), tokens(2, 50)
    torch.testing.assert_close(logits(model, ids), logits(base(), ids), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(model, ids, 1), logits(base(), ids), rtol=0, atol=1e-9)


def test_what_is_lost_from_a_slot_is_folded_without_its_own_rotation():
    """With ``memory_positions="none"`` the memory adds what it would if nothing were rotated."""
    sizes = {"hidden_size": N, "num_kv_heads": G, "value_dim": D}
    eviction = policy(6, score="key_norm", positions="absolute")  # a rotation leaves norms and so the choice alone
    compressor = GatedDeltaNet(num_heads=H, head_dim=D, **sizes).double()
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64) for heads in (H, G, G))
    x, rank, window = torch.randn(B, T, N, dtype=torch.float64), torch.arange(T), Window(WINDOW, SINKS)
    rotary = Rotary(FREQUENCIES, 1000)

    def added(q, k, rotary, **options):
        with torch.no_grad():
            with_memory, without = (
                MemoryStore(window, c, rotary, eviction=eviction, **options)(q, k, v, x)[0] for c in (compressor, None)
            )
        return with_memory - without

    found = added(rotate(q, rank), rotate(k, rank), rotary, memory_positions="none")
    expected = added(q, k, None)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
