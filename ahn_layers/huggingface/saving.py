"""``save_pretrained`` of a retrofitted model: base, memory, and a config that is never taken for a plain model's."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter_files import DESCRIPTION, WEIGHTS, Weights, write
from ..attention import HippocampalAttention
from ..eviction import RIDES
from ..files import write_atomically
from ..staging import publish, staged
from .model_method import ModelMethod
from .saved_model import ADVICE, saved_config, variant_of

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
RESUMED = "memory.safetensors"
"""The memory weights by their names in the model: with the index, what a ``Trainer`` resumes from."""


class SavePretrained(ModelMethod):
    """Stands in for ``model.save_pretrained``: the folder holds the base, the memory, and how they belong together."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as the model would; arguments as there. A folder that holds another saved model is overwritten.

        Everything is written beside it first, so that a crash or a full disk leaves the earlier model.
        """
        from ..description import describe, describe_adapter, gather_weights, is_described

        model: Any = self.model
        folder, record, description = Path(save_directory), model.hippocampus, describe(model, model.hippocampus)
        adapter = describe_adapter(model, record, state_dict) if is_described(model, record) else None
        names = _names(model)
        weights = gather_weights(model) if state_dict is None else _taken_from(state_dict, model, names)
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        stamps = model._get_files_timestamps(folder) if push_to_hub and folder.is_dir() else {}
        writes = is_main_process and getattr(model, "should_save_on_this_rank", bool)(is_main_process)
        lora_alone = getattr(model, "_hf_peft_config_loaded", False)  # then transformers writes the PEFT adapter only
        with staged(folder) as name:
            stage = Path(name)
            with _left_out(model, {name for own in names.values() for name in own.values()}):
                type(model).save_pretrained(
                    model,
                    stage,
                    is_main_process=is_main_process,
                    state_dict=None if state_dict is None else dict(state_dict),
                    max_shard_size=max_shard_size,
                    variant=variant if lora_alone else variant_of(variant),
                    **kwargs,
                )
            if writes and adapter is not None:
                write(stage, weights, adapter)
            if writes and not lora_alone:
                base = json.loads((stage / CONFIG).read_text())
                _write_json(stage / CONFIG, saved_config(base, description))
                named = {names[i][key]: u for i, own in weights.items() for key, u in own.items()}
                _write_index(stage, variant, named)
            written = publish(stage, folder, (CONFIG, INDEX))
        if writes:
            _remove_earlier(folder, variant, written, lora_alone=lora_alone)
        if writes and push_to_hub:
            _upload(model, folder, stamps, kwargs.get("token"), **hub)


def _names(model: nn.Module) -> dict[int, dict[str, str]]:
    """Of each retrofitted layer: the names of the memory weights, with their names in the model."""
    named: dict[int, dict[str, str]] = {}
    for name, block in model.named_modules():
        if isinstance(block, HippocampalAttention):
            parts = (("", block.memory.compressor, "compressor"), (RIDES, block.memory.eviction, "eviction"))
            own = {
                prefix + key: f"{name}.memory.{place}.{key}"
                for prefix, part, place in parts
                if part is not None
                for key in part.state_dict()
            }
            if own:
                named[block.layer_idx] = own
    return named


def _taken_from(state_dict: dict[str, Any], model: nn.Module, names: dict[int, dict[str, str]]) -> Weights:
    """The memory weights of a given state dict; where it has none (another process does), the model's own."""
    own: dict[str, Tensor] = model.state_dict()
    return {i: {key: state_dict.get(name, own[name]) for key, name in inner.items()} for i, inner in names.items()}


@contextmanager
def _left_out(model: Any, names: set[str]) -> Iterator[None]:
    """Within this context, ``save_pretrained`` of the model's class leaves these weights out."""
    before = dict(vars(model))
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}
    try:
        yield
    finally:
        del model._keys_to_ignore_on_save
        vars(model).update({key: value for key, value in before.items() if key == "_keys_to_ignore_on_save"})


def _base_files(folder: Path, variant: str | None) -> tuple[Path, Path]:
    """Where the base weights are: in one file, or in those that an index lists."""
    ours = variant_of(variant)
    return folder / f"model.{ours}.safetensors", folder / f"model.safetensors.index.{ours}.json"


def _remove_earlier(folder: Path, variant: str | None, written: set[str], *, lora_alone: bool) -> None:
    """Remove what an earlier save here has left that could be taken for a part of this one."""
    ours, earlier = variant_of(variant), [folder / WEIGHTS, folder / DESCRIPTION]
    if not lora_alone:
        earlier += [folder / "model.safetensors", folder / INDEX, _base_files(folder, variant)[1]]
        earlier += folder.glob(f"model.{ours}.safetensors")
        earlier += folder.glob(f"model.{ours}-*-of-*.safetensors")
        earlier += folder.glob(f"model-*-of-*.{ours}.safetensors")
    for path in earlier:
        if path.name not in written:
            path.unlink(missing_ok=True)


def _write_index(folder: Path, variant: str | None, memory: dict[str, Tensor]) -> None:
    """List base and memory weights together under the name that a ``Trainer`` looks for.

    The index has no ``metadata``, which ``from_pretrained`` needs and a ``Trainer`` does not.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    single, index = _base_files(folder, variant)
    if variant is not None:
        return
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(str(single), framework="pt") as file:
            places = dict.fromkeys(file.keys(), single.name)
    if memory:
        data = save({name: u.detach().cpu().contiguous() for name, u in memory.items()}, {"format": "pt"})
        write_atomically(folder / RESUMED, data)
        places |= dict.fromkeys(memory, RESUMED)
    _write_json(folder / INDEX, {"about": ADVICE, "weight_map": places})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _upload(model: Any, folder: Path, stamps: dict[str, float], token: Any, **hub: Any) -> None:
    """Send what is new in the folder to the hub, as transformers does it."""
    from huggingface_hub import create_repo

    repo = create_repo(hub.pop("repo_id", folder.name), exist_ok=True, token=token, private=hub.pop("private", None))
    model._upload_modified_files(folder, repo.repo_id, stamps, token=token, **hub)
