"""The search of the site finds what users type: the theme's own script, run by Node on the built index."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no Node here")

TYPED = {
    "vLLM": "faq/",
    "quantization": "guides/quantization/",
    "quantized": "guides/quantization/",
    "bitsandbytes": "guides/quantization/",
    "4-bit": "guides/quantization/",
    "OpenAI": "guides/serving/",
    "nanoGPT": "faq/",
    "publishing": "faq/",
    "hub": "faq/",
    "PEFT": "guides/peft/",
    "LoRA": "guides/peft/",
    "24 GB": "faq/",
    "kv cache": "faq/",
    "context length": "faq/",
    "attention sink": "faq/",
    "StreamingLLM": "comparison/",
    "H2O": "faq/",
    "RAG": "faq/",
    "FlashAttention": "faq/",
    "fine-tuning": "faq/",
    "Windows": "faq/",
    "out of memory": "faq/",
    "slot": "guides/recall/",
    "evicted": "guides/eviction/",
    "pad": "guides/batches/",
    "window_size": "guides/retrofit/",
    "torch.compile": "guides/integrations/",
    "save_pretrained": "guides/sessions/",
    "FSDP": "guides/several-gpus/",
    "needle in a haystack": "faq/",
    "GatedDeltaNet": "reference/compressors/",
    "benchmark": "benchmarks/",
    "OOM": "faq/",
    "Ollama": "faq/",
    "MPS": "faq/",
    "Mac": "faq/",
    "multi-turn": "faq/",
    "streaming": "faq/",
    "flash attention": "faq/",
    "long document": "guides/long-document/",
    "summarize": "guides/long-document/",
    "throughput": "faq/",
    "perplexity": "faq/",
    "cost of training": "guides/training/",
    "multimodal": "faq/",
    "classification": "faq/",
    "agent": "faq/",
    "VRAM": "guides/walkthroughs/",
    "RTX 4090": "faq/",
    "finetuning": "faq/",
    "RNN": "faq/",
    "passkey": "faq/",
    "requirements": "faq/",
    "Docker": "faq/",
    "tutorial": "guides/walkthroughs/",
    "getting started": "faq/",
    "how does it work": "faq/",
    "hallucination": "faq/",
    "privacy": "faq/",
    "GQA": "faq/",
    "MLA": "faq/",
    "ALiBi": "faq/",
    "VLM": "faq/",
    "WSL": "faq/",
    "bibtex": "citation/",
    "Llama 3": "faq/",
    "torchao": "guides/quantization/",
}
"""What a user types, and a page that has the answer."""
SHOWN = 5
"""Pages that are seen before a user scrolls."""


def ask(site, queries):
    """The pages that are found for each query, best first."""
    (worker,) = site.glob("assets/javascripts/workers/search.*.min.js")
    files = [worker, site / "search" / "search_index.json", site / "assets" / "stems.js"]
    script = Path(__file__).with_name("search.js")
    done = subprocess.run(
        ["node", str(script), *map(str, files)], input=json.dumps(queries), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [[group[0].partition("#")[0] for group in found] for found in json.loads(done.stdout)]


def test_the_search_finds_what_users_type(site):
    found = dict(zip(TYPED, ask(site, list(TYPED)), strict=True))
    missed = {query: found[query][:SHOWN] for query, page in TYPED.items() if page not in found[query][:SHOWN]}
    assert len(missed) <= len(TYPED) // 10, missed


def test_words_are_found_beside_punctuation_and_in_other_forms(site):
    plain = ["bitsandbytes", "slots", "key value", "eviction"]
    other = ["bitsandbytes,", "slot", "key/value", "evicts"]
    for one, two in zip(ask(site, plain), ask(site, other), strict=True):
        assert one and set(one[:3]) & set(two[:SHOWN])
    assert ask(site, ["zebra"]) == [[]]


def test_no_number_makes_a_query_fail(site):
    """The search confuses numbers where it takes them as beginnings of words."""
    queries = ["Llama 3", "Llama-3", "Qwen 2.5", "4-bit", *(f"tokens {number}" for number in range(100))]
    assert [query for query, found in zip(queries, ask(site, queries), strict=True) if not found] == []
