"""PEFT and a retrofit in either order: its adapters go on the base model's layers, the memory stays as it is."""

import warnings

import peft
import pytest
import torch
from torch import nn

from ahn_layers import (
    Compressor,
    Mamba2,
    MemoryStore,
    adapter_parameters,
    load_adapter,
    memory_report,
    restore,
    retrofit,
    save_adapter,
)
from ahn_layers.distillation import freeze_base, use_window

from ..models import CAPACITY, SINKS, WINDOW, base, generate, greedy, logits, retrofitted, tokens, train_memory
from .adapted import F32, LONG, USUAL, adapted, lora, train_step, wrapped

warnings.filterwarnings("ignore", module="peft")

TARGETS = {
    "usual": (USUAL, 21),
    "o_proj": (["o_proj"], 3),
    "regex": (r".*self_attn.*\.(q_proj|o_proj)", 6),
    "wide regex": (r".*_proj", 21),
    "all-linear": ("all-linear", 21),
}


METHODS = {
    "LoRA": (peft.LoraConfig, {"init_lora_weights": False}),
    "DoRA": (peft.LoraConfig, {"init_lora_weights": False, "use_dora": True}),
    "IA3": (peft.IA3Config, {"init_ia3_weights": False, "feedforward_modules": []}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_lora_weights": False, "total_step": 10}),
    "VeRA": (peft.VeraConfig, {"init_weights": False}),
    "OFT": (peft.OFTConfig, {"init_weights": False, "oft_block_size": 8}),
    "LoHa": (peft.LoHaConfig, {"init_weights": False}),
}


@pytest.mark.parametrize("order", ["retrofit first", "PEFT first"])
@pytest.mark.parametrize("targets", TARGETS)
def test_every_usual_target_is_of_the_base(targets, order):
    """What is adapted is what would be without a memory, and everything that is trained gets a gradient."""
    chosen, count = TARGETS[targets]
    model = wrapped(lora(chosen), order)
    assert adapted(model) == adapted(peft.get_peft_model(base(dtype=F32), lora(chosen)))
    assert len(adapted(model)) == count
    given = train_step(model)
    assert all(gradient is not None and gradient.any() for gradient in given.values())
    assert any("memory" in name for name in given) == (order == "PEFT first"), "PEFT freezes what is there before it"
    ids = tokens(2, LONG)
    assert torch.equal(generate(model, ids), greedy(model, ids, 8))
    assert set(dict(retrofitted().named_parameters())) == {
        name.replace("base_model.model.", "").replace("base_layer.", "")
        for name, _ in model.named_parameters()
        if "lora" not in name
    }, "every parameter keeps its name"


@pytest.mark.parametrize("method", METHODS)
def test_methods_give_the_same_in_either_order(method):
    kind, options = METHODS[method]
    config = lambda: kind(target_modules=USUAL, task_type="CAUSAL_LM", **options)
    ids = tokens(2, LONG)
    one, other = (wrapped(config(), order).eval() for order in ("retrofit first", "PEFT first"))
    assert torch.equal(logits(one, ids), logits(other, ids))
    plain = base(dtype=F32)
    torch.manual_seed(1)
    plain = peft.get_peft_model(plain, config()).eval()
    assert torch.equal(logits(one, ids[:, :CAPACITY]), logits(plain, ids[:, :CAPACITY]))
    assert (logits(one, ids) - logits(retrofitted(dtype=F32), ids)).abs().max() > 1e-3
    assert not any("memory" in name for name in adapted(one))
    assert torch.equal(generate(one, ids), greedy(one, ids, 8))
    given = train_step(one)
    assert given and all(gradient is not None for gradient in given.values())


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "phi3", "deepseek_v3", "mixtral", "gemma3"])
@pytest.mark.parametrize("compressor", ["GatedDeltaNet", "Mamba2"])
def test_all_linear_in_other_families(name, compressor):
    model, plain = retrofitted(name, F32, Compressor.by_name[compressor]), base(name, F32)
    model, plain = (peft.get_peft_model(m, lora("all-linear")) for m in (model, plain))
    assert adapted(model) == adapted(plain) and adapted(plain)


