"""The documentation is true: its code runs, its links lead somewhere, every public name and every error is in it.

The code blocks of a page run in order in one fresh namespace, as a reader would paste them: what a block uses, it or
one before it on that page has imported or made. Whatever they load by name is small, random and made on the spot. A
block below a comment ``<!-- not run: reason -->`` is compiled, and the names that it uses are looked up.
"""

import ast
import builtins
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import ahn_layers
import ahn_layers.distillation

from ..small_models import install

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
EXCERPTS = runpy.run_path(str(ROOT / "docs" / "excerpts.py"))
INCLUDED = re.compile(r'^-+8<-+ "([^"]+\.md)"$', re.MULTILINE)
FENCE = re.compile(r"^( *)(`{3,})(?: \{ \.)?(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
LISTING = re.compile(r'^-+8<-+ "([^"]+\.py)"$')
RAISED = {"AttributeError", "FileNotFoundError", "ImportError", "RuntimeError", "TypeError", "ValueError"}
MODULES = [name for _, name, _ in pkgutil.walk_packages(ahn_layers.__path__, "ahn_layers.")]


def page_name(page):
    return str(page.relative_to(ROOT))


def markdown(page):
    """What a page says on the site, with the other pages that it takes in."""
    text = page.read_text()
    if page.is_relative_to(ROOT / "docs"):
        text = EXCERPTS["for_site"](text, page.relative_to(ROOT / "docs").as_posix())
    return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(), text)


def fences(page, *languages):
    """``(line, code, whether it runs)`` of each fenced block in one of the languages."""
    text = markdown(page)
    for match in FENCE.finditer(text):
        if match[3] in languages:
            indent, before = len(match[1]), text[: match.start()]
            code = "".join(line[indent:] or "\n" for line in match[4].splitlines(keepends=True))
            yield before.count("\n") + 2, code, not before.rstrip().endswith("-->") or "not run:" not in before[-200:]


def python_blocks(page):
    """Like ``fences``, without blocks that show a whole script: those run in test_examples.py."""
    for line, code, runs in fences(page, "python", "py"):
        if not LISTING.match(code.strip()):
            yield line, code, runs


@pytest.mark.parametrize("page", [p for p in PAGES if list(python_blocks(p))], ids=page_name)
def test_code_blocks_run(page, tmp_path, monkeypatch, unchecked):
    monkeypatch.syspath_prepend(ROOT / "examples")
    shipped = any("examples/adapters" in block for _, block, _ in python_blocks(page))
    install(monkeypatch, tmp_path, fits_shipped_adapters=shipped)
    monkeypatch.delitem(sys.modules, "_chat")  # pages stand without the examples
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(ROOT / "examples")])
    names = {"__name__": "documentation"}
    for line, code, runs in python_blocks(page):
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if runs:
            exec(compiled, names)
        else:
            assert unknown_names(code) <= names.keys() | vars(builtins).keys()
            names |= dict.fromkeys(bound_names(code))


def bound_names(code):
    """Names that a block makes."""
    nodes = list(ast.walk(ast.parse(code)))
    imports = [u for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for u in n.names]
    imported = {(u.asname or u.name).split(".")[0] for u in imports}
    arguments = {n.arg for n in nodes if isinstance(n, ast.arg)}
    return imported | arguments | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def unknown_names(code):
    """Names that a block uses and does not make."""
    nodes = ast.walk(ast.parse(code))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - bound_names(code)


def inline_calls():
    """``(page, call, function)`` of each call of a public function that the text of a page shows."""
    modules = (ahn_layers, ahn_layers.distillation)
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([A-Za-z_.]+\([^`]*\))`", FENCE.sub("", markdown(page))):
            try:
                call = ast.parse(code, mode="eval").body
            except SyntaxError:
                continue
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                found = next((getattr(m, call.func.id) for m in modules if call.func.id in m.__all__), None)
                if found is not None:
                    yield pytest.param(call, found, id=f"{page_name(page)}: {code}")


@pytest.mark.parametrize("call, function", inline_calls())
def test_calls_in_the_text_have_arguments_that_exist(call, function):
    parameters = inspect.signature(function).parameters
    free = any(u.kind is u.VAR_KEYWORD for u in parameters.values())
    assert free or {keyword.arg for keyword in call.keywords} <= parameters.keys()


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


def test_every_example_is_shown_on_a_page():
    """A page takes in each script as it is: a link on a line of its own, whose text is the path."""
    text = "".join(map(markdown, PAGES))
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


@cache
def messages():
    """``(where, text)`` of every error the library raises, with … in place of what is filled in."""
    found = []
    for path in sorted((ROOT / "ahn_layers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in RAISED:
                text = text_of(node.args[0])
                if text.strip("… (:)") and not text.startswith("module "):
                    found.append((f"{path.name}:{node.lineno}", text))
    return found


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


QUALIFIED = {
    r"3\.3 to\s+3\.5 ms": r"graph",
    r"\b22\.(1|05) GB": r"unchunked",
    r"(?<![\d.])(86|74) ms\b": r"plain|full\s+attention",
}
"""A number or a claim, and what its paragraph has to say with it."""
UNTRUE = (r"one\s+changed\s+line", r"load as they are", r"kernels do\s+the forward pass\b", r"instead of 22\.1")


def paragraphs(page):
    """The paragraphs, lists and tables of a page."""
    return re.split(r"\n\s*\n|\n(?=- )", FENCE.sub("", markdown(page)))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_claims_say_what_they_are_for(page):
    for text in paragraphs(page):
        for claim, needed in QUALIFIED.items():
            assert not re.search(claim, text) or re.search(needed, text), text
        for claim in UNTRUE:
            assert not re.search(claim, text), text


def test_the_readme_has_one_command_for_the_tests():
    command = README.read_text().split("## Run the tests", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    assert len(command.strip().splitlines()) == 1 and command.strip().endswith("-m pytest -q -n auto")


def test_maths_becomes_mathml():
    pytest.importorskip("latex2mathml")
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    html = hook(r'<p><span class="arithmatex">\(a_t &lt; b\)</span></p><div class="arithmatex">\[\frac{a}{b}\]</div>')
    assert html.startswith('<p><span class="maths"><math') and html.endswith("</math></div>")
    assert "<mfrac>" in html and "arithmatex" not in html
    assert hook(r'<div class="arithmatex">\[a \qquad b\]</div>').count("<math") == 2, "a line may end at a wide space"


def test_the_search_leaves_out_whole_scripts():
    pytest.importorskip("latex2mathml")
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    assert "data-search-exclude" in hook('<details class="example"><summary>a script</summary></details>')
