"""A model that transformers splits by heads over two processes is the model of one process, its memory too."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ahn_layers import (
    GatedDeltaNet,
    Mamba2,
    SalientSlots,
    adapter_parameters,
    full_attention,
    load_adapter,
    memory_report,
    restore,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.huggingface.decoder import CACHE

from ..methods import COMPRESSORS, OPTIONS, BiggestKeys

pytestmark = pytest.mark.skipif(
    not hasattr(Shard, "local_shard_size_and_offset"), reason="transformers splits no model with this torch"
)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
}
WINDOW = {"window_size": 12, "num_sinks": 2}
CASES = {
    **{c.__name__: ("llama", {"compressor": c, **OPTIONS.get(c, {})}) for c in COMPRESSORS},
    "shared states, learned slots": (
        "qwen2",
        {"compressor": GatedDeltaNet, "shared_state": True, "eviction": SalientSlots(5)},
    ),
    "plain slots": (
        "qwen2",
        {
            "compressor": GatedDeltaNet,
            "eviction": SalientSlots(4, score="value_norm", rate=0.1),
            "memory_positions": "none",
        },
    ),
    "learned slots alone": ("qwen2", {"compressor": None, "eviction": SalientSlots(5)}),
}
IDS = torch.randint(1, 64, (2, 50), generator=torch.Generator().manual_seed(1))


def load(folder, base, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another way to say tp_plan="auto" is preferred
        return AutoModelForCausalLM.from_pretrained(f"{folder}/{base}", dtype=torch.float32, **options).eval()


def what_it_does(model):
    """Logits of a prompt in pieces and of decoding, and tokens."""
    logits, cache = [], None
    with torch.no_grad():
        for piece in (*IDS[:, :45].split([9, 20, 16], dim=1), *IDS[:, 45:].split(1, dim=1)):
            out = model(piece, use_cache=True, **({} if cache is None else {CACHE: cache}))
            cache = out[CACHE]
            logits.append(out.logits)
        padded = IDS.clone()
        padded[0, :7] = 0
        found = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=6, do_sample=False)
    return {"logits": torch.cat(logits, dim=1), "tokens": found}


def refusal(function, *args, **options):
    """What an error says."""
    try:
        function(*args, **options)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def split(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the processes agree on their weights all the same
    models = {base: load(folder, base, tp_plan="auto") for base in BASES}
    found = {}
    for name, (base, options) in CASES.items():
        model = models[base]
        if name == "Mamba2":
            found[name] = refusal(retrofit, model, **options, **WINDOW)
            continue
        load_adapter(model, f"{folder}/{name}")
        found[name] = what_it_does(model)
        save_adapter(model, f"{folder}/again/{name}")
        if name == "GatedDeltaNet":
            found["report"] = memory_report(model)
            with full_attention(model):
                found["full"] = what_it_does(model)
            with window_only(model):
                found["window"] = what_it_does(model)
            found["gradient"] = refusal(lambda model=model: model(IDS).logits.sum().backward())
            for _, parameter in adapter_parameters(model):
                parameter.requires_grad_(True)
            found["training"] = refusal(model, IDS)
        restore(model)
    found["restored"] = what_it_does(models["llama"])
    found["one key head"] = refusal(retrofit, models["one key head"], GatedDeltaNet, **WINDOW)
    found["an eviction that does not say"] = refusal(retrofit, models["llama"], None, **WINDOW, eviction=BiggestKeys(3))
    found["rates by head"] = refusal(
        retrofit, models["llama"], None, **WINDOW, eviction=SalientSlots(3, score="recent", rate=[1.0, 2.0])
    )
    torch.manual_seed(5 + rank)
    retrofit(models["llama"], GatedDeltaNet, **WINDOW, eviction=SalientSlots(3))
    save_adapter(models["llama"], f"{folder}/again/as it begins")
    torch.save(found, f"{folder}/found{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process finds, and what two find."""
    folder = tmp_path_factory.mktemp("split")
    torch.manual_seed(0)
    for name, make in BASES.items():
        make().save_pretrained(folder / name)
    one = {}
    for name, (base, options) in CASES.items():
        model = retrofit(load(folder, base), **options, **WINDOW)
        with torch.no_grad():
            for _, parameter in adapter_parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
        save_adapter(model, folder / name)
        one[name] = what_it_does(model)
        if name == "GatedDeltaNet":
            with full_attention(model):
                one["full"] = what_it_does(model)
            with window_only(model):
                one["window"] = what_it_does(model)
    one["restored"] = one["full"]
    torch.manual_seed(5)
    save_adapter(
        retrofit(load(folder, "llama"), GatedDeltaNet, **WINDOW, eviction=SalientSlots(3)), folder / "as it begins"
    )
    torch.multiprocessing.spawn(split, (str(folder),), nprocs=2)
    return folder, one, [torch.load(folder / f"found{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*(name for name in CASES if name != "Mamba2"), "full", "window", "restored"])
def test_logits_and_tokens_are_those_of_one_process(both, name):
    _, one, two = both
    for found in two:
        torch.testing.assert_close(found[name]["logits"], one[name]["logits"], rtol=0, atol=1e-5)
        assert torch.equal(found[name]["tokens"], one[name]["tokens"])
    differ = (one["window"]["logits"] - one["GatedDeltaNet"]["logits"]).abs().max()
    assert differ > 1e-2, "the memory says something"


@pytest.mark.parametrize("name", [*(name for name in CASES if name != "Mamba2"), "as it begins"])
def test_adapters_are_saved_as_by_one_process(both, name):
    folder, _, _ = both
    for file in ("adapter.json", "adapter.safetensors"):
        assert (folder / "again" / name / file).read_bytes() == (Path(folder) / name / file).read_bytes()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (Mamba2.__name__, "Mamba2 cannot be split by heads over 2 processes (tp_plan): a share of its heads alone"),
        ("one key head", "1 key/value heads cannot be shared equally by 2 processes"),
        (
            "an eviction that does not say",
            "BiggestKeys cannot be split by heads over 2 processes (tp_plan): it does not",
        ),
        ("rates by head", "SalientSlots cannot be split by heads over 2 processes (tp_plan): rate=[1.0, 2.0]"),
        ("gradient", "gradients through a memory that is split over several processes"),
        ("training", "gradients through a memory that is split over several processes"),
        ("report", "split by heads over 2 processes: parameters and bytes of this one"),
    ],
)
def test_what_cannot_be_split_is_refused(both, what, words):
    _, _, two = both
    for found in two:
        assert words in found[what]
