"""Learning what to keep: goals, heads, rates, soft visibility, against plain computations."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from ahn_layers import (
    GatedDeltaNet,
    HippocampalAttention,
    HippocampalCache,
    SalientSlots,
    adapter_parameters,
    full_attention,
    retrofit,
)
from ahn_layers.distillation import (
    DistillationTrainer,
    distillation_loss,
    freeze_base,
    learn_scores,
    retrieval_heads,
    salient_slots,
    set_rates,
    set_slots,
    settle_rates,
    soft_slots,
    use_window,
)
from ahn_layers.distillation.windows import longer_windows
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.ops.slots.soft_slots import soft_visibility

from ..distilling import VOCAB, small, text
from ..models import base, train_memory
from ..refusing import refused

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW, SINKS, LENGTH = 20, 4, 300


def made(compressor=None, num_slots=10, dtype=torch.float64):
    model = base(dtype=dtype)
    model.config.attention_dropout = 0.0
    retrofit(model, compressor, window_size=WINDOW, num_sinks=SINKS, eviction=SalientSlots(num_slots, score_size=6))
    freeze_base(model)
    return model


def tokens(rows=2, length=LENGTH):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def attention_of(model, ids):
    """The attention weights of every layer with full attention, ``(B, H, T, T)``, as transformers gives them."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), full_attention(eager):
        return eager(ids, output_attentions=True, use_cache=False).attentions


@torch.no_grad()
@pytest.mark.parametrize("block", [512, 64, 7])
def test_the_goal_is_the_largest_attention_of_a_distant_query(monkeypatch, block):
    monkeypatch.setattr("ahn_layers.distillation.retention._BLOCK", block)
    model, ids = made(), tokens()
    train_memory(model)
    expected = []
    for policy, weights in zip(salient_slots(model), attention_of(model, ids), strict=True):
        far = torch.ones(LENGTH, LENGTH).tril(-WINDOW).bool()
        goal = weights.masked_fill(~far, 0).unflatten(1, (2, -1)).amax(dim=(2, 3)).clamp(min=3e-6).log()
        part = slice(SINKS, LENGTH - WINDOW - 256)
        block = model.model.layers[len(expected)]
        seen = {}
        handle = block.self_attn.store.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(v=a[2], x=a[3]))
        model(ids, use_cache=False)
        handle.remove()
        # hidden states with full attention: those of a window as long as the text
        handle = block.self_attn.store.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(v=a[2], x=a[3]))
        with use_window(model, LENGTH):
            model(ids, use_cache=False)
        handle.remove()
        score = policy.learned(seen["x"], seen["v"])[:, :, part]
        goal = goal[:, :, part]
        error = torch.nn.functional.smooth_l1_loss(score, goal, reduction="none")
        expected.append((error * torch.where(goal > torch.tensor(0.01).log(), 5.0, 1.0)).mean())
    with torch.enable_grad():
        found = learn_scores(model, ids)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_scores_learn_and_nothing_else_gets_a_gradient():
    model, ids = made(), tokens()
    optimizer = torch.optim.Adam([p for n, p in adapter_parameters(model) if "log_rate" not in n], lr=0.03)
    errors = []
    for _ in range(25):
        errors.append(learn_scores(model, ids).mean().item())
        touched = {n for n, p in model.named_parameters() if p.grad is not None}
        assert touched and all(".eviction.learned." in n and "log_rate" not in n for n in touched)
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.8 * errors[0]
    assert all(policy.learned.is_trained for policy in salient_slots(model))


def test_an_untrained_score_begins_at_the_mean():
    model = made()
    learn_scores(model, tokens())
    assert all(float(policy.learned.direct.bias.max()) < -1 for policy in salient_slots(model))


