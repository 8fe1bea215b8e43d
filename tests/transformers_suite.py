"""transformers' own model tests, on the base models and on models that were retrofitted as they were made.

The tests are not part of the installed package: they need a checkout of transformers at the installed version, or one
whose ``src/transformers`` is a link to the installed package, and ``parameterized``. ::

    python tests/transformers_suite.py CHECKOUT              # llama, qwen2, qwen3 and mistral
    python tests/transformers_suite.py CHECKOUT llama -k generate

Each test file runs twice in a process of its own, the second time with every model of the file retrofitted at the end
of its construction, with a window larger than any text of the tests. Printed is each test whose outcome differs, by
cause; those in ``BY_DESIGN`` with the reason. The exit code is 1 if others differ.
"""

import argparse
import fnmatch
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MODELS = ("llama", "qwen2", "qwen3", "mistral")
WINDOW, SINKS = 1024, 4
BY_DESIGN = {
    "test_custom_4d_attention_mask": "a mask beyond causality and padding is refused: tokens are folded in their order",
    "test_generate*_with_static_cache": "a static cache holds sinks and window, not max_cache_len tokens",
    "test_generate_compilation_all_outputs": "keys and attentions of a static cache have the width of sinks and window",
    "test_generate_compile_model_forward_fullgraph": "generate returns a HippocampalCache, which can be forked",
    "test_can_set_attention_dynamically": "retrofitted blocks and mask makers hold a view of the config with our name",
    "test_sdpa_can_dispatch_non_composite_models": "the same",
    "test_all_tensors_are_parameter_or_buffer": "a retrofit comes after loading, not on the meta device",
    "test_init_weights_can_init_buffers": "the same",
    "test_retain_grad_hidden_states_attentions": "attention weights are computed beside the attention, without a graph",
    "test_can_load_ignoring_mismatched_shapes": "a plain checkpoint has no weights for a memory",
    "test_model_weights_reload_no_missing_tied_weights": "the same",
    "test_sliding_window_mask": "weights over 7 tokens, where the model's own window, and so ours, holds 2 or 3",
    "test_eager_matches_sdpa_inference_24*": "the same",
}
"""Tests whose outcome differs as it should, by patterns of their names: why."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the plugin, which ``main`` passes on."""
    parser.addoption("--outcomes", help="file to write each test's outcome to")
    parser.addoption("--retrofit", help="model type whose models are retrofitted as they are made")


def pytest_configure(config: pytest.Config) -> None:
    """Retrofit from here on, and watch."""
    if config.getoption("--retrofit"):
        retrofit_at_construction(config.getoption("--retrofit"))
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


class Outcomes:
    """Writes what became of each test.

    Args:
        path: a JSON file, ``{test: [outcome, message]}``.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst phase and subtest of a test."""
        name = report.nodeid.split("::", 1)[1].replace("::", ".")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.outcomes.setdefault(name, ("failed", str(report.longrepr) if crash is None else crash.message))
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(name, (report.outcome, ""))
            if self.outcomes[name][0] == "skipped" and report.passed:
                self.outcomes[name] = ("passed", "")

    def pytest_sessionfinish(self) -> None:
        """Write them."""
        self.path.write_text(json.dumps(self.outcomes))


def retrofit_at_construction(model_type: str) -> None:
    """From now on every model of this type is retrofitted once it, and all that it is part of, is complete."""
    from transformers import PreTrainedModel

    from ahn_layers import GatedDeltaNet, retrofit
    from ahn_layers.attention import HippocampalAttention

    under_construction = 0

    def completed(make: Callable[..., Any], made: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal under_construction
            under_construction += 1
            try:
                result = make(first, *args, **kwargs)
            finally:
                under_construction -= 1
            model = made(first, result)
            if not under_construction and not any(isinstance(m, HippocampalAttention) for m in model.modules()):
                with torch.random.fork_rng(devices=[]):  # what the test draws next is what it draws on the base
                    window_size, num_sinks = largest_window(model.config)
                    retrofit(model, GatedDeltaNet, window_size=window_size, num_sinks=num_sinks)
                vars(model).pop("save_pretrained")  # the tests load by concrete classes, which refuse our folders
            return result

        return run

    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__:
            cls.__init__ = completed(cls.__init__, lambda model, _: model)
    load = PreTrainedModel.from_pretrained.__func__

    def loaded(_: Any, result: Any) -> Any:
        return result[0] if isinstance(result, tuple) else result

    PreTrainedModel.from_pretrained = classmethod(completed(load, loaded))


def largest_window(config: Any) -> tuple[int, int]:
    """A window that holds every text of the tests; a model's own sliding window is wider than its texts too."""
    own = getattr(config.get_text_config(decoder=True), "sliding_window", None)
    if own is not None and own <= 2 * SINKS:
        return own, 0
    return min(WINDOW, (own or WINDOW + SINKS) - SINKS), SINKS


def outcomes(checkout: Path, model_type: str, retrofitted: bool, extra: list[str]) -> dict[str, tuple[str, str]]:
    """Run one test file of transformers."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outcomes.json")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            here.stem,
            f"--outcomes={file}",
            "-k",
            "ModelTest",
            *extra,
        ]
        command += [f"--retrofit={model_type}"] if retrofitted else []
        command += [f"tests/models/{model_type}/test_modeling_{model_type}.py"]
        paths = [str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True)
        if not file.exists() or not (found := json.loads(file.read_text())):
            raise RuntimeError(f"no test ran: {' '.join(command)}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return found


def compare(model_type: str, base: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> int:
    """Print what differs, by cause; returns how many tests do that should not."""
    causes: dict[str, list[str]] = defaultdict(list)
    expected: dict[str, list[str]] = defaultdict(list)
    for name in sorted(base | ours):
        before, after = base.get(name, ("missing", "")), ours.get(name, ("missing", ""))
        if before[0] == after[0]:
            continue
        reason = next((why for pattern, why in BY_DESIGN.items() if fnmatch.fnmatch(name, f"*.{pattern}")), None)
        cause = f"{before[0]}, then {after[0]}: {(after[1] or before[1])[:300]}"
        (causes if reason is None else expected)[cause if reason is None else reason].append(name)
    counts = {kind: sum(outcome == kind for outcome, _ in base.values()) for kind in ("passed", "failed", "skipped")}
    differing = sum(map(len, causes.values()))
    print(f"\n{model_type}: base {counts}; {differing} differ, {sum(map(len, expected.values()))} by design")
    for title, group in (("by design", expected), ("differs", causes)):
        for cause, names in sorted(group.items(), key=lambda item: -len(item[1])):
            print(f"\n  {title}: {cause}", *(f"    {name}" for name in names), sep="\n")
    return differing


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of transformers, at the installed version")
    parser.add_argument("models", nargs="*", default=MODELS, help="model types")
    arguments, extra = parser.parse_known_args()
    differing = 0
    for model_type in arguments.models or MODELS:
        base, ours = (outcomes(arguments.checkout, model_type, retrofitted, extra) for retrofitted in (False, True))
        differing += compare(model_type, base, ours)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
