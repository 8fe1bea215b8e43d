"""A model with a memory on disk: it comes back as it was, or not at all; never as a plain model."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from ahn_layers import (
    Compressor,
    Mamba2,
    adapter_parameters,
    full_attention,
    load_adapter,
    outer,
    restore,
    save_adapter,
)
from ahn_layers.record import find_retrofitted

from ..models import CAPACITY, FAMILIES, base, generate, logits, retrofitted, tokens, train_memory

LONG = 4 * CAPACITY


def make(**options):
    return retrofitted(dtype=torch.float32, **options)


def memory(model):
    return {name: u.detach().clone() for name, u in adapter_parameters(model)}


def assert_same(model, other, *, outputs=True):
    """Class, retrofit, every weight bit for bit, and what comes out."""
    assert type(other) is type(model)
    ours, theirs = find_retrofitted(model)[1], find_retrofitted(other)[1]
    for name in ("window", "compressor", "memory_positions", "options", "layers"):
        assert getattr(ours, name) == getattr(theirs, name), name
    mine, its = model.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(u, its[name]) and u.dtype == its[name].dtype for name, u in mine.items())
    assert not any(module.training for module in other.modules())
    if not outputs:
        return
    ids = tokens(2, LONG)
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert torch.equal(generate(model, ids), generate(other, ids))


OPTIONS = {
    "default": {},
    "layers": {"layers": [1]},
    "positions": {"memory_positions": "none", "sink_positions": "streaming"},
    "options": {"compressor": Mamba2, "shared_state": True},
    "window alone": {"compressor": None, "window_size": 5, "num_sinks": 0},
}


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


def vision_language_model():
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", **text}, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


def test_a_model_that_reads_images(tmp_path):
    model = make(model=vision_language_model())
    model.save_pretrained(tmp_path)
    other = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(other) is type(model) and find_retrofitted(other)[1].window == find_retrofitted(model)[1].window
    assert torch.equal(logits(model, tokens(1, LONG)), logits(other, tokens(1, LONG)))
    for kind in (type(model), LlamaForCausalLM):
        with pytest.raises(Exception, match="import ahn_layers"):
            kind.from_pretrained(tmp_path)


PARTS = {"the decoder": lambda model: model.model, "a part of it": lambda model: model.model.language_model}


@pytest.mark.parametrize("part", PARTS)
def test_a_model_around_the_retrofitted_one_is_not_saved_without_the_memory(part, tmp_path):
    model = base(dtype=torch.float32) if part == "the decoder" else vision_language_model()
    plain, before = copy.deepcopy(model), model.state_dict()
    expected = memory(make(model=PARTS[part](model)))
    for around in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for given in ({}, {"state_dict": around.state_dict()}, {"push_to_hub": True}):
            with pytest.raises(ValueError, match=r"contains a retrofitted model \(model.*save_adapter"):
                around.save_pretrained(tmp_path, **given)
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "adapter")  # what the error advises
    restore(model).save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "plain")
    other = type(model).from_pretrained(tmp_path / "base")
    assert all(torch.equal(u, before[name]) for name, u in other.state_dict().items())
    found = memory(load_adapter(PARTS[part](other), tmp_path / "adapter"))
    assert found.keys() == expected.keys() and all(torch.equal(u, expected[name]) for name, u in found.items())


# --- ways of saving


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


# --- what else reads the folder


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<s>")


def test_config_tokenizer_and_pipeline(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlamaConfig) and config.model_type == "llama" and config.hidden_size == 32
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config):
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, config=other))
    assert AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, nonsense=1)[1] == {"nonsense": 1}
    assert AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids == [2, 3]
    run = pipeline("text-generation", model=str(tmp_path))
    assert_same(model, run.model)
    assert run("a b a", max_new_tokens=3)[0]["generated_text"].startswith("a b a")
    with pytest.raises(ValueError, match="import ahn_layers"):
        LlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_a_new_model_from_the_config_has_a_memory(tmp_path):
    model = make(layers=[0, 2])
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert find_retrofitted(other)[1].layers == [0, 2]


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_no_other_class_makes_a_plain_model_of_it(case, shards, tmp_path):
    model = make(**OPTIONS[case])
    model.save_pretrained(tmp_path, max_shard_size=shards)
    with pytest.raises(Exception, match=r"import ahn_layers.*AutoModelForCausalLM"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).vocab_size == model.config.vocab_size  # which PEFT asks for
    for kind in (LlamaForCausalLM, AutoModelForCausalLM):  # a config of one's own
        with pytest.raises(KeyError, match="metadata"):
            kind.from_pretrained(tmp_path, config=model.config)
    assert PreTrainedConfig.from_pretrained(tmp_path).transformers_version  # which a Trainer reads


FRESH = """
import sys
{imports}
try:
    model = {load}.from_pretrained(sys.argv[1])
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
print(type(model).__name__, hasattr(model, "hippocampus"))
"""
IMPORTS = {
    "library first": "import ahn_layers; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import ahn_layers",
    "not yet its classes": "import transformers, ahn_layers; from transformers import AutoModelForCausalLM",
    "a part of the library": "from ahn_layers import Window; from transformers import AutoModelForCausalLM",
}


def in_a_new_process(folder, imports, load="AutoModelForCausalLM"):
    code = FRESH.format(imports=imports, load=load)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)


@pytest.mark.parametrize("case", IMPORTS)
def test_in_a_new_process(case, tmp_path):
    make().save_pretrained(tmp_path)
    done = in_a_new_process(tmp_path, IMPORTS[case])
    assert done.stdout.strip() == "LlamaForCausalLM True", done.stderr


@pytest.mark.parametrize("load", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoConfig", "LlamaModel", "AutoModel"])
def test_without_the_library_the_error_says_what_to_import(load, tmp_path):
    make().save_pretrained(tmp_path)
    done = in_a_new_process(tmp_path, f"from transformers import {load}", load)
    assert done.returncode == 1 and "import ahn_layers" in done.stderr and not done.stdout


def test_the_table_is_registered_once_and_the_import_stays_light():
    code = (
        "import sys, ahn_layers; assert 'transformers' not in sys.modules;"
        "assert 'ahn_layers.registration' in {type(u).__module__ for u in sys.meta_path};"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING as m;"
        "assert 'import ahn_layers' in m;"
        "assert 'ahn_layers.registration' not in {type(u).__module__ for u in sys.meta_path};"
        "import transformers.models.auto.configuration_auto as u; assert 'Then' not in type(u.__loader__).__name__;"
        "import importlib; importlib.reload(ahn_layers); assert 'import ahn_layers' in m"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_that_is_not_imported(tmp_path):
    class Leaky(Compressor):
        def fold(self, state, k, v):
            return 0.5 * state + outer(k, v)

    model = make(compressor=Leaky)
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    del Compressor.by_name["Leaky"]
    with pytest.raises(ValueError, match=r"unknown compressor 'Leaky'.*Import the module that defines the class first"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == [2]
    with pytest.raises(ValueError, match="unknown compressor 'Leaky'"):
        pipeline("text-generation", model=str(tmp_path))


SPOILED = {
    "no adapter": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors"),
    "no description": (lambda f: (f / "adapter.json").unlink(), "adapter.json"),
    "cut": (lambda f: (f / "adapter.safetensors").write_bytes(b"nothing"), "damaged"),
    "no base": (lambda f: (f / "model.ahn_layers.safetensors").unlink(), "model.ahn_layers.safetensors"),
    "another base": (lambda f: other_base(f), "other values in"),
    "damaged config": (lambda f: edit(f, lambda u: u["ahn_layers"].pop("retrofit")), "lacks 'retrofit'"),
    "unknown base": (
        lambda f: edit(f, lambda u: u["ahn_layers"].update(base_model_type="elephant")),
        "model type 'elephant'",
    ),
}


def edit(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def other_base(folder):
    other = base(dtype=torch.float32)
    with torch.no_grad():
        for u in other.parameters():
            u.mul_(1.1)
    other.save_pretrained(folder / "plain")
    (folder / "plain" / "model.safetensors").replace(folder / "model.ahn_layers.safetensors")


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_in_which_something_is_wrong(case, tmp_path):
    spoil, message = SPOILED[case]
    make().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


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


# --- the hub, Trainer, PEFT


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps what it is sent in a folder."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    uploads = []

    def upload(self, folder, repo_id, files_timestamps, **options):
        shutil.copytree(folder, tmp_path / "hub", dirs_exist_ok=True)
        uploads.append((repo_id, files_timestamps, options))

    repo = lambda *args, **options: SimpleNamespace(repo_id=(args or (options["repo_id"],))[0])
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **options: repo(*args, **options))
    monkeypatch.setattr(huggingface_hub, "create_repo", repo)
    if hasattr(hub, "create_repo"):
        monkeypatch.setattr(hub, "create_repo", repo)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", hub.create_and_tag_model_card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    return uploads


def test_push_to_hub(hub, tmp_path):
    model = make()
    model.push_to_hub("someone/model", max_shard_size="20KB")
    assert hub[0][0] == "someone/model"
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))


def test_push_to_hub_while_saving(hub, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="someone/model", commit_message="first")
    assert hub[0][0] == "someone/model" and hub[0][2]["commit_message"] == "first"
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert hub[1][0] == "model" and "config.json" in hub[1][1]


def trainer(model, folder, steps):
    data = [{"input_ids": u, "labels": u} for u in tokens(8, 20)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("options", [{}, {"compressor": None}])
def test_checkpoints_of_a_trainer(options, tmp_path):
    """All weights are trained; training goes on from a checkpoint as if it had not stopped."""
    model = make(**options)
    trainer(model, tmp_path, 4).train()
    assert_same(model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4"))
    other = make(**options)
    trainer(other, tmp_path / "other", 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(model, other.eval())


def test_lora_around_it(tmp_path):
    lora = get_peft_model(make(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").glob("*.safetensors")) == ["adapter_model.safetensors"]
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_same(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def test_lora_around_a_model_that_was_loaded(tmp_path):
    """PEFT reads the base's config where the model came from, and loads the model from there."""
    make().save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    lora.save_pretrained(tmp_path / "lora")
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert find_retrofitted(other)[1].layers == [0, 1, 2]
    assert torch.equal(logits(lora.eval(), tokens(1, LONG)), logits(other, tokens(1, LONG)))


def test_lora_inside_it(tmp_path, monkeypatch):
    """Transformers writes the LoRA alone; the memory goes beside it."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = make()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "config.json" not in names and "adapter_model.safetensors" in names
    other = load_adapter(base(dtype=torch.float32), tmp_path)
    assert all(torch.equal(u, memory(other)[name]) for name, u in memory(model).items())
