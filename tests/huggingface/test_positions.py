"""How far away sinks seem, and what a memory knows of positions, in whole models."""

import warnings

import pytest
import torch

from ahn_layers import memory_report

from ..models import CAPACITY, SINKS, WINDOW, base, logits, retrofitted, tokens
from .retrofits import blocks


def by_hand(ids, limit, window=WINDOW, sinks=SINKS, layers=1):
    """Logits of the base model with sinks + window, every sink at most ``limit`` away: one row of logits per query.

    The query of rank ``p`` sees what a text of the visible tokens with these positions shows to its last token, if
    there is one layer.
    """
    model, rows = base(num_hidden_layers=layers), []
    for p in range(ids.shape[1]):
        seen = [j for j in range(p + 1) if j < sinks or j > p - window]
        far = max(0, p - limit)  # everything but the sinks stands this much nearer
        position = torch.tensor([[j if j < sinks else j - far for j in seen]])
        with torch.no_grad():
            out = model(ids[:, seen], position_ids=position, attention_mask=torch.ones_like(position), use_cache=False)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("trained", [12, 16, 256])
@pytest.mark.parametrize("sink_positions", ["trained", "streaming", "absolute"])
def test_sinks_seem_as_far_as_they_may(sink_positions, trained):
    """One layer, so that the base model on the visible tokens alone is the reference."""
    ids = tokens(1, 30)
    limit = {"trained": trained - 1, "streaming": CAPACITY - 1, "absolute": 10**9}[sink_positions]
    plain = base(num_hidden_layers=1, max_position_embeddings=trained)
    model = retrofitted(model=plain, compressor=None, sink_positions=sink_positions)
    expected = by_hand(ids, limit)
    for cuts in (None, 1, [5, 11, 14]):
        torch.testing.assert_close(logits(model, ids, cuts), expected, rtol=0, atol=1e-5)  # angles are float32


def test_the_choices_are_equal_inside_the_trained_range_and_differ_beyond():
    def run(choice, trained):
        model = retrofitted(model=base(max_position_embeddings=trained), sink_positions=choice)
        return logits(model, tokens(1, 40))

    trained, streaming, absolute = (run(choice, 40) for choice in ("trained", "streaming", "absolute"))
    assert torch.equal(trained, absolute), "no query is farther away"
    far = (streaming - absolute).abs().amax(dim=(0, 2))
    assert far[:CAPACITY].max() == 0 and far[CAPACITY] > 1e-4
    beyond = (run("trained", 20) - absolute).abs().amax(dim=(0, 2))
    assert beyond[:20].max() < 1e-9 and beyond[20] > 1e-4
    assert torch.equal(run("trained", CAPACITY), streaming), "the narrowest range holds the window all the same"


def test_a_memory_without_positions_does_not_know_where_the_text_begins():
    """Shifted position_ids change nothing for rotated attention, nor for a memory of either kind; the two differ."""
    ids, outs = tokens(1, 40), {}
    for choice in ("absolute", "none"):
        model = retrofitted(memory_positions=choice)
        outs[choice] = logits(model, ids)
        torch.testing.assert_close(logits(model, ids, [7, 13, 20]), outs[choice], rtol=0, atol=1e-5)
        with torch.no_grad():
            shifted = model(ids, position_ids=torch.arange(40)[None] + 100, use_cache=False).logits
        torch.testing.assert_close(shifted, outs[choice], rtol=0, atol=1e-4)
    assert (outs["none"] - outs["absolute"])[:, CAPACITY:].abs().max() > 1e-3


def test_the_rotation_outlives_the_meta_device():
    """A model that is moved there, so that its weights can be loaded anew, keeps what cannot be loaded."""
    model, ids = retrofitted(num_sinks=SINKS), tokens(1, 300)
    expected, weights = logits(model, ids), {name: u.clone() for name, u in model.state_dict().items()}
    own = {name: u.clone() for name, u in model.named_buffers() if "memory" not in name}
    model.to("meta").to("meta").to_empty(device="cpu")
    model.load_state_dict(weights)
    for name, u in own.items():  # of the base model, which loses its rotation
        model.get_buffer(name).copy_(u)
    assert torch.equal(logits(model, ids), expected)
    assert model.bfloat16().model.layers[0].self_attn.memory.rotary.inv_freq.dtype == torch.float64


@pytest.mark.parametrize("choice", ["absolute", "none"])
@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.half().float()], ids=["once", "and back"])
def test_a_model_in_another_dtype_is_turned_back_by_its_rounded_frequencies(move, choice):
    """``model.to(dtype)`` rounds them in the base, before a retrofit and after it."""
    ids, outs, reports = tokens(1, 60), [], []
    for moved_first in (True, False):
        model = base("llama", torch.float32, max_position_embeddings=CAPACITY, num_hidden_layers=1)
        model = move(model) if moved_first else model
        retrofitted(model=model, memory_positions=choice)
        move(model)
        reports.append(memory_report(model))
        outs.append(logits(model.double(), ids))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    assert reports[0] == reports[1]
    torch.testing.assert_close(logits(model, ids, 7), outs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, rounded", [("llama", True), ("phimoe", False), ("gemma3", True), ("gpt_neox", True)])
def test_frequencies_that_are_computed_in_every_call_are_not_rounded(name, rounded):
    model = retrofitted(name, torch.float32)
    kept = [block.memory.rotary.inv_freq.clone() for block in blocks(model)]
    model.bfloat16()
    for block, before in zip(blocks(model), kept, strict=True):
        assert torch.equal(block.memory.rotary.inv_freq, before.bfloat16().float() if rounded else before)


def test_a_memory_without_positions_needs_a_rotation():
    with pytest.raises(ValueError, match=r"memory_positions='none': .* cannot have its rotation undone, since its"):
        retrofitted(model=base("gpt2"), memory_positions="none")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_rotation_that_cannot_be_redone_is_warned_about_once(name):
    trained = 16
    long, short = tokens(1, trained + 4), tokens(1, trained)
    fits = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[name]

    def make(**options):
        model = base(name, **{fits: 64})
        model.config.max_position_embeddings = trained  # else the model cannot go beyond it
        return retrofitted(model=model, **options)

    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, short)
        for quiet in (make(sink_positions="absolute"), make(num_sinks=0)):
            logits(quiet, long, 5)
    with pytest.warns(UserWarning, match="passed the trained length of 16 tokens") as caught:
        logits(model, long, 5)
    assert len([w for w in caught if "trained length" in str(w.message)]) == 3, "each layer once"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, long, 5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_warned_about(kind):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = base(rope_parameters=Frozen(scaling), max_position_embeddings=16)
    retrofitted(model=model)
    assert all(kind in block.found.fixed_positions for block in blocks(model))
    with pytest.warns(UserWarning, match=f"its rope_type '{kind}' changes its frequencies"):
        logits(model, tokens(1, 20))


class Frozen(dict):
    """Options of models are remembered, so they need a hash."""

    def __hash__(self):
        return hash(repr(self))


def test_a_rotation_that_is_known_is_not_warned_about():
    model = retrofitted(model=base(max_position_embeddings=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, tokens(1, 30))
        logits(model, tokens(1, 30), 5)