@torch.no_grad()
def test_retrieval_heads():
    model, ids = made(), tokens()
    asked = [[((5, 9), (100, 104)), ((30, 31), (200, 202))], [((60, 66), (250, 256))]]
    expected = torch.zeros(3, 2)
    for layer, weights in enumerate(attention_of(model, ids)):
        for row, spans in enumerate(asked):
            for (a, b), (start, end) in spans:
                paid = weights[row, :, start - 1 : end - 1, a:b].sum(-1).amax(-1)
                expected[layer] += paid.unflatten(0, (2, -1)).amax(-1) / 3
    torch.testing.assert_close(retrieval_heads(model, ids, asked), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="asked has no answers"):
        retrieval_heads(model, ids, [[], []])


def test_rates_are_set_by_what_heads_do():
    model = made()
    heads = torch.tensor([[0.1, 0.9], [0.8, 0.0], [0.2, 0.3]])
    set_rates(model, heads, coverage=0.7, keep=1e-4, forget=0.5)
    rates = torch.stack([policy.learned.rate for policy in salient_slots(model)])
    expected = torch.tensor([[0.5, 1e-4], [1e-4, 0.5], [0.5, 0.5]], dtype=rates.dtype)
    torch.testing.assert_close(rates, expected)
    with pytest.raises(ValueError, match="expected 3 layers"):
        set_rates(model, heads[:2])


def test_the_fewest_heads_that_cover_enough():
    heads = torch.tensor([[0.5, 0.1], [0.3, 0.1], [0.0, 0.0]])
    model = made()
    for coverage, kept in (
        (0.4, [[1, 0], [0, 0], [0, 0]]),
        (0.6, [[1, 0], [1, 0], [0, 0]]),
        (1.0, [[1, 1], [1, 1], [0, 0]]),
    ):
        set_rates(model, heads, coverage=coverage, keep=1e-4, forget=0.5)
        rates = torch.stack([policy.learned.rate for policy in salient_slots(model)])
        assert torch.equal(rates < 0.1, torch.tensor(kept).bool()), coverage
    set_rates(model, 0 * heads)  # nothing is looked up: one head keeps
    assert sum((policy.learned.rate < 1e-3).sum() for policy in salient_slots(model)) == 1


def test_rates_of_heads_that_keep_settle_again():
    model = made()
    rates = torch.tensor([[2e-4, 0.5], [1e-6, 2e-3], [9e-4, 0.03]])
    with torch.no_grad():
        for policy, own in zip(salient_slots(model), rates, strict=True):
            policy.learned.log_rate.copy_(own.log())
    settle_rates(model)
    found = torch.stack([policy.learned.rate for policy in salient_slots(model)]).float()
    torch.testing.assert_close(found, torch.tensor([[1e-5, 0.5], [1e-5, 2e-3], [1e-5, 0.03]]))
    with refused(ValueError, "keep=0.1, below=0.001", "keep the smaller one"):
        settle_rates(model, keep=0.1)


def test_layers_that_look_up_get_the_slots_of_the_others():
    model, heads = made(), torch.tensor([[0.1, 0.0], [0.8, 0.4], [0.2, 0.5]])
    before = sum(policy.num_slots for policy in salient_slots(model))
    assert before == 3 * 10 and set_slots(model, heads, coverage=0.8, least=4) == [4, 13, 13]
    assert set_slots(model, heads, least=4) == [4, 22, 4] and set_slots(model, heads) == [0, 30, 0]
    assert set_slots(model, heads, coverage=1.0, least=0) == [10, 10, 10]
    with torch.no_grad():
        ids = tokens(length=60)
        set_slots(model, heads, coverage=0.8, least=4)
        cache = HippocampalCache()
        model(ids, cache=cache, use_cache=True)
        assert [layer.state.kept["k"].shape[2] for layer in cache.layers] == [4, 13, 13]
    with pytest.raises(ValueError, match="expected 3 layers"):
        set_slots(model, heads[:2])


