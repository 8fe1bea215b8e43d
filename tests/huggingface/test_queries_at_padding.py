"""A query at padding sees what the last real token before it saw, as in the base model."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ahn_layers import GatedDeltaNet, HippocampalCache, MemoryStore, Window
from ahn_layers.huggingface.decoder import CACHE

from ..models import CAPACITY, base, retrofitted, tokens

pytestmark = pytest.mark.usefixtures("unchecked")


def masked(lengths, columns, side):
    """A mask of rows with so many real tokens each."""
    column = torch.arange(columns)
    rows = [column < n if side == "right" else column >= columns - n for n in lengths]
    return torch.stack(rows).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_within_the_window_have_the_bits_of_the_base_model(side, attention):
    """Logits at padding too, so that a loss on it is the same."""
    model, plain, ids = retrofitted(), base(), tokens(3, CAPACITY)
    mask = masked((CAPACITY, 3, 1), CAPACITY, side)
    for one in (model, plain):
        one.set_attn_implementation(attention)
    with torch.no_grad():
        out, expected = (one(ids, attention_mask=mask, labels=ids) for one in (model, plain))
    shown = torch.ones_like(mask) if side == "right" else mask
    if side == "left" and attention == "eager":  # in which the base model fails in float64
        assert out.logits[shown.bool()].isfinite().all()
        return
    assert torch.equal(out.logits[shown.bool()], expected.logits[shown.bool()])
    assert side == "left" or torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("static", [False, True])
def test_generate_with_right_padding_is_that_of_the_base_model(static):
    """As bad an idea as ever, but the same: within the window."""
    model, plain, ids = retrofitted(window_size=40), base(), tokens(3, 12)
    mask = masked((12, 7, 2), 12, "right")
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    kind = {"cache_implementation": "static"} if static else {}
    assert torch.equal(model.generate(ids, **options, **kind), plain.generate(ids, **options))


@pytest.mark.parametrize("make", [HippocampalCache, DynamicCache, lambda: StaticCache(base().config, 64)])
def test_a_masked_token_in_its_own_step(make):
    model, plain = retrofitted(window_size=40), base()
    ids, new, mask = tokens(2, 9), tokens(2, 1, seed=1), torch.ones(2, 10, dtype=torch.long)
    mask[1, -1] = 0
    outs = []
    for one, cache in ((model, make()), (plain, DynamicCache())):
        with torch.no_grad():
            one(ids, **{CACHE: cache})
            outs.append(one(new, attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.allclose(*outs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["absolute", "none"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("pads", [1, 3, 20])
@pytest.mark.parametrize("split", [None, 5, 14])
def test_beyond_the_window_it_reads_the_memory_too(split, pads, sinks, kind):
    """Against one real query at the last rank: softmax over what it sees, and the reading of the state."""
    from ahn_layers import Rotary

    torch.manual_seed(0)
    rotary = Rotary(10.0 ** -torch.arange(2), trained_length=6)
    store = MemoryStore(Window(5, sinks), GatedDeltaNet(12, 2, 4), rotary, memory_positions=kind).double()
    with torch.no_grad():
        for parameter in store.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    length = 16
    q, k, v = torch.randn(3, 2, 2, length + pads, 4, dtype=torch.float64)
    x = torch.randn(2, length + pads, 12, dtype=torch.float64)
    valid = torch.ones(2, length + pads, dtype=torch.bool)
    valid[1, length:] = False
    valid[0, : length - 3] = False  # this row has not outgrown its window
    with torch.no_grad():
        state, outs = None, []
        for a, b in zip([0, split or length], [split or length, length + pads], strict=True):
            if a < b:
                part = slice(a, b)
                out, state = store(q[:, :, part], k[:, :, part], v[:, :, part], x[:, part], state, valid=valid[:, part])
                outs.append(out)
        out = torch.cat(outs, dim=2)[1, :, length:]
        for i in range(pads):  # the query and the hidden state of the padding, with the key and value of the last token
            last = [torch.cat((u[1:, :, : length - 1], w[1:, :, j, None]), dim=2) for u, w, j in (
                (q, q, length + i), (k, k, length - 1), (v, v, length - 1)
            )]  # fmt: skip
            hidden = torch.cat((x[1:, : length - 1], x[1:, length + i, None]), dim=1)
            expected, _ = store(*last, hidden)
            assert torch.allclose(out[:, i], expected[0, :, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_static_caches_under_autocast(implementation):
    model, ids = retrofitted(dtype=torch.float32), tokens(2, 30)
    kind = {} if implementation is None else {"cache_implementation": implementation}
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, max_new_tokens=6, do_sample=False, **kind)
        assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False))
