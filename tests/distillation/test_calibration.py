"""Calibration: what windows cost by layer, the best use of bytes, and a proposal that retrofit takes."""

import itertools

import pytest
import torch

from ahn_layers import (
    GatedDeltaNet,
    HippocampalAttention,
    SalientSlots,
    full_attention,
    memory_report,
    retrofit,
)
from ahn_layers.distillation import arm_losses, calibrate
from ahn_layers.distillation.budgets import cost_at, spend

from ..models import base, tokens

SMALL = {"window_size": 6, "num_sinks": 2}


def written_by(model, length=220):
    """Texts that a model wrote: it knows them better than with a window."""
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.4, "min_new_tokens": length - 2, "pad_token_id": 0}
    return model.generate(tokens(2, 2), max_new_tokens=length - 2, **options)


IDS = written_by(base())


def with_one_layer_that_matters(which=1):
    """The attention of the other layers adds nothing."""
    model = base()
    for i, layer in enumerate(model.model.layers):
        if i != which:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


def bytes_of(model):
    """What the report says that all retrofitted layers take."""
    total = next(line for line in memory_report(model).splitlines() if line.startswith("total"))
    return int(total.split()[-1].replace(",", ""))


def full_bytes(layers, length=220):
    return layers * length * 2 * 2 * 8 * 8  # two heads, keys and values of 8 numbers in float64


