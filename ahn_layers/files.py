"""Tensors in safetensors files: versioned, written atomically, every defect named."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1


def save_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, description: dict[str, Any]) -> None:
    """Write tensors and a JSON description to a safetensors file that appears complete or not at all."""
    from safetensors.torch import save

    text = json.dumps(description)
    metadata = {"format": f"ahn_layers.{kind}", "version": str(FORMAT_VERSION), "description": text}
    metadata["sha256"] = digest(sorted(tensors.items()), text)
    write_atomically(path, save({name: u.detach().contiguous() for name, u in tensors.items()}, metadata))


def digest(named: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """A hash of names, dtypes, shapes and values, wherever the tensors are, and of a text.

    Raises:
        ValueError: if a tensor is of a class of its own, such as a quantized one, whose bytes cannot be read.
    """
    found = hashlib.sha256(text.encode())
    for name, u in named:
        found.update(f"{name} {u.dtype} {tuple(u.shape)}".encode())
        try:
            u = u.detach().cpu().contiguous()
            # one row of bytes, whatever the strides of a dimension of size 1 or 0
            u = u.reshape(-1, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if type(u) in (Tensor, torch.nn.Parameter) and u.layout == torch.strided and not u.is_meta:
                raise  # memory has run out
            raise ValueError(
                f"{name} is a {type(u).__name__}: expected a tensor whose bytes can be read. Weights of a memory are "
                "not quantized: quantize the base model before retrofit(...), or leave out the modules under 'memory'."
            ) from error
        found.update(u.numpy().data)
    return found.hexdigest()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that it is complete or not there, even after a crash.

    Its permissions are those of any new file (0666 without the umask).

    Raises:
        OSError: if the folder cannot be written to, as the subclass that says why (``PermissionError``, ...).
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:
        reason = f"cannot write {path.name} into this folder ({error.strerror})"
        raise OSError(error.errno, reason, str(path.parent)) from error
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _keep_name(path.parent)


def _keep_name(folder: Path) -> None:
    """Make sure that a new name in a folder survives a power cut, where folders can be asked for it."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(number)
    os.close(number)


def sha256(data: bytes | Path) -> str:
    """The SHA-256 of some bytes, or of a file."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        found = hashlib.sha256()
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def as_device(device: torch.device | str | torch.dtype | None) -> torch.device | None:
    """The device, if it is one: a dtype in its place would round counters as well."""
    if isinstance(device, torch.dtype):
        raise TypeError(
            f"device={device}: expected a device, such as 'cpu'. A state of another dtype has to be computed anew, by "
            "a model of that dtype."
        )
    return None if device is None else torch.device(device)


def load_tensors(path: str | Path, kind: str, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what ``save_tensors`` wrote; every defect of the file is a ValueError that names it."""
    from safetensors import safe_open

    place = as_device(device)
    expected = f"ahn_layers.{kind}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with reading(path), safe_open(str(path), framework="pt", device=str(place)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != expected:
            raise ValueError(f"{path}: expected a file of format {expected!r}, found {metadata.get('format')!r}.")
        if metadata.get("version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{path}: format version {metadata.get('version')}, this library reads {FORMAT_VERSION}. "
                "Load it with the version of ahn_layers that wrote it."
            )
        # copies are aligned as all tensors are, which those in a mapped file are not: products round as before
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = metadata["description"]
        if metadata.get("sha256") not in (None, digest(sorted(tensors.items()), text)):
            raise ValueError(f"{path}: damaged, its contents are not what was written (sha256). Save it again.")
        description = json.loads(text)
        if not isinstance(description, dict):
            raise ValueError(f"{path}: damaged, its description is a {type(description).__name__}.")
        return tensors, description


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Within this context, whatever a damaged file leads to is a ValueError that names the file."""
    from safetensors import SafetensorError

    damage = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, RuntimeError, TypeError)
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, *damage) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: damaged or truncated safetensors file ({reason}).") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from error
