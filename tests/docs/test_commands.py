"""Every command that README, documentation, cards and scripts show is one that works.

Each is taken apart: scripts parse their options, accelerate and pytest theirs, pip's extras and packages are those of
the project. What takes seconds is run as it stands, with small models of random weights.
"""

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
from functools import cache

import pytest
import torch

from ahn_layers import SalientSlots

from ..small_models import install
from .test_docs import FENCE, PAGES, ROOT, fences, markdown, page_name

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())
ADAPTERS = sorted(path.parent for path in EXAMPLES.glob("adapters/*/adapter.json"))
PROGRAMS = (
    "python",
    "python3",
    "pip",
    "pytest",
    "accelerate",
    "torchrun",
    "mkdocs",
    "git",
    "cd",
    ".",
    "ruff",
    "mypy",
    "lm_eval",
    "twine",
)
CHATS = re.compile(r"examples/(llama|qwen|mistral|gemma3)\.py")
CHEAP = re.compile(r"examples/(llama|qwen|mistral|gemma3|new_compressor)\.py|sessions\.py$|--output try_adapter")


def commands():
    """``(where, command)`` of each command shown anywhere, without comments and prompts."""
    found = []
    for page in [*PAGES, *EXAMPLES.glob("adapters/*/README.md")]:
        for line, code, _ in fences(page, "bash", "sh", "console", ""):
            found += [(f"{page_name(page)}:{line}", u) for u in lines_of(code)]
        for code in re.findall(r"(?<!`)`([^`\n]+)`", FENCE.sub("", markdown(page))):
            if code.split()[0] in PROGRAMS and " " in code:
                found += [(page_name(page), u) for u in lines_of(code)]
    for path in SCRIPTS:
        found += [(path.name, u) for u in lines_of(ast.get_docstring(ast.parse(path.read_text()))) if "examples/" in u]
    return [(where, command) for command, where in {u: where for where, u in reversed(found)}.items()]


def lines_of(text):
    """The commands of a block of lines, or of a docstring, in which they are indented."""
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        for command in line.split("&&"):
            words = re.sub(r"\s#.*", "", command).strip()
            program = words.split(" ")[0].rpartition("/")[2]
            if program in PROGRAMS and not words.endswith("."):
                yield words


COMMANDS = commands()


class Parsed(Exception):  # noqa: N818
    """A script has understood its command line."""


