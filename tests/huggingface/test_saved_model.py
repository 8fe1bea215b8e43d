"""A saved folder and the Auto classes, also in a new process, and what is refused."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    pipeline,
)

from ahn_layers import Compressor, outer
from ahn_layers.record import find_retrofitted

from ..models import base
from .saved import OPTIONS, assert_same, make, tokenizer


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
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
print(type(model).__name__, hasattr(model, "hippocampus"))
"""


IMPORTS = {
    "transformers first": "from transformers import AutoModelForCausalLM; import ahn_layers",
    "not yet its classes": "import transformers, ahn_layers; from transformers import AutoModelForCausalLM",
    "a part of the library": "from ahn_layers import Window; from transformers import AutoModelForCausalLM",
}


def in_a_new_process(folder, imports):
    code = FRESH.format(imports=imports)
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)


@pytest.mark.parametrize("case", IMPORTS)
def test_in_a_new_process(case, tmp_path):
    make().save_pretrained(tmp_path)
    done = in_a_new_process(tmp_path, IMPORTS[case])
    assert done.stdout.strip() == "LlamaForCausalLM True", done.stderr


WITHOUT = """
import sys, traceback, transformers
for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoConfig", "LlamaModel", "AutoModel"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except Exception:
        print(name, "import ahn_layers" in traceback.format_exc())
    else:
        print(name, "loads")
"""


def test_without_the_library_the_error_says_what_to_import(tmp_path):
    make().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, check=True)
    answers = done.stdout.split()
    assert len(answers) == 10 and set(answers[1::2]) == {"True"}, done.stdout


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
