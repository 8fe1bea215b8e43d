"""Another base model and other memory weights are recognised, whatever their dtype or device."""

import copy
import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ahn_layers import adapter_parameters, load_adapter, retrofit, save_adapter
from ahn_layers.files import digest
from ahn_layers.fingerprint import differences, memory_identity
from ahn_layers.record import find_retrofitted

from .adapters import SIZES, make, plain, same, weights
from .hard.stores import Interrupt

SIBLINGS = {
    "family": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        "base_model_type='llama', the model has 'mistral'",
    ),
    "checkpoint": (lambda: plain(seed=1), "other values in "),
    "deeper": (lambda: plain(num_hidden_layers=4), "num_hidden_layers=3 there, 4 here"),
    "shallower": (lambda: plain(num_hidden_layers=2), "num_hidden_layers=3 there, 2 here"),
    "wider": (lambda: plain(hidden_size=64), "hidden_size=32 there, 64 here"),
    "vocabulary": (lambda: plain(vocab_size=65), "vocab_size=64 there, 65 here"),
    "rotation": (
        lambda: plain(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "rope_parameters.rope_theta=10000.0 there, 500000.0 here",
    ),
}


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("case", SIBLINGS)
def test_another_base_is_refused(case, retrofitted, tmp_path):
    build, message = SIBLINGS[case]
    save_adapter(make(), tmp_path)
    other = make(model=build()) if retrofitted else build()
    before, names = copy.deepcopy(other.state_dict()), [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError) as error:
        load_adapter(other, tmp_path)
    if not retrofitted or case not in ("deeper", "shallower", "wider"):  # whose memory does not fit either
        assert message in str(error.value) and "check_base=False" in str(error.value)
    assert same(other.state_dict(), before) and [name for name, _ in other.named_modules()] == names


@pytest.mark.parametrize("case", ["family", "checkpoint", "vocabulary", "deeper"])
def test_the_check_of_the_base_can_be_overridden(case, tmp_path):
    model = make(layers=[0, 1])
    save_adapter(model, tmp_path)
    other = load_adapter(SIBLINGS[case][0](), tmp_path, check_base=False)
    assert same(weights(other), weights(model)) and find_retrofitted(other)[1].layers == [0, 1]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("there", DTYPES)
@pytest.mark.parametrize("here", DTYPES)
def test_the_same_base_in_another_dtype_is_the_same(there, here, tmp_path):
    save_adapter(make(model=plain(dtype=there)), tmp_path)
    load_adapter(plain(dtype=here), tmp_path)
    narrow = plain(dtype=torch.bfloat16).to(here)  # a checkpoint in bfloat16, loaded wider
    save_adapter(make(model=plain(dtype=torch.bfloat16).to(there)), tmp_path)
    load_adapter(narrow, tmp_path)
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(plain(seed=1, dtype=here), tmp_path)


def test_a_slightly_trained_base_is_another_one(tmp_path):
    save_adapter(make(), tmp_path)
    other = plain()
    with torch.no_grad():
        for u in other.parameters():
            u.mul_(1 + 1e-6)
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(other, tmp_path)


def test_weights_that_cannot_be_read_are_not_compared(tmp_path):
    """Quantized and offloaded ones; the config still is."""
    save_adapter(make(), tmp_path)
    other = plain(seed=1)
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    found = list(differences(json.loads((tmp_path / "adapter.json").read_text())["base"], other))
    assert found and all("embed" in text or "norm" in text for text in found)
    assert not list(differences(json.loads((tmp_path / "adapter.json").read_text())["base"], plain().to("meta")))


def test_a_bare_decoder_is_the_same_base(tmp_path):
    model = make()
    save_adapter(model, tmp_path)
    assert same(load_adapter(plain().model, tmp_path).state_dict(), model.model.state_dict())
    with pytest.raises(ValueError, match="other values in"):
        load_adapter(plain(seed=1).model, tmp_path)


def test_adapters_without_a_fingerprint_load(tmp_path):
    """Those of earlier versions."""
    model = make()
    save_adapter(model, tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    del description["base"], description["weights_sha256"], description["description_sha256"]
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    assert same(weights(load_adapter(plain(seed=1), tmp_path)), weights(model))


def test_bytes_that_cannot_be_read():
    with pytest.raises(ValueError, match="w is a Tensor: expected a tensor whose bytes can be read"):
        digest([("w", torch.eye(3).to_sparse())])


def test_memory_that_runs_out_is_not_taken_for_quantized_weights():
    model, error = make(), torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError, match="none left"), Interrupt(1, error):
        memory_identity(model)


def test_memory_identity(tmp_path):
    model = make()
    found = memory_identity(model)
    assert len(found.split()[-1]) == 64 and memory_identity(model) == found
    assert memory_identity(copy.deepcopy(model)) == found and memory_identity(torch.nn.Sequential(model)) == found
    save_adapter(model, tmp_path)
    assert memory_identity(load_adapter(plain(), tmp_path, window_size=9)) == found
    assert memory_identity(make()) != found and memory_identity(make(memory_positions="none")) != found
    assert memory_identity(retrofit(plain(), None, window_size=6)) == memory_identity(
        retrofit(plain(), None, window_size=9)
    )
    assert memory_identity(copy.deepcopy(model).to("meta")) == ""


CHANGES = {
    "in place": lambda p: p.mul_(2),
    "one value": lambda p: p.flatten()[-1:].add_(1),
    "other storage": lambda p: setattr(p, "data", p.data * 2),
    "copied": lambda p: p.copy_(p * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_memory_identity_follows_the_weights(change):
    model = make()
    found = memory_identity(model)
    with torch.no_grad():
        CHANGES[change](list(adapter_parameters(model))[-1][1])
    assert memory_identity(model) != found


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("way", ["fused", "foreach"])
def test_memory_identity_follows_an_optimizer(optimizer, way):
    """Fused ones, the default of ``Trainer``, change no version counter."""
    model = make()
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    found = memory_identity(model)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer(parameters, lr=0.1, **{way: True}).step()
    assert memory_identity(model) == memory_identity(copy.deepcopy(model)) != found


def test_memory_identity_of_other_parameters():
    model, other = make(), make()
    kept = dict(adapter_parameters(model))  # the old ones live on
    found = memory_identity(model), memory_identity(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert kept and found[0] != memory_identity(model) == found[1]


def test_memory_identity_is_cheap_while_nothing_changes(monkeypatch):
    model = make()
    found = memory_identity(model)
    monkeypatch.setattr("hashlib.sha256", None)
    assert memory_identity(model) == found
