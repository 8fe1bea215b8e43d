"""The arms that an evaluation compares differ where they must, and put everything back."""

import random
import sys
from pathlib import Path

import pytest
import torch

from ahn_layers import GatedDeltaNet, HippocampalAttention, SalientSlots, retrofit
from ahn_layers.distillation import arm_losses, use_window

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("matplotlib")
import arms  # noqa: E402
import gap  # noqa: E402
import needles  # noqa: E402
import quickstart  # noqa: E402

from .trying import base, made, small  # noqa: E402


def test_each_text_reads_the_memory_of_the_other():
    model = small()
    memory = next(m.memory.compressor for m in model.modules() if isinstance(m, HippocampalAttention))
    sizes = ((memory.num_heads, 9, memory.head_dim), (memory.num_kv_heads, 9, memory.head_dim))
    (q, k), v = (torch.randn(2, *size) for size in sizes), torch.randn(2, memory.num_kv_heads, 9, memory.value_dim)
    gates, state = memory.gates(torch.randn(2, 9, memory.hidden_size)), memory.init_state(2, q)
    turned = {name: gate.flip(0) for name, gate in gates.items()}
    expected, other = memory.scan(state, q, k.flip(0), v.flip(0), turned)
    with gap.swapped_memories(model):
        found, after = memory.scan(state, q, k, v, gates)
    torch.testing.assert_close((found, after), (expected, other.flip(0)))
    assert not torch.allclose(found, memory.scan(state, q, k, v, gates)[0])


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def held_by(model):
    """What a store is made of, by layer."""
    return [(store.window, store.eviction, store.compressor) for store in arms.stores_of(model)]


def test_the_arms_of_a_model():
    three = ("full", "window", "memory")
    assert arms.arms_of(small()) == arms.arms_of(small(compressor=None, eviction=SalientSlots(16))) == three
    assert arms.arms_of(small(eviction=SalientSlots(0))) == three
    model = small(eviction=SalientSlots(16))
    assert arms.arms_of(model) == ("full", "window", "compressor", "slots", "memory")
    with arms.use_arm(model, "slots"), pytest.raises(ValueError, match="expected one of full, window"):
        arms.use_arm(model, "sinks").__enter__()
    with pytest.raises(ValueError, match="has no memory"):
        arms.use_arm(base(), "full").__enter__()


@pytest.mark.parametrize("window", [None, (12, 4)])
def test_arms_without_slots_have_windows_as_long_as_window_and_slots(window):
    """They are models that were retrofitted as such, with the same weights."""
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (2, 150))
    size, sinks = window or (24, 8)
    others = {
        "window": retrofit(base(), None, window_size=size + 16, num_sinks=sinks),
        "compressor": retrofit(base(), GatedDeltaNet, window_size=size + 16, num_sinks=sinks),
        "slots": retrofit(base(), None, window_size=size, num_sinks=sinks, eviction=SalientSlots(16)),
        "memory": retrofit(base(), GatedDeltaNet, window_size=size, num_sinks=sinks, eviction=SalientSlots(16)),
        "full": base(),
    }
    found = {}
    for arm, other in others.items():
        other.eval().load_state_dict({name: u for name, u in model.state_dict().items() if name in other.state_dict()})
        with arms.use_arm(model, arm, window):
            found[arm] = logits_of(model, ids)
            assert arms.slots_of(model) == (0 if arm == "compressor" else 16)
        torch.testing.assert_close(found[arm], logits_of(other, ids), rtol=1e-4, atol=1e-5)
    for arm in ("window", "compressor", "slots"):
        assert (found[arm] - found["memory"]).abs().max() > 1e-4
    assert (found["window"] - found["slots"]).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ["full", "window", "compressor", "slots", "memory"])
def test_an_arm_puts_everything_back(arm):
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (1, 90))
    before, names, expected = held_by(model), list(model.state_dict()), logits_of(model, ids)

    def fail():
        assert held_by(model) != before
        return logits_of(model, ids)[9]

    with pytest.raises(IndexError), arms.use_arm(model, arm, (12, 4)):
        fail()
    with pytest.raises(ValueError, match="window_size=-"), arms.use_arm(model, arm, (-99, 4)):
        pass
    assert held_by(model) == before and list(model.state_dict()) == names
    assert torch.equal(logits_of(model, ids), expected)


