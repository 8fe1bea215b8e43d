"""Teacher and student are compared without noise, in training too; also in models that name themselves as decoder."""

import pytest
import torch

from ahn_layers.distillation import arm_losses, distillation_loss, retrieval_heads

from ..models import CAPACITY, retrofitted, tokens

IDS = tokens(2, 5 * CAPACITY)


@pytest.mark.parametrize("name", ["opt", "phimoe", "gpt2"])
def test_training_is_without_noise(name):
    """Of dropout that is a function, of routers that jitter, of attention weights."""
    model = retrofitted(name)
    expected, arms = distillation_loss(model, IDS).loss.item(), arm_losses(model, IDS)
    for _ in range(2):
        assert distillation_loss(model.train(), IDS).loss.item() == expected
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
    assert distillation_loss(model, IDS).loss.item() > 0


ASKED = [[((5, 9), (30, 34))]] * 2


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_heads_are_watched_without_noise(name):
    model = retrofitted(name)
    assert torch.equal(retrieval_heads(model, IDS, ASKED), retrieval_heads(model.train(), IDS, ASKED))


def test_heads_with_a_sliding_window_of_their_own_are_not_watched():
    """Their attention to the whole text is none that the model has."""
    with pytest.raises(ValueError, match="layers with sliding windows of their own"):
        retrieval_heads(retrofitted("mistral_window"), IDS, ASKED)
