"""The records of a benchmark: from a folder on this machine, or from the hub.

Both benchmarks keep one JSON Lines file for each task. On the hub, LV-Eval packs those of a data set into a zip file.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets


def load(name: str, data: str | None, hub: str, archive: str | None = None) -> list[dict[str, Any]]:
    """Records of one file.

    Args:
        name: the file in a folder with data, without ``.jsonl``; on the hub it lies in no folder.
        data: that folder; None for the hub.
        hub: the repository of the data set there.
        archive: a zip file there that holds the file; None if it is not packed.

    Raises:
        FileNotFoundError: if the folder, or the zip file, has no such file.
    """
    if data is not None:
        path = Path(data) / f"{name}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file. Expected the files of {hub} in {path.parent}.")
        return list(_parsed(path.read_text(encoding="utf-8").split("\n")))
    from huggingface_hub import hf_hub_download

    file = f"{name.rpartition('/')[2]}.jsonl"
    found = hf_hub_download(hub, archive or file, repo_type="dataset")
    if archive is None:
        return list(_parsed(Path(found).read_text(encoding="utf-8").split("\n")))
    with zipfile.ZipFile(found) as packed:
        members = [member for member in packed.namelist() if member.rpartition("/")[2] == file]
        if not members:
            raise FileNotFoundError(f"{archive} of {hub} has no {file}, but {', '.join(packed.namelist())}.")
        return list(_parsed(packed.read(members[0]).decode("utf-8").split("\n")))


def as_test_split(records: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    """Records as the harness takes them."""
    return {"test": datasets.Dataset.from_list(records)}


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in lines if line.strip())
