"""Every family of the table: the base model inside the window; one memory, however a text is cut, padded, generated."""

from pathlib import Path

import pytest
import torch

from ahn_layers import GatedDeltaNet, HippocampalAttention, full_attention, restore, retrofit, window_only
from ahn_layers.record import find_retrofitted

from ..methods import COMPRESSORS
from ..models import (
    CAPACITY,
    FAMILIES,
    NARROW,
    REFUSED,
    SINKS,
    VOCABULARY,
    WINDOW,
    base,
    generate,
    greedy,
    logits,
    positions,
    retrofitted,
    table,
    tokens,
)

ROOT = Path(__file__).parents[2]
LONG = 5 * CAPACITY
CUTS = {"fives": 5, "to the brim": [CAPACITY, LONG - CAPACITY], "past it": [CAPACITY + 1, 1, 17, 13]}

without_checks = pytest.mark.usefixtures("unchecked")
every_family = pytest.mark.parametrize("name", FAMILIES)


def close(actual, expected, name, message=None):
    torch.testing.assert_close(actual, expected, rtol=0, atol=FAMILIES[name].tolerance, msg=message)


def padded(rows):
    """Rows of tokens as one left-padded batch, and its mask."""
    longest = max(len(row) for row in rows)
    pads = [torch.zeros(longest - len(row), dtype=torch.long) for row in rows]
    ids = torch.stack([torch.cat((pad, row)) for pad, row in zip(pads, rows, strict=True)])
    return ids, (ids != 0).long()


def rows_of(*lengths):
    return [tokens(length, seed=seed) for seed, length in enumerate(lengths)]


# --- inside the window: the base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_inside_the_window_every_bit_is_the_base_models(name, dtype):
    plain, model, ids = base(name, dtype), retrofitted(name, dtype), tokens(2, CAPACITY)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    for cuts in (CAPACITY, 1, [3, 1, CAPACITY - 4]):
        ours, theirs = logits(model, ids, cuts), logits(plain, ids, cuts)
        if FAMILIES[name].latent:  # its own cache computes the keys anew from what it holds
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 if dtype == torch.float32 else 0.2)
        else:
            assert torch.equal(ours, theirs), f"cut into {cuts}"


@every_family
def test_one_token_more_differs(name):
    """The window is as large as it says, and no larger."""
    ids = tokens(1, CAPACITY + 1)
    difference = (logits(retrofitted(name), ids) - logits(base(name), ids)).abs().amax(dim=(0, 2))
    assert difference[:CAPACITY].max() <= FAMILIES[name].tolerance
    assert difference[CAPACITY] > 1e-3


# --- beyond it: one memory however the text is cut (token by token it is in the table, see below)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@every_family
def test_cached_is_uncached(name, cuts):
    model, ids = retrofitted(name), tokens(2, LONG)
    close(logits(model, ids, cuts), logits(model, ids), name)


@without_checks
@every_family
def test_generate_is_greedy_by_hand(name):
    model, ids = retrofitted(name), tokens(2, CAPACITY + 3)
    expected = greedy(model, ids, 10)
    assert torch.equal(generate(model, ids, 10), expected)
    with window_only(model):
        forgetful = generate(model, ids, 10)
    assert not torch.equal(forgetful, expected), "the memory says nothing in this test"


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_compressor(compressor):
    model = retrofitted(compressor=compressor)
    ids = tokens(2, LONG)
    expected = logits(model, ids)
    for cuts in CUTS.values():
        close(logits(model, ids, cuts), expected, "llama")
    assert torch.equal(generate(model, ids, 6), greedy(model, ids, 6))
    assert torch.equal(logits(model, ids[:, :CAPACITY]), logits(base(), ids[:, :CAPACITY]))
    with window_only(model):
        assert (logits(model, ids) - expected).abs().max() > 1e-3


# --- padding is nothing


