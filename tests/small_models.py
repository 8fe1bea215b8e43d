"""What documentation and commands name, small and on the spot: models, tokenizers, adapters, files, no network."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from ahn_layers import Compressor

ROOT = Path(__file__).parent.parent
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
"""The shape of SmolLM2-135M as far as a memory can tell: the shipped adapters fit."""
RELEASED = {"GDN": "GatedDeltaNet", "DN": "DeltaNet", "Mamba2": "Mamba2"}
FILES = ("book.txt", "novel.txt", "books/train/a.txt", "books/dev/b.txt")


def install(monkeypatch, folder: Path, *, fits_shipped_adapters: bool) -> None:
    """In ``folder``, loading by name gives small random things. ``examples`` is there as in a clone.

    Args:
        monkeypatch: of pytest.
        folder: the current folder from now on.
        fits_shipped_adapters: whether SmolLM2 has its true shape, which takes a second.
    """
    import huggingface_hub
    import smollm2
    from _chat import SMALL, random_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
    )

    def make(name, **_):
        kinds = {"qwen": Qwen2Config, "mistral": MistralConfig, "gemma": Gemma3TextConfig}
        kind = next((u for key, u in kinds.items() if key in str(name).lower()), None)
        if kind is None and fits_shipped_adapters:
            return random_model(LlamaConfig(**SMOLLM2))
        window = {"sliding_window": None} if kind is MistralConfig else {}
        if kind is Gemma3TextConfig:
            window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
        sizes = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 8192, **window}
        return random_model((kind or LlamaConfig)(**sizes))

    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name, **options):
        return load_model(name, **options) if Path(name).is_dir() else make(name)[0]

    def tokenizer(name, **options):
        if Path(name).is_dir():  # that a block has saved
            return load_tokenizer(name, **options)
        found = make(name)[1] if not fits_shipped_adapters else random_model(LlamaConfig(**SMALL))[1]
        for key, value in options.items():
            setattr(found, key, value)
        return found

    def download(name, **_):
        """A released memory, as the authors of the paper name its weights."""
        match = re.search(r"AHN-(\w+)-for", str(name))
        if match is None:
            raise OSError("no network in the tests")
        sizes = {"hidden_size": SMALL["hidden_size"], "num_heads": SMALL["num_attention_heads"], "head_dim": 16}
        sizes["num_kv_heads"] = 2
        memory = Compressor.by_name[RELEASED[match[1]]](**sizes)
        names = [(f"model.layers.{i}.ahn.fn.{key}", u) for i in range(2) for key, u in memory.state_dict().items()]
        (folder / "released").mkdir(exist_ok=True)
        save_file({key: torch.randn_like(u) for key, u in names}, folder / "released" / "model.safetensors")
        return str(folder / "released")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(smollm2, "smollm2_folder", lambda: Path("SmolLM2"))
    monkeypatch.chdir(folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "README.md").symlink_to(ROOT / "README.md")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("A text that is longer than the window of the adapters. " * 15)