@pytest.fixture
def run(monkeypatch):
    """Run a script as a command does."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(script, arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return start


@pytest.fixture
def parse(run, monkeypatch):
    """Let a script parse its command line, and go no further; returns its parser."""
    usual = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        usual(self, args, namespace)
        raise Parsed(self)

    def only_parse(script, arguments):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patch.setattr(torch.cuda, "is_available", lambda: True)  # commands are for machines with a GPU too
            patch.setattr(torch.cuda, "device_count", lambda: 8)
            with pytest.raises(Parsed) as parsed:
                run(script, arguments)
        return parsed.value.args[0]

    return only_parse


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_help_of_a_script_explains_every_option_and_shows_its_default(path, run, monkeypatch):
    def parse_args(self, args=None, namespace=None):
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    try:
        run(str(path), [])
    except Parsed as parsed:
        made = parsed.args[0]
    formatter, lacking = made._get_formatter(), []
    for action in made._actions:
        text = formatter._expand_help(action) if action.help else ""
        shows = action.default in (None, [], argparse.SUPPRESS) or isinstance(action.default, bool) or "default" in text
        if action.help != argparse.SUPPRESS and not (text and shows):
            lacking.append((action.dest, text))
    assert not lacking


@cache
def requirements():
    """The extras of the project, and all requirements of theirs."""
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", text, re.DOTALL)[1]
    core = re.search(r"^dependencies = .*$", text, re.MULTILINE)[0]
    asked = [u for u in re.findall(r'"([^"]+)"', table + core) if not u.startswith("ahn-layers")]  # on no index
    return re.findall(r"^(\w+) = ", table, re.MULTILINE), asked


def check(command, parse):
    """Whether a command can work, as far as that shows without running it."""
    words = shlex.split(command)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:2] in (["python", "-m"], ["python3", "-m"]):
        words = words[2:]
    program, *rest = words
    if program == "python":
        assert (ROOT / rest[0]).is_file(), "no such script"
        parse(rest[0], rest[1:])
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        options = launch_command_parser().parse_args([u for u in rest[1:] if u != "..."])
        if "..." not in rest:
            parse(options.training_script, options.training_script_args)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        parse(options.training_script, options.training_script_args)
    elif program == "pip":
        extras, known = requirements()
        for word in (u for u in rest[1:] if not u.startswith("-")):
            extra = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
            if extra:
                assert set((extra[1] or extras[0]).split(",")) <= set(extras), f"no extra {word}"
            else:
                plain = {re.match(r"[\w-]+", u)[0] for u in known}
                assert word in known or word in plain or word.startswith("torch=="), "not what pyproject.toml asks for"
    elif program == "pytest":
        for word in (u for u in rest if u.endswith(".py")):
            assert (ROOT / word).is_file()
        if "-k" in rest:
            source = "".join((ROOT / u).read_text() for u in rest if u.endswith(".py"))
            assert set(re.findall(r"\w+", rest[rest.index("-k") + 1])) - {"and", "or", "not"} <= set(
                re.findall(r"[a-z]+|\w+", source)
            )
    elif program == "mkdocs":
        assert rest[0] in ("serve", "build")
    elif program in ("ruff", "mypy"):
        assert rest in {"ruff": (["check", "."], ["format", "--check", "."]), "mypy": ([],)}[program]
    elif program in ("build", "twine"):
        assert rest[0] in {"build": ("--no-isolation",), "twine": ("check", "upload")}[program]
    elif program == "lm_eval":
        from lm_eval._cli.harness import HarnessCLI

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *rest])
            assert HarnessCLI().parse_args().func
    elif program.startswith("tests."):
        module = ROOT / f"{program.replace('.', '/')}.py"
        assert module.is_file(), "no such module"
        assert all(f'"{word}"' in module.read_text() for word in rest if word.startswith("--")), "no such option"
    else:
        known = (["git", "clone"], ["cd", "ahn_layers"], [".", ".venv/bin/activate"], ["venv", ".venv"])
        assert any(words[: len(start)] == start for start in known), "an unknown command"


@pytest.mark.parametrize("where, command", COMMANDS, ids=lambda u: u)
def test_a_command_is_understood(where, command, parse):
    check(command, parse)


def test_commands_are_found():
    """In fences, in the text, over several lines, in docstrings."""
    found = dict.fromkeys(command for _, command in COMMANDS)
    assert any("accelerate launch" in u for u in found) and any(u.startswith("pip install") for u in found)
    assert any("--adapter examples/adapters" in u and "--document book.txt" in u for u in found)
    for script in SCRIPTS:
        assert any(f"python examples/{script.name}" in u for u in found), script.name


@pytest.mark.parametrize("wrong", [
    "python examples/llama.py --no-such-option", "python examples/nothing.py", "pip install '.[nothing]'",
    "pip install 'ahn-layers[examples]'", "pytest tests/test_nothing.py", "python examples/train.py --text a",
    "python examples/quickstart.py --tokens many", "pip install 'peft>=99'", "pytest tests/ops/test_ops.py -k not_said",
])  # fmt: skip
def test_a_wrong_command_would_be_noticed(wrong, parse):
    with pytest.raises((AssertionError, SystemExit)):
        check(wrong, parse)


@pytest.mark.parametrize(
    "command", sorted({u for _, u in COMMANDS if u.startswith("python ") and CHEAP.search(u)}), ids=lambda u: u
)
def test_a_cheap_command_runs_as_it_is_written(command, run, tmp_path, monkeypatch, capsys, unchecked):
    words = shlex.split(command)[1:]
    monkeypatch.syspath_prepend(EXAMPLES)
    install(monkeypatch, tmp_path, fits_shipped_adapters="examples/adapters" in command)
    typed = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    if CHATS.match(words[0]) and "--max-new-tokens" not in words:
        words += ["--max-new-tokens", "3"]
    run(words[0], words[1:])
    printed = capsys.readouterr().out
    if CHATS.match(words[0]):
        assert "tokens, cache" in printed
        assert ("the memory is untrained" in printed) != ("--adapter" in words)


@pytest.mark.parametrize("options", [[], ["--window", "60", "--sinks", "4"], ["--sinks", "8"]], ids=" ".join)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.name)
def test_a_chat_takes_the_shipped_adapters(adapter, options, run, tmp_path, monkeypatch, capsys, unchecked):
    monkeypatch.syspath_prepend(EXAMPLES)
    install(monkeypatch, tmp_path, fits_shipped_adapters=True)
    import _chat

    given = {}
    monkeypatch.setattr(_chat.Chat, "__init__", lambda self, model, *_: given.update(model=model))
    monkeypatch.setattr(_chat.Chat, "say", lambda self, *_: "")
    monkeypatch.setattr(_chat.Chat, "figures", lambda self: "")
    run("examples/llama.py", ["--adapter", f"examples/adapters/{adapter.name}", "--prompt", "Hello", *options])
    record = given["model"].hippocampus
    wanted = dict(zip(options[::2], map(int, options[1::2]), strict=True))
    described = json.loads((adapter / "adapter.json").read_text())
    assert record.window.window_size == wanted.get("--window", described["window_size"])
    assert record.window.num_sinks == wanted.get("--sinks", 32)
    assert record.options == ({"shared_state": True} if "shared" in adapter.name else {})
    assert record.memory_positions == described["memory_positions"]
    slots = [module for module in given["model"].modules() if isinstance(module, SalientSlots)]
    assert len(slots) == (30 if described.get("evictions") else 0)


@pytest.mark.parametrize("options, message", [
    (["--adapter", "nowhere"], "--adapter nowhere: no such file or folder"),
    (["--adapter", "examples/adapters/smollm2-135m-instruct-gdn", "--compressor", "Mamba2"], "Leave --compressor out"),
    (["--document", "nothing.txt"], "nothing.txt"),
    (["--model", "qwen", "--adapter", "examples/adapters/smollm2-135m-instruct-gdn"], "for another base model"),
])  # fmt: skip
def test_a_chat_says_what_is_wrong(options, message, run, tmp_path, monkeypatch, unchecked):
    monkeypatch.syspath_prepend(EXAMPLES)
    install(monkeypatch, tmp_path, fits_shipped_adapters=True)
    with pytest.raises(SystemExit, match=re.escape(message)):
        run("examples/llama.py", ["--prompt", "Hello", *options])


def options_in_the_text(page):
    """The options that the text of a page names, commands aside."""
    text = FENCE.sub("", markdown(page))
    if page.name == "migration.md":  # the left column of its table has those of other code
        text = "".join(re.findall(r"\|[^|\n]*\|([^|\n]*)\|", text))
    code = " ".join(re.findall(r"(?<!`)`([^`\n]+)`", text))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))


@pytest.mark.parametrize("page", [page for page in PAGES if options_in_the_text(page)], ids=page_name)
def test_options_in_the_text_exist(page, parse):
    """They are options of the scripts that the page speaks of."""
    known = {"--strict", "--multi_gpu", "--num_processes", "--config_file", "--metadata"}  # mkdocs, accelerate, lm_eval
    required = {
        "compare_compressors.py": ["--output", "o"],
        "evaluate.py": ["--adapter", "a", "--output", "o"],
        "paper.py": ["--output", "o"],
        "train.py": ["--text", "a", "--output", "o"],
    }
    for path in SCRIPTS:
        if path.name in markdown(page):
            parser = parse(f"examples/{path.name}", required.get(path.name, []))
            known |= set(parser._option_string_actions)
    assert options_in_the_text(page) <= known


def test_the_file_for_fsdp_is_one_that_accelerate_reads(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    ((_, code, _),) = fences(ROOT / "docs" / "guides" / "several-gpus.md", "yaml")
    (tmp_path / "fsdp.yaml").write_text(code)
    assert load_config_from_file(str(tmp_path / "fsdp.yaml")).num_processes == 2


def test_the_extra_for_the_examples_has_what_they_import():
    text = (ROOT / "pyproject.toml").read_text()
    extras = {name: set(re.findall(r'"([\w-]+)', re.search(rf"^{name} = \[.*?\]\n", text, re.MULTILINE | re.DOTALL)[0]))
              for name in ("dependencies", "transformers", "examples", "serving", "ray", "paper")}  # fmt: skip
    brought = {"tokenizers", "huggingface_hub", "pydantic", "starlette"}  # by transformers, by fastapi
    brought |= {"bitsandbytes"}  # for one option, which says so
    available = set().union(*extras.values(), brought, sys.stdlib_module_names, {"ahn_layers"})
    available |= {name.replace("-", "_") for name in available}
    for path in EXAMPLES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [u.name for u in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in (u.partition(".")[0] for u in names):
                own = (EXAMPLES / f"{name}.py").exists() or (EXAMPLES / name / "__init__.py").exists()
                assert name in available or own, f"{path.name} imports {name}"


def test_no_advice_to_install_from_an_index_that_does_not_have_the_package():
    sources = [u for folder in ("ahn_layers", "examples", "docs") for u in (ROOT / folder).rglob("*.*") if u.is_file()]
    for path in [ROOT / "README.md", *(u for u in sources if u.suffix in (".py", ".md"))]:
        assert not re.search(r"install[^\n]*\bahn[-_]layers\b(?!\.git)", path.read_text()), path
