"""A retrofitted model that is copied, runs beside another one, or is interrupted: others stay as they are."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ahn_layers import GatedDeltaNet, full_attention, restore, retrofit

from ..models import WINDOW, base, logits, tokens
from .isolated import LONG, built, everything, put, same, shared

# --- copies


def copies(model):
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", ["llama", "gemma3", "vlm"])
def test_copies_have_views_and_records_of_their_own(name):
    model, plain = shared(name, "sdpa", 2)
    plain.load_state_dict(model.state_dict())
    before, ours = everything(plain), everything(put(model))
    for how, copied in copies(model):
        same(everything(copied), ours)
        assert copied.hippocampus is not model.hippocampus, how
        with full_attention(copied):
            same(everything(copied), before)
            same(everything(model), ours)
        copied.config.get_text_config()._attn_implementation = "eager"
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        copied.config.get_text_config()._attn_implementation = "sdpa"
        restore(copied)
        same(everything(copied), before)
        same(everything(put(copied)), ours)
    same(everything(model), ours)


def test_a_part_of_a_model_can_be_copied():
    model = put(base())
    layer = copy.deepcopy(model.model.layers[1])
    x, places = torch.randn(1, LONG, 32, dtype=torch.float64), torch.arange(LONG)[None]
    rotation = model.model.rotary_emb(x, places)
    expected = model.model.layers[1](x, position_embeddings=rotation)
    assert torch.equal(layer(x, position_embeddings=rotation), expected)


def test_a_pickled_model_runs_in_a_new_process(tmp_path):
    model = put(base())
    torch.save((model, logits(model, tokens(1, LONG)), logits(base(), tokens(1, LONG))), tmp_path / "model.pt")
    code = (
        "import sys, torch; from ahn_layers import restore;"
        f"model, ours, plain = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        f"ids = torch.randint(1, 64, (1, {LONG}), generator=torch.Generator().manual_seed(0));"
        "assert torch.equal(model(ids, use_cache=False).logits, ours);"
        "assert torch.equal(restore(model)(ids, use_cache=False).logits, plain)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- threads and interruptions


def test_a_model_that_runs_meanwhile_does_not_notice():
    running, other = shared("llama", "eager", 2)
    ids, stop, wrong, count = tokens(1, 12), threading.Event(), [], [0]
    expected = logits(running, ids)

    def loop():
        while not stop.is_set():
            count[0] += 1
            if not torch.equal(logits(running, ids), expected):
                wrong.append(count[0])

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(5):
            put(other)
            logits(other, ids)
            restore(other)
    finally:
        stop.set()
        thread.join()
    assert count[0] > 0 and not wrong


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_call_that_failed_other_models_are_still_plain(error):
    plain, model = base(), put(base())
    made = built(model, "view", None)

    def fail(*_):
        raise error("between two layers")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        model(tokens(1, LONG))
    handle.remove()
    expected = everything(plain)
    if error is ValueError:
        same(everything(made), expected)
    ours = everything(model)
    same(everything(made), expected)
    same(everything(model), ours)


def test_a_model_that_was_interrupted_while_it_was_probed_is_as_it_was():
    model = base()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = logits(model, tokens(1, LONG))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        retrofit(model, GatedDeltaNet, window_size=WINDOW)
    handle.remove()
    for name, module in model.named_modules():
        assert vars(module) == before[name], name
    assert torch.equal(logits(model, tokens(1, LONG)), expected)
