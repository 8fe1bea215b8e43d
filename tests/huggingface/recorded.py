"""Models that decode as on a GPU, without one: steps are recorded, and replayed without the hooks of the model."""

import pytest
import torch

from ahn_layers.huggingface import call, prepare_cache
from ahn_layers.huggingface.compiled import step_graph
from ahn_layers.huggingface.compiled.region import run_plainly

ENOUGH = 6
"""New tokens for which a step is recorded, in these tests."""


class Rerun:
    """In place of a CUDA graph: the step itself, at the addresses of its first inputs."""

    def __init__(self, function, leaves, structure):
        self.function, self.structure = function, structure
        self.static = [u.clone() if isinstance(u, torch.Tensor) else u for u in leaves]

    def __call__(self, leaves):
        for mine, new in zip(self.static, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)
        return self.function(**torch.utils._pytree.tree_unflatten(self.static, self.structure))


class Replay(Rerun):
    """What the device would do, without what Python does around it.

    Attributes:
        count: replays of all recordings.
        during: called in the middle of every replay, after the step.
    """

    count = 0
    silent = False
    during = staticmethod(lambda: None)

    def __call__(self, leaves):
        Replay.silent = True
        try:
            out = super().__call__(leaves)
        finally:
            Replay.silent = False
        Replay.count += 1
        Replay.during()
        return out


@pytest.fixture
def recorded(monkeypatch):
    """Makes a model decode as on a GPU."""
    monkeypatch.setattr(step_graph, "Recording", Replay)
    monkeypatch.setattr(Replay, "count", 0)
    monkeypatch.setattr(Replay, "during", staticmethod(lambda: None))
    monkeypatch.setattr(call, "_is_recording", lambda: Replay.silent)
    monkeypatch.setattr(prepare_cache, "WORTH_RECORDING", ENOUGH)

    def make(model):
        decides = model.get_compiled_call
        monkeypatch.setattr(decides, "serves", lambda compile_config: compile_config is None)
        monkeypatch.setattr(decides.recorder, "_region", run_plainly)
        monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", _criteria)
        monkeypatch.setattr(type(model), "get_compiled_call", _refuse)
        return model

    return make


def _refuse(self, compile_config):
    raise AssertionError("transformers was asked to compile the whole model")


def _criteria(self, model_kwargs, generation_config):
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    return not generation_config.disable_compile and cache is not None and cache.is_compileable
