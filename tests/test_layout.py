"""The house rules: imports run one way, and importing the library has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ahn_layers"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

# what a module may import from the package, from the bottom up; a package stands for all its modules
ALLOWED = {
    "version": set(),
    "files": set(),
    "missing": set(),
    "ops": set(),
    "layers": set(),
    "tokens": set(),
    "window": set(),
    "rotary": {"ops"},
    "compressor": {"layers", "ops"},
    "compressors": {"compressor", "layers", "ops"},
    "state": {"compressor", "files", "tokens", "window"},
    "checks": {"memory", "state", "tokens"},  # memory for its type only
    "step": {"compressor", "memory", "ops", "state", "tokens"},  # memory for its type only
    "memory": {"checks", "compressor", "ops", "rotary", "state", "step", "tokens", "window"},
    "attention": {"memory", "state"},
    "huggingface": {"attention", "compressor", "files", "memory", "ops", "rotary", "state", "window"},
    "retrofit": {"attention", "compressor", "huggingface", "memory", "missing", "window"},
    "adapter": {"attention", "compressor", "files", "retrofit", "version"},
    "cost": {"attention", "compressor", "retrofit"},
    "distillation": {"attention", "huggingface", "missing", "ops", "retrofit"},  # huggingface: a name only
    "huggingface/trainer": {"adapter", "distillation"},
    "testing": {"compressor", "memory", "ops", "window"},
}


def imports(path: str, *, top_level: bool = False) -> list[tuple[int, str]]:
    """``(level, dotted name)`` of everything that a module imports."""
    tree = ast.parse((PACKAGE / path).read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", [m for m in MODULES if m != "__init__.py"])
def test_imports_run_one_way(path):
    parts = Path(path).with_suffix("").parts
    concept = "/".join(parts) if "/".join(parts) in ALLOWED else parts[0]  # a module may stand above its package
    assert concept in ALLOWED, f"{concept} has no place in the order of imports: give it one here"
    for level, name in imports(path):
        if level == 0 or level < len(parts):  # absolute, or within its own package
            continue
        target = name.split(".")[0]
        assert target in ALLOWED[concept] | {concept}, f"{path} imports {target}"


@pytest.mark.parametrize("path", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(path):
    inside = path.startswith("huggingface")
    for level, name in imports(path):
        if level == 0 and name.split(".")[0] == "transformers":
            assert inside, f"{path} imports transformers"
    for level, name in imports(path, top_level=True):
        if path.startswith("ops/triton_"):  # nothing but kernels, imported where they run
            break
        assert level or name.split(".")[0] not in ("triton", "fla"), f"{path} imports {name} at its top"


def test_importing_is_light():
    code = (
        "import sys, torch; before = set(sys.modules), torch.get_default_dtype(); import ahn_layers;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before[0]};"
        "heavy = new & {'transformers', 'triton', 'fla', 'beartype'};"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse((PACKAGE / path).read_text())), f"{path} has no docstring"


def test_no_model_family_is_named_in_the_library():
    """Nothing in the code depends on a family; docstrings may name one as an example."""
    for path in MODULES:
        tree = ast.parse((PACKAGE / path).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare | ast.If):
                text = ast.unparse(node.test if isinstance(node, ast.If) else node).lower()
                assert not any(family in text for family in ("llama", "qwen", "mistral", "gemma")), f"{path}: {text}"
