"""The documentation is true: its code runs, its links lead somewhere, every public name and every error is in it.

Code blocks of a page run in order and share their names. Models are small and random: whatever a block loads by name
is made on the spot. A block below a comment ``<!-- not run: reason -->`` is compiled only.
"""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch

import ahn_layers
from ahn_layers import Compressor

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)(`{3,})(?: \{ \.)?(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^-+8<-+ "([^":]+)(?::(\w+))?"$')
RAISED = {"AttributeError", "FileNotFoundError", "ImportError", "RuntimeError", "TypeError", "ValueError"}
MODULES = [name for _, name, _ in pkgutil.walk_packages(ahn_layers.__path__, "ahn_layers.")]


def page_name(page):
    return str(page.relative_to(ROOT))


def fences(page, *languages):
    """``(line, code, whether it runs)`` of each fenced block in one of the languages."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[3] in languages:
            indent, before = len(match[1]), text[: match.start()]
            code = "".join(line[indent:] or "\n" for line in match[4].splitlines(keepends=True))
            yield before.count("\n") + 2, code, not before.rstrip().endswith("-->") or "not run:" not in before[-200:]


def python_blocks(page):
    """Like ``fences``, without blocks that show a whole script: those run in test_examples.py."""
    for line, code, runs in fences(page, "python", "py"):
        included = SNIPPET.match(code.strip())
        if included is None or included[2] is not None:
            yield line, code, runs


@pytest.fixture
def examples(monkeypatch):
    """Modules of examples/ can be imported."""
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def small_models(monkeypatch, examples):
    """``from_pretrained`` and the hub give small random models, tokenizers and adapters."""
    import huggingface_hub
    from _chat import SMALL, random_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    def make(name):
        config = Qwen2Config if "qwen" in name.lower() else LlamaConfig
        return random_model(config(**SMALL, num_key_value_heads=2, max_position_embeddings=8192))

    def download(name, **_):
        kinds = {"GDN": "GatedDeltaNet", "DN": "DeltaNet", "Mamba2": "Mamba2"}
        kind = Compressor.by_name[kinds[re.search(r"AHN-(\w+)-for", name)[1]]]
        memory = kind(SMALL["hidden_size"], SMALL["num_attention_heads"], 16, num_kv_heads=2)
        names = [(f"model.layers.{i}.ahn.fn.{key}", u) for i in range(2) for key, u in memory.state_dict().items()]
        save_file({key: torch.randn_like(u) for key, u in names}, "released.safetensors")
        return str(Path.cwd())

    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name, **options):
        return load_model(name, **options) if Path(name).is_dir() else make(name)[0]

    def tokenizer(name, **options):
        if Path(name).is_dir():  # that a block has saved
            return load_tokenizer(name, **options)
        found = make(name)[1]
        for key, value in options.items():
            setattr(found, key, value)
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def names_of_example(code):
    """What the example a block is taken from has in scope, and the part that is shown."""
    included = SNIPPET.match(code.strip())
    if included is None:
        return {}, code
    module = importlib.import_module(Path(included[1]).stem)
    text = (ROOT / included[1]).read_text()
    start, end = (f"# --8<-- [{mark}:{included[2]}]\n" for mark in ("start", "end"))
    return vars(module), text[text.index(start) + len(start) : text.index(end)]


@pytest.mark.parametrize("page", [p for p in PAGES if list(python_blocks(p))], ids=page_name)
def test_code_blocks_run(page, small_models, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    names = {}
    for line, block, runs in python_blocks(page):
        given, code = names_of_example(block)
        names["__name__"] = given.get("__name__", "documentation")  # a class that is shown is the one of the example
        names |= {name: value for name, value in given.items() if not name.startswith("__")}
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if runs:
            exec(compiled, names)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert not failed, "see the output"


def test_public_classes_have_examples():
    names = [name for name in ahn_layers.__all__ if isinstance(getattr(ahn_layers, name), type)]
    missing = [name for name in names if ">>>" not in (getattr(ahn_layers, name).__doc__ or "")]
    assert missing in ([], ["MemoryState"]), f"no example in the docstring of {missing}"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_are_written_for_markdown(name):
    """``Example:`` and roles of reStructuredText would not be rendered."""
    text = Path(importlib.util.find_spec(name).origin).read_text()
    assert not re.search(r"^ +Example:$|:(meth|func|class|mod):`|\w::$", text, re.MULTILINE), "Examples, ``x``, one :"


def test_public_names_have_an_entry():
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: ahn_layers\.(?:retrofit\.)?(\w+)$", reference, re.MULTILINE)) | {"__version__"}
    assert set(ahn_layers.__all__) - entries == set(), "add them to a page of docs/reference"
    assert "`__version__`" in reference


@pytest.mark.parametrize("name", ["distillation", "cost"])
def test_public_names_of_a_module_have_an_entry(name):
    module = importlib.import_module(f"ahn_layers.{name}")
    own = [u for u, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = {u for u in getattr(module, "__all__", own) if not u.startswith("_")}
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert set(re.findall(rf"^::: ahn_layers\.{name}\.(\w+)$", page, re.MULTILINE)) == public


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_name_examples_and_options_that_exist(page):
    for line, code, _ in fences(page, "bash"):
        for command in code.replace("\\\n", " ").splitlines():
            script = re.search(r"examples/\w+\.py", command)
            if script is None:
                continue
            source = (ROOT / script[0]).read_text()
            if "from _chat import" in source:
                source += (ROOT / "examples" / "_chat.py").read_text()
            for option in re.findall(r"(?<= )--[\w-]+", command[script.end() :].split("&&")[0]):
                assert f'"{option}"' in source, f"{page_name(page)}:{line}: {script[0]} has no {option}"


def test_every_example_is_shown_on_a_page():
    """A page takes in each script as it is."""
    text = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r'^ *-+8<-+ "(examples/[\w/]+\.py)"$', text, re.MULTILINE))
    assert shown >= {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


def test_links_of_the_readme_lead_somewhere():
    """Those of the site are checked by ``mkdocs build --strict``."""
    for target in re.findall(r"\]\(([^)\s]+)\)", README.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (ROOT / (path or "README.md")).read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def messages():
    """``(where, text)`` of every error the library raises, with … in place of what is filled in."""
    for path in sorted((ROOT / "ahn_layers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in RAISED:
                text = text_of(node.args[0])
                if text.strip("… (:)") and not text.startswith("module "):
                    yield f"{path.name}:{node.lineno}", text


def text_of(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…"


def rows():
    """The error messages in the tables of the troubleshooting page."""
    text = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def shows(row, message):
    """Whether a row of the table shows this message: its fixed parts are there, in their order."""
    parts = [part.strip() for part in row.split("…")]
    return re.search(".*".join(re.escape(part) for part in parts), message, re.DOTALL) is not None


def test_every_error_is_in_the_troubleshooting_page():
    missing = [f"{where} {text}" for where, text in messages() if not any(shows(row, text) for row in rows())]
    assert not missing, "add a row with a remedy to docs/guides/troubleshooting.md:\n" + "\n".join(missing)


@pytest.mark.parametrize("row", rows())
def test_every_row_of_the_troubleshooting_page_is_an_error(row):
    assert any(shows(row, text) for _, text in messages()), "no such message in the library"


def test_the_readme_has_one_command_for_the_tests():
    command = README.read_text().split("## Run the tests", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    assert len(command.strip().splitlines()) == 1 and command.strip().endswith("-m pytest -q -n auto")


def test_maths_becomes_mathml():
    pytest.importorskip("latex2mathml")
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    html = hook(r'<p><span class="arithmatex">\(a_t &lt; b\)</span></p><div class="arithmatex">\[\frac{a}{b}\]</div>')
    assert html.startswith('<p><span class="maths"><math') and html.endswith("</math></div>")
    assert "<mfrac>" in html and "arithmatex" not in html
