"""The evaluation: needles lie where they are said to, arms differ where they must, lm_eval runs unchanged."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ahn_layers import (
    GatedDeltaNet,
    HippocampalAttention,
    SalientSlots,
    adapter_parameters,
    retrofit,
    save_adapter,
)
from ahn_layers.distillation import arm_losses, use_window
from ahn_layers.distillation.trainer import standard_error

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("matplotlib")

import arms  # noqa: E402
import evaluate  # noqa: E402
import gap  # noqa: E402
import needles  # noqa: E402
import quickstart  # noqa: E402
import texts  # noqa: E402
import train  # noqa: E402


def tokenizer():
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=alphabet[0], pad_token=alphabet[0])


def base(length=4096):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def small(window_size=24, num_sinks=8, compressor=GatedDeltaNet, eviction=None):
    model = retrofit(base(), compressor, window_size=window_size, num_sinks=num_sinks, eviction=eviction).eval()
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, an adapter and a text on disk."""
    root = tmp_path_factory.mktemp("evaluate")
    base().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    save_adapter(small(), root / "adapter")
    save_adapter(small(eviction=SalientSlots(16)), root / "slots")
    save_adapter(small(compressor=None, eviction=SalientSlots(16)), root / "slots alone")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return root


@pytest.mark.parametrize("task", sorted(needles.TASKS))
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_needles_lie_where_they_are_said_to(task, depth):
    encode = tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 40)
    example = needles.make(task, encode, haystack, 900, depth, random.Random(3))
    assert len(example.prompt) == 900
    text = tokenizer().decode(example.prompt)
    positions = [needle.position for needle in example.needles]
    assert positions == sorted(positions)
    for needle in example.needles:
        answer = tokenizer().decode(needle.answer).strip(', "')
        if needle.position == needle.end:  # the text as a whole decides
            assert text.count(answer) > 5
            continue
        hidden = tokenizer().decode(example.prompt[needle.position : needle.end])
        assert answer in hidden
        most = 3 if task == "RULER variable tracking" else 2
        assert (
            text.count(answer) <= most or task == "facts"
        )  # the pass key is said twice, nothing gives it away elsewhere
    if depth == 0.0:
        several = ("RULER multi-key", "RULER multi-value", "key-value", "facts")
        assert min(positions) == 0 or task in (*several, "RULER common words")


def made(task, seed=0, length=2400, **options):
    """An example and its prompt as text."""
    example = needles.make(task, tokenizer().encode, [32] * length, length, 0.5, random.Random(seed), **options)
    return example, tokenizer().decode(example.prompt)


@pytest.mark.parametrize("task", ["RULER multi-key 2", "RULER multi-key 3"])
@pytest.mark.parametrize("seed", range(5))
def test_a_haystack_of_needles_has_one_that_is_asked_for(task, seed):
    example, text = made(task, seed)
    stated = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)
    asked = re.search(r"special magic (?:number|uuid) for (\S+) mentioned", text)[1]
    assert len(stated) > 20 and len({key for key, _ in stated}) == len(stated)
    assert dict(stated)[asked] == tokenizer().decode(example.needles[0].answer).strip()
    assert text.count("One of") in (len(stated), len(stated) + 1)  # all whole, but for the first


@pytest.mark.parametrize("seed", range(5))
def test_the_words_that_are_asked_for_are_the_most_frequent(seed):
    for task, pattern, several in (("RULER common words", r"\d\. (\w+)", 1), ("RULER frequent words", r" (\w{6})", 3)):
        example, text = made(task, seed)
        found = Counter(re.findall(pattern, text.rpartition("\n")[0])).most_common(several + 1)
        answers = [tokenizer().decode(needle.answer).strip(" ,") for needle in example.needles]
        assert answers == [word for word, _ in found[:several]] and found[several - 1][1] > 1.5 * found[several][1]
        assert {needle.place(2400, 24, 8) for needle in example.needles} == {"the whole text"}


