"""Recurrences that begin anew when several tokens come at once: nothing is cut unasked, and pieces are refused."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ahn_layers.huggingface import prefill

from ..models import CACHE, logits, tokens
from .recurrent import read
from .test_recurrent_rows import TYPES, of_type, without_kernels  # noqa: F401

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("name", TYPES)
def test_a_model_tells_whether_it_goes_on(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not know it")
    assert of_type(name).hippocampus.goes_on == (name != "jamba")


@pytest.mark.parametrize("name", ["jamba", "dots3_note"])
def test_a_prompt_is_not_cut_unasked(name, monkeypatch):
    """Nor where layers that were left alone pick keys by an index."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not know it")
    model, ids = of_type(name), tokens(2, 30)
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(prefill, "SHORTEST_CHUNK", 8)
    out = model.generate(ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, do_sample=False)
    torch.testing.assert_close(out.logits[0], logits(model, ids)[:, -1].float(), rtol=0, atol=1e-5)


def test_several_tokens_behind_others_are_refused():
    model, new = of_type("jamba"), tokens(1, 5, seed=1)
    cache = read(model, 20)
    with pytest.raises(ValueError, match=r"5 new tokens and a cache that holds 20: .* one at a time"):
        model(new, use_cache=True, **{CACHE: cache})
    whole = logits(model, torch.cat((tokens(1, 20), new), dim=1))[:, 20:]
    torch.testing.assert_close(logits(model, new, 1, cache), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="leave prefill_chunk_size unset"):
        model.generate(torch.cat((tokens(1, 20), new), dim=1), max_new_tokens=1, prefill_chunk_size=10)
