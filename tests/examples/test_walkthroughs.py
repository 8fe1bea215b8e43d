"""The examples of the walk-throughs: a GPT with learned positions, bytes on a card, memory in training, colours."""

import importlib
from pathlib import Path

import pytest
import torch

from ahn_layers import GatedDeltaNet, Window

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def run_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def trained_like(gpt):
    """Weights as large as if it was trained, the memory's too."""
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return gpt.double().eval()


def test_nanogpt(capsys, tmp_path, unchecked):
    (tmp_path / "text.txt").write_text("A text of some characters. " * 60)
    small = ["--text", "text.txt", "--steps", "2", "--length", "60", "--tokens", "40"]
    results = importlib.import_module("nanogpt").main(small)
    assert list(results) == ["full attention", "window only", "memory"]
    assert all(len(found) == 2 and min(found) > 0 for found in results.values())
    assert "[40 characters by the model with the memory]" in capsys.readouterr().out


def test_nanogpt_with_a_window_that_holds_everything_is_the_plain_model():
    module = importlib.import_module("nanogpt")
    gpt = trained_like(module.GPT(50, Window(100), None))
    ids = torch.randint(50, (2, 90))
    x = gpt.wte(ids) + gpt.wpe(torch.arange(90))
    for block in gpt.blocks:
        q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, module.HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(gpt(ids)[0], gpt.ln_f(x) @ gpt.wte.weight.T)


def test_nanogpt_samples_as_if_it_read_everything_again(monkeypatch, unchecked):
    module = importlib.import_module("nanogpt")
    monkeypatch.setattr(module, "POSITIONS", 24)
    gpt = trained_like(module.GPT(50, Window(10, num_sinks=2), GatedDeltaNet))
    ids = torch.randint(50, (1, 5))
    written = module.sample(gpt, ids, 30, top_k=1)  # goes round in the table of positions
    text = torch.cat((ids, written), dim=1)
    again = gpt(text)[0][:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(again, written)
    sizes = {sum(state.nbytes for state in gpt(text[:, :length])[1]) for length in (20, 30, 35)}
    assert len(sizes) == 1


def test_bytes_on_a_card_are_those_that_are_held(capsys, unchecked):
    found = importlib.import_module("fit_on_a_card").main([
        "--shape", "tiny", "--tokens", "150", "--window", "60", "--sinks", "4", "--piece", "100", "--measure", "--full",
        "--device", "cpu",
    ])  # fmt: skip
    for arm in ("memory", "full attention"):
        assert found["arms"][arm]["cache of a text"] == found["measured"][arm][0]
    assert "peak" not in capsys.readouterr().out.partition("measured")[0]


def test_an_arm_that_runs_out_of_memory_says_after_how_many_tokens(capsys, monkeypatch, unchecked):
    module = importlib.import_module("fit_on_a_card")

    class Small(module.DynamicCache):
        def update(self, keys, values, layer, **more):
            if self.get_seq_length(layer) + keys.shape[2] > 100:
                raise torch.OutOfMemoryError("CUDA out of memory. If reserved memory is large try something")
            return super().update(keys, values, layer, **more)

    monkeypatch.setattr(module, "DynamicCache", Small)
    shape = ["--shape", "tiny", "--tokens", "150", "--window", "60", "--sinks", "4", "--piece", "60"]
    found = module.main([*shape, "--measure", "--full", "--device", "cpu"])["measured"]
    assert (
        found["full attention"][0] * 150
        == module.account(module.parse(shape))["full attention"]["cache of a text"] * 60
    )
    assert "full attention: out of memory after 60 tokens: CUDA out of memory.\n" in capsys.readouterr().out


def test_a_3b_model_with_a_long_text_on_a_card():
    """As the page says; the peak measured on an H100 at 131,072 tokens is 8.17 GB."""
    module = importlib.import_module("fit_on_a_card")
    arms = module.account(module.parse([]))
    assert {name: round(arm["together"] / 1e9, 2) for name, arm in arms.items()} == {
        "full attention": 14.22, "memory": 8.19
    }  # fmt: skip
    assert [arm["texts"] for arm in arms.values()] == [2, 12] and arms["memory"]["longest"] == float("inf")
    four = module.account(module.parse(["--bits", "4"]))
    assert round(four["memory"]["weights"] / 1e9, 2) == 2.08 and [arm["texts"] for arm in four.values()] == [2, 16]


def test_training_memory_grows_with_tokens_and_layers(capsys):
    found = importlib.import_module("training_memory").main([
        "--shape", "tiny", "--lengths", "4096", "8192", "--batches", "1", "2", "--device", "cpu"
    ])  # fmt: skip
    assert found["tiny", 4096, 2] == found["tiny", 8192, 1]
    plain, less = found["tiny", 8192, 2]
    assert plain > found["tiny", 8192, 1][0] and less < plain


def test_arms_have_one_colour_each():
    looks = importlib.import_module("looks")
    assert looks.color("full attention") == looks.color("full") == looks.color("full, 131,072") == "tab:gray"
    assert looks.color("window only") == looks.color("window") != looks.color("memory, compiled, 200, batch 1")
    assert len(set(looks.COLORS.values())) == len(looks.COLORS) and looks.look("recent")["color"] is None