@pytest.mark.parametrize("recent", [0, 400])
@pytest.mark.parametrize("task", ["RULER multi-query", "RULER variable tracking"])
def test_parts_that_are_asked_for_in_turn(task, recent):
    for seed in range(5):
        example, text = made(task, seed, recent=recent)
        written = [tokenizer().decode(needle.answer).strip(" ,") for needle in example.needles]
        if task == "RULER multi-query":
            keys = re.search(r"for (\w+), (\w+) and (\w+) mentioned", text).groups()
            assert written == [re.search(rf"numbers for {key} is: (\d+)", text)[1] for key in keys]
        else:
            value = re.search(r"assigned the value (\d+)", text)[1]
            chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", text)
            assert written == [name for name, _ in chain]
            assert [given for _, given in chain] == [value, *written[:-1]]
        assert min(needle.position for needle in example.needles) >= (1700 if recent else 1000)


@pytest.mark.parametrize(
    "right, of, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_wilson(right, of, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, for the last."""
    assert needles.wilson(right, of) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("position", "end", "place"),
    [
        (0, 8, "sink"),
        (0, 9, "edge of the sinks"),
        (7, 990, "edge of the sinks"),
        (8, 9, "evicted, up to 2,048 back"),
        (464, 474, "evicted, up to 512 back"),
        (940, 960, "evicted, up to 512 back"),
        (960, 976, "evicted, up to 512 back"),
        (960, 977, "edge of the window"),
        (300, 310, "evicted, up to 2,048 back"),
        (975, 990, "edge of the window"),
        (976, 990, "window"),
    ],
)
def test_places(position, end, place):
    assert needles.Needle(position, end, [1]).place(1000, 24, 8) == place
    assert needles.Needle(20, 30, [1]).place(100_000, 24, 8) == "evicted, further back"
    assert needles.Needle(5, 12, [1]).place(32, 24, 8) == "window"  # all of it in sinks and window
    assert needles.Needle(5, 12, [1]).place(33, 24, 8) == "edge of the sinks"


@pytest.mark.parametrize("task", sorted(needles.TASKS.keys() - {"RULER common words", "RULER frequent words"}))
@pytest.mark.parametrize("depth", [0.0, 0.7, 1.0])
def test_needles_that_are_all_evicted(task, depth):
    encode = tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 60)
    for seed in range(5):
        rng = random.Random(seed)
        example = needles.make(task, encode, haystack, 1400, depth, rng, evicted=(150, 8), begin=[1, 2])
        assert example.prompt[:2] == [1, 2] and len(example.prompt) == 1400
        places = {needle.place(1400, 150, 8) for needle in example.needles}
        # sentences that fill a text begin where they begin
        most = {"edge of the sinks", "sink"} if task in needles.HAYSTACKS and depth == 0.0 else set()
        assert {place for place in places - most if not place.startswith("evicted")} == set()
        with pytest.raises(ValueError, match="does not fit"):
            needles.make(task, encode, haystack, 300, depth, rng, evicted=(290, 8))


def test_prompts_side_by_side_are_scored_as_alone():
    model, encode = small(), tokenizer().encode
    haystack = encode("lorem ipsum dolor sit amet " * 20)
    tasks = ("pass key", "RULER multi-value", "facts")
    examples = [needles.make(task, encode, haystack, 300, 0.4, random.Random(1)) for task in tasks]
    for own, example in zip(needles.score_all(model, examples, 70), examples, strict=True):
        for together, alone in zip(own, needles.score(model, example, 300), strict=True):
            assert together.loss == pytest.approx(alone.loss, rel=1e-4) and together.answer == alone.answer
    examples[0].prompt.pop()
    with pytest.raises(ValueError, match=r"prompts of \[299, 300\] tokens"):
        needles.score_all(model, examples, 70)


