"""A mistake in a command line ends every script at once: one line that says it, exit code 2, no model loaded."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())
CHATS = ("llama", "qwen", "mistral", "gemma3")
OUTPUT = ["--output", "out"]
WRONG = {
    "benchmark": [(["--length", "many"], "expected a whole number of at least 1")],
    "clients": [
        (["--clients", "0"], "expected a whole number of at least 1"),
        (["--url", "http://127.0.0.1:1/v1"], "--url http://127.0.0.1:1/v1: no server answers there"),
    ],
    "compare_compressors": [
        ([*OUTPUT, "--compressors", "Nothing"], "no compressor Nothing"),
        ([*OUTPUT, "--lr", "-1"], "expected a number from 0 to 10"),
        ([*OUTPUT, "--text", "nothing.txt", "--dev", "nothing.txt"], "nothing.txt"),
        ([*OUTPUT, "--model", "nothing"], "--model nothing: no such folder, and no hub model"),
        ([*OUTPUT, "--module", "not_there"], "No module named 'not_there'"),
    ],
    "custom_architecture": [(["--steps", "0"], "expected a whole number of at least 1")],
    "evaluate": [
        (["--adapter", "nowhere", *OUTPUT], "--adapter nowhere: no such file or folder"),
        (["--adapter", "here", "--text", "nothing.txt", *OUTPUT], "nothing.txt"),
        (["--adapter", "here", "--capacities", "0+4", *OUTPUT], "expected WINDOW+SINKS"),
        (["--adapter", "here", "--model", "nothing", *OUTPUT], "--model nothing: no such folder"),
    ],
    "fit_on_a_card": [
        (["--shape", "gpt-9"], "invalid choice: 'gpt-9'"),
        (["--tokens", "-3"], "expected a whole number of at least 1"),
        (["--measure", "--device", "cuda:77"], "no such GPU that PyTorch can use"),
    ],
    "gpu_benchmark": [
        (["--window", "0"], "expected a whole number of at least 1"),
        (["--device", "tpu!"], "expected cpu, cuda"),
        (["--dtype", "float99"], "invalid choice: 'float99'"),
    ],
    "learn_to_recall": [
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--ask", "nowhere"], "--ask nowhere: no such file or folder"),
        (["--steps", "1.5"], "expected a whole number"),
    ],
    "nanogpt": [(["--text", "nothing.txt"], "nothing.txt"), (["--temperature", "0"], "expected a positive number")],
    "new_compressor": [(["--tokens", "0"], "expected a whole number of at least 1")],
    "new_eviction": [(["--slots", "x"], "expected a whole number of at least 1")],
    "paper": [
        (["--window", "0"], "expected a whole number of at least 1"),
        (["--random-weights", "--model", "a", "--tasks", "lv_eval", *OUTPUT], "--model a: --random-weights makes"),
    ],
    "planting": [(["--tokens", "x"], "expected a whole number of at least 1")],
    "quickstart": [
        (["--text", "nothing.txt"], "nothing.txt"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such file or folder"),
        (["--model", "nothing"], "--model nothing: no such folder, and no hub model"),
        (["--chunk", "-1"], "expected a whole number of at least 1"),
    ],
    "serve": [
        (["--adapter", "nowhere"], "--adapter nowhere: no such file"),
        (["--random-weights", "--model", "a"], "--model a: --random-weights makes a model of its own"),
        (["--rows", "0"], "at least 1"),
    ],
    "serve_ray": [(["--adapter", "nowhere"], "--adapter nowhere: no such file"), (["--replicas", "x"], "at least 1")],
    "sessions": [(["--model", "nothing"], "nothing"), (["--tokens", "0"], "at least 1")],
    "tensor_parallel": [
        (["--model", "nothing"], "--model nothing: no such folder, and no hub model"),
        (["--adapter", "nowhere"], "nowhere: no such file or folder"),
    ],
    "train": [
        (["--text", "nothing.txt", *OUTPUT], "nothing.txt"),
        (["--text", "here", "--start-from", "nowhere", *OUTPUT], "--start-from nowhere: no such file or folder"),
        (["--text", "here", "--model", "nothing", *OUTPUT], "--model nothing: no such folder"),
        (["--text", "here", "--lr", "fast", *OUTPUT], "expected a number from 0 to 10"),
        (["--text", "here", *OUTPUT, "--resume"], "no checkpoint in"),
    ],
    "training_memory": [(["--lengths", "0"], "at least 1"), (["--shape", "gpt-9"], "invalid choice: 'gpt-9'")],
    "what_is_kept": [(["--text", "nothing.txt"], "nothing.txt"), (["--adapter", "nowhere"], "nowhere: no such file")],
}  # fmt: skip
for chat in CHATS:
    WRONG[chat] = [
        (["--document", "nothing.txt"], "nothing.txt"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such file or folder"),
        (["--model", "nothing", "--prompt", "Hello"], "--model nothing: no such folder, and no hub model"),
        (["--random-weights", "--model", "a"], "--model a: --random-weights makes a model of its own"),
        (["--window", "0"], "expected a whole number of at least 1"),
    ]
CASES = [(name, given, says) for name in SCRIPTS for given, says in [*WRONG[name], (["--no-such"], "unrecognized")]]


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    def load(name, **_):
        if name == "nothing":
            raise OSError(f"{name} is not a local folder")
        raise AssertionError(f"{name} was loaded before the command line was checked")

    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("A text. " * 40)


def test_every_script_has_wrong_arguments():
    assert WRONG.keys() == set(SCRIPTS)


@pytest.mark.parametrize("name, given, says", CASES, ids=lambda u: u if isinstance(u, str) else " ".join(u))
def test_a_mistake_is_one_line_and_exit_code_2(name, given, says, capsys):
    module = importlib.import_module(name)
    required = {"evaluate": ["--adapter", "here", *OUTPUT], "train": ["--text", "here", *OUTPUT]}
    if given == ["--no-such"]:
        given = [*required.get(name, OUTPUT if name in ("compare_compressors", "paper") else []), "--no-such"]
    with pytest.raises(SystemExit) as stopped:
        (module.run if name in CHATS else module.main)(given)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in said and says in said.strip().splitlines()[-1], said
