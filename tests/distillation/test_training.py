"""Training a retrofitted model: which parameters get gradients, and that these are right however they are computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahn_layers import (
    Compressor,
    GatedDeltaNet,
    HippocampalAttention,
    MemoryStore,
    Window,
    adapter_parameters,
    full_attention,
    retrofit,
    window_only,
)
from ahn_layers.huggingface.cache_layers import MemoryLayer

from ..methods import NAMES
from ..models import CAPACITY, SINKS, WINDOW, base, logits, positions, retrofitted, tokens

LONG = 3 * CAPACITY


def frozen(model):
    """Only the memory learns."""
    model.requires_grad_(False)
    memory = dict(adapter_parameters(model))
    for parameter in memory.values():
        parameter.requires_grad_(True)
    return memory


def gradients(model, ids, parameters, cuts=None, **options):
    """Of the language modelling loss, by a backward pass; with ``cuts`` the text is read piece by piece."""
    model.zero_grad(set_to_none=True)
    cache, outs = None, []
    for piece in ids.split(cuts or ids.shape[1], dim=1):
        out = model(input_ids=piece, cache=cache, use_cache=cuts is not None, **options)
        cache = out.past_key_values
        outs.append(out.logits)
    F.cross_entropy(torch.cat(outs, dim=1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def close(one, other, atol=1e-9):
    assert one.keys() == other.keys() and one
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text)


# --- which parameters


@pytest.mark.parametrize("compressor", NAMES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_frozen_base_gets_no_gradients_and_the_memory_all(name, compressor):
    model = retrofitted(name, compressor=Compressor.by_name[compressor])
    memory = frozen(model)
    given = gradients(model, tokens(2, LONG), dict(model.named_parameters()))
    assert {name for name, gradient in given.items() if gradient is not None} == memory.keys()
    assert all(given[name].abs().max() > 0 for name in memory), "every one of them matters"


@pytest.mark.parametrize("compressor", NAMES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_window"])
@pytest.mark.parametrize("cached", [False, True])
def test_within_the_window_the_memory_gets_zeros(name, compressor, cached):
    """A batch that is too short for the memory can be trained on, and changes nothing."""
    model, ids = retrofitted(name, compressor=Compressor.by_name[compressor]), tokens(2, CAPACITY)
    memory = frozen(model)
    out = model(ids, labels=ids, use_cache=cached)
    assert torch.equal(out.logits, logits(base(name), ids)), "not one bit"
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in memory.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in memory)


@pytest.mark.parametrize("length", [CAPACITY, 2 * CAPACITY])
def test_a_padded_batch_within_the_window_too(length):
    model, ids = retrofitted(), tokens(2, length)
    memory, mask = frozen(model), torch.ones(2, length, dtype=torch.long)
    mask[:, : length - CAPACITY + 2] = 0
    model(ids, attention_mask=mask, position_ids=positions(mask), labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in memory.values())


def test_short_and_long_batches_add_up():
    """Short pieces before long ones, with a cache and without: what the long ones give stays."""
    model, ids = retrofitted(), tokens(2, LONG)
    memory = frozen(model)
    expected = gradients(model, ids, memory)
    model(ids[:, :CAPACITY], labels=ids[:, :CAPACITY]).loss.backward()
    close({name: p.grad for name, p in memory.items()}, expected)
    close(gradients(model, ids, memory, [CAPACITY, LONG - CAPACITY]), expected, 1e-6)  # float32 norms


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_within_the_window(use_reentrant):
    model, ids = retrofitted().train(), tokens(2, CAPACITY)
    memory = frozen(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert all(gradient is not None and not gradient.any() for gradient in gradients(model, ids, memory).values())


def test_within_the_window_only_what_is_trained_is_in_the_graph():
    model, ids = retrofitted(), tokens(2, CAPACITY)
    memory = frozen(model)
    chosen = next(iter(memory))
    for name, parameter in memory.items():
        parameter.requires_grad_(name == chosen)
    given = gradients(model, ids, memory)
    assert [name for name, gradient in given.items() if gradient is not None] == [chosen]
    model.requires_grad_(False)
    assert not model(ids, labels=ids).loss.requires_grad
    frozen(model)
    with torch.no_grad():
        assert not model(ids, labels=ids).loss.requires_grad
    with window_only(model):
        assert not model(ids, labels=ids).loss.requires_grad, "the memory takes no part"


def test_within_the_window_an_attention_block_of_your_own_gets_zeros():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x, attend):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return attend(q, k, v).transpose(1, 2).flatten(2)

    compressor = GatedDeltaNet(hidden_size=32, num_heads=4, head_dim=8)
    layer = HippocampalAttention(Attention(), MemoryStore(Window(WINDOW, SINKS), compressor))
    layer(torch.randn(2, CAPACITY, 32))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in compressor.parameters())
    assert layer.qkv.weight.grad.any()
    names = dict(compressor.named_parameters())
    functional = lambda u: torch.func.functional_call(layer, u, (torch.ones(1, CAPACITY, 32),))[0].sum()
    given = torch.func.grad(functional)({f"memory.compressor.{name}": p.detach() for name, p in names.items()})
    assert len(given) == len(names) and not any(gradient.any() for gradient in given.values())


def test_a_fresh_memory_learns_through_its_output_first():
    """The output matrix is zero, so it alone has a gradient at the first step, and the base model is unchanged."""
    model = retrofit(base(), GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    given = gradients(model, tokens(2, LONG), frozen(model))
    for name, gradient in given.items():
        assert bool(gradient.any()) == name.endswith("o_proj.weight"), name


@pytest.mark.parametrize("switch", [full_attention, window_only])
def test_switched_off_the_memory_gets_no_gradients(switch):
    model, ids = retrofitted(), tokens(2, LONG)
    memory = dict(adapter_parameters(model))
    with switch(model):
        given = gradients(model, ids, dict(model.named_parameters()))
    assert all(given[name] is None for name in memory)
    assert all(given[name].any() for name in given.keys() - memory.keys())
    assert all(gradient.any() for gradient in gradients(model, ids, memory).values())


# --- the right ones


def test_gradients_are_those_of_finite_differences():
    """Along random directions, in every parameter; a model whose norms keep float64."""
    model, ids = retrofitted("gpt_neox"), tokens(1, LONG)
    loss = lambda: F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:])
    parameters = dict(model.named_parameters())
    given = torch.autograd.grad(loss(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), given, strict=True):
        direction, ends = torch.randn_like(parameter), []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                ends.append(loss())
                parameter.sub_(direction, alpha=step)
        measured, expected = (ends[0] - ends[1]) / 2e-6, (gradient * direction).sum()
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-7, msg=f"{name}: {measured} {expected}")


@pytest.mark.parametrize("compressor", NAMES)
def test_gradients_are_those_of_the_loop(compressor, monkeypatch):
    """Folding as it is defined, one token after the other."""
    kind = Compressor.by_name[compressor]
    model, ids = retrofitted("gpt_neox", compressor=kind), tokens(2, 5 * CAPACITY)
    parameters = dict(model.named_parameters())
    chunked = gradients(model, ids, parameters)
    monkeypatch.setattr(kind, "scan", Compressor.scan)
    close(gradients(model, ids, parameters), chunked)


@pytest.mark.parametrize("cuts", [1, [CAPACITY + 1, 1, 5, LONG - CAPACITY - 7]], ids=str)
@pytest.mark.parametrize("name", ["gpt_neox", "mistral_window"])
def test_gradients_do_not_depend_on_the_cutting(name, cuts):
    """Back through the cache, into tokens that left the window long ago."""
    model, ids = retrofitted(name), tokens(2, LONG)
    parameters = dict(model.named_parameters())
    expected = gradients(model, ids, parameters)
    close(gradients(model, ids, parameters, cuts), expected, 1e-9 if name == "gpt_neox" else 1e-6)  # float32 norms


def test_gradients_of_a_padded_batch_are_those_of_its_rows():
    model, ids = retrofitted("gpt_neox"), tokens(2, LONG)
    ids[1, :10] = 0
    mask = (ids != 0).long()
    parameters = dict(model.named_parameters())

    def total(ids, **options):
        return F.cross_entropy(model(ids, use_cache=False, **options).logits[0, -9:-1], ids[0, -8:])

    rows = total(ids[:1]) + total(ids[1:, 10:])
    expected = torch.autograd.grad(rows, list(parameters.values()))
    out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    together = sum(F.cross_entropy(out[i, -9:-1], ids[i, -8:]) for i in range(2))
    given = torch.autograd.grad(together, list(parameters.values()))
    close(dict(zip(parameters, given, strict=True)), dict(zip(parameters, expected, strict=True)))


def test_early_tokens_are_reached_through_the_memory_alone():
    model, ids = retrofitted(model=base(num_hidden_layers=1)), tokens(1, LONG)

    def reach():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits[:, -1].square().sum().backward()
        return embedded.grad[0].abs().amax(dim=-1) > 0

    seen = [j < SINKS or j >= LONG - WINDOW for j in range(LONG)]
    assert reach().all()
    with window_only(model):
        assert reach().tolist() == seen


# --- ways to compute them


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("only_memory", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_gradient_checkpointing_changes_nothing(name, only_memory, use_reentrant):
    model, ids = retrofitted(name), tokens(2, LONG)
    parameters = frozen(model) if only_memory else dict(model.named_parameters())
    model.train()
    expected = gradients(model, ids, parameters)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if only_memory:
        model.enable_input_require_grads()
    calls = []
    for layer in model.model.layers:
        layer.self_attn.memory.register_forward_hook(lambda *_: calls.append(1))
    close(gradients(model, ids, parameters), expected)
    assert len(calls) == 6, "each of the three layers ran twice"
    model.gradient_checkpointing_disable()
    close(gradients(model, ids, parameters), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_mode_computes_the_same(name):
    model, ids = retrofitted(name), tokens(2, LONG)
    expected = logits(model, ids)
    assert torch.equal(logits(model.train(), ids), expected)
    assert torch.equal(logits(model.eval(), ids), expected)


def test_dropout_of_attention_is_refused_in_training_only():
    plain = base(attention_dropout=0.1)
    model, ids = retrofitted(model=plain), tokens(1, LONG)
    expected = logits(model, ids)
    assert torch.equal(expected, logits(retrofitted(), ids))
    model.train()
    for length in (3, LONG):
        with pytest.raises(ValueError, match=r"attention dropout=0\.1: expected 0.*config\.attention_dropout = 0"):
            model(ids[:, :length])
    with full_attention(model):
        model(ids)
    assert torch.equal(logits(model.eval(), ids), expected)


def test_a_model_in_training_mode_may_be_retrofitted_whatever_its_dropout():
    model = retrofitted(model=base(attention_dropout=0.1).train())
    assert model.training and model.model.layers[0].self_attn.block.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_mixed_precision(name, dtype):
    """Everything in float32 under autocast; and a base in bfloat16 with a memory in float32, as it is often trained."""
    model, plain, ids = retrofitted(name, torch.float32), base(name, torch.float32).to(dtype), tokens(2, LONG)
    memory = frozen(model)
    exact, expected = logits(model, ids), gradients(model, ids, memory)
    model.to(dtype)
    for parameter in memory.values():
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
        given = gradients(model, ids, memory)
        assert torch.equal(logits(model, ids[:, :CAPACITY]), logits(plain, ids[:, :CAPACITY]))
    assert {(layer.keys.dtype, layer.state.memory.dtype) for layer in memory_layers(out.past_key_values)} == {
        (torch.bfloat16, torch.float32)
    }
    assert (out.logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert {gradient.dtype for gradient in given.values()} == {torch.float32}
    one, other = (torch.cat([gradient.flatten() for gradient in grads.values()]) for grads in (given, expected))
    assert F.cosine_similarity(one, other, dim=0) > 0.95


def memory_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]


def test_a_memory_in_float32_on_a_base_in_bfloat16():
    model, ids = retrofitted(dtype=torch.bfloat16), tokens(2, LONG)
    memory = frozen(model)
    for parameter in memory.values():
        parameter.data = parameter.data.float()
    given = gradients(model, ids, memory)
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in given.values())


# --- it learns


@pytest.mark.parametrize("compressor", NAMES)
def test_a_few_steps_lower_the_loss(compressor):
    """What follows was said once, three windows ago: the window alone cannot know."""
    model = retrofit(base(dtype=torch.float32), Compressor.by_name[compressor], window_size=WINDOW, num_sinks=SINKS)
    memory = frozen(model)
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokens(8, LONG)
    ids[:, -1] = ids[:, 5]
    optimiser = torch.optim.Adam(memory.values(), lr=0.02)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(ids, use_cache=False).logits[:, -2], ids[:, -1])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], u) == (name not in memory) for name, u in before.items())
    with torch.no_grad(), window_only(model):
        forgetful = F.cross_entropy(model(ids, use_cache=False).logits[:, -2], ids[:, -1]).item()
    torch.testing.assert_close(forgetful, losses[0], rtol=1e-4, atol=1e-4)
