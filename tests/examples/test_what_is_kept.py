"""The example that shows which tokens are kept: against ranks that are computed from the scores alone."""

import importlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ahn_layers import GatedDeltaNet, HippocampalCache, SalientSlots, retrofit, save_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW, SINKS, SLOTS, TOKENS = 20, 3, 6, 90
TEXT = 'if a < b && c > "d": <b>bold</b>\n\nnaïve 日本 \x1b[31m $rows </script>\n' + "The cat sat. " * 20


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("what_is_kept")


@pytest.fixture
def options(module, tmp_path):
    """A small model with two layers of two key/value heads, in a folder, and a text that it is to read."""
    chat = importlib.import_module("_chat")
    model, tokenizer = chat.random_model(LlamaConfig(**chat.SMALL, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return ["--model", "model", "--text", "text.txt", "--tokens", str(TOKENS), "--chunk", "17"]


@pytest.fixture
def small(options):
    return [*options, "--window", str(WINDOW), "--sinks", str(SINKS), "--slots", str(SLOTS)]


def load():
    return AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()


def load_tokenizer():
    return AutoTokenizer.from_pretrained("model")


def value_norms(ids):
    """The score of each token, read off the values while a model with the same slots runs token by token."""
    model = retrofit(
        load(), None, window_size=WINDOW, num_sinks=SINKS, eviction=SalientSlots(SLOTS, score="value_norm")
    )
    norms = {}
    for name, part in model.named_modules():
        if name.endswith("v_proj"):
            part.register_forward_hook(
                lambda _, __, out, name=name: norms.setdefault(name, []).append(out[0, 0].view(2, -1).norm(dim=1))
            )
    cache = HippocampalCache()
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            model(token, cache=cache, use_cache=True)
    return torch.stack([torch.stack(own, dim=1) for own in norms.values()])


def test_kept_are_the_evicted_tokens_of_highest_score(module, small, tmp_path):
    text = "".join(chr(33 + 37 * i % TOKENS) for i in range(TOKENS))  # no token twice: no equal scores
    (tmp_path / "text.txt").write_text(text)
    result = module.main(small)
    ids, _ = module.split_text(load_tokenizer(), text, TOKENS)
    assert len(set(ids)) == TOKENS
    norms = value_norms(torch.tensor([ids]))
    assert result["kept"].shape == norms.shape == (2, 2, TOKENS)
    for layer in range(2):
        for head in range(2):
            evicted = range(SINKS, TOKENS - WINDOW)
            best = sorted(evicted, key=lambda rank: (-norms[layer, head, rank], rank))[:SLOTS]
            assert result["kept"][layer, head].nonzero().flatten().tolist() == sorted(best)
            priority = result["priority"][layer, head]
            torch.testing.assert_close(priority[best], norms[layer, head, best])
            assert int(priority.isnan().sum()) == TOKENS - SLOTS
            order = result["found"].order[layer, head, best]
            torch.testing.assert_close(order, torch.arange(SLOTS, 0, -1) / SLOTS)


def test_share_and_marks(module, small):
    found = module.main(small)["found"]
    assert found.layers == [0, 1] and found.heads == [2, 2] and found.slots == [SLOTS, SLOTS]
    assert found.sinks.nonzero().flatten().tolist() == list(range(SINKS))
    assert found.recent.nonzero().flatten().tolist() == list(range(TOKENS - WINDOW, TOKENS))
    for rank, mark in enumerate(found.marks):
        number = int(found.kept[:, :, rank].sum())
        whole = "sinks" if rank < SINKS else "window" if rank >= TOKENS - WINDOW else None
        assert found.share[rank] == (1 if whole else number / 4)
        assert mark == (whole or {0: "", 1: "3", 2: "3", 3: "4", 4: "4"}[number])  # up to 50 %, up to 100 %
    assert {"", "3"} < set(found.marks)


def test_the_text_is_printed_with_marks(module, small, capsys):
    result = module.main(small)
    printed = capsys.readouterr().out
    assert result["text"] in printed and result["table"] in printed and "\x1b" not in printed
    assert "90 tokens read, 3 sinks, a window of 20, 6 slots in each of 4 key/value heads (2 layers)" in printed
    assert result["text"].startswith("[sinks|if ]") and result["text"].count("[window|") == 1
    assert re.sub(r"\[\w+\||\]", "", module.mark_text(result["found"], "x" * TOKENS)) == "x" * TOKENS
    lines = result["table"].splitlines()
    assert len(lines) == 2 + 4 and all(f"{SLOTS}/{SLOTS}" in line for line in lines[2:])
    ranks = result["kept"][1, 0].nonzero().flatten()
    best = result["pieces"][int(result["priority"][1, 0].nan_to_num(-1).argmax())]
    row = lines[4].split()
    assert row[:2] == ["1", "0"] and row[3] == str(int(ranks[0]))
    assert f"  {float((TOKENS - 1 - ranks).double().quantile(0.5)):,.0f}  {best!r}" in lines[4]


def test_colours(module, small):
    found = module.main(small)["found"]
    painted = module.mark_text(found, ["a\nb"] + ["c"] * (TOKENS - 1), color=True)
    assert painted.startswith("\x1b[30;48;5;151ma\x1b[0m\n\x1b[30;48;5;151mbcc\x1b[0m")
    text = re.sub(r"\x1b\[[\d;]+m", "", painted)
    assert text == "a\nb" + "c" * (TOKENS - 1)
    newlines = module.mark_text(found, ["\n"] * TOKENS)
    assert newlines.count("\\n") == int((found.kept.sum(dim=(0, 1)) > 0).sum())
    assert "sinks" in module.legend() and "\x1b[" in module.legend(color=True)


def test_pieces_add_up_to_the_text(module, options):
    tokenizer = load_tokenizer()
    ids, pieces = module.split_text(tokenizer, TEXT, 10_000)
    assert len(ids) == len(pieces) == len(TEXT.encode())  # one token per byte
    assert "".join(piece for piece in pieces if piece != "·") == TEXT
    start = len(TEXT[: TEXT.index("日")].encode())
    assert pieces[start : start + 6] == ["日", "·", "·", "本", "·", "·"]
    ids, pieces = module.split_text(tokenizer, "<s>ab", 2)
    assert (len(ids), pieces) == (2, ["<s>", "a"])


class Page(HTMLParser):
    """The tokens of a page with their titles, its options and its data."""

    def __init__(self, html):
        super().__init__()
        self.tokens, self.options, self.data, self.inside = [], 0, "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("id") in ("text", "rows"):
            self.inside = attributes["id"]
        elif tag == "span" and self.inside == "text":
            self.tokens.append([attributes["class"], attributes["title"], ""])
        else:
            assert self.inside != "text", f"the text has become markup: {tag}"
        self.options += tag == "option"

    def handle_endtag(self, tag):
        if tag in ("div", "script"):
            self.inside = None

    def handle_data(self, data):
        if self.inside == "text":
            self.tokens[-1][2] += data
        elif self.inside == "rows":
            self.data += data


def test_html(module, small, tmp_path):
    path = tmp_path / "new" / "kept.html"
    result = module.main([*small, "--html", str(path)])
    assert result["html"] == path
    html = path.read_text(encoding="utf-8")
    assert "&lt;" in html and "&amp;" in html and "\x1b" not in html and "http" not in html
    page, kept = Page(html), result["kept"]
    assert len(page.tokens) == TOKENS and page.options == 1 + 4
    shown = "".join(text for _, _, text in page.tokens).replace("↵", "").replace("·", "")
    assert shown == "".join(result["pieces"]).replace("·", "").replace("\x1b", "\ufffd")
    assert '< b && c > "d": <b>bold</b>' in shown and "</script>" in shown
    for rank, (kind, title, _) in enumerate(page.tokens):
        assert title.startswith(f"{result['pieces'][rank]!r}, rank {rank}\n")
        assert f"by {100 * float(result['found'].share[rank]):.1f} % of the heads" in title
        assert (kind == "slots") == bool(kept[:, :, rank].any())
        for layer, head in kept[:, :, rank].nonzero().tolist():
            (line,) = (line for line in title.splitlines() if line.startswith(f"layer {layer}: "))
            assert f"head {head} priority {float(result['priority'][layer, head, rank]):.4g}" in line
        assert title.count("priority") == int(kept[:, :, rank].sum())
    rows = json.loads(page.data)
    assert [sorted(map(int, row)) for row in rows] == [u.nonzero().flatten().tolist() for u in kept.flatten(0, 1)]
    assert all(0 < shade <= 0.8 for row in rows for shade in row.values())


def test_plot(module, small, tmp_path):
    path = tmp_path / "new" / "kept.png"
    assert module.main([*small, "--plot", str(path)])["plot"] == path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_slots_of_an_adapter(module, options, capsys):
    """An untrained learned score keeps the tokens right behind the window."""
    model = retrofit(load(), GatedDeltaNet, window_size=12, num_sinks=2, eviction={1: SalientSlots(5)})
    save_adapter(model, "adapter")
    found = module.main([*options, "--adapter", "adapter"])["found"]
    assert found.layers == [1] and found.window.capacity == 14
    for head in range(2):
        assert found.kept[0, head].nonzero().flatten().tolist() == list(range(TOKENS - 17, TOKENS - 12))
    assert "5 slots in each of 2 key/value heads (1 layer)" in capsys.readouterr().out


def test_padding_does_not_count(module, options):
    model = retrofit(load(), None, window_size=WINDOW, num_sinks=SINKS, eviction=SalientSlots(SLOTS, score="key_norm"))
    ids, pad = 2 + torch.randperm(198)[None, :60], 7  # no token twice: no equal scores
    alone = module.kept_tokens(module.read(model, ids, 60))
    cache, mask = HippocampalCache(), torch.ones(2, 60 + pad, dtype=torch.long)
    mask[1, :pad] = 0
    with torch.no_grad():
        both = torch.cat((torch.randint(2, 200, (1, 60 + pad)), torch.cat((ids[:, :pad], ids), dim=1)))
        model(both, attention_mask=mask, cache=cache, use_cache=True)
    padded = module.kept_tokens(cache, row=1)
    assert padded.seen == 60 and module.kept_tokens(cache).seen == 60 + pad
    assert torch.equal(padded.kept, alone.kept)


@pytest.mark.parametrize("tokens", [1, WINDOW + SINKS])
def test_nothing_evicted_yet(module, small, tokens, tmp_path, capsys):
    more = ["--tokens", str(tokens), "--html", "kept.html", "--plot", "kept.png"]
    result = module.main([*small, *more])
    assert "Nothing has been evicted yet: sinks and window hold 23 tokens" in capsys.readouterr().out
    assert not result["kept"].any() and result["found"].share.eq(1).all()
    assert (tmp_path / "kept.html").exists() and (tmp_path / "kept.png").exists()


def test_one_token_evicted(module, small, capsys):
    kept = module.main([*small, "--tokens", str(WINDOW + SINKS + 1)])["kept"]
    assert "Nothing has been evicted" not in capsys.readouterr().out
    assert kept[:, :, SINKS].all() and int(kept.sum()) == 4


@pytest.mark.parametrize("slots", [None, SalientSlots(4, score="recent")], ids=["no slots", "nothing read"])
def test_a_cache_without_kept_tokens(module, options, slots):
    model, cache = retrofit(load(), None, window_size=WINDOW, eviction=slots), HippocampalCache()
    if slots is None:
        cache = module.read(model, torch.randint(200, (1, 40)), 40)
    with pytest.raises(ValueError, match=r"no layer of this cache has slots.*eviction=SalientSlots"):
        module.kept_tokens(cache)


def test_an_adapter_without_slots(module, options):
    save_adapter(retrofit(load(), GatedDeltaNet, window_size=12), "adapter")
    with pytest.raises(SystemExit, match=r"what_is_kept: --adapter adapter: this memory has no slots.*--slots"):
        module.main([*options, "--adapter", "adapter"])


@pytest.mark.parametrize("more, message", [
    (["--adapter", "nowhere"], "--adapter nowhere: no such file or folder"),
    (["--text", "nothing.txt"], "nothing.txt"),
    (["--text", "empty.txt"], "--text empty.txt: expected at least 1 token"),
    (["--html", "model"], "model: is a folder"),
])  # fmt: skip
def test_what_is_wrong_is_said(module, options, more, message, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit, match=f"what_is_kept: .*{re.escape(message)}"):
        module.main([*options, *more])


def test_an_adapter_has_its_own_slots(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--adapter", "adapter", "--slots", "3"])
    assert "the adapter has its own" in capsys.readouterr().err