def test_a_needle_can_be_put_into_the_window():
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 200)
    for seed in range(10):
        example = needles.make("pass key", encode, haystack, 800, 0.0, random.Random(seed), recent=200)
        assert example.needles[0].position >= 800 - 200 - 100
    with pytest.raises(ValueError, match="does not fit"):
        needles.make("pass key", encode, haystack, 30, 0.0, random.Random(0))


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_scores_are_those_of_greedy_decoding(chunk):
    model = small()
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 40)
    example = needles.make("RULER multi-value", encode, haystack, 400, 0.3, random.Random(0))
    answer = [token for needle in example.needles for token in needle.answer]
    with torch.no_grad():
        logits = model(torch.tensor([example.prompt + answer[:-1]])).logits[0, -len(answer) :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    scored = needles.score(model, example, chunk)
    total = sum(needle.loss * len(needle.answer) for needle in scored) / len(answer)
    assert total == pytest.approx(float(expected), rel=1e-4)
    written = model.generate(torch.tensor([example.prompt]), max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    example.needles = [needles.Needle(0, 5, written), needles.Needle(9, 15, [(written[0] + 1) % 256])]
    assert [needle.correct for needle in needles.score(model, example, chunk)] == [True, False]


def test_a_needle_outside_the_window_cannot_reach_it():
    model = small()
    encode, haystack = tokenizer().encode, tokenizer().encode("lorem ipsum " * 60)
    pair = [needles.make("pass key", encode, haystack, 500, 0.3, random.Random(seed)) for seed in (0, 1)]
    pair[1].needles[0].answer = pair[0].needles[0].answer
    losses = {}
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            losses[arm] = [needles.score(model, example, 64)[0].loss for example in pair]
    # two layers hand on what lies up to two windows back, the needle lies farther
    assert losses["window"][0] == pytest.approx(losses["window"][1], abs=1e-6)
    assert abs(losses["full"][0] - losses["full"][1]) > 1e-6 and abs(losses["memory"][0] - losses["memory"][1]) > 1e-6


def test_each_text_reads_the_memory_of_the_other():
    model = small()
    memory = next(m.memory.compressor for m in model.modules() if isinstance(m, HippocampalAttention))
    sizes = ((memory.num_heads, 9, memory.head_dim), (memory.num_kv_heads, 9, memory.head_dim))
    (q, k), v = (torch.randn(2, *size) for size in sizes), torch.randn(2, memory.num_kv_heads, 9, memory.value_dim)
    gates, state = memory.gates(torch.randn(2, 9, memory.hidden_size)), memory.init_state(2, q)
    turned = {name: gate.flip(0) for name, gate in gates.items()}
    expected, other = memory.scan(state, q, k.flip(0), v.flip(0), turned)
    with gap.swapped_memories(model):
        found, after = memory.scan(state, q, k, v, gates)
    torch.testing.assert_close((found, after), (expected, other.flip(0)))
    assert not torch.allclose(found, memory.scan(state, q, k, v, gates)[0])


def test_evaluate_writes_table_json_and_picture(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "300", "--chunk", "50", "--stretches", "3", "--length", "200", "--start", "40", "--needles", "1",
        "--needle-length", "420", "--capacities", "24+8", "56+8", "--sink-positions", "trained", "absolute",
        "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()).keys() == results.keys()
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert "bytes" not in results and "spans" not in results
    assert set(results["gap"]) == {"24+8", "56+8"} and set(results["needles"]) == set(needles.TASKS)
    for cell in results["gap"].values():
        assert cell["another_text"] != cell["memory"] and len(cell["by_text"]["another_text"]) == len(
            cell["by_text"]["memory"]
        )
        closed = (cell["window"] - cell["memory"]) / (cell["window"] - cell["full"])
        assert cell["gap_closed"] == (pytest.approx(closed) if cell["verdict"] == "significant" else None)
    assert len(results["tables"]) == 4 and "evicted" in results["tables"][2]
    streamed = results["streaming"]
    assert streamed["memory"]["cache_bytes"][-1] == streamed["memory"]["cache_bytes"][-2]  # constant once it is full
    assert streamed["full attention"]["cache_bytes"][-1] > streamed["full attention"]["cache_bytes"][-2]


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def held_by(model):
    """What a store is made of, by layer."""
    return [(store.window, store.eviction, store.compressor) for store in arms.stores_of(model)]


def test_the_arms_of_a_model():
    three = ("full", "window", "memory")
    assert arms.arms_of(small()) == arms.arms_of(small(compressor=None, eviction=SalientSlots(16))) == three
    assert arms.arms_of(small(eviction=SalientSlots(0))) == three
    model = small(eviction=SalientSlots(16))
    assert arms.arms_of(model) == ("full", "window", "compressor", "slots", "memory")
    with arms.use_arm(model, "slots"), pytest.raises(ValueError, match="expected one of full, window"):
        arms.use_arm(model, "sinks").__enter__()
    with pytest.raises(ValueError, match="has no memory"):
        arms.use_arm(base(), "full").__enter__()


@pytest.mark.parametrize("window", [None, (12, 4)])
def test_arms_without_slots_have_windows_as_long_as_window_and_slots(window):
    """They are models that were retrofitted as such, with the same weights."""
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (2, 150))
    size, sinks = window or (24, 8)
    others = {
        "window": retrofit(base(), None, window_size=size + 16, num_sinks=sinks),
        "compressor": retrofit(base(), GatedDeltaNet, window_size=size + 16, num_sinks=sinks),
        "slots": retrofit(base(), None, window_size=size, num_sinks=sinks, eviction=SalientSlots(16)),
        "memory": retrofit(base(), GatedDeltaNet, window_size=size, num_sinks=sinks, eviction=SalientSlots(16)),
        "full": base(),
    }
    found = {}
    for arm, other in others.items():
        other.eval().load_state_dict({name: u for name, u in model.state_dict().items() if name in other.state_dict()})
        with arms.use_arm(model, arm, window):
            found[arm] = logits_of(model, ids)
            assert arms.slots_of(model) == (0 if arm == "compressor" else 16)
        torch.testing.assert_close(found[arm], logits_of(other, ids), rtol=1e-4, atol=1e-5)
    for arm in ("window", "compressor", "slots"):
        assert (found[arm] - found["memory"]).abs().max() > 1e-4
    assert (found["window"] - found["slots"]).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ["full", "window", "compressor", "slots", "memory"])
def test_an_arm_puts_everything_back(arm):
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (1, 90))
    before, names, expected = held_by(model), list(model.state_dict()), logits_of(model, ids)

    def fail():
        assert held_by(model) != before
        return logits_of(model, ids)[9]

    with pytest.raises(IndexError), arms.use_arm(model, arm, (12, 4)):
        fail()
    with pytest.raises(ValueError, match="window_size=-"), arms.use_arm(model, arm, (-99, 4)):
        pass
    assert held_by(model) == before and list(model.state_dict()) == names
    assert torch.equal(logits_of(model, ids), expected)


