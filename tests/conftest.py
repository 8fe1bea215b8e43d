"""One thread per process, fixed seeds, and shapes checked at run time."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.util import find_spec
from pathlib import Path

import jaxtyping
from jaxtyping import install_import_hook

from .checking import jaxtyped

PACKAGE = Path(find_spec("ahn_layers").origin).parent
names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("[!_]*.py")]
# Triton compiles the source of its kernels and does not find what they use behind a decorator
install_import_hook([name for name in names if ".triton_" not in name], "beartype.beartype")
jaxtyping.jaxtyped = jaxtyped

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that cannot run here is skipped once, not for each of its parameters: the rest is deselected."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
    if "every_type" not in config.getoption("markexpr"):
        asked = [item for item in items if not item.get_closest_marker("every_type")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("every_type")])
        items[:] = asked
    seen: set[tuple[str, str]] = set()
    kept, dropped = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        reasons = {(name, mark.kwargs["reason"]) for mark in item.iter_markers("skipif") if mark.args[0] is True}
        (dropped if reasons & seen else kept).append(item)
        seen |= reasons
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for every test, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def classes_of_examples() -> Iterator[None]:
    """Two examples define classes that files know by name; the documentation defines them as well, in another place."""
    yield
    for name in ("new_compressor", "new_eviction"):
        sys.modules.pop(name, None)
    from ahn_layers import Compressor, Eviction

    places = ("new_compressor", "new_eviction", "documentation", "__main__")
    for table in (Compressor.by_name, Eviction.by_name):  # whatever else still holds such a class
        for name in [u for u, kind in table.items() if kind.__module__ in places]:
            del table[name]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked, as for users: the library's own errors have to speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
