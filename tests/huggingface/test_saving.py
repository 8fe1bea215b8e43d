"""A model with a memory on disk: it comes back as it was, or not at all; never as a plain model."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from ahn_layers import adapter_parameters, full_attention, load_adapter, restore
from ahn_layers.record import find_retrofitted

from ..models import FAMILIES, base, logits, retrofitted, tokens, train_memory
from .saved import LONG, OPTIONS, assert_same, make, memory


@pytest.mark.parametrize("case", OPTIONS)
def test_it_comes_back_as_it_was(case, tmp_path):
    model = make(**OPTIONS[case])
    model.save_pretrained(tmp_path)
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(model, other)
    assert type(other.config) is LlamaConfig and "retrofit" not in other.config.to_dict()
    other.save_pretrained(tmp_path)  # over itself
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gemma2", "llama4")])
def test_families(name, tmp_path):
    model = retrofitted(name)
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": FAMILIES[name].attention, "experts_implementation": "eager"}
    other = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert type(other) is type(model)
    # buffers that are not saved may be rounded differently
    torch.testing.assert_close(logits(model, tokens(1, LONG)), logits(other, tokens(1, LONG)), rtol=0, atol=1e-5)
    assert_same(model, other, outputs=False)
    with pytest.raises(Exception, match="import ahn_layers"):
        type(model).from_pretrained(tmp_path)


def test_other_auto_classes(tmp_path):
    model = make(model=base(dtype=torch.float32).model)
    model.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path)
    assert type(other) is type(model) and find_retrofitted(other)[1].layers == [0, 1, 2]
    assert all(torch.equal(u, memory(other)[name]) for name, u in memory(model).items())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_model_that_reads_images(tmp_path):
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", **text}, vision_config=vision)
    model = make(model=AutoModelForImageTextToText.from_config(config).eval())
    model.save_pretrained(tmp_path)
    other = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(other) is type(model) and find_retrofitted(other)[1].window == find_retrofitted(model)[1].window
    assert torch.equal(logits(model, tokens(1, LONG)), logits(other, tokens(1, LONG)))
    for kind in (type(model), LlamaForCausalLM):
        with pytest.raises(Exception, match="import ahn_layers"):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(variant, tmp_path):
    model = make()
    for size in ("50GB", "20KB", "50GB", "20KB"):  # also over an earlier save of another kind
        train_memory(model, seed=len(size))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.25)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        assert (len(list(tmp_path.glob("model.*-of-*.safetensors"))) > 2) is (size == "20KB")
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant))


def test_a_given_state_dict(tmp_path):
    """Its weights are saved, base and memory."""
    model, other = make(), make()
    train_memory(other, seed=1)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    given = other.state_dict()
    names = set(given)
    model.save_pretrained(tmp_path, state_dict=given)
    assert set(given) == names
    assert_same(other, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_another_process_writes_nothing(tmp_path):
    make().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_memory_weights_are_not_among_those_of_the_base(tmp_path):
    from safetensors.torch import load_file

    make().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.ahn_layers.safetensors").keys() == set(base().state_dict())


def test_the_folder_is_an_adapter_too(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert_same(model, load_adapter(base(dtype=torch.float32), tmp_path).eval())


def test_a_memory_in_float32_beside_a_base_in_bfloat16(tmp_path):
    model = make(model=base(dtype=torch.bfloat16))
    for _, u in adapter_parameters(model):
        u.data = u.data.float() * 1.001
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "auto"}):
        # transformers keeps the rotation's frequencies in float32, which .to() does not
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, **options), outputs=False)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {u.dtype for u in other.state_dict().values()} == {torch.float32}
    assert all(torch.equal(u, memory(other)[name]) for name, u in memory(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "bfloat16"])
def test_another_dtype(dtype, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, u in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], u.to(expected)), name


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"trust_remote_code": True},
        {"attn_implementation": "sdpa", "max_position_embeddings": 999},
    ],
    ids=str,
)
def test_ways_of_loading(options, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert_same(model, other)
    assert other.config.max_position_embeddings == options.get("max_position_embeddings", 256)


def test_the_attention_implementation_can_be_chosen(tmp_path):
    make().save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert other.config._attn_implementation == "eager" and find_retrofitted(other)[1].mode == "memory"


def test_quantization_is_passed_on(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    seen, usual = [], LlamaForCausalLM.from_pretrained.__func__

    def spy(cls, *args, quantization_config=None, **kwargs):
        seen.append(quantization_config)
        return usual(cls, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(spy))
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": "any"})
    assert seen == [{"quant_method": "any"}]


def test_a_subfolder(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "inner")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner"))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "base trained on": lambda model: model,
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_are_saved_on_their_own(case, tmp_path):
    model = make()
    other = COPIES[case](model)
    with torch.no_grad():
        for u in other.parameters():
            u.mul_(1.5)
    other.save_pretrained(tmp_path)
    assert_same(other, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_torch_save(tmp_path):
    torch.save(make(), tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    other.save_pretrained(tmp_path / "folder")
    assert_same(other, AutoModelForCausalLM.from_pretrained(tmp_path / "folder"))


def test_inside_full_attention_it_is_saved_alike(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "outside")
    with full_attention(model):
        model.save_pretrained(tmp_path / "inside")
    files = sorted(path.name for path in (tmp_path / "outside").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "inside").iterdir())
    assert all((tmp_path / "inside" / u).read_bytes() == (tmp_path / "outside" / u).read_bytes() for u in files)


def test_the_generation_config_is_saved(tmp_path):
    model = make()
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 7
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 7


def test_a_restored_model_is_saved_plainly(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    restore(model).save_pretrained(tmp_path)  # over the other
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(other, "hippocampus") and "save_pretrained" not in vars(model)
    assert torch.equal(logits(other, tokens(1, LONG)), logits(base(dtype=torch.float32), tokens(1, LONG)))
    make().save_pretrained(tmp_path)  # and back
    assert_same(make(), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_without_a_compressor_no_earlier_adapter_is_left(tmp_path):
    make().save_pretrained(tmp_path)
    make(compressor=None).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))


@pytest.mark.parametrize("fails", ["config", "weights", "adapter"])
def test_a_save_that_is_interrupted_over_a_plain_model(fails, tmp_path, monkeypatch):
    """The plain model is still there, and nothing beside it."""
    base(dtype=torch.float32).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    places = {
        "config": "transformers.PreTrainedConfig.save_pretrained",
        "weights": "transformers.modeling_utils.safe_save_file",
        "adapter": "ahn_layers.adapter_files.write_atomically",
    }

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(places[fails], interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