def test_slots_by_scores_without_training():
    ids = torch.randint(1, 256, (1, 120))
    for score in ("value_norm", "key_difference"):
        own = retrofit(base(), None, window_size=24, num_sinks=8, eviction=SalientSlots(16, score=score))
        model = small(eviction=SalientSlots(16))
        with arms.use_arm(model, score):
            torch.testing.assert_close(logits_of(model, ids), logits_of(own, ids))
        with pytest.raises(ValueError, match="a score for slots"), arms.use_arm(small(), score):
            pass


def test_layers_keep_windows_of_their_own():
    model = retrofit(base(), None, window_size={0: 24, 1: 12}, num_sinks=8)
    with arms.use_arm(model, "window"):
        assert [store.window.window_size for store in arms.stores_of(model)] == [24, 12]
    with pytest.raises(ValueError, match="the layers have different windows"):
        arms.own_window(model)


def test_layers_may_have_different_numbers_of_slots():
    model = small(eviction={0: SalientSlots(16), 1: SalientSlots(4)})
    with arms.use_arm(model, "window"):
        assert [store.window.window_size for store in arms.stores_of(model)] == [40, 28]
        example, _ = made("pass key", length=300)
        chunks = [needles.score(model, example, size)[0].loss for size in (37, 1000)]
    assert chunks[0] == pytest.approx(chunks[1], rel=1e-4)
    assert arms.equal_window(model, (24, 8)) == (40, 8)


def test_bytes_of_the_arms():
    """Those of caches that have read more than they hold."""
    model, ids = small(eviction=SalientSlots(16)), torch.randint(1, 256, (1, 201))
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            reading, _ = quickstart.read(model, ids, 50, arm)
        assert arms.arm_bytes(model, arm, (24, 8), 200) == reading.cache_bytes[-1], arm


@pytest.mark.parametrize("compressor", [None, GatedDeltaNet])
def test_each_text_reads_the_slots_of_the_other(compressor):
    model, ids = small(compressor=compressor, eviction=SalientSlots(16)), torch.randint(1, 256, (2, 120))
    alone, twice = logits_of(model, ids), logits_of(model, ids[:1].expand(2, -1))
    with gap.swapped_memories(model):
        assert (logits_of(model, ids) - alone).abs().max() > 1e-4
        torch.testing.assert_close(logits_of(model, ids[:1].expand(2, -1)), twice)  # its own, from the other row
        assert torch.equal(logits_of(model, ids)[:, :32], alone[:, :32])  # before anything is evicted
    assert torch.equal(logits_of(model, ids), alone)


