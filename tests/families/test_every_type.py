"""Types that stand for many others; all of them with ``pytest -m every_type tests/families``."""

import json

import pytest
import torch

from ahn_layers import GatedDeltaNet, retrofit

from ..models import train_memory
from . import cases, table
from .checks import SINKS, WINDOW, judge, one_pass
from .try_every_type import try_type

REPRESENTATIVE = {
    "gpt_oss": "1 of 3",  # learned sink logits
    "gemma3n_text": "2 of 4",  # layers that share keys and values
    "falcon_h1": "3 of 3",  # a recurrence in every layer
    "nemotron_h": "1 of 1",  # layers of many kinds
    "recurrent_gemma": "1 of 1",  # its output holds no cache
    "minimax_m3_vl_text": "3 of 3",
    "roc_bert": "3 of 3",  # a cache beside one of an encoder's tokens
    "image/gemma3": "1 of 3",  # images whose tokens see each other
    "image/paligemma": "3 of 3",  # prompts whose tokens see each other
    "image/qwen2_vl": "3 of 3",  # positions in three dimensions
    "audio/qwen2_audio": "3 of 3",
}
REFUSED = {
    "doge": "changes the mask",
    "deepseek_v32": "whose cache (DynamicIndexedLayer) holds more",
    "zamba2": "share the cache index",
    "mamba2": "has no attention, or one of its own",
    "bloom": "does not use the attention interface",
    "inkling_text": "position biases are not supported",
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_types_that_stand_for_others(name):
    verdict = judge(cases.build(name))
    assert (verdict.word, verdict.layers) == ("passes", REPRESENTATIVE[name]), verdict.cause


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["image/gemma3", "image/qwen2_vl", "audio/qwen2_audio"])
def test_a_saved_model_comes_back_whole_or_not_at_all(name, tmp_path):
    """With its class named, it is refused; with an Auto class, it is the same model."""
    case = cases.build(name)
    model = retrofit(case.model.float(), GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    case.media = {key: u.float() if u.is_floating_point() else u for key, u in case.media.items()}
    train_memory(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="import ahn_layers"):
        type(model).from_pretrained(tmp_path)
    auto = cases.multimodal_auto(name.partition("/")[2])
    other = auto.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(other) is type(model)
    assert torch.equal(one_pass(other, case, case.text(30)), one_pass(model, case, case.text(30)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_supported_is_refused_by_retrofit(name):
    verdict = judge(cases.build(name))
    assert verdict.word == "refused" and REFUSED[name] in verdict.cause, verdict.cause


def test_the_table_of_the_documentation_has_every_type():
    page = table.PAGE.read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    missing = set(cases.all_names("causal")) - set(rows)
    assert not missing, "python -m tests.families.try_every_type --write"
    for name, layers in REPRESENTATIVE.items():
        assert f"| `{name}` | passes | {layers} |" in page
    for name in REFUSED:
        assert f"| `{name}` | refused |" in page
    assert "| fails |" not in page


@pytest.mark.every_type
@pytest.mark.parametrize("name", cases.all_names())
def test_every_type(name):
    verdict = try_type(name)
    assert verdict["word"] != "fails", json.dumps(verdict, indent=1)