@pytest.mark.parametrize("which", [0, 1])
def test_the_layer_that_matters_gets_the_bytes(which):
    model, everything = with_one_layer_that_matters(which), full_bytes(3)
    budgets = calibrate(model, written_by(model), bytes=everything // 2, **SMALL)
    assert budgets.capacities == {i: None if i == which else budgets.capacities[i] for i in range(3)}
    for layer, costs in budgets.costs.items():
        assert (abs(costs[8]) > 1e-2) == (layer == which)
    # nothing is lost: expected and measured are the loss of full attention
    assert budgets.expected_loss == pytest.approx(budgets.full_loss, abs=1e-9)
    assert budgets.loss == pytest.approx(budgets.full_loss, abs=1e-9) and budgets.equal_loss > budgets.full_loss


def test_the_model_is_as_before():
    model = base().train()
    before, ids = {name: u.clone() for name, u in model.state_dict().items()}, tokens(1, 30)
    calibrate(model, IDS, bytes=full_bytes(3) // 2, **SMALL)
    assert model.training and not any(isinstance(m, HippocampalAttention) for m in model.modules())
    assert all(torch.equal(before[name], u) for name, u in model.state_dict().items())
    assert torch.equal(model.eval()(ids).logits, base()(ids).logits)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        calibrate(Failing(model), IDS, bytes=full_bytes(3) // 2, **SMALL)


def Failing(model):  # noqa: N802
    model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    return model


@pytest.mark.parametrize("compressor", [None, GatedDeltaNet])
@pytest.mark.parametrize("slots", [None, SalientSlots(0), SalientSlots(0, score="value_norm")])
def test_retrofit_takes_the_proposal_and_it_takes_the_bytes_it_says(compressor, slots):
    budget = int(full_bytes(3) * 0.45)
    budgets = calibrate(base(), IDS, bytes=budget, slots=slots, compressor=compressor, **SMALL)
    model = retrofit(base(), compressor, **budgets.arguments)
    left_full = sum(size is None for size in budgets.capacities.values())
    assert bytes_of(model) + full_bytes(left_full) == budgets.bytes <= budget
    assert budgets.bytes > 0.8 * budget
    text = str(budgets)
    assert f"{budgets.bytes:,} bytes" in text and len(text.splitlines()) == 6


@pytest.mark.parametrize("slots", [None, SalientSlots(0)])
def test_losses_are_those_of_the_retrofitted_model(slots):
    """Untrained slots are a longer window."""
    budgets = calibrate(base(), IDS, bytes=full_bytes(3) // 3, slots=slots, **SMALL)
    model = retrofit(base(), None, **budgets.arguments)
    if slots is not None:
        with torch.no_grad():
            for block in model.modules():
                if isinstance(block, HippocampalAttention):
                    block.store.eviction.learned.log_rate.zero_()
    found = arm_losses(model, IDS, start=8, arms=["full", "memory"])
    assert float(found["full"].mean()) == pytest.approx(budgets.full_loss, abs=1e-6)
    assert float(found["memory"].mean()) == pytest.approx(budgets.loss, abs=1e-6)
    alike = retrofit(base(), None, window_size=budgets.equal_capacity - 2, num_sinks=2)
    equal = arm_losses(alike, IDS, start=8, arms=["memory"])["memory"]
    assert float(equal.mean()) == pytest.approx(budgets.equal_loss, abs=1e-6)


def test_a_cost_is_that_of_one_window():
    budgets = calibrate(base(), IDS, bytes=full_bytes(3) // 2, measured=[8, 40], **SMALL)
    assert [list(costs) for costs in budgets.costs.values()] == [[8, 40]] * 3
    model = retrofit(base(), None, window_size=38, num_sinks=2, layers=[1])
    losses = arm_losses(model, IDS, start=8, arms=["full", "window"])
    assert losses["window"].mean() > losses["full"].mean()
    with torch.no_grad():
        windowed = model(IDS, use_cache=False).logits.log_softmax(-1)
        with full_attention(model):
            full = model(IDS, use_cache=False).logits.log_softmax(-1)
    expected = float((full.exp() * (full - windowed)).sum(-1)[:, 8:-1].mean())
    assert budgets.costs[1][40] == pytest.approx(expected, abs=1e-6) and expected > 1e-3


def test_answers_count_apart_and_say_which_heads_look_up():
    asked = [[((20, 24), (200, 204))], []]
    plain = calibrate(base(), IDS, bytes=full_bytes(3) // 2, **SMALL)
    budgets = calibrate(base(), IDS, bytes=full_bytes(3) // 2, asked=asked, **SMALL)
    model = retrofit(base(), None, **SMALL)
    losses = arm_losses(model, IDS, start=8, arms=["full"])["full"]
    assert budgets.full_loss == pytest.approx(float(losses.mean() + losses[0, 200 - 9 : 204 - 9].mean()), abs=1e-6)
    assert budgets.retrieval.shape == (3, 2) and not torch.allclose(budgets.retrieval, plain.retrieval)
    keeping = torch.tensor([[rate < 1e-3 for rate in rates] for rates in budgets.rates.values()])
    assert 0.9 * budgets.retrieval.sum() <= budgets.retrieval[keeping].sum() and not keeping.all()
    assert budgets.retrieval[keeping].min() > budgets.retrieval[~keeping].max()


def test_rates_reach_the_slots():
    budgets = calibrate(base(), IDS, bytes=full_bytes(3) // 3, slots=SalientSlots(0), layers=[0, 2], **SMALL)
    model = retrofit(base(), None, **budgets.arguments)
    for block in (m for m in model.modules() if isinstance(m, HippocampalAttention)):
        expected = torch.tensor(budgets.rates[block.layer_idx])
        torch.testing.assert_close(block.store.eviction.learned.rate.float(), expected)
        assert block.store.eviction.num_slots == budgets.capacities[block.layer_idx] - 8


def test_the_best_choice_is_found():
    """Against trying all."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(4, 5, generator=generator).sort(descending=True).values.tolist()
        sizes = torch.randint(1, 60, (4, 5), generator=generator).sort().values.tolist()
        low, high = sum(u[0] for u in sizes), sum(u[-1] for u in sizes)
        budget = (low + high) // 2
        picks = spend(costs, sizes, budget)
        assert sum(u[i] for u, i in zip(sizes, picks, strict=True)) <= budget
        every = itertools.product(range(5), repeat=4)
        fitting = (p for p in every if sum(u[i] for u, i in zip(sizes, p, strict=True)) <= budget)
        best = min(sum(u[i] for u, i in zip(costs, p, strict=True)) for p in fitting)
        assert sum(u[i] for u, i in zip(costs, picks, strict=True)) == pytest.approx(best)


def test_costs_between_the_measured_capacities():
    costs = {8: 0.4, 32: 0.2}
    assert [cost_at(costs, size, 128) for size in (8, 16, 32, 64, 128, 999)] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0, 0]
    )


def test_wrong_budgets():
    for budget in (100, full_bytes(3)):
        with pytest.raises(
            ValueError, match=f"bytes={budget:,}: expected at least .* which 8 tokens in each of 3 layers"
        ):
            calibrate(base(), IDS, bytes=budget, **SMALL)
    with pytest.raises(ValueError, match="sequences of 130 tokens: expected more than 136"):
        calibrate(base(), IDS[:, :130], bytes=9999, **SMALL)
    with pytest.raises(ValueError, match="is retrofitted already"):
        calibrate(retrofit(base(), None, **SMALL), IDS, bytes=9999, **SMALL)


def test_a_sliding_window_of_its_own_is_no_full_attention():
    model = base("mistral_window", sliding_window=40)
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"sliding windows of their own, \{0: 40, 1: 40, 2: 40\}"):
        calibrate(model, IDS, bytes=9999, **SMALL)
    assert torch.equal(model(IDS).logits, before)
