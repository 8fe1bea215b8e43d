"""Self-distillation: the loss against its definition, gradients, what may change and what may not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
)

from ahn_layers import (
    GatedDeltaNet,
    adapter_parameters,
    full_attention,
    retrofit,
    window_only,
)
from ahn_layers.distillation import (
    align_layers,
    arm_losses,
    distillation_loss,
    gap_closed,
    repeat_spans,
    sample_window,
    sliced_loss,
    use_window,
)
from ahn_layers.distillation.windows import CAPACITIES, SINKS

from ..distilling import CAPACITY, gradients, small, text

# windows


@pytest.mark.parametrize("length", [1, 2, 5, 31, 32, 33, 64, 100, 1024, 8192, 24_000, 65_536, 131_072, 10**7])
@pytest.mark.parametrize("shortest", [0.0, 1 / 8, 0.9])
def test_a_window_can_be_drawn_at_any_length(length, shortest):
    for seed in range(20):
        window, sinks = sample_window(length, torch.Generator().manual_seed(seed), shortest=shortest)
        assert window >= 1 and sinks >= 0 and sinks <= (window + sinks) // 2
        assert window + sinks < length or length == 1


def test_windows_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    drawn = {sample_window(8192, generator) for _ in range(2000)}
    assert {w + s for w, s in drawn} == {2048, 4096}  # above 8192 / 8, below 8192
    assert {s for w, s in drawn if w + s == 4096} == {0, 32, 64, 128, 512, 2048}
    every = {sum(sample_window(8192, generator, shortest=0.0)) for _ in range(2000)}
    assert every == set(CAPACITIES) - {8192}
    assert {sample_window(8192, generator, sinks=(4, 16))[1] for _ in range(200)} == {4, 16}
    assert SINKS[0] == 0


@pytest.mark.parametrize(("length", "shortest"), [(0, 0.1), (-3, 0.1), (100, 1.0), (100, -0.1)])
def test_impossible_draws_are_refused(length, shortest):
    with pytest.raises(ValueError, match="expected"):
        sample_window(length, shortest=shortest)


def test_use_window_is_a_retrofit_with_that_window():
    model, ids = small(), text()
    with use_window(model, 5, 2):
        inside = model(ids).logits
    assert {m.memory.window.capacity for m in model.modules() if hasattr(m, "memory")} == {CAPACITY}
    weights = model.state_dict()
    other = small()
    other.load_state_dict(weights)
    for module in other.modules():
        if hasattr(module, "memory"):
            module.memory.window = type(module.memory.window)(5, 2)
    assert torch.equal(inside, other(ids).logits)
    with pytest.raises(ValueError, match="retrofit"), use_window(nn.Linear(2, 2), 4):
        pass


# the loss


@pytest.mark.parametrize("slice_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_slices_give_the_loss_in_one_piece(slice_size, weights):
    kl, ce = weights
    student = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(64, 8, dtype=torch.float64)
    weight, labels = torch.randn(30, 8, dtype=torch.float64), torch.randint(30, (64,))

    def head(hidden):
        return 5 * torch.tanh(hidden @ weight.T / 5)

    loss, divergence, entropy = sliced_loss(
        student, head, teacher=teacher, labels=labels, kl_weight=kl, ce_weight=ce, slice_size=slice_size
    )
    (gradient,) = torch.autograd.grad(3 * loss, student)
    p, log_q = head(teacher).softmax(-1), head(student).log_softmax(-1)
    expected_kl = (p * (p.log() - log_q)).sum(-1).mean()
    expected_ce = F.cross_entropy(head(student), labels)
    expected = kl * expected_kl + ce * expected_ce
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(divergence, expected_kl.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_ce.detach(), rtol=1e-12, atol=1e-12)


def test_no_tensor_is_larger_than_a_slice_of_logits():
    largest = 0

    def head(hidden):
        nonlocal largest
        largest = max(largest, len(hidden))
        return hidden @ torch.ones(4, 30)

    student = torch.randn(100, 4, requires_grad=True)
    loss = sliced_loss(student, head, teacher=torch.randn(100, 4), slice_size=16)[0]
    assert largest == 16
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda u: u):
        loss = sliced_loss(student, head, teacher=torch.randn(100, 4), slice_size=16)[0]
    loss.backward()
    assert sizes and max(sizes) <= 30 * 16


def test_what_a_loss_needs_is_asked_for():
    student = torch.randn(4, 8)
    with pytest.raises(ValueError, match="teacher"):
        sliced_loss(student, lambda u: u)
    with pytest.raises(ValueError, match="labels"):
        sliced_loss(student, lambda u: u, kl_weight=0.0, ce_weight=1.0)
    with pytest.raises(ValueError, match="no token"):
        sliced_loss(student[:0], lambda u: u, teacher=student[:0])


def test_distillation_loss_is_its_definition():
    model, ids = small(torch.float64), text()
    found = distillation_loss(model, ids, ce_weight=0.5, slice_size=10)
    found.loss.backward()
    with torch.no_grad(), full_attention(model):
        goal = model(ids).logits[:, CAPACITY:-1].log_softmax(-1)
    sliced = gradients(model)
    model.zero_grad()
    logits = model(ids).logits[:, CAPACITY:-1].log_softmax(-1)
    divergence = (goal.exp() * (goal - logits)).sum(-1).mean()
    entropy = F.nll_loss(logits.flatten(0, 1), ids[:, CAPACITY + 1 :].flatten())
    (divergence + 0.5 * entropy).backward()
    torch.testing.assert_close(found.divergence, divergence.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.cross_entropy, entropy.detach(), rtol=1e-8, atol=1e-10)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(sliced[name], gradient, rtol=1e-6, atol=1e-10)
    with pytest.raises(ValueError, match="longer"):
        distillation_loss(model, ids[:, :CAPACITY])


def test_loss_counts_the_positions_beyond_the_capacity():
    model, ids = small(), text(length=48)
    for capacity in (20, 47):
        with torch.no_grad(), use_window(model, capacity):
            assert distillation_loss(model, ids).tokens == 2 * (48 - capacity)
            assert arm_losses(model, ids)["full"].shape == (2, 48 - capacity - 1)
            assert arm_losses(model, ids, start=4)["full"].shape == (2, 43)


def test_arms_are_the_three_models():
    model, ids = small(), text()
    losses = arm_losses(model, ids, slice_size=9)
    for arm, mode in (("full", full_attention), ("window", window_only)):
        with torch.no_grad(), mode(model):
            logits = model(ids).logits
        expected = F.cross_entropy(logits[:, CAPACITY:-1].transpose(1, 2), ids[:, CAPACITY + 1 :], reduction="none")
        torch.testing.assert_close(losses[arm], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses["memory"], losses["window"])
    assert gap_closed(3.0, 4.0, 3.5) == 0.5 and gap_closed(3.0, 3.0, 3.0) != gap_closed(3.0, 3.0, 3.0)


def test_a_soft_capped_head_is_honoured():
    model, ids = small(), text(length=40)
    plain = arm_losses(model, ids)["full"]
    model.config.final_logit_softcapping = 0.1
    assert not torch.allclose(plain, arm_losses(model, ids)["full"])


# gradients


def test_only_the_memory_learns_and_the_base_is_bit_frozen():
    model = small()
    before = {name: u.clone() for name, u in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        distillation_loss(model, text(seed=seed), ce_weight=0.1, layer_weight=0.1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, u in model.state_dict().items():
        assert torch.equal(u, before[name]) != (".memory." in name), name


def test_gradient_checkpointing_changes_nothing():
    plain, saving = small(torch.float64), small(torch.float64)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model.train()
        with use_window(model, 7, 2):
            distillation_loss(model, text(), layer_weight=0.1).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(saving)[name]), name


def test_a_bfloat16_base_keeps_a_float32_memory():
    model = small(torch.bfloat16)
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    distillation_loss(model, text()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for _, p in adapter_parameters(model))


def test_alignment_has_the_gradient_of_each_layers_own_error():
    model, ids = small(torch.float64), text()
    errors = align_layers(model, ids)
    found = gradients(model)
    model.zero_grad()
    # the same by hand for layer 0, whose input is the teacher's in any case
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    position = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    with torch.no_grad(), full_attention(model):
        goal = block.self_attn(hidden_states=x, position_embeddings=position, attention_mask=None)[0][:, CAPACITY:]
    out = block.self_attn(hidden_states=x, position_embeddings=position, attention_mask=None)[0][:, CAPACITY:]
    error = (out - goal).square().mean() / goal.square().mean()
    error.backward()
    torch.testing.assert_close(errors[0], error.detach())
    torch.testing.assert_close(found["model.layers.0.self_attn.memory.compressor.o_proj.weight"],
                               block.self_attn.memory.compressor.o_proj.weight.grad)  # fmt: skip
    assert len(errors) == 3 and all(g.abs().sum() > 0 for name, g in found.items() if "o_proj" in name)
    model.zero_grad()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)  # hooks and modes are gone


def test_alignment_learns():
    model = small(trained=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        history.append(float(align_layers(model, text()).mean()))
        optimizer.step()
    assert history[-1] < 0.9 * history[0]


# copied spans


def test_spans_come_back_later():
    tokens = torch.arange(2048)
    changed = repeat_spans(tokens, torch.Generator().manual_seed(3), spans=(1, 1), sizes=(50, 60))
    assert torch.equal(tokens, torch.arange(2048))  # the argument is left alone
    (where,) = (changed != tokens).nonzero(as_tuple=True)
    size = len(where)
    assert 50 <= size <= 60 and torch.equal(where, torch.arange(int(where[0]), int(where[0]) + size))
    source = int(changed[where[0]])
    assert torch.equal(changed[where], torch.arange(source, source + size)) and source + size <= int(where[0])


@pytest.mark.parametrize("length", [1, 100, 127, 128, 130, 4096])
def test_spans_at_any_length(length):
    for seed in range(20):
        changed = repeat_spans(torch.arange(length), torch.Generator().manual_seed(seed))
        assert len(changed) == length and (length >= 128) == bool((changed != torch.arange(length)).any())


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(logits_scaling=8.0, **SMALL),
        CohereConfig(logit_scale=0.0625, **SMALL),
        Gemma2Config(final_logit_softcapping=2.0, head_dim=8, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_those_of_the_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    retrofit(model, GatedDeltaNet, window_size=10, num_sinks=2)
    ids = torch.randint(1, 60, (2, 30))
    with torch.no_grad():
        losses = {"memory": model(ids).logits}
        with full_attention(model):
            losses["full"] = model(ids).logits
    found = arm_losses(model, ids)
    for arm, logits in losses.items():
        expected = F.cross_entropy(logits[:, 12:-1].flatten(0, 1), ids[:, 13:].flatten(), reduction="none")
        torch.testing.assert_close(found[arm].flatten(), expected, rtol=1e-4, atol=1e-4)


def test_unknown_changes_of_the_logits_are_refused(monkeypatch):
    model = small()
    forward = type(model.lm_head).forward
    monkeypatch.setattr(model.lm_head, "forward", lambda u: 3 * forward(model.lm_head, u))
    with pytest.raises(ValueError, match="does more to its logits"):
        distillation_loss(model, text())


@pytest.mark.parametrize("switch", [full_attention, window_only])
def test_the_student_has_its_memory_whatever_is_around(switch):
    model, ids = small(), text()
    expected, losses = distillation_loss(model, ids), arm_losses(model, ids)
    with switch(model):
        found, arms = distillation_loss(model, ids), arm_losses(model, ids)
    assert torch.equal(found.loss, expected.loss) and found.loss > 0 and found.loss.requires_grad
    assert all(torch.equal(arms[arm], losses[arm]) for arm in losses)


def test_the_error_of_the_layers_alone():
    model = small()
    found = distillation_loss(model, text(), kl_weight=0.0, layer_weight=2.0)
    assert found.loss == 2 * found.layers > 0 == found.divergence
    found.loss.backward()
    assert all(gradient.any() for gradient in gradients(model).values())


def test_an_adapted_output_layer_is_called_as_it_is():
    """The losses of a LoRA on it, however small it is, and not those of the layer below."""
    peft = pytest.importorskip("peft")
    model, ids = small(), text()
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-2)
        found, logits = arm_losses(lora, ids)["memory"], lora(input_ids=ids).logits[:, CAPACITY:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, CAPACITY + 1 :].flatten(), reduction="none")
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-6)