def test_a_window_alone_is_longer_by_the_mean_of_the_slots():
    model = made()
    set_slots(model, torch.tensor([[0.1, 0.0], [0.8, 0.4], [0.2, 0.5]]))
    stores = [block.store for block in model.modules() if isinstance(block, HippocampalAttention)]
    with longer_windows(model):
        assert [store.window.window_size for store in stores] == [WINDOW + 10] * 3
    assert [store.window.window_size for store in stores] == [WINDOW] * 3


def test_visibilities_trade_places():
    """The threshold moves with the priorities: raising all of them alike changes nothing, raising one lowers others."""
    priority = torch.randn(1, 1, 40, dtype=torch.float64, requires_grad=True)
    first = torch.arange(40).expand(1, 1, -1)
    queries = torch.arange(40, 60)
    bias = soft_visibility(priority, first, queries, 10, 0.5)
    (gradient,) = torch.autograd.grad(bias.exp().sum(), priority, retain_graph=True)
    assert gradient.abs().max() < 1e-9  # the sum is kept
    (gradient,) = torch.autograd.grad(bias[0, 0, 0, 7], priority)
    assert gradient[0, 0, 7] > 0 and gradient.sum().abs() < 1e-9 and (gradient < 0).any()


def test_visibility_hardens_and_waits():
    priority = torch.randn(2, 3, 50, dtype=torch.float64)
    first = torch.arange(50).expand(2, 3, -1)
    bias = soft_visibility(priority, first, torch.arange(0, 70), 8, 1e-6)
    for query in (0, 6, 20, 48, 68):  # a threshold serves two queries, since there are 8 slots
        seen, gone = bias[:, :, query].exp() > 0.5, min(query + 1, 50)
        best = torch.zeros(2, 3, 50, dtype=torch.bool)
        best.scatter_(2, priority[:, :, :gone].topk(min(8, gone)).indices, True)
        assert torch.equal(seen, best), query
    assert bias[:, :, 3, 4:].isneginf().all()


