"""Teacher and student are compared without noise, in training too; also in models that name themselves as decoder."""

import pytest
import torch

from ahn_layers.distillation import arm_losses, distillation_loss

from ..models import CAPACITY, retrofitted, tokens

IDS = tokens(2, 5 * CAPACITY)


@pytest.mark.parametrize("name", ["opt", "phimoe", "gpt2"])
def test_training_is_without_noise(name):
    """Of dropout that is a function, of routers that jitter, of attention weights."""
    model = retrofitted(name)
    expected, arms = float(distillation_loss(model, IDS).loss), arm_losses(model, IDS)
    for _ in range(2):
        assert float(distillation_loss(model.train(), IDS).loss) == expected
        assert all(torch.equal(arms[arm], loss) for arm, loss in arm_losses(model.train(), IDS).items())
    assert model.training, "as the caller left it"


def test_the_teacher_is_without_noise_where_layers_are_recomputed():
    model = retrofitted("opt")
    expected = arm_losses(model, IDS)
    model.gradient_checkpointing_enable()
    model.train()
    assert all(torch.equal(expected[arm], loss) for arm, loss in arm_losses(model, IDS).items())
    assert model.model.decoder.layers[0].training
    distillation_loss(model, IDS).loss.backward()


def test_a_model_that_names_itself_as_its_decoder():
    model = retrofitted("llama4")
    assert float(distillation_loss(model, IDS).loss) > 0
