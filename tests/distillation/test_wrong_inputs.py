"""Losses, heads and budgets of inputs that do not fit together: refused, where they would be silently wrong."""

import pytest
import torch

from ahn_layers import SalientSlots
from ahn_layers.distillation import (
    align_layers,
    arm_losses,
    calibrate,
    distillation_loss,
    learn_scores,
    retrieval_heads,
    salient_slots,
    set_rates,
    set_slots,
    sliced_loss,
)

from ..models import CAPACITY, base, retrofitted, tokens
from ..refusing import refused

pytestmark = pytest.mark.usefixtures("unchecked")
STUDENT, HEAD = torch.randn(6, 4), torch.nn.Linear(4, 9, bias=False)
LABELS = torch.arange(6)

LOSSES = {
    "no slices": ({"teacher": STUDENT, "slice_size": -1}, "slice_size=-1", "at least one token"),
    "slices of nothing": ({"teacher": STUDENT, "slice_size": 0}, "slice_size=0", "at least one token"),
    "one teacher for all": ({"teacher": STUDENT[:1]}, "teacher has shape (1, 4)", "(6, 4)"),
    "other labels": ({"teacher": STUDENT, "labels": LABELS[:3]}, "labels has shape (3,)", "(6,)"),
    "labels to leave out": ({"teacher": STUDENT, "labels": LABELS - 100}, "labels go down to -100", "Leave", "out"),
}


@pytest.mark.parametrize("options, parts", [(u[0], u[1:]) for u in LOSSES.values()], ids=LOSSES)
def test_losses(options, parts):
    with refused(ValueError, *parts):
        sliced_loss(STUDENT, HEAD, **options)


def test_losses_of_a_text_inside_the_window():
    with refused(ValueError, f"sequences of {CAPACITY} tokens", f"start={CAPACITY}", "expected longer ones"):
        arm_losses(retrofitted(), tokens(1, CAPACITY))
    assert arm_losses(retrofitted(), tokens(1, CAPACITY + 2))["memory"].shape == (1, 1)


@pytest.mark.parametrize(
    "ids", [tokens(40), tokens(1, 2, 40), tokens(0, 40), tokens(1, 40).float()], ids=lambda u: u.shape
)
def test_texts(ids):
    model = retrofitted(eviction=SalientSlots(3))
    for function in (distillation_loss, arm_losses, align_layers, learn_scores):
        with refused(ValueError, f"input_ids has shape {tuple(ids.shape)}", "(texts, tokens)", "input_ids[None]"):
            function(model, ids)
    with refused(ValueError, "start=-1", "start has to be a token"):
        arm_losses(model, tokens(1, 40), start=-1)


SPANS = {
    "an answer before its fact": ((20, 22), (1, 3)),
    "no answer": ((1, 3), (20, 20)),
    "no fact": ((3, 3), (20, 22)),
    "from the end": ((-3, -1), (20, 22)),
    "beyond the text": ((1, 3), (20, 99)),
    "the first token": ((0, 0), (0, 2)),
}


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_facts_and_answers(span):
    with refused(ValueError, "asked, row 1", str(span[0]), str(span[1]), "within 40 tokens"):
        retrieval_heads(retrofitted(), tokens(2, 40), [[((1, 3), (20, 22))], [span]])


def test_every_text_has_its_row():
    with refused(ValueError, "asked has 1 rows", "expected 2"):
        retrieval_heads(retrofitted(), tokens(2, 40), [[((1, 3), (20, 22))]])


@pytest.mark.parametrize("options, part", [({"coverage": 2.0}, "coverage=2.0"), ({"keep": 0.0}, "keep=0.0")], ids=str)
def test_rates(options, part):
    model = retrofitted(eviction=SalientSlots(3))
    with refused(ValueError, part, "expected a"):
        set_rates(model, torch.rand(3, 2), **options)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
@pytest.mark.parametrize("function", [set_rates, set_slots])
def test_what_was_not_measured(function, value):
    model = retrofitted(eviction=SalientSlots(10))
    with refused(ValueError, f"retrieval holds values from {value}", "expected", "Pass what retrieval_heads returned"):
        function(model, torch.full((3, 2), value))


@pytest.mark.parametrize(
    "options, part",
    [({"least": 4}, "least=4"), ({"least": -1}, "least=-1"), ({"coverage": 0.0}, "coverage=0.0")],
    ids=str,
)
def test_slots_by_layer(options, part):
    model = retrofitted(eviction=SalientSlots(3))
    with refused(ValueError, part, "expected a"):
        set_slots(model, torch.rand(3, 2), **{"least": 1} | options)
    assert {policy.num_slots for policy in salient_slots(model)} == {3}


def test_scores_are_learned_where_there_are_slots():
    model = retrofitted(eviction={0: SalientSlots(0), 1: SalientSlots(3), 2: SalientSlots(0)})
    assert learn_scores(model, tokens(1, 400)).shape == (1,)
    trained = [policy.learned.direct.weight.grad is not None for policy in salient_slots(model)]
    assert trained == [False, True, False]
    model = retrofitted(eviction=SalientSlots(0))
    with refused(ValueError, "num_slots=0 in every layer", "expected slots in one of them"):
        learn_scores(model, torch.zeros(1, 400, dtype=torch.long))


CALIBRATIONS = {
    "no coverage": ({"coverage": 0.0}, "coverage=0.0", "above 0"),
    "less than the window": ({"measured": [4]}, "measured=[4]", "from 8", "Leave [4] out"),
    "more than the text": ({"measured": [8, 500]}, "measured=[8, 500]", "to 199", "Leave [500] out"),
}


@pytest.mark.parametrize("options, parts", [(u[0], u[1:]) for u in CALIBRATIONS.values()], ids=CALIBRATIONS)
def test_calibration(options, parts):
    with refused(ValueError, *parts):
        calibrate(base(), tokens(1, 200), bytes=25_000, window_size=6, num_sinks=2, **options)


def test_calibration_leaves_every_module_in_its_mode():  # on a text just long enough for spans that are repeated
    model = base(dtype=torch.float32).train()
    model.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate(model, tokens(1, 140), bytes=15_000, window_size=6, num_sinks=2, measured=[8])
    assert {name: module.training for name, module in model.named_modules()} == before