@pytest.mark.parametrize("eviction", [None, SalientSlots(16)])
def test_losses_of_a_span_that_comes_again(eviction):
    model, text, rng = small(eviction=eviction), torch.randint(1, 256, (900,)), random.Random(0)
    found = gap.span_losses(model, text, 600, random.Random(0), (24, 8))
    begin, more = rng.randrange(301), 16 if eviction else 0
    place = begin + rng.randint(8, 600 - 2 * gap.SEGMENT - 32 - more)
    assert place + gap.SEGMENT + 32 + more <= begin + 600 - gap.SEGMENT
    ids = torch.cat((text[begin : begin + 600 - gap.SEGMENT], text[place : place + gap.SEGMENT]))[None]
    assert ids.shape == (1, 600) and list(found) == list(arms.arms_of(model))
    with use_window(model, 24 + more, 8):
        expected = arm_losses(model, ids, start=600 - gap.SEGMENT, arms=["full", "window"])
    expected |= arm_losses(model, ids, start=600 - gap.SEGMENT, arms=["memory"])
    for arm, losses in expected.items():
        assert losses.shape == (1, gap.SEGMENT - 1)
        torch.testing.assert_close(found[arm], losses[0].double())
    measured = gap.measure_spans([found, {arm: losses + 1 for arm, losses in found.items()}])
    assert measured["memory"]["gain"] == pytest.approx(
        measured["window"]["loss"] - measured["memory"]["loss"], abs=1e-5
    )
    assert measured["memory"]["gain_error"] == pytest.approx(0, abs=1e-5)
    assert gap.measure_spans([found])["full"]["gain_error"] is None


@pytest.mark.parametrize("adapter, names", [
    ("slots", ["full", "window", "compressor", "slots", "memory"]), ("slots alone", ["full", "window", "memory"]),
])  # fmt: skip
def test_evaluate_compares_slots_at_equal_capacity(adapter, names, folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / adapter), "--text", str(folders / "text.txt"),
        "--tokens", "200", "--chunk", "50", "--stretches", "2", "--length", "330", "--start", "40", "--needles", "4",
        "--needle-length", "420", "--tasks", "pass key", "RULER common words", "--spans", "2", "--sink-positions",
        "absolute", "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(results["spans"]) == list(results["bytes"]["24+8"]) == names
    assert [cell["tokens"] for cell in results["bytes"]["24+8"].values()] == [420, *[48] * (len(names) - 1)]
    assert list(results["streaming"]) == ["full attention", "window only", *names[2:]]
    for name, arm in zip(results["streaming"], names, strict=True):
        if arm != "full":
            assert results["streaming"][name]["cache_bytes"][-1] == results["bytes"]["24+8"][arm]["bytes"]
    assert set(results["gap"]["24+8"]["by_text"]) == {*names, "another_text"}
    assert list(results["sinks"]) == [f"absolute {arm}" for arm in names[1:]]
    assert set(results["needles"]) == {"pass key", "RULER common words"}
    assert list(results["needles"]["RULER common words"]) == ["the whole text"]
    for cells in results["needles"].values():
        assert sum(cell["n"] for cell in cells.values()) == 4
        for cell in cells.values():
            assert list(cell["interval"]) == names
            assert all(low <= cell[arm] <= high for arm, (low, high) in cell["interval"].items())
    assert len(results["tables"]) == 6 and "24+8+16 slots" in results["tables"][0]
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_needles_that_are_all_evicted_have_a_row_of_their_own(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "slots"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "0", "--needles", "5", "--batch", "3", "--evicted", "--needle-length", "420",
        "--slots", "8", "--tasks", "pass key", "RULER frequent words", "--device", "cpu", "--dtype", "float32",
        "--scores", "key_norm", "key_difference", "--output", str(tmp_path),
    ])  # fmt: skip
    arms = ["full", "window", "compressor", "slots", "memory", "key_norm", "key_difference"]
    assert list(results["needles"]["RULER frequent words"]["the whole text"]["interval"]) == arms
    by_arm = results["bytes"]["24+8"]
    assert by_arm["key_norm"]["bytes"] < by_arm["slots"]["bytes"] < by_arm["memory"]["bytes"]
    assert results["bytes"]["24+8"]["memory"]["tokens"] == 24 + 8 + 8
    results = results["needles"]
    assert list(results["RULER frequent words"]) == ["the whole text"]
    places = results["pass key"]
    assert list(places)[-1] == "evicted, at any distance" and all(name.startswith("evicted") for name in places)
    assert places["evicted, at any distance"]["n"] == 5 == sum(u["n"] for u in places.values()) - 5


