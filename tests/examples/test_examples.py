"""Every example runs, in a small setting, without a network."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from ahn_layers import GatedDeltaNet, HippocampalCache, adapter_parameters, retrofit, save_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
CHATS = ("llama", "qwen", "mistral", "gemma3")


@pytest.fixture(autouse=True)
def run_from_anywhere(monkeypatch, tmp_path):
    """Examples import one another, start processes of their own, and write to the current folder only."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_does(path):
    text = path.read_text()
    assert text.startswith(('"""', 'r"""'))
    if "__main__" in text:
        assert f"    python examples/{path.name}" in text, "its docstring shows no command"


def test_custom_architecture(capsys):
    results = importlib.import_module("custom_architecture").main(["--steps", "12"])
    assert list(results) == ["window only", "GatedDeltaNet"]
    assert all(0 <= share <= 1 for shares in results.values() for share in shares.values())
    assert "chance is 3%" in capsys.readouterr().out


def test_custom_architecture_is_split_invariant():
    module = importlib.import_module("custom_architecture")
    model = module.Decoder(module.Compressor.by_name["GatedDeltaNet"])
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.memory.compressor.o_proj.weight)
    ids, states, parts = module.texts(3, gap=40), None, []
    whole, _ = model(ids)
    for part in ids.split(5, dim=1):
        out, states = model(part, states)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_new_eviction(capsys):
    result = importlib.import_module("new_eviction").main(["--tokens", "90", "--new-tokens", "5", "--slots", "3"])
    assert result["cache"].layers[0].state.kept["filled"].tolist() == [[3, 3]]
    assert result["gap"] > 1e-4
    assert "passed" in capsys.readouterr().out


def test_new_compressor(capsys):
    result = importlib.import_module("new_compressor").main(["--tokens", "90", "--new-tokens", "5"])
    assert result["gap"] > 0 and result["cache"].get_seq_length() == 94
    assert "passed" in capsys.readouterr().out


def test_sessions(capsys):
    assert importlib.import_module("sessions").main(["--tokens", "150"]) == {"forked": True, "resumed": True}


@pytest.mark.parametrize("name", CHATS)
def test_chat(name, tmp_path, capsys):
    document = tmp_path / "document.txt"
    document.write_text("A document that is longer than the window. " * 20)
    small = ["--random-weights", "--window", "60", "--sinks", "4", "--max-new-tokens", "7"]
    replies = importlib.import_module(name).run(
        [*small, "--document", str(document), "--prompt", "Hello", "--prompt", "Again"]
    )
    printed = capsys.readouterr().out
    assert len(replies) == 2 and all(reply in printed for reply in replies)
    first, second = (line for line in printed.splitlines() if line.startswith("["))
    held = "0.03" if name == "gemma3" else "0.05"  # one of its two layers keeps its own sliding window
    assert f"cache {held} MB" in first and f"cache {held} MB" in second  # full: it grows no further
    tokens, full = figures(printed)[1], figures(printed)[3]
    growing = 1 if name == "gemma3" else 2
    assert full == pytest.approx((growing * tokens + (2 - growing) * 31) * 2 * 2 * 16 * 4 / 1e6, abs=0.01)
    assert "the memory is untrained" in printed


def figures(text):
    """What the last line in brackets says: tokens, MB of the cache, MB of full attention."""
    line = [u for u in text.splitlines() if u.startswith("[")][-1]
    full = re.search(r"full attention ([\d.]+) MB", line)
    numbers = re.match(r"\[([\d,]+) tokens, cache ([\d.]+) MB", line)
    return line, int(numbers[1].replace(",", "")), float(numbers[2]), full and float(full[1])


def test_a_short_chat_is_not_compared_with_full_attention(capsys):
    importlib.import_module("llama").run(["--random-weights", "--prompt", "Hello", "--max-new-tokens", "3"])
    line, tokens, _, full = figures(capsys.readouterr().out)
    assert tokens < 100 and full is None and "it grows up to 2,048 tokens" in line


def test_a_chat_says_from_when_on_a_window_saves(capsys):
    small = ["--random-weights", "--window", "4", "--sinks", "2", "--max-new-tokens", "3"]
    importlib.import_module("llama").run([*small, "--prompt", "Hi"])
    line, tokens, _, full = figures(capsys.readouterr().out)
    assert tokens > 6 and full is not None
    module = importlib.import_module("_chat")
    model, tokenizer = module.random_model(LlamaConfig(**module.SMALL, num_key_value_heads=2))
    chat = module.Chat(retrofit(model, GatedDeltaNet, window_size=4, num_sinks=2), tokenizer)
    limit = 10**9
    for count in range(8, 60):
        chat.cache = HippocampalCache()
        chat.ids = torch.ones(1, count + 1, dtype=torch.long)
        with torch.no_grad():
            model(chat.ids[:, :-1], cache=chat.cache, use_cache=True)
        line = chat.figures()
        match = re.search(r"which is more from (\d+) tokens on", line)
        limit = int(match[1]) if match else limit
        assert (match is None) == (count >= limit), line
    assert 8 < limit < 60