def test_a_compressor_of_your_own_is_hidden_too():
    class Own(Compressor):
        def build(self):
            self.q_proj = nn.Linear(self.hidden_size, self.num_states)
            self.deep = nn.Sequential(nn.Linear(4, 4), nn.Embedding(2, 4))

        def fold(self, state, k, v):
            return state + k.unsqueeze(-1) * v.unsqueeze(-2)

    try:
        model = retrofit(base(dtype=F32), Own, window_size=WINDOW, num_sinks=SINKS)
        model.add_module("aside", nn.Linear(2, 2))
        found = adapted(peft.get_peft_model(model, lora("all-linear")))
        assert len(found) == 22 and not any("memory" in name for name in found)
    finally:
        del Compressor.by_name["Own"]


def test_only_the_walk_for_targets_is_blind():
    """Everyone else, and PEFT where it is not choosing targets, sees the memory's modules."""
    model = retrofitted(dtype=F32)
    names = [name for name, _ in model.named_modules()]
    assert sum(".memory.compressor." in name for name in names) == 15
    model = peft.get_peft_model(model, lora(bias="all"))
    assert [name for name, _ in model.get_base_model().named_modules() if ".memory." in name] == [
        name for name in names if ".memory." in name
    ]
    assert not any(p.requires_grad for _, p in adapter_parameters(model)), "frozen with the rest"
    # PEFT's names for biases are substrings; what it unfreezes gets a gradient
    model = peft.get_peft_model(retrofitted(dtype=F32, compressor=Mamba2), lora(bias="all"))
    assert all(gradient is not None for gradient in train_step(model).values())


def test_layers_and_exclusions_that_a_config_names():
    model = peft.get_peft_model(retrofitted(dtype=F32), lora(["o_proj"], layers_to_transform=[1]))
    assert adapted(model) == ["base_model.model.model.layers.1.self_attn.o_proj"]
    model = peft.get_peft_model(retrofitted(dtype=F32), lora("all-linear", exclude_modules=["o_proj"]))
    assert len(adapted(model)) == 18
    model = peft.get_peft_model(retrofitted("mixtral", F32), lora(["o_proj"], target_parameters=["gate_up_proj"]))
    assert all("self_attn.o_proj" in name or "experts" in name for name in adapted(model))


def test_a_finished_adapter_goes_onto_a_retrofitted_model(tmp_path):
    """Trained on the base model before there was a memory."""
    ids, plain = tokens(2, LONG), peft.get_peft_model(base(dtype=F32), lora()).eval()
    plain.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(retrofitted(dtype=F32), tmp_path)
    assert torch.equal(logits(model, ids[:, :CAPACITY]), logits(plain, ids[:, :CAPACITY]))
    other = peft.PeftModel.from_pretrained(base(dtype=F32), tmp_path)
    retrofitted(model=other.get_base_model())
    assert torch.equal(logits(model, ids), logits(other, ids))
    empty = peft.PeftModel.from_pretrained(retrofitted(dtype=F32), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(model, ids), logits(empty, ids))
    injected = peft.inject_adapter_in_model(lora("all-linear"), retrofitted(dtype=F32))
    assert not any("memory" in name for name in adapted(injected))
    restore(model)
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_several_adapters_on_one_model():
    ids, model = tokens(2, LONG), wrapped(lora(["q_proj", "o_proj"])).eval()
    bare, first = logits(retrofitted(dtype=F32), ids), logits(model, ids)
    model.add_adapter("second", lora(["o_proj", "v_proj"]))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    second = logits(model.eval(), ids)
    assert (second - first).abs().max() > 1e-3
    mixed = model.generate(input_ids=ids, adapter_names=["default", "second"], max_new_tokens=4, do_sample=False)
    assert torch.equal(mixed[1:], generate(model, ids[1:], 4))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    assert torch.equal(generate(model, ids), greedy(model, ids, 8))
    assert not any("memory" in name for name in adapted(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), bare)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model.eval(), ids), first)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), first, rtol=0, atol=2e-3)
    again = peft.get_peft_model(merged, lora("all-linear")).eval()
    assert len(adapted(again)) == 21
    assert not adapted(again.unload())