def losses_with_a_gap(gap, noise, texts=2, tokens=512):
    """Losses by arm of texts in which full attention is better by ``gap``, and the memory closes half of it."""
    found = []
    for _ in range(texts):
        full = 3 + torch.randn(tokens, dtype=torch.float64)
        window = full + gap + noise * torch.randn(tokens, dtype=torch.float64)
        memory = window - gap / 2
        found.append({"full": full, "window": window, "memory": memory, "another_text": window - gap / 4})
    return found


@pytest.mark.parametrize("texts", [2, 8])
def test_a_share_is_of_a_gap_that_is_there(texts):
    found = gap.measure(losses_with_a_gap(0.1, 0.5, texts))
    assert found["verdict"] == "significant" and found["gap_closed"] == pytest.approx(0.5, abs=0.15)
    assert found["by_own_memory"] == pytest.approx(found["gap_closed"] / 2, abs=0.1)
    worse = gap.measure(losses_with_a_gap(-0.1, 0.5, texts))
    assert worse["verdict"] == "full attention is worse" and worse["gap_closed"] is None
    assert worse["by_own_memory"] is None


def test_the_trainer_says_how_sure_the_gap_is():
    sums = torch.tensor([[1.0, 2, 0, 1], [2, 5, 0, 2], [0, 0, 0, 0]])  # gaps of 1 and 1.5, and a text without tokens
    assert standard_error(sums) == pytest.approx(0.25)
    assert standard_error(sums[:1]) == float("inf")


def test_noise_has_no_share():
    """By chance one in twenty is taken for a gap."""
    found = [gap.measure(losses_with_a_gap(0.0, 0.5, texts)) for texts in (2, 8) for _ in range(50)]
    assert sum(cell["gap_closed"] is not None for cell in found) <= 8
    assert {cell["verdict"] for cell in found} >= {"not significant"}


def test_a_single_measurement_is_not_significant():
    (text,) = losses_with_a_gap(1.0, 0.1, texts=1, tokens=gap.SEGMENT + 9)
    found = gap.measure([{arm: values for arm, values in text.items() if arm != "another_text"}])
    assert found["verdict"] == "not significant" and found["another_text"] is None and found["gap_error"] is None
    json.loads(json.dumps(found), parse_constant=pytest.fail)


def test_the_table_says_that_a_gap_is_not_significant(folders, tmp_path):
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "1", "--length", "100", "--start", "40", "--needles", "0", "--device", "cpu",
        "--dtype", "float32", "--output", str(tmp_path),
    ])  # fmt: skip
    assert "not significant" in results["tables"][0] and "%" not in results["tables"][0].splitlines()[-1]


@pytest.mark.parametrize("given, message", [
    (["--length", "90000"], "--length 90000: the longest text has"),
    (["--length", "100", "--start", "99"], "--length 100: nothing is measured before position 99"),
    (["--length", "40", "--start", "1", "--capacities", "56+8"], "--length 40: nothing is measured before position 64"),
    (["--spans", "2", "--length", "250", "--start", "99"], "needs 296 tokens"),
    (["--capacities", "24-8"], "expected WINDOW+SINKS"),
    (["--compressor", "Mamba2"], "Leave --compressor out"),
    (["--text", "nowhere.txt"], "nowhere.txt"),
    (["--output", __file__], "File exists"),
    (["--tasks", "RULER"], "invalid choice"),
    (["--slots", "9"], "--slots 9: this memory has no slots"),
    (["--scores", "recent"], "--scores: this memory has no slots"),
    (["--stretches", "0", "--evicted", "--needle-length", "150"], "--needle-length 150: expected at least 160"),
])  # fmt: skip
def test_a_wrong_option_fails_before_anything_is_measured(given, message, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "streaming", lambda *_: pytest.fail("the first part ran"))
    words = ["--model", str(folders / "base"), "--adapter", str(folders / "adapter"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*words, "--text", str(folders / "text.txt"), "--device", "cpu", "--dtype", "float32", *given])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