@every_family
def test_a_padded_batch_is_its_rows(name):
    model, rows = retrofitted(name), rows_of(LONG, 1, CAPACITY - 1, CAPACITY + 5)
    ids, mask = padded(rows)
    together = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    for i, row in enumerate(rows):
        close(together[i, LONG - len(row) :], logits(model, row[None])[0], name, f"row {i}, {len(row)} tokens")


@without_checks
@every_family
def test_generate_of_a_padded_batch_is_that_of_its_rows(name):
    """The shortest rows begin below the sinks, and leave the window while they are generated."""
    model, rows = retrofitted(name), rows_of(20, 1, CAPACITY - 1)
    ids, mask = padded(rows)
    together = generate(model, ids, CAPACITY + 2, attention_mask=mask)[:, ids.shape[1] :]
    for i, row in enumerate(rows):
        alone = generate(model, row[None], CAPACITY + 2)[0, len(row) :]
        assert torch.equal(together[i], alone), f"row {i}, {len(row)} tokens"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.mixes])
def test_pads_in_the_middle_are_nothing(name):
    """As in the second turn of a batch of chats."""
    model = retrofitted(name)
    ids, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, 12:21], mask[1, :3], mask[1, 30:] = 0, 0, 0
    options = {"attention_mask": mask, "position_ids": positions(mask)}
    together = logits(model, ids.where(mask.bool(), 0), **options)
    for i in range(2):
        real = mask[i].bool()
        close(together[i, real], logits(model, ids[i, real][None])[0], name)


# --- what was retrofitted


@every_family
def test_which_layers_get_a_memory(name):
    model, family = retrofitted(name), FAMILIES[name]
    record = find_retrofitted(model)[1]
    assert tuple(record.layers) == family.layers
    wrapped = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    assert tuple(block.layer_idx for block in wrapped) == family.layers
    if family.layers != (0, 1, 2) and name != "lfm2":  # its other layers are no attention at all
        assert len(record.skipped) == 2 and all(record.skipped.values())


@every_family
def test_base_parameters_keep_their_names_and_values(name):
    plain = base(name)
    before = {key: u.clone() for key, u in plain.state_dict().items()}
    parameters = [key for key, _ in plain.named_parameters()]
    model = retrofitted(model=plain)
    after = model.state_dict()
    assert {key for key in after if ".memory." not in key} == before.keys()
    assert [key for key, _ in model.named_parameters() if ".memory." not in key] == parameters
    assert all(torch.equal(after[key], u) for key, u in before.items())
    owners = {key.split(".memory.")[0] for key in after if ".memory." in key}
    assert len(owners) == len(FAMILIES[name].layers)


@every_family
def test_sinks_stay_within_the_trained_distance(name):
    model, kind = retrofitted(name), FAMILIES[name].sinks
    blocks = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    assert any(block.memory.rotary is not None for block in blocks) == (kind == "turned back")
    assert all(bool(block.found.fixed_positions) == (kind == "true distance") for block in blocks)


def far_away(name, sink_positions):
    """How much the last logits depend on whether the sinks are 90 or 117 tokens away, without a memory."""
    model = base(name, max_position_embeddings=16)
    retrofit(model, None, window_size=WINDOW, num_sinks=SINKS, sink_positions=sink_positions)
    first, between, last = tokens(1, SINKS), tokens(1, 3 * NARROW, seed=1), tokens(1, 80, seed=2)
    near = torch.cat((first, last), dim=1)
    far = torch.cat((first, between, last), dim=1)
    return (logits(model, near)[:, -1] - logits(model, far)[:, -1]).abs().max()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sinks != "true distance"])
def test_beyond_the_trained_length_sinks_look_equally_far(name):
    """Angles are float32 in every model, hence the tolerance."""
    assert far_away(name, "trained") < 1e-3
    if FAMILIES[name].sinks == "turned back":
        assert far_away(name, "absolute") > 1e-2


# --- switches


