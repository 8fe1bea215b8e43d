"""What the README says of itself: its first example, its figure, its numbers, its shape on a package index."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from ahn_layers import GatedDeltaNet, memory_report, retrofit
from ahn_layers.cost import Sizes

from .test_docs import README, ROOT

TEXT = README.read_text()
CACHED = Path.home() / ".cache" / "ahn_layers" / "SmolLM2-135M-Instruct-Q4_1"
"""SmolLM2 as the examples convert it, where they have run."""


def section(title):
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.skipif(not CACHED.exists(), reason="the quickstart has not run here, which brings SmolLM2")
def test_the_example_prints_what_it_says(monkeypatch, capsys):
    """The answer in every word; what the window alone makes up depends on Python's manual."""
    code, output = re.findall(r"```(?:python|text)\n(.*?)```", section("In a few lines"), re.DOTALL)
    assert "not run:" in section("In a few lines"), "this test runs it, test_docs.py does not"
    monkeypatch.chdir(ROOT)
    exec(compile(code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', f'"{CACHED}"'), "README.md", "exec"), {})
    printed, said = (u.splitlines() for u in (capsys.readouterr().out, output))
    assert len(printed) == len(said) == 2
    assert all(re.fullmatch(r"1,\d\d\d tokens, 512 kept: 71432", lines[0]) for lines in (printed, said))
    assert all("window alone:" in lines[1] and "71432" not in lines[1] for lines in (printed, said))


SHAPES = {
    "Llama-3.1-8B": Sizes(32, 4096, 32, 8, 128, 64, 128),
    "Qwen2.5-3B": Sizes(36, 2048, 16, 2, 128, 64, 128),
}
"""As far as a cache can tell: MLP and vocabulary are small."""


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_table_is_what_memory_report_prints(name):
    from transformers import AutoModelForCausalLM, LlamaConfig

    (row,) = re.findall(rf"^\| {re.escape(name)} .*$", TEXT, re.MULTILINE)
    said = [float(u) for u in re.findall(r"([\d.]+) GB", row)]
    found, sizes = [], SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=sizes.hidden_size, num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
    )  # fmt: skip
    for window in (32_640, 8_064):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        report = memory_report(retrofit(model, GatedDeltaNet, window_size=window, num_sinks=128))
        found.append(sizes.num_layers * int(report.split()[-1].replace(",", "")) / 1e9)
    full = 131_072 * sizes.num_layers * sizes.num_kv_heads * 2 * sizes.head_dim * 2 / 1e9
    assert said == [pytest.approx(u, rel=0.005) for u in (full, *found)]


def test_the_figure_shows_the_table_of_the_guide():
    """Numbers are read from the table and nowhere else."""
    pytest.importorskip("matplotlib")
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    cells = figures["recall_table"]((ROOT / "docs" / "guides" / "recall.md").read_text())
    assert len(cells) == 12 and [u.kept for u in cells[:3]] == [4096, 512, 512]
    memory = [u.answers for u in cells if u.arm == "slots + GatedDeltaNet"]
    assert memory == [
        ((120, 120), (104, 120), (120, 120)), ((100, 100), (88, 100), (100, 100)),
        ((24, 24), (19, 24), (24, 24)), ((24, 24), (20, 24), (24, 24)),
    ]  # fmt: skip
    (alt,) = re.findall(r"!\[([^\]]*)\]\(docs/assets/recall.png\)", TEXT)
    shares = {f"{u.share:.0f}" for u in cells}
    said = {u for pair in re.findall(r"(?:(\d\d) and )?(\d\d) percent", alt) for u in pair if u}
    assert said == {"96", "78", "70", "93", "94"} <= shares
    for arm, sizes in figures["HELD_BYTES"].items():
        assert sizes == held(arm), arm


def held(arm):
    """Bytes of SmolLM2's cache in bfloat16, for 512 tokens kept."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ahn_layers import SalientSlots

    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 8}
    plain = LlamaConfig(num_hidden_layers=30, vocab_size=8, **sizes)
    model = AutoModelForCausalLM.from_config(plain, dtype=torch.bfloat16)
    if arm == "sinks + window":
        retrofit(model, None, window_size=480, num_sinks=32)
    else:
        slots = {layer: SalientSlots(1728) for layer in (17, 18, 20, 21, 23)}
        retrofit(model, GatedDeltaNet, window_size=192, num_sinks=32, eviction=slots)
    return int(memory_report(model).split()[-1].replace(",", ""))


def test_both_commands_say_how_long_they_take_and_what_they_bring():
    for title in ("Run the quickstart", "Run the tests"):
        assert re.search(r"minutes.*\d GB", section(title), re.DOTALL), title


def test_links_have_the_one_form_that_the_build_for_an_index_rewrites():
    """``[text](path)`` and ``![text](path)``: neither HTML nor references nor titles."""
    prose = re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->", "", TEXT, flags=re.DOTALL)
    assert not re.search(r"<[a-z/]", prose) and not re.search(r"^ *\[[^\]]+\]: |\]\[", prose, re.MULTILINE)
    assert all(re.fullmatch(r"[^\s\"']+", target) for target in re.findall(r"\]\(([^)]*)\)", prose))