WRONG = {
    "a text that is not there": (["--text", "nowhere.txt"], "nowhere.txt"),
    "no source": ([], "one of --text and --dataset"),
    "two sources": (["--text", "TEXT", "--dataset", "a"], "one of --text and --dataset"),
    "a configuration of nothing": (["--text", "TEXT", "--config", "a"], "are for --dataset"),
    "a stream of nothing": (["--text", "TEXT", "--streaming"], "are for --dataset"),
    "no such dataset": (["--dataset", "nobody/nothing"], "--dataset nobody/nothing"),
    "no such column": (["--dataset", "JSONL", "--column", "title"], "--column title: no column of text"),
    "no such field": (["--text", "JSONL", "--column", "title"], "the field 'title'"),
    "no such split": (["--dataset", "JSONL", "--split", "nothing"], "nothing"),
    "no such configuration": (["--dataset", "CSV", "--config", "b", "--split", "c"], "--dataset"),
    "a broken line": (["--text", "BROKEN"], "line 2: expected a JSON object"),
    "a dev text that is not there": (["--text", "TEXT", "--dev", "nowhere"], "nowhere"),
    "short texts to measure on": (
        ["--text", "TEXT", "--length", "80", "--dev", "TEXT", "--dev-length", "9000"],
        "9000 tokens in one",
    ),
    "nothing beyond the window": (["--text", "TEXT", "--dev", "TEXT", "--dev-length", "500"], "--dev-length 500"),
    "texts shorter than a sequence": (["--text", "TEXT", "--length", "90000"], "at least one stretch of 90000"),
    "no checkpoint": (["--text", "TEXT", "--resume"], "--resume: no checkpoint"),
    "no adapter": (["--text", "TEXT", "--start-from", "nowhere"], "nowhere: no such folder"),
    "nothing to measure on the way": (["--text", "TEXT", "--eval-every", "5"], "--eval-every"),
    "a share": (["--text", "TEXT", "--copies", "2"], "from 0 to 1"),
    "a window": (["--text", "TEXT", "--window", "0"], "at least 1"),
    "sinks": (["--text", "TEXT", "--draw-sinks", "-4"], "draw-sinks"),
    "a dtype": (["--text", "TEXT", "--dtype", "float7"], "invalid choice"),
    "a compressor": (["--text", "TEXT", "--compressor", "Nothing"], "invalid choice"),
    "an output that is a file": (["--text", "TEXT", "--output", "TEXT"], "a file, expected a folder"),
}