def test_merging_before_and_after_a_retrofit():
    ids, model = tokens(2, LONG), wrapped(lora(), "PEFT first").eval()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=2e-3)
    plain = peft.get_peft_model(base(dtype=F32), lora()).merge_and_unload()
    before = logits(plain, ids)
    assert torch.equal(logits(restore(retrofitted(model=plain)), ids), before)


@pytest.mark.parametrize("saved", ["memory", "compressor"])
def test_a_memory_that_peft_trains_and_saves(saved, tmp_path):
    ids, plain = tokens(2, LONG), logits(retrofitted(dtype=F32), tokens(2, LONG))
    model = wrapped(lora(modules_to_save=[saved]))
    given = train_step(model)
    memory = dict(adapter_parameters(model))
    assert len(memory) == 21 and memory.keys() <= given.keys(), "those that are in use, not those kept beside them"
    assert all(gradient is not None and gradient.any() for gradient in given.values())
    with torch.no_grad():
        for parameter in memory.values():
            parameter.add_(0.1)
    changed = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
        names = {name for name, _ in adapter_parameters(model)}
        assert len(names) == 21 and not names & memory.keys()
    assert torch.equal(generate(model, ids), greedy(model, ids, 8))
    assert memory_report(model).count("self_attn") == 3

    model.save_pretrained(tmp_path / "peft")  # LoRA and memory together
    other = peft.PeftModel.from_pretrained(retrofitted(dtype=F32), tmp_path / "peft")
    assert torch.equal(logits(other, ids), changed)
    save_adapter(model, tmp_path / "ours")  # the memory alone
    third = load_adapter(base(dtype=F32), tmp_path / "ours")
    for (_, one), (_, two) in zip(adapter_parameters(third), memory.items(), strict=True):
        assert torch.equal(one, two)
    train_memory(other, seed=5)
    load_adapter(other, tmp_path / "ours")
    assert torch.equal(logits(other, ids), changed)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), changed, rtol=0, atol=2e-3)
    stores = [block.self_attn.memory for block in merged.model.layers]
    assert all(type(store) is MemoryStore and isinstance(store.compressor, Compressor) for store in stores)
    restore(merged)


@pytest.mark.parametrize("use_cache", [False, True])
def test_rows_of_a_batch_share_one_memory(use_cache):
    ids, model = tokens(2, LONG), wrapped(lora(modules_to_save=["memory"])).eval()
    model.add_adapter("second", lora(["q_proj"], modules_to_save=["memory"]))
    model.set_adapter("second")
    assert torch.equal(generate(model, ids), greedy(model, ids, 8))
    with pytest.raises(ValueError, match=r"adapter_names was given.*set_adapter"):
        model(input_ids=ids, adapter_names=["default", "second"], use_cache=use_cache)


def test_a_window_for_a_time_reaches_the_copies_that_peft_made():
    ids, model = tokens(2, LONG), wrapped(lora(modules_to_save=["memory"])).eval()
    before = logits(model, ids)
    with use_window(model, WINDOW + 4, SINKS):
        longer = logits(model, ids)
        with model.disable_adapter():
            off = logits(model, ids)
    expected = retrofitted(dtype=F32, window_size=WINDOW + 4)
    torch.testing.assert_close(off, logits(expected, ids), rtol=0, atol=0)
    assert (longer - before).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), before)


def test_the_memory_alone_is_trained_below_a_frozen_lora():
    model = wrapped(lora())
    names = dict(adapter_parameters(model)).keys()
    freeze_base(model)
    given = train_step(model)
    assert given.keys() == names and all(gradient.any() for gradient in given.values())


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # as PEFT calls it
def test_prefix_tuning_is_refused():
    """Its prefix is a cache of full attention."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="holds 4 tokens of full attention"):
        train_step(peft.get_peft_model(retrofitted(dtype=F32), config))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompt_tuning_works(kind):
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    given = train_step(peft.get_peft_model(retrofitted(dtype=F32), config))
    assert given and all(gradient is not None and gradient.any() for gradient in given.values())
