"""Wheel and source hold what they must and nothing else; the README has no link that leads nowhere; calls are typed."""

import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|npz)$")
JUNK = re.compile(r"(__pycache__|\.pyc$|\.egg-info|(^|/)(dist|build|site|\.venv|\.cache|\.\w+_cache)/)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of the wheel and of the source."""
    pytest.importorskip("hatchling", reason="the extra dev has what builds the package")
    folder = tmp_path_factory.mktemp("dist")
    build = (
        "from hatchling.build import *; import sys; print(build_wheel(sys.argv[1])); print(build_sdist(sys.argv[1]))"
    )
    run = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [folder / name for name in run.stdout.split()[-2:]]


def files(*folders):
    """What the folders of the checkout hold, without what programs leave there."""
    found = (
        path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*") if path.is_file()
    )
    return {path for path in found if not JUNK.search(path)}


def test_the_wheel_is_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == files("ahn_layers")
    assert "ahn_layers/py.typed" in names and not any(map(CHECKPOINTS.search, names))
    assert {name.split("/", 1)[1] for name in info} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


def test_the_source_has_tests_examples_and_documentation(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    single = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "hatch_build.py", "mkdocs.yml"}
    added = {"PKG-INFO", "pyproject.toml", ".gitignore"}  # by hatchling
    assert names == files("ahn_layers", "docs", "examples", "tests") | single | added
    shipped = {name.rpartition("/")[0] for name in names if CHECKPOINTS.search(name)}
    adapters = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/adapters/*/adapter.json")}
    assert shipped == adapters | {"tests/compressors/golden"}


def test_the_metadata_is_complete(built):
    classifiers = pytest.importorskip("trove_classifiers").classifiers
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (u for u in wheel.namelist() if u.endswith("METADATA"))
        metadata = message_from_string(wheel.read(name).decode("utf-8"))
    version = runpy.run_path(str(ROOT / "ahn_layers" / "version.py"))["__version__"]
    assert (metadata["Name"], metadata["Version"]) == ("ahn-layers", version)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert all(metadata[u] for u in ("Summary", "Author", "Keywords", "Project-URL", "Requires-Python"))
    assert set(metadata.get_all("Classifier")) <= classifiers
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = re.sub(r"^```.*?^```$", "", metadata.get_payload(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href|srcset)=[\"']([^\"']+)", text)
    assert targets and all(re.match(r"(https?://|#|mailto:)", one or other) for one, other in targets)


README = """[![A *figure*](docs/a.png)](docs/a.md) [guide](docs/b.md#part), [paper](https://arxiv.org), [here](#here)
<picture><source srcset="docs/dark.png"><img alt="A figure" src='docs/a.png'></picture> <a href="docs/b.md">b</a>
```python
x = [f](y)  # [not](a/link.md)
```
[end](LICENSE)
"""


def test_links_of_the_readme_lead_to_the_repository():
    pytest.importorskip("hatchling", reason="the extra dev has what builds the package")
    on_an_index = runpy.run_path(str(ROOT / "hatch_build.py"))["on_an_index"]
    at, raw = (f"https://code.example/ahn/{kind}/v1.2/" for kind in ("blob", "raw"))
    expected = README.replace("(docs/a.png)", f"({raw}docs/a.png)").replace("(docs/a.md)", f"({at}docs/a.md)")
    expected = expected.replace("(docs/b", f"({at}docs/b").replace("(LICENSE", f"({at}LICENSE")
    expected = expected.replace('"docs/dark', f'"{raw}docs/dark').replace("'docs/a", f"'{raw}docs/a")
    assert on_an_index(README, "https://code.example/ahn", "1.2") == expected.replace('"docs/b', f'"{at}docs/b')
    without = on_an_index(README, "", "1.2")
    assert without.startswith("*A *figure** guide, [paper](https://arxiv.org), [here](#here)\n<picture></picture> b\n")
    assert "[not](a/link.md)" in without and without.endswith("```\nend\n")


def test_the_wheel_imports_where_nothing_else_of_the_project_is(built, tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path),
        str(built[0]),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stderr
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ahn_layers, ahn_layers.testing; print(ahn_layers.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), done.stderr


def test_calls_are_typed():
    """For mypy calls have the types that ``typed.py`` asserts, and the two wrong calls there are errors."""
    pytest.importorskip("mypy", reason="the extra dev has it")
    command = [sys.executable, "-m", "mypy", "--warn-unused-ignores", "--no-color-output", "tests/package/typed.py"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert [line for line in out.splitlines() if line.startswith("tests/package")] == []
    assert "Found" in out or "Success" in out  # it came to an end


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    version = runpy.run_path(str(ROOT / "ahn_layers" / "version.py"))["__version__"]
    assert f"\nversion: {version}\n" in text and "arXiv:2510.07318" in text
    assert f"version = {{{version}}}" in (ROOT / "docs" / "citation.md").read_text()


def test_calls_are_those_of_forward():
    import inspect

    from ahn_layers import HippocampalAttention, MemoryStore
    from ahn_layers.calls import BlockCall, StoreCall

    for module, call in ((MemoryStore, StoreCall), (HippocampalAttention, BlockCall)):
        one, other = (inspect.signature(u).parameters for u in (module.forward, call.__call__))
        assert {k: (u.kind, u.default) for k, u in one.items()} == {k: (u.kind, u.default) for k, u in other.items()}