@pytest.mark.parametrize("given, message", WRONG.values(), ids=WRONG)
def test_a_wrong_option_fails_before_the_model_is_loaded(given, message, folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "a.csv").write_text("text\nwords\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "some words"}\nno JSON\n')
    monkeypatch.setattr(train, "load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    paths = {
        "TEXT": folders / "text.txt", "JSONL": tmp_path / "a.jsonl", "CSV": tmp_path / "a.csv",
        "BROKEN": tmp_path / "broken.jsonl",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [str(paths.get(word, word)) for word in given]
    with pytest.raises(SystemExit) as stopped:
        train.main(["--model", str(folders / "base"), "--output", str(tmp_path / "out"), *words])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_a_start_that_contradicts_its_adapter_fails_before_the_training(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_trainer", lambda *_: pytest.fail("the training began"))
    words = ["--model", str(folders / "base"), "--text", str(folders / "text.txt"), "--output", str(tmp_path / "out")]
    words += ["--length", "80", "--start-from", str(folders / "adapter")]
    for wrong in (["--shared-state"], ["--memory-positions", "none"], ["--compressor", "Mamba2"]):
        with pytest.raises(SystemExit, match=f"Leave {wrong[0]} out"):
            train.main([*words, *wrong])
    with pytest.raises(SystemExit, match="--dev-length 33"):
        train.main([*words, "--dev", str(folders / "text.txt"), "--dev-length", "33"])


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_of_a_dataset(streaming, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"body": f"text {i}", "n": i} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    expected = [row["body"] for row in rows]
    for name in ("a.jsonl", "folder"):
        assert list(texts.read_dataset(str(tmp_path / name), None, "train", "body", streaming)) == expected
    assert texts.read_texts([tmp_path / "folder"], "body") == expected
    with pytest.raises(ValueError, match=r"--column n: .*\['body', 'n'\]"):
        texts.read_dataset(str(tmp_path / "a.jsonl"), None, "train", "n", streaming)


def test_a_stream_is_read_as_far_as_it_is_needed():
    read = []

    def stream():
        for i in range(1000):
            read.append(i)
            yield "some words"

    documents = texts.tokenize(tokenizer(), stream(), "test", enough=300)
    assert 300 <= sum(map(len, documents)) < 500 and len(read) < 60


def test_streaming_reads_what_the_steps_need(tmp_path, monkeypatch):
    asked, read = [], []

    def stream(*source):
        asked.append(source)
        for i in range(5000):
            read.append(i)
            yield "some words"

    monkeypatch.setattr(train, "read_dataset", stream)
    words = ["--dataset", "a", "--config", "b", "--split", "c", "--column", "d", "--output", str(tmp_path)]
    sizes = ["--steps", "3", "--batch", "2", "--accumulate", "2", "--length", "64"]
    options = train.parse([*words, *sizes, "--streaming"])
    documents, _ = train.load_data(tokenizer(), options)
    crops = train.crops_of(documents, tokenizer(), options)
    assert asked == [("a", "b", "c", "d", True)] and len(crops) == 12
    assert sum(map(len, crops.documents)) >= 12 * 64 and len(read) < 200
    train.load_data(tokenizer(), train.parse([*words, *sizes]))
    assert asked[-1][-1] is False and len(read) > 5000


def test_train_writes_an_adapter_that_evaluate_reads(folders, tmp_path):
    report = train.main([
        "--model", str(folders / "base"), "--text", str(folders / "text.txt"), "--dev", str(folders / "text.txt"),
        "--dev-length", "100", "--dev-count", "2", "--window", "24", "--sinks", "8", "--steps", "4",
        "--align-steps", "2", "--length", "80", "--batch", "2", "--save-every", "2", "--shared-state",
        "--gradient-checkpointing", "--output", str(tmp_path / "adapter"),
    ])  # fmt: skip
    assert report["steps"] == 4 and {"eval_full", "eval_window", "eval_memory"} <= report["metrics"].keys()
    metrics = report["metrics"]
    assert (metrics["eval_gap_closed"] is None) == (metrics["eval_gap"] != "significant")
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["tokens"] == 4 * 2 * 80
    results = evaluate.main([
        "--model", str(folders / "base"), "--adapter", str(tmp_path / "adapter"), "--text", str(folders / "text.txt"),
        "--tokens", "0", "--stretches", "1", "--length", "100", "--start", "40", "--needles", "0", "--device", "cpu",
        "--dtype", "float32", "--output", str(tmp_path / "results"),
    ])  # fmt: skip
    assert set(results["gap"]) == {"24+8"}


def test_crops_depend_on_their_number_only():
    documents = [torch.arange(1000), torch.arange(5000, 5030), torch.arange(9000, 9300)]
    one, other = (texts.Crops(documents, 200, 50, copies=0.5, seed=3) for _ in range(2))
    assert torch.equal(one[7]["input_ids"], other[7]["input_ids"])
    assert all(len(one[i]["input_ids"]) == 200 for i in range(50))
    assert {int(crop["input_ids"][0]) // 5000 for crop in one} == {0, 1}
    with pytest.raises(ValueError, match="at least one stretch"):
        texts.Crops(documents, 5000, 1)
    pieces = texts.stretches(documents, 100, 4)
    assert [int(p["input_ids"][0]) for p in pieces] == [0, 400, 800, 9200]


def test_lm_eval_runs_on_a_retrofitted_model(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = " alpha beta gamma delta"  # lm_eval moves a space at the end of the context into the answer
    rows = [{"context": words * (4 + i), "choices": [" one", " two"], "label": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "data.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model, letters = small(), tokenizer()

    def run():
        harness = HFLM(pretrained=model, tokenizer=letters, batch_size=2, max_length=512)
        out = lm_eval.simple_evaluate(
            harness,
            tasks=["local_choice"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        samples = sorted(out["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
        return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]

    def by_hand():
        values = []
        for row in rows:
            for choice in row["choices"]:
                context, whole = letters.encode(row["context"]), letters.encode(row["context"] + choice)
                with torch.no_grad():
                    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                values.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        return values

    found = {}
    for arm in arms.arms_of(model):
        with arms.use_arm(model, arm):
            found[arm] = run()
            assert found[arm] == pytest.approx(by_hand(), abs=1e-3)
    assert found["memory"] != pytest.approx(found["window"], abs=1e-3)
    assert found["full"] != pytest.approx(found["window"], abs=1e-3)