@without_checks
@every_family
def test_full_attention_is_the_base_model_beyond_the_window(name):
    plain, model, ids = base(name), retrofitted(name), tokens(2, LONG)
    with full_attention(model):
        assert torch.equal(logits(model, ids), logits(plain, ids))
        assert torch.equal(logits(model, ids, [21, 1, 18]), logits(plain, ids, [21, 1, 18]))
        assert torch.equal(generate(model, ids), generate(plain, ids))
    assert (logits(model, ids) - logits(plain, ids)).abs().max() > 1e-3


@without_checks
@every_family
def test_restore_gives_back_the_original(name):
    plain, model, ids = base(name), base(name), tokens(2, LONG)
    modules = dict(model.named_modules())
    attributes, config = set(model.__dict__), model.config.to_dict()
    retrofitted(model=model)
    logits(model, ids)
    assert restore(model) is model
    assert dict(model.named_modules()) == modules, "the very same modules"
    assert set(model.__dict__) == attributes and model.config.to_dict() == config
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(logits(model, ids, 13), logits(plain, ids, 13))
    assert torch.equal(generate(model, ids), generate(plain, ids))
    assert torch.equal(logits(retrofitted(model=model), ids), logits(retrofitted(name), ids)), "and once more"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name):
    model, ids = base(name, torch.float32), tokens(1, 12)
    keys, expected = list(model.state_dict()), logits(model, ids)
    trait = REFUSED[name].trait.replace("indexed", "(indexed|deepseek_sparse)")  # its name with transformers 5.17
    with pytest.raises(ValueError, match=trait):
        retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids), expected), "the model is unchanged"


# --- what reaches the output


def changed(model, ids, reach):
    """How the last logits answer to other tokens between the sinks and the last ``reach`` ones."""
    other = ids.clone()
    other[:, SINKS:-reach] = (other[:, SINKS:-reach] + 1) % VOCABULARY
    return (logits(model, ids)[:, -1] - logits(model, other)[:, -1]).abs().max()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.recurs])
def test_what_left_the_window_is_gone_without_a_memory_and_remembered_with_one(name):
    """Through three layers the last token sees at most three windows."""
    model, ids, reach = retrofitted(name), tokens(1, 60), 1 + 3 * (max(WINDOW, NARROW) - 1)
    assert changed(model, ids, reach) > 1e-6
    with window_only(model):
        assert changed(model, ids, reach) == 0
    fresh = retrofit(base(name), GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    assert changed(fresh, ids, reach) == 0, "a memory that is not trained adds nothing"
    assert torch.equal(logits(fresh, ids), logits(retrofitted(name, compressor=None), ids))


@without_checks
def test_the_window_is_exact_in_one_layer():
    """The last token sees the sinks and the last ``WINDOW`` tokens, itself included: each of them, and nothing else."""
    model, ids = retrofitted(model=base(num_hidden_layers=1)), tokens(1, LONG)
    expected = logits(model, ids)[:, -1]
    with window_only(model):
        inside = logits(model, ids)[:, -1]
    for place in range(LONG):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        assert not torch.equal(logits(model, other)[:, -1], expected), f"{place} does not reach the output at all"
        with window_only(model):
            seen = not torch.equal(logits(model, other)[:, -1], inside)
        assert seen == (place < SINKS or place >= LONG - WINDOW), place


# --- the table in the documentation


@without_checks
def test_the_table_of_the_documentation_is_that_of_the_tests():
    page = (ROOT / "docs" / "reference" / "families.md").read_text().strip().splitlines()
    shown, measured = ([row.rsplit("|", 2) for row in rows] for rows in (page, table().splitlines()))
    remedy = "python -m tests.models > docs/reference/families.md"
    assert [row[0] for row in shown] == [row[0] for row in measured], remedy
    for row, family in zip(shown[2:], FAMILIES.values(), strict=False):
        assert float(row[1]) <= family.tolerance, row
    assert "\n[`docs/reference/families.md`](families.md)\n" in (ROOT / "docs" / "reference" / "models.md").read_text()
