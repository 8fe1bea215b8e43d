"""A folder of files that is replaced once all of them are there: a crash or a full disk leaves the earlier ones."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory


def staged(folder: Path) -> AbstractContextManager[str]:
    """Within this context, a folder to write to, whose files ``publish`` moves to the given one; removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)  # on the same disk, so that files can be moved
    return TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder, ignore_cleanup_errors=True)


def publish(stage: Path, folder: Path, last: Sequence[str] = ()) -> set[str]:
    """Move all files of a stage into its folder, over those of the same names: the last ones in the order given.

    Returns:
        The names.
    """
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    order = {name: i for i, name in enumerate(last, 1)}
    for path in sorted(files, key=lambda path: order.get(path.name, 0)):
        target = folder / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return {path.relative_to(stage).as_posix() for path in files}
