"""The house rules: imports run one way, and importing the library has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ahn_layers"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

# from the bottom up: a module imports what stands above it in this list, types included; a package is all its modules
ORDER = [
    *("version", "files", "hub", "staging", "by_name", "undo", "missing", "autocast", "ops", "layers", "peft"),
    *(
        "tokens",
        "ring",
        "window",
        "positions",
        "arrivals",
        "uncompiled",
        "compressor",
        "recurrent",
        "rank_one",
        "compressors",
    ),
    *("flops", "eviction", "evictions", "recall", "split", "consistency", "kinds", "state", "calls", "without", "rows"),
    *("checks", "padded", "step", "memory", "attention", "record"),
    *("fingerprint", "adapter_schema", "adapter_files", "huggingface", "arguments", "retrofit", "description"),
    *("card", "adapter"),
    *("publishing", "cost", "huggingface/saved_model", "huggingface/saving", "distillation"),
    *("registration", "testing"),
]
EXCEPTIONS = {
    ("huggingface/install.py", "huggingface/saving"),  # what a retrofitted model is saved by
    ("huggingface/config_view.py", "huggingface/interface"),  # a view that is unpickled makes its functions known
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


def targets(path: str) -> set[str]:
    """The modules of the package that a module imports, as paths without suffix; a package where it is imported."""
    package = Path(path).parent.parts
    found = set()
    for level, name in imports(path):
        if level:
            found.add("/".join((*package[: len(package) - level + 1], *name.split("."))))
    return found


def place(module: str) -> int:
    """Where a module stands in the order; some modules stand apart from their package."""
    name = module if module in ORDER else module.split("/")[0]
    assert name in ORDER, f"{name} has no place in the order of imports: give it one here"
    return ORDER.index(name)


@pytest.mark.parametrize("path", [m for m in MODULES if m != "__init__.py"])
def test_imports_run_one_way(path):
    module = path.removesuffix(".py").removesuffix("/__init__")
    for target in targets(path):
        same = target.split("/")[0] == module.split("/")[0] and place(target) == place(module)
        if not same and (path, target) not in EXCEPTIONS:
            assert place(target) < place(module), f"{path} imports {target}, which stands below it"


def test_no_imports_run_in_a_circle():
    graph = {path.removesuffix(".py").removesuffix("/__init__"): targets(path) for path in MODULES}
    for path, target in EXCEPTIONS:
        graph[path.removesuffix(".py").removesuffix("/__init__")] -= {target}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " imports ".join((*above[above.index(module) :], module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(path):
    inside = path.startswith("huggingface") or path == "distillation/trainer.py"
    for level, name in imports(path):
        if level == 0 and name.split(".")[0] == "transformers":
            assert inside, f"{path} imports transformers"
    for level, name in imports(path, top_level=True):
        if Path(path).name.startswith("triton_"):  # nothing but kernels, imported where they run
            break
        assert level or name.split(".")[0] not in ("triton", "fla"), f"{path} imports {name} at its top"


@pytest.mark.parametrize("path", MODULES)
def test_files_and_classes_are_short(path):
    text = (PACKAGE / path).read_text()
    assert len(text.splitlines()) <= 300, f"{path} has {len(text.splitlines())} lines, at most 300: split it by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 200, f"{path}: {node.name} has {size} lines, at most 200"


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """The named parameters of a method but ``self``."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs][1:]


def test_a_forward_has_few_parameters():
    for path in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
            method = isinstance(node, ast.FunctionDef) and node.name == "forward"
            if method and "staticmethod" not in map(ast.unparse, node.decorator_list):
                assert len(parameters(node)) <= 7, f"{path}: forward has {len(parameters(node))} parameters, at most 7"


def test_the_forward_of_a_store_is_its_equations():
    tree = ast.parse((PACKAGE / "memory.py").read_text())
    forward = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "forward")
    body = forward.body[1:]  # after the docstring
    assert body[-1].end_lineno - body[0].lineno + 1 <= 25
    names = [parameter.arg for parameter in parameters(forward)]
    assert len(names) <= 7
    modes = [p.arg for p in parameters(forward) if "bool" in ast.unparse(p.annotation)]
    assert not modes, f"{modes}: a mode is a store or a state of its own"


def test_one_place_of_each_folder_chooses_between_forms():
    """Which operations run in kernels, and in whose, is asked for in ``forms.py`` of their folder alone."""
    for path in MODULES:
        if Path(path).name not in ("forms.py", "triton_forms.py") and path != "huggingface/compiled/matvec.py":
            asks = {"has_triton", "in_triton"} & names_in(path)
            assert not asks, f"{path} asks for {asks}: this belongs into forms.py of a folder of operations"


def test_one_place_asks_for_what_can_be_deleted():
    for path in MODULES:
        if not path.startswith("huggingface/compiled") and path != "huggingface/speedups.py":
            assert not any("compiled" in target.split("/") for target in targets(path)), f"{path} imports compiled"


def names_in(path: str) -> set[str]:
    """All names and attributes in a module."""
    nodes = list(ast.walk(ast.parse((PACKAGE / path).read_text())))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


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
