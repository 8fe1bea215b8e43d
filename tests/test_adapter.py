"""Adapter files: round trips, the released naming, and every way in which one can be wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ahn_layers import (
    Compressor,
    GatedDeltaNet,
    HippocampalAttention,
    Mamba2,
    SalientSlots,
    adapter_parameters,
    load_adapter,
    memory_report,
    outer,
    retrofit,
    save_adapter,
)
from ahn_layers.huggingface import install
from ahn_layers.record import find_retrofitted

from .adapters import interrupt, make, plain, released, same, weights


@pytest.mark.parametrize("options", [{}, {"shared_state": True}, {"layers": [0, 2]}])
@pytest.mark.parametrize("compressor", [GatedDeltaNet, Mamba2])
def test_round_trip(compressor, options, tmp_path):
    model = make(compressor, **options)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    other = make(compressor, **options)
    assert not same(weights(other), weights(model))
    assert load_adapter(other, tmp_path / "adapter") is other
    assert same(weights(other), weights(model))


def test_an_adapter_may_have_no_weights(tmp_path):
    """A score that needs no training, and no compressor: the description is all; where weights belong, they must be."""
    policy = SalientSlots(6, score="key_norm")
    save_adapter(retrofit(plain(), None, window_size=8, eviction=policy), tmp_path / "slots")
    found = find_retrofitted(load_adapter(plain(), tmp_path / "slots"))[1]
    assert found.window.window_size == 8
    assert "6 slots" in memory_report(load_adapter(plain(), tmp_path / "slots"))
    save_adapter(make(), tmp_path / "other")
    save_file({}, tmp_path / "other" / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"memory weights for the layers \[\], the model has a memory in"):
        load_adapter(plain(), tmp_path / "other")


def test_a_plain_model_is_retrofitted_as_the_adapter_says(tmp_path):
    model = make(shared_state=True, layers=[1], sink_positions="streaming", memory_positions="none")
    save_adapter(model, tmp_path)
    other = load_adapter(plain(), tmp_path)
    ours, theirs = find_retrofitted(model)[1], find_retrofitted(other)[1]
    assert (ours.window, ours.layers, ours.options) == (theirs.window, theirs.layers, theirs.options)
    assert ours.memory_positions == theirs.memory_positions == "none"
    ids = torch.randint(0, 64, (1, 30))
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_the_window_may_be_chosen_while_loading(tmp_path):
    save_adapter(make(memory_positions="none"), tmp_path)
    model = load_adapter(plain(), tmp_path, window_size=20, num_sinks=3)
    window = find_retrofitted(model)[1].window
    assert (window.window_size, window.num_sinks) == (20, 3) and load_adapter(model, tmp_path, window_size=20) is model
    with pytest.raises(ValueError, match="num_sinks=4: the model is retrofitted already, with num_sinks=3"):
        load_adapter(model, tmp_path, num_sinks=4)


def test_another_window_may_be_used(tmp_path):
    save_adapter(make(), tmp_path)
    model = retrofit(plain(), GatedDeltaNet, window_size=10)
    load_adapter(model, tmp_path)
    assert find_retrofitted(model)[1].window.window_size == 10


def test_a_class_of_the_user_is_found_by_name(tmp_path):
    class Decaying(Compressor):
        def fold(self, state, k, v):
            return 0.9 * state + outer(k, v)

    model = make(Decaying)
    save_adapter(model, tmp_path)
    assert same(weights(load_adapter(plain(), tmp_path)), weights(model))


@pytest.mark.parametrize("as_folder", [False, True])
def test_released_naming(tmp_path, as_folder):
    model, other = make(), make()
    released(model, tmp_path / "model.safetensors")
    load_adapter(other, tmp_path if as_folder else tmp_path / "model.safetensors")
    assert same(weights(other), weights(model))


def fingerprint_of(model):
    """All that a retrofit changes, and all weights."""
    modules = {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    return modules, hooks, model.config._attn_implementation, {n: u.clone() for n, u in model.state_dict().items()}


def unchanged(model, before):
    now = fingerprint_of(model)
    return now[:3] == before[:3] and same(now[3], before[3])


REFUSED = {
    "nan": lambda u: u | {"layers.1.A_log": torch.full((4,), float("nan"))},
    "missing": lambda u: {name: value for name, value in u.items() if name != "layers.2.a_proj.weight"},
    "unknown": lambda u: u | {"layers.2.c_proj.weight": torch.ones(2)},
    "shape": lambda u: u | {"layers.2.a_proj.weight": torch.ones(4, 31)},
    "layer": lambda u: {name: value for name, value in u.items() if not name.startswith("layers.2.")},
    "of another save": lambda u: {name: value + 1 for name, value in u.items()},
}


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_adapter_changes_nothing(case, retrofitted, tmp_path):
    save_adapter(make(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    save_file(REFUSED[case](load_file(path)), path)
    model = make() if retrofitted else plain()
    before = fingerprint_of(model)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)
    model(torch.arange(20)[None])
    if not retrofitted:
        retrofit(model, GatedDeltaNet, window_size=6)


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_ctrl_c_while_weights_are_copied(after, retrofitted, tmp_path, monkeypatch):
    save_adapter(make(), tmp_path)
    model = make() if retrofitted else plain()
    before, calls = fingerprint_of(model), []

    def interrupted(value, parameter):
        calls.append(value)
        if len(calls) > after:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr("ahn_layers.adapter._as_sharded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    assert len(calls) == after + 1 and unchanged(model, before)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_ctrl_c_in_retrofit_leaves_the_model_alone(after, monkeypatch):
    model, usual, calls = plain(), HippocampalAttention.__init__, []
    before, ids = fingerprint_of(model), torch.arange(30)[None]
    expected = model(ids).logits

    def interrupted(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        calls.append(self)
        if len(calls) > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HippocampalAttention, "__init__", interrupted)
        if after == 3:  # all blocks are replaced
            patch.setitem(install.REPLACED, "get_compiled_call", interrupt)
        with pytest.raises(KeyboardInterrupt):
            retrofit(model, GatedDeltaNet, window_size=6)
    assert unchanged(model, before) and torch.equal(model(ids).logits, expected)
    assert retrofit(model, GatedDeltaNet, window_size=6) is model


def test_options_that_are_no_json_values(tmp_path):
    class Picky(GatedDeltaNet):
        def __init__(self, *args, choice=None, **kwargs):
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match=r"compressor_options=.*cannot be written as JSON"):
        save_adapter(make(Picky, choice=object()), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model = make(Picky, choice=(1, 2))  # JSON knows lists only
    save_adapter(model, tmp_path)
    assert same(weights(load_adapter(make(Picky, choice=(1, 2)), tmp_path)), weights(model))
    assert same(weights(load_adapter(plain(), tmp_path)), weights(model))


def test_weights_that_are_too_large_for_the_model_are_refused(tmp_path):
    model = make()
    with torch.no_grad():
        next(parameter for _, parameter in adapter_parameters(model)).fill_(1e5)
    save_adapter(model, tmp_path)
    half = plain(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"layer 0 .* values up to 100000, too large for torch.float16.*bfloat16"):
        load_adapter(half, tmp_path)
    assert not hasattr(half, "hippocampus")
    for dtype in (torch.bfloat16, torch.float32):
        assert all(u.isfinite().all() for u in weights(load_adapter(plain(dtype=dtype), tmp_path)).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_training_that_diverged_do_not_replace_an_adapter(value, tmp_path):
    model = make()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        list(adapter_parameters(model))[-1][1].view(-1)[-1] = value
    with pytest.raises(ValueError, match=r"layer 2 'o_norm\.weight' has values that are not finite, so nothing was"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
