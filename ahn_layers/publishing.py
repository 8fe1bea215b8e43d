"""Publishing the memory of a model on the Hugging Face hub."""

import tempfile
from pathlib import Path

from torch import nn

from . import adapter_files, hub
from .adapter import save_adapter
from .card import CARD, TRAINING, base_model_of, described, write_card


def push_adapter(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a memory",
) -> str:
    """Upload a memory to the Hugging Face hub, with a model card; ``load_adapter(model, repo_id)`` loads it.

    The repository gets ``adapter.safetensors``, ``adapter.json``, ``README.md`` and, if the folder has one,
    ``training.json``; checkpoints stay where they are. The card is the ``README.md`` of the folder, or written by
    [`adapter_card`][ahn_layers.adapter_card].

    Args:
        source: a retrofitted model, or a folder written by [`save_adapter`][ahn_layers.save_adapter]. A model whose
            weights are sharded over several processes: save it first, and push the folder from one process.
        repo_id: ``owner/name``; made if it is not there.
        base_model: hub id of the base model. Default: where the base was loaded from, if that was the hub.
        license: of the adapter, as the hub names it (``"apache-2.0"``, ``"other"``, ...). Default: none is named.
        private: whether a repository that is made now is private. Default: as your account has it.
        revision: the branch to commit to, made if it is not there. Default: the main branch.
        token: with write access. Default: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: without huggingface_hub.
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if there is no token, a name is not ``owner/name``, the base model is not known by a hub id, the
            model is not retrofitted or the adapter is damaged.
        RuntimeError: if the hub cannot be reached or refuses the files.
    """
    hub.check_upload(repo_id, token)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / repo_id.rpartition("/")[2]
        if isinstance(source, nn.Module):
            save_adapter(source, staged)
        else:
            _copy(Path(source), staged)
        _name_base(staged, base_model)
        write_card(staged, base_model=base_model, license=license, repo_id=repo_id)
        return hub.upload(staged, repo_id, commit_message, private=private, revision=revision, token=token)


def _copy(folder: Path, staged: Path) -> None:
    """The files of an adapter alone: training leaves checkpoints beside them."""
    if not (folder / adapter_files.WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: no {adapter_files.WEIGHTS} in this folder.")
    staged.mkdir()
    for name in (adapter_files.WEIGHTS, adapter_files.DESCRIPTION, CARD, TRAINING):
        if (folder / name).is_file():
            (staged / name).write_bytes((folder / name).read_bytes())


def _name_base(folder: Path, base_model: str | None) -> None:
    """Make the adapter name its base by a hub id: a folder of this machine means nothing to others."""
    files = adapter_files.read(folder)
    description = described(files, folder)
    base = base_model_of(description, base_model)
    if base is None:
        raise ValueError(
            f"the base model was loaded from {description.get('base_model')!r}, which others do not have: pass "
            "base_model='owner/name', the hub id of the model that this memory belongs to."
        )
    if base != description.get("base_model"):
        rest = {name: value for name, value in description.items() if name not in adapter_files.HASHES}
        adapter_files.write(folder, files.weights, rest | {"base_model": base})
