"""A folder of files that is replaced once all of them are there: a crash or a full disk leaves the earlier ones."""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Within this context, a folder to write to; ``publish`` moves its files. It is removed at the end.

    Args:
        folder: where the files are to be; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f".{secrets.token_hex(8)}.tmp"  # on the same disk, so that files can be moved
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, folder: Path, last: Sequence[str] = ()) -> set[str]:
    """Move all files of a stage into its folder, over those of the same names.

    Args:
        stage: where they are.
        folder: where they go.
        last: names of files to move after all others, in this order.

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
