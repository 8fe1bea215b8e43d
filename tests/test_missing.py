"""Without transformers everything else works, and what needs it says what to install."""

import subprocess
import sys

import pytest

HIDDEN = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
import ahn_layers
"""
ADVICE = "pip install 'transformers>=5.17,<6'"


def run(code, *names):
    """Standard output of a process in which these packages cannot be imported."""
    done = subprocess.run([sys.executable, "-c", HIDDEN.format(names=names) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("what, code", [
    ("HippocampalCache", "ahn_layers.HippocampalCache"),
    ("HippocampalCache", "from ahn_layers import HippocampalCache"),
    ("DistillationTrainer", "from ahn_layers.distillation import DistillationTrainer"),
    ("retrofit", "ahn_layers.retrofit(torch.nn.Linear(2, 2), ahn_layers.GatedDeltaNet, window_size=4)"),
])  # fmt: skip
def test_it_says_what_to_install(what, code):
    printed = run(f"try:\n    {code}\nexcept ImportError as error:\n    print(error)", "transformers")
    assert printed.startswith(f"{what} needs transformers") and ADVICE in printed


def test_a_plot_says_what_to_install():
    code = """
from ahn_layers.cost import CostReport
try:
    CostReport.plot(None, 'a.png')
except ImportError as error:
    print(error)
"""
    assert run(code, "matplotlib") == "plot needs matplotlib: pip install matplotlib.\n"


def test_the_version_advised_is_the_one_of_the_project():
    from .docs.test_commands import requirements

    assert ADVICE.split("'")[1] in requirements()[1]


def test_the_rest_works():
    code = """
from ahn_layers import GatedDeltaNet, MemoryStore, Window, check_compressor, restore
store = MemoryStore(Window(4), GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8))
q, k, v = torch.randn(3, 1, 2, 9, 8)
print(store(q, k, v, torch.randn(1, 9, 32))[0].shape)
from ahn_layers.distillation import distillation_loss
from ahn_layers.cost import cost_report
try:
    restore(torch.nn.Linear(2, 2))
except ValueError as error:
    print(error)
"""
    printed = run(code, "transformers", "huggingface_hub", "matplotlib", "datasets", "accelerate")
    assert printed.splitlines() == [
        "torch.Size([1, 2, 9, 8])", "Linear is not retrofitted: call retrofit(model, ...) first.",
    ]  # fmt: skip