@pytest.mark.parametrize("limit", [1, 9])
def test_a_chat_goes_on_as_if_it_read_everything_again(limit, capsys):
    module = importlib.import_module("_chat")
    model, tokenizer = module.random_model(LlamaConfig(**module.SMALL))
    retrofit(model, GatedDeltaNet, window_size=30, num_sinks=2)
    for _, parameter in adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    chat = module.Chat(model, tokenizer)
    for message in ("A first message that fills the window", "A second one", "And a third"):
        chat.say(message, limit)
    seen, probe = chat.cache.get_seq_length(), chat.ids[:, :1]
    with torch.no_grad():
        again = model(torch.cat((chat.ids[:, :seen], probe), dim=1)).logits[:, -1]
        kept = model(probe, cache=chat.cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(kept, again, rtol=1e-4, atol=1e-4)
    text = tokenizer.decode(chat.ids[0])
    assert text.count("[user]") == 3 and text.count("[assistant]") == 3 and text.count("<s>") == 1


def test_a_chat_needs_a_template(monkeypatch):
    module = importlib.import_module("_chat")
    llama = importlib.import_module("llama")

    def load(*_):
        model, tokenizer = module.random_model(LlamaConfig(**module.SMALL))
        tokenizer.chat_template = None
        return model, tokenizer

    monkeypatch.setattr(module, "load_causal_lm", load)
    with pytest.raises(SystemExit, match="has no chat template"):
        llama.run(["--model", "base", "--prompt", "Hello"])


def test_tensor_parallel(tmp_path, capsys):
    """In one process; ``tests/huggingface/test_tensor_parallel.py`` has two."""
    module = importlib.import_module("_chat")
    model, tokenizer = module.random_model(LlamaConfig(**module.SMALL))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    save_adapter(retrofit(model, GatedDeltaNet, window_size=20, num_sinks=2), tmp_path / "adapter")
    small = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--repeat", "2"]
    text = importlib.import_module("tensor_parallel").main([*small, "--max-new-tokens", "4"])
    assert f"tokens, then: {text}" in capsys.readouterr().out


def test_quickstart(tmp_path, capsys, monkeypatch):
    model, tokenizer = importlib.import_module("_chat").random_model(
        LlamaConfig(**importlib.import_module("_chat").SMALL, max_position_embeddings=128)
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = ["--tokens", "300", "--window", "60", "--sinks", "4", "--chunk", "50", "--model", str(tmp_path / "model")]
    importlib.import_module("quickstart").main([*small, "--plot", str(tmp_path / "new" / "plot.png")])
    assert (tmp_path / "new" / "plot.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "full attention" in printed and "untrained" in printed and "pass key" not in printed
    monkeypatch.setattr(importlib.import_module("pass_key"), "PLACE", 100)
    results = importlib.import_module("quickstart").main([*small, "--plot", str(tmp_path / "plot.png")])
    assert list(results["answers"]) == ["full attention", "window only", "memory"]
    asked = capsys.readouterr().out.split("Asked for the pass key 71432")[1]
    assert all(f"{name:16}{answer}" in asked for name, answer in results["answers"].items())


def test_benchmark(capsys):
    importlib.import_module("benchmark").main(["--length", "70", "--lengths", "256"])
    assert "GatedDeltaNet" in capsys.readouterr().out


def test_gpu_benchmark(tmp_path, capsys):
    results = importlib.import_module("gpu_benchmark").main([
        "--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--window", "60", "--sinks", "4", "--length", "200",
        "--lengths", "300", "--batches", "2", "--new-tokens", "12", "--train-length", "150", "--output", str(tmp_path),
    ])  # fmt: skip
    assert {"kernels", "prefill", "decode", "training"} <= results.keys()
    assert (tmp_path / "results.json").stat().st_size and (tmp_path / "results.png").stat().st_size
    assert "memory, compiled, 200, batch 1" in capsys.readouterr().out


def test_only_compressors_that_can_be_made_are_choices():
    from _common import compressor_names

    assert "GatedDeltaNet" in compressor_names()
    assert not {"Recurrent", "DiagonalPlusRankOne"} & set(compressor_names())
