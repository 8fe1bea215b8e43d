"""Several texts in one row are read as if each were alone, forward and backward; with a cache they are an error."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from ahn_layers import HippocampalCache, adapter_parameters, restore
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.huggingface.packing import find_texts

from ..models import CAPACITY, FAMILIES, base, retrofitted, tokens

LENGTHS = (3 * CAPACITY, 5, CAPACITY + 1, 1)
pytestmark = pytest.mark.usefixtures("unchecked")


def packed(lengths=LENGTHS):
    texts = [tokens(1, length, seed=length) for length in lengths]
    return texts, torch.cat(texts, dim=1), torch.cat([torch.arange(length) for length in lengths])[None]


def bounds(lengths=LENGTHS):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def ways(lengths=LENGTHS):
    """What collators pass."""
    positions = packed(lengths)[2]
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    flash = {"cu_seq_lens_q": bounds(lengths), "cu_seq_lens_k": bounds(lengths), "max_length_q": 24, "max_length_k": 24}
    return {
        "positions": {"position_ids": positions, "use_cache": False},
        "positions, by default": {"position_ids": positions},
        "a mask of ones": {"position_ids": positions, "attention_mask": torch.ones_like(positions)},
        "cu_seq_lens": flash,
        "seq_idx": {"seq_idx": number},
        "all of them": {"position_ids": positions, "seq_idx": number} | flash,
    }


@pytest.mark.parametrize("how", ways())
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window", "phi3", "gemma2", "gemma3", "cohere2", "glm"])
def test_each_text_is_read_alone(family, how):
    model = retrofitted(family)
    texts, row, _ = packed()
    with torch.no_grad():
        out = model(row, **ways()[how])
        expected = torch.cat([model(text, use_cache=False).logits for text in texts], dim=1)
    assert torch.allclose(out.logits, expected, rtol=0, atol=FAMILIES[family].tolerance)
    assert getattr(out, CACHE, None) is None


def test_within_the_window_each_text_is_read_as_by_the_base_model():
    model, (texts, row, positions) = retrofitted(), packed((5, CAPACITY, 1))
    with torch.no_grad():
        out = model(row, position_ids=positions).logits
        plain = restore(model)
        expected = torch.cat([plain(text, use_cache=False).logits for text in texts], dim=1)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_texts_alone():
    model, (texts, row, positions) = retrofitted(), packed()
    weights = torch.randn(1, row.shape[1], 64, dtype=torch.float64)
    grads = []
    for whole in (True, False):
        model.zero_grad()
        if whole:
            (model(row, position_ids=positions).logits * weights).sum().backward()
        else:
            for text, weight in zip(texts, weights.split(LENGTHS, dim=1), strict=True):
                (model(text, use_cache=False).logits * weight).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) and any(p.grad is not None for _, p in adapter_parameters(model))
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in zip(*grads, strict=True))


def test_gradient_checkpointing_keeps_texts_apart():
    model, (_, row, positions) = retrofitted(), packed()
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.zero_grad()
        loss = model(row, position_ids=positions).logits.square().mean()
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(*losses, strict=True))


@pytest.mark.parametrize("family, message", [
    ("gpt_oss", "masks of this model do not honour them: pass one text a row"),
    ("lfm2", "packed texts in a model with convolutions or recurrences, .* Pass seq_idx too"),
    ("falcon_h1", "packed texts in a model with convolutions or recurrences"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["positions", "a mask of ones", "cu_seq_lens"])
def test_texts_that_other_layers_would_mix_are_refused(family, message, how):
    """Sliding layers whose masks the model makes without positions, convolutions, recurrences."""
    _, row, positions = packed()
    options, alone = ways()[how] | {"position_ids": positions}, tokens(1, 1)
    with torch.no_grad():
        plain = base(family)
        assert (plain(row, **options).logits[:, -1] - plain(alone, use_cache=False).logits[:, -1]).abs().max() > 0.01
        with pytest.raises(ValueError, match=message):
            retrofitted(family)(row, **options)


@pytest.mark.parametrize("flash", [False, True])
def test_the_collator_of_transformers(flash):
    model, (texts, row, _) = retrofitted(), packed()
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash, return_tensors="pt")
    batch = collator([{"input_ids": text[0].tolist()} for text in texts])
    with torch.no_grad():
        out = model(**batch)
        expected = torch.cat([model(text, use_cache=False).logits for text in texts], dim=1)
    assert torch.equal(batch["input_ids"], row) and torch.allclose(out.logits, expected, rtol=0, atol=1e-9)


def test_padding_between_texts_is_nothing():
    """Two rows, the second padded on the left and in the middle."""
    model = retrofitted()
    long, short = tokens(1, 20, seed=1), tokens(1, 13, seed=2)
    positions = torch.cat((torch.arange(20), torch.arange(13)))[None]
    pads = torch.zeros(1, 2, dtype=torch.long)
    padded = torch.cat((pads, long, pads, short), dim=1)
    its_positions = torch.cat((pads + 1, positions[:, :20], pads + 1, positions[:, 20:]), dim=1)
    mask = torch.ones_like(padded)
    mask[0, :2] = mask[0, 22:24] = 0
    with torch.no_grad():
        out = model(padded, position_ids=its_positions, attention_mask=mask).logits
        expected = torch.cat((model(long, use_cache=False).logits, model(short, use_cache=False).logits), dim=1)
    assert torch.allclose(out[mask.bool()], expected[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("cache", ["passed", "filled", "asked for"])
def test_with_a_cache_packed_texts_are_an_error(how, cache):
    model, (_, row, _) = retrofitted(), packed()
    options = ways()[how] | {"use_cache": True}
    held = HippocampalCache()
    if cache == "filled":
        with torch.no_grad():
            model(tokens(1, 4), **{CACHE: held})
    if cache != "asked for":
        options[CACHE] = held
    with torch.no_grad(), pytest.raises(ValueError, match="packed texts with a cache"):
        model(row, **options)
    assert held.get_seq_length() == (4 if cache == "filled" else 0)


@pytest.mark.parametrize("left", [0, 3])
def test_a_padded_row_is_one_text(left):
    """Positions at padding mean nothing; a row may begin anywhere, with a cache or without."""
    model, ids = retrofitted(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    for fill in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: HippocampalCache()}).logits
            assert torch.allclose(out[:1, left:], model(ids[:1, left:], use_cache=False).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_cache", [False, True])
def test_right_padding_in_generate_is_no_second_text(use_cache):
    """Positions count on from those of the pads, and so they fall; the base model does the same."""
    model, plain, ids = retrofitted(window_size=40), base(), tokens(4, 9)
    mask = torch.ones_like(ids).tril(5)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_sources_that_contradict_each_other_are_an_error():
    positions = torch.cat((torch.arange(4), torch.arange(3)))[None]
    with pytest.raises(ValueError, match="column 4 of row 0"):
        find_texts(1, 7, position_ids=positions, cu_seq_lens=torch.tensor([0, 5, 7]))
    for wrong in ([0, 5], [1, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="increasing bounds from 0"):
            find_texts(1, 7, cu_seq_lens=torch.tensor(wrong))
    with pytest.raises(ValueError, match="seq_idx has shape"):
        find_texts(1, 7, seq_idx=torch.zeros(1, 6))


def test_the_base_model_keeps_texts_apart_too():
    """So that what is compared above is what a user of transformers expects."""
    plain, (texts, row, positions) = base(), packed()
    with torch.no_grad():
        out = plain(row, position_ids=positions, use_cache=False).logits
        expected = torch.cat([plain(text, use_cache=False).logits for text in texts], dim=1)
    assert torch.allclose(out, expected, rtol=0, atol=1e-9)
