"""What speeds up the base model can be deleted: without the folder everything works, and answers the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ahn_layers"
SCRIPT = """
import importlib, pkgutil, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import ahn_layers
from ahn_layers.huggingface import speedups

found = pkgutil.walk_packages(ahn_layers.huggingface.__path__, "ahn_layers.huggingface.")
names = [module.name for module in found if ".triton_" not in module.name]
for name in names:
    importlib.import_module(name)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
ids = torch.randint(64, (2, 40))
asked = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
before = base.generate(ids, **asked)
model = ahn_layers.retrofit(base, ahn_layers.GatedDeltaNet, window_size=12, num_sinks=2)
for _, parameter in ahn_layers.adapter_parameters(model):
    torch.nn.init.normal_(parameter, std=0.3)
found = [model.generate(ids, cache_implementation=kind, **asked) for kind in (None, "static")]
restored = ahn_layers.restore(model)
assert torch.equal(restored.generate(ids, **asked), before)
print(speedups.THERE, *(u.tolist() for u in found))
"""


def test_everything_works_without_the_folder(tmp_path, unchecked, capsys):
    shutil.copytree(PACKAGE, tmp_path / "ahn_layers", ignore=shutil.ignore_patterns("compiled", "__pycache__"))
    without = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert without.returncode == 0, without.stderr
    exec(SCRIPT, {})
    answers = [u.strip().splitlines()[-1].split(" ", 1) for u in (without.stdout, capsys.readouterr().out)]
    assert [there for there, _ in answers] == ["False", "True"] and answers[0][1] == answers[1][1]