def test_soft_training_reaches_scores_rates_and_compressor():
    model, ids = made(GatedDeltaNet, dtype=torch.float32), tokens(length=128)
    train_memory(model)
    answers = (torch.arange(128) // 4 == 25).expand_as(ids)
    with soft_slots(model, 0.7):
        assert {policy.temperature for policy in salient_slots(model)} == {0.7}
        plain = distillation_loss(model, ids).loss
        found = distillation_loss(model, ids, answers=answers, answer_weight=2.0)
    found.loss.backward()
    assert found.loss > plain
    assert {policy.temperature for policy in salient_slots(model)} == {None}
    for name, parameter in adapter_parameters(model):
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if ".eviction." in name:
            assert parameter.grad.any(), name


def test_true_answers_are_learned_beside_those_of_full_attention():
    model, ids = made(dtype=torch.float64), tokens(length=128)
    train_memory(model)
    answers = (torch.arange(128) // 4 == 25).expand_as(ids)
    plain = distillation_loss(model, ids, ce_weight=1.0).loss.item()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1][answers[:, 1:]]
        with full_attention(model):
            goal = model(ids, use_cache=False).logits[:, :-1][answers[:, 1:]].log_softmax(-1)
    entropy = torch.nn.functional.cross_entropy(logits, ids[answers]).item()
    divergence = (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1).mean().item()
    for kl, ce in ((1.0, 0.0), (0.0, 2.0), (0.25, 0.75)):
        weights = {"ce_weight": 1.0, "answer_weight": kl, "answer_ce_weight": ce}
        found = distillation_loss(model, ids, answers=answers, **weights).loss.item()
        assert found == pytest.approx(plain + kl * divergence + ce * entropy, rel=1e-9), (kl, ce)


def test_a_gradient_step_brings_the_soft_loss_down():
    model, ids = made(dtype=torch.float32), tokens(length=128)
    train_memory(model)
    with torch.no_grad():
        for policy in salient_slots(model):
            policy.learned.log_rate.fill_(-4)
    optimizer, losses = torch.optim.Adam([p for _, p in adapter_parameters(model)], lr=0.02), []
    for _ in range(12):
        with soft_slots(model):
            loss = distillation_loss(model, ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_soft_slots_do_not_go_on_after_tokens_that_they_cannot_see():
    """A cache beyond its window, and padding in the middle of a text; what is before the window is whole."""
    model, ids, cache = made(dtype=torch.float32), tokens(length=40), HippocampalCache()
    with torch.no_grad():
        capacity = model(ids[:, :4], **{CACHE: cache})[CACHE].layers[0].state.window.capacity
        hard = model(ids, use_cache=False).logits
        with soft_slots(model):
            soft = model(ids, use_cache=False).logits
            going_on = model(ids[:, 4:], **{CACHE: cache.clone()}).logits
            torch.testing.assert_close(going_on, soft[:, 4:], rtol=0, atol=1e-4)
            model(ids[:, 4 : capacity + 1], **{CACHE: cache})
            with pytest.raises(ValueError, match="with a soft choice"):
                model(ids[:, capacity + 1 :], **{CACHE: cache})
            mask = torch.ones_like(ids)
            mask[0, 30:33] = 0
            with pytest.raises(ValueError, match="with a soft choice"):
                model(ids, attention_mask=mask)
    assert not torch.allclose(soft, hard, rtol=0, atol=1e-3)


def test_answers_are_weighed():
    model, ids = small(), text()
    answers = torch.zeros_like(ids, dtype=torch.bool)
    assert distillation_loss(model, ids, answers=answers).loss == distillation_loss(model, ids).loss
    answers[:, 20:] = True
    assert distillation_loss(model, ids, answers=answers).loss > distillation_loss(model, ids).loss
    assert VOCAB == 61


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change", [lambda u: u[:, 1:], lambda u: u.long()])
def test_answers_are_a_mask_of_the_tokens(change):
    ids = text()
    with pytest.raises(ValueError, match="expected a boolean mask of the shape of input_ids"):
        distillation_loss(small(), ids, answers=change(torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_wrong_temperature(temperature):
    with pytest.raises(ValueError, match="expected a positive number"), soft_slots(made(), temperature):
        pass


def test_an_error_inside_leaves_the_choice_hard():
    model = made()
    with pytest.raises(KeyError), soft_slots(model):
        raise KeyError
    assert {policy.temperature for policy in salient_slots(model)} == {None}


def test_errors():
    with pytest.raises(ValueError, match="no slots with a learned score"):
        learn_scores(small(), text())
    with pytest.raises(ValueError, match="expected more than 280"):
        learn_scores(made(), tokens(length=280))
    assert not any(isinstance(m, HippocampalAttention) for m in base().modules())


class Answers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": tokens(1, 64)[0], "answers": torch.arange(64) > 50}


def test_the_trainer_teaches_slots(tmp_path):
    model = made(dtype=torch.float32)
    train_memory(model)
    before = {name: u.detach().clone() for name, u in adapter_parameters(model)}
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.01, disable_tqdm=True, **options)
    weights = {"answer_weight": 0.25, "answer_ce_weight": 0.75}
    trainer = DistillationTrainer(model, arguments, temperature=0.5, shortest=0.3, train_dataset=Answers(), **weights)
    batch = {name: u[None] for name, u in Answers()[0].items()}
    assert torch.equal(trainer.compute_loss(model, batch), distillation_loss(model, **batch, **weights).loss)
    trainer.train()
    same = [name for name, u in adapter_parameters(model) if torch.equal(u, before[name])]
    assert not same, same
    assert {policy.temperature for policy in salient_slots(model)} == {None}
    for other, temperature, message in ((small(), 0.5, "no slots with a learned"), (model, -1.0, "temperature=-1")):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(other, arguments, temperature=temperature)
