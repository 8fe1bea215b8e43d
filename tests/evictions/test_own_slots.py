"""SalientSlots of users: subclasses, scores of their own, options and sizes that do not fit."""

import pytest
import torch

from ahn_layers import HippocampalAttention, MemoryStore, SalientSlots, Window, load_adapter, save_adapter
from ahn_layers.distillation import calibrate

from ..models import base, logits, retrofitted, tokens

N, G, D = 10, 2, 8  # hidden size, key/value heads, their size


class LargestKeysFirst(SalientSlots):
    """Chooses the other way round; knows more than its constructor says."""

    note = "none"

    def priority(self, tokens, rank, score=None):
        return -super().priority(tokens, rank, score)


class OwnScore(SalientSlots):
    def gates(self, x, k, v):
        return {name: -score for name, score in super().gates(x, k, v).items()}


@pytest.mark.parametrize("score", ["key_norm", "learned"])
def test_a_subclass_stays_one_in_every_layer(score, tmp_path):
    eviction = LargestKeysFirst(5, score=score)
    eviction.note = "mine"
    model, ids = retrofitted(eviction=eviction), tokens(1, 50)
    policies = [m.memory.eviction for m in model.modules() if isinstance(m, HippocampalAttention)]
    assert [(type(u), u.note, u.learned is not None) for u in policies] == [
        (LargestKeysFirst, "mine", score == "learned")
    ] * 3
    assert (logits(model, ids) - logits(retrofitted(eviction=SalientSlots(5, score=score)), ids)).abs().max() > 1e-4
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(base(), tmp_path), ids), logits(model, ids))


def test_a_subclass_is_what_a_calibration_proposes():
    ids = tokens(1, 160)
    least = {"window_size": 8, "num_sinks": 2, "measured": [10]}
    proposed = calibrate(base(), ids, bytes=30_000, slots=LargestKeysFirst(0, score="key_norm"), **least).arguments
    assert {type(policy) for policy in proposed["eviction"].values()} == {LargestKeysFirst}


def test_kernels_do_not_compute_a_score_that_is_made_otherwise(unchecked):
    """They are told how a learned score is computed, unless somebody has changed it."""
    sizes = {"hidden_size": N, "num_kv_heads": G, "value_dim": D}
    own = SalientSlots(3).for_layer(**sizes)
    assert own.contest(None).weights is not None
    assert OwnScore(3).for_layer(**sizes).contest(None).weights is None
    assert LargestKeysFirst(3).for_layer(**sizes).contest(None) is None
    own.learned.__class__ = type("Doubled", (type(own.learned),), {"forward": lambda self, x, v: 2 * x})
    assert own.contest(None).weights is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_slots": -1}, "num_slots=-1: expected a whole number of at least 0"),
        ({"num_slots": 2.0}, "num_slots=2.0"),
        ({"num_slots": 2, "score": "size"}, "score='size': expected 'learned' or one of"),
        ({"num_slots": 2, "rate": -1.0}, "rate=-1.0"),
        ({"num_slots": 2, "rate": float("nan")}, "rate=nan"),
        ({"num_slots": 2, "rate": []}, r"rate=\[\]: expected a number of at least 0, or one for each key/value head"),
        ({"num_slots": 2, "rate": [0.1, -1.0]}, r"rate=\[0.1, -1.0\]"),
        ({"num_slots": 2, "rate": "fast"}, "rate='fast': expected a number"),
        ({"num_slots": 2, "rate": torch.ones(2)}, r"rate=tensor\(\[1., 1.\]\): expected a number"),
        ({"num_slots": 2, "score_size": 0}, "score_size=0"),
        ({"num_slots": 2, "positions": "near"}, "positions='near'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SalientSlots(**options)


def test_a_score_of_other_sizes_is_refused(unchecked):
    q, k, v, x = *torch.randn(3, 2, 2, 9, 8), torch.randn(2, 9, 12)
    sizes = {"hidden_size": 12, "num_kv_heads": 2, "value_dim": 8}
    store = MemoryStore(Window(4), eviction=SalientSlots(3).for_layer(**sizes))
    for wrong in (x[:1], x[:, :1]):  # that would be broadcast
        with pytest.raises(ValueError, match=r"x has shape .*expected floating .* = \(2, 9, 12\)"):
            store(q, k, v, wrong)
    for name, size in (("num_kv_heads", 1), ("hidden_size", 11), ("value_dim", 7)):
        store = MemoryStore(Window(4), eviction=SalientSlots(3).for_layer(**sizes | {name: size}))
        with pytest.raises(ValueError, match=f"made for {name}={size}, the attention has {sizes[name]}: make it"):
            store(q, k, v, x)
    store = MemoryStore(Window(4), eviction=SalientSlots(3, score="recent", rate=[0.5]))
    with pytest.raises(ValueError, match=r"rate=\[0.5\]: expected one number, or 2, one for each"):
        store(q, k, v)