def test_slots_by_scores_without_training():
    ids = torch.randint(1, 256, (1, 120))
    for score in ("value_norm", "key_difference"):
        own = retrofit(base(), None, window_size=24, num_sinks=8, eviction=SalientSlots(16, score=score))
        model = small(eviction=SalientSlots(16))
        with arms.use_arm(model, score):
            torch.testing.assert_close(logits_of(model, ids), logits_of(own, ids))
        with pytest.raises(ValueError, match="a score for slots"), arms.use_arm(small(), score):
            pass


def test_layers_keep_windows_of_their_own():
    model = retrofit(base(), None, window_size={0: 24, 1: 12}, num_sinks=8)
    with arms.use_arm(model, "window"):
        assert [store.window.window_size for store in arms.stores_of(model)] == [24, 12]
    with pytest.raises(ValueError, match="the layers have different windows"):
        arms.own_window(model)


def test_layers_may_have_different_numbers_of_slots():
    model = small(eviction={0: SalientSlots(16), 1: SalientSlots(4)})
    with arms.use_arm(model, "window"):
        assert [store.window.window_size for store in arms.stores_of(model)] == [34, 34]  # the mean, at equal bytes
        example, _ = made("pass key", length=300)
        chunks = [needles.score(model, example, size)[0].loss for size in (37, 1000)]
    assert chunks[0] == pytest.approx(chunks[1], rel=1e-4)
    assert arms.equal_window(model, (24, 8)) == (34, 8)
    arms.set_slots(model, 20)
    assert [store.eviction.num_slots for store in arms.stores_of(model)] == [32, 8] and arms.slots_of(model) == 20
    one = small(eviction={1: SalientSlots(16)})  # the other layer folds everything, and counts for the mean
    arms.set_slots(one, 20)
    assert arms.stores_of(one)[1].eviction.num_slots == 40 and arms.slots_of(one) == 20
    with arms.use_arm(one, "key_norm"):
        assert [str(store.eviction) for store in arms.stores_of(one)] == ["FoldAll()", "40 slots (key_norm)"]


def test_bytes_of_the_arms():
    """Those of caches that have read more than they hold."""
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (1, 201))
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            reading, _ = quickstart.read(model, ids, 50, arm)
        assert arms.arm_bytes(model, arm, (24, 8), 200) == reading.cache_bytes[-1], arm


@pytest.mark.parametrize("compressor", [None, GatedDeltaNet])
def test_each_text_reads_the_slots_of_the_other(compressor):
    model, ids = small(compressor=compressor, eviction=SalientSlots(16)), torch.randint(1, 256, (2, 120))
    alone, twice = logits_of(model, ids), logits_of(model, ids[:1].expand(2, -1))
    with gap.swapped_memories(model):
        assert (logits_of(model, ids) - alone).abs().max() > 1e-4
        torch.testing.assert_close(logits_of(model, ids[:1].expand(2, -1)), twice)  # its own, from the other row
        assert torch.equal(logits_of(model, ids)[:, :32], alone[:, :32])  # before anything is evicted
    assert torch.equal(logits_of(model, ids), alone)


@pytest.mark.parametrize("eviction", [None, SalientSlots(16)])
def test_losses_of_a_span_that_comes_again(eviction):
    model, text, rng = small(eviction=eviction), torch.randint(1, 256, (900,)), random.Random(0)
    found = gap.span_losses(model, text, 600, random.Random(0), (24, 8))
    begin, more = rng.randrange(301), 16 if eviction else 0
    place = begin + rng.randint(8, 600 - 2 * gap.SEGMENT - 32 - more)
    assert place + gap.SEGMENT + 32 + more <= begin + 600 - gap.SEGMENT
    ids = torch.cat((text[begin : begin + 600 - gap.SEGMENT], text[place : place + gap.SEGMENT]))[None]
    assert ids.shape == (1, 600) and list(found) == list(arms.arms_of(model))
    with use_window(model, 24 + more, 8):
        expected = arm_losses(model, ids, start=600 - gap.SEGMENT, arms=["full", "window"])
    expected |= arm_losses(model, ids, start=600 - gap.SEGMENT, arms=["memory"])
    for arm, losses in expected.items():
        assert losses.shape == (1, gap.SEGMENT - 1)
        torch.testing.assert_close(found[arm], losses[0].double())
    measured = gap.measure_spans([found, {arm: losses + 1 for arm, losses in found.items()}])
    assert measured["memory"]["gain"] == pytest.approx(
        measured["window"]["loss"] - measured["memory"]["loss"], abs=1e-5
    )
    assert measured["memory"]["gain_error"] == pytest.approx(0, abs=1e-5)
    assert gap.measure_spans([found])["full"]["gain_error"] is None
