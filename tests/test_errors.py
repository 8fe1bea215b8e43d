"""Every way to go wrong: an error that says what was given, what was expected and what to do, and nothing changed.

Each provoked message has its row, with a remedy, in ``docs/guides/troubleshooting.md``.
"""

import json
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

from ahn_layers import (
    DeltaNet,
    GatedDeltaNet,
    HippocampalAttention,
    HippocampalCache,
    Mamba2,
    MemoryState,
    MemoryStore,
    Rotary,
    Window,
    full_attention,
    load_adapter,
    memory_report,
    restore,
    retrofit,
    save_adapter,
    window_only,
)
from ahn_layers.huggingface.cache_layers import MemoryLayer
from ahn_layers.huggingface.decoder import CACHE

from .docs.test_docs import rows, shows
from .models import CAPACITY, SINKS, WINDOW, base, generate, logits, retrofitted, tokens

LONG = 3 * CAPACITY
pytestmark = pytest.mark.usefixtures("unchecked")


@contextmanager
def refused(kind, *parts):
    """The error, all parts in its message, in this order, and a row of the page that shows it."""
    with pytest.raises(kind) as error:
        yield
    assert type(error.value) is kind
    message = str(error.value)
    start = 0
    for part in parts:
        assert part in message[start:], f"{part!r} is not in its place in: {message}"
        start = message.index(part, start) + len(part)
    assert any(shows(row, message) for row in rows()), f"not in troubleshooting.md: {message}"


# --- making things


def block(calls=1):
    """A custom block that attends so many times."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = calls

        def forward(self, x, attend):
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            for _ in range(self.calls):
                x = attend(q, q, q).transpose(1, 2).flatten(2)
            return x

    return Block()


def custom(calls=1):
    return HippocampalAttention(block(calls), MemoryStore(Window(5, num_sinks=1), GatedDeltaNet(32, 4, 8)))


def with_memory_child():
    module = block()
    module.memory = nn.Linear(1, 1)
    return module


def size(**options):
    return lambda: Window(**{"window_size": 4} | options)


WHOLE = "expected a whole number of at least"
MAKING = {
    "no window": (size(window_size=0), ValueError, "window_size=0", f"{WHOLE} 1."),
    "a negative window": (size(window_size=-3), ValueError, "window_size=-3", f"{WHOLE} 1."),
    "a window of bool": (size(window_size=True), ValueError, "window_size=True", f"{WHOLE} 1."),
    "a window of float": (size(window_size=4.0), ValueError, "window_size=4.0", f"{WHOLE} 1."),
    "a window of text": (size(window_size="4"), ValueError, "window_size='4'", f"{WHOLE} 1."),
    "a window of None": (size(window_size=None), ValueError, "window_size=None", f"{WHOLE} 1."),
    "negative sinks": (size(num_sinks=-1), ValueError, "num_sinks=-1", f"{WHOLE} 0."),
    "sinks of bool": (size(num_sinks=False), ValueError, "num_sinks=False", f"{WHOLE} 0."),
    "sinks of float": (size(num_sinks=0.5), ValueError, "num_sinks=0.5", f"{WHOLE} 0."),
    "sink positions": (
        size(sink_positions="near"), ValueError, "sink_positions='near'", "('trained', 'streaming', 'absolute')",
    ),
    "memory positions": (
        lambda: MemoryStore(Window(4), memory_positions="near"), ValueError, "memory_positions='near'",
        "('absolute', 'none')",
    ),
    "no rotation to undo": (
        lambda: MemoryStore(Window(4), memory_positions="none"), ValueError, "memory_positions='none'",
        "expected rotary=Rotary(...)",
    ),
    "no heads": (lambda: GatedDeltaNet(32, 0, 8), ValueError, "num_heads=0", "expected a positive number"),
    "no channels": (lambda: Mamba2(32, 4, -8), ValueError, "head_dim=-8", "expected a positive number"),
    "heads that do not divide": (
        lambda: DeltaNet(32, 4, 8, num_kv_heads=3), ValueError, "num_heads=4", "num_kv_heads=3", "the same number",
    ),
    "frequencies": (lambda: Rotary(torch.ones(2, 2), 8), ValueError, "(2, 2)", "one frequency per rotated pair"),
    "trained length": (lambda: Rotary(torch.ones(2), 0), ValueError, "trained_length=0", "a positive number of tokens"),
    "wrapped twice": (
        lambda: HippocampalAttention(custom(), MemoryStore(Window(4))), ValueError, "Block", "wrap the block once",
    ),
    "a taken name": (
        lambda: HippocampalAttention(with_memory_child(), MemoryStore(Window(4))), ValueError, "Block", "'memory'",
        "rename it",
    ),
    "a block that does not attend": (
        lambda: custom(0)(torch.randn(1, 3, 32)), RuntimeError, "Block did not call attend", "expected attend(q, k, v)",
    ),
    "a block that attends twice": (
        lambda: custom(2)(torch.randn(1, 3, 32)), RuntimeError, "Block called attend twice", "expected exactly once",
        "on its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAKING)
def test_what_cannot_be_made(case):
    provoke, kind, *parts = MAKING[case]
    with refused(kind, *parts):
        provoke()


# --- retrofitting


def put(model, compressor=GatedDeltaNet, **options):
    return retrofit(model, compressor, **{"window_size": WINDOW, "num_sinks": SINKS} | options)


def flex():
    model = base()
    model.config._attn_implementation_internal = "flex_attention"
    return model


def encoder_decoder():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, pad_token_id=0))


def lora():
    return get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))


FIRST = "call retrofit(model, ...) first"
RETROFITTING = {
    "twice": (lambda: put(retrofitted()), ValueError, "LlamaForCausalLM is retrofitted already", "restore(model)"),
    "not of transformers": (lambda: put(nn.Linear(2, 2)), TypeError, "Linear is not", "HippocampalAttention"),
    "inside PEFT": (lambda: put(lora()), TypeError, "PeftModel", "model.get_base_model()"),
    "an encoder-decoder": (lambda: put(encoder_decoder()), ValueError, "BartForCond", "expected a decoder-only"),
    "no attention interface": (
        lambda: put(base("bloom", torch.float32)), ValueError, "BloomForCausalLM", "HippocampalAttention",
    ),
    "another attention": (lambda: put(flex()), ValueError, "'flex_attention'", "('sdpa', 'eager')", "Load the model"),
    "an object for a class": (
        lambda: put(base(), GatedDeltaNet(32, 4, 8)), TypeError, "GatedDeltaNet(", "the class, not an object",
    ),
    "another class": (lambda: put(base(), nn.Linear), TypeError, "Linear", "expected a subclass of Compressor"),
    "no such layer": (lambda: put(base(), layers=[0, 3]), ValueError, "no attention layer 3", "[0, 1, 2]"),
    "a layer of another kind": (
        lambda: put(base("llama4"), layers=[0]), ValueError, "layer 0 (model.layers.0.self_attn)", "chunked",
    ),
    "no layer that is suitable": (
        lambda: put(base("diffllama", torch.float32)), ValueError, "no suitable", "model.layers.0.self_attn: calls the",
        "model.layers.1.self_attn", "model.layers.2.self_attn",
    ),
    "windows that are too small": (
        lambda: put(base("mistral_window"), window_size=20), ValueError, "no suitable", "model.layers.0.self_attn",
        "sliding window of 9", "= 22", "model.layers.2.self_attn",
    ),
    "a window that is too small": (
        lambda: put(base("gemma3"), layers=[0], window_size=20), ValueError, "no suitable", "of 9", "= 22",
    ),
    "restoring a plain model": (lambda: restore(base()), ValueError, "LlamaForCausalLM is not retrofitted", FIRST),
    "reporting on a plain model": (lambda: memory_report(base()), ValueError, "LlamaForCausalLM", FIRST),
    "saving from a plain model": (lambda: save_adapter(base(), "nowhere"), ValueError, "LlamaForCausalLM", FIRST),
    "switching a plain model": (lambda: full_attention(base()).__enter__(), ValueError, "LlamaForCausalLM", FIRST),
    "switching a plain module": (lambda: window_only(nn.Linear(1, 1)).__enter__(), ValueError, "Linear", FIRST),
    "restoring twice": (lambda: restore(restore(retrofitted())), ValueError, "LlamaForCausalLM", FIRST),
}  # fmt: skip


@pytest.mark.parametrize("case", RETROFITTING)
def test_what_cannot_be_retrofitted(case):
    provoke, kind, *parts = RETROFITTING[case]
    with refused(kind, *parts):
        provoke()


# --- files


def spoil_weight(name, change):
    def spoil(folder):
        weights = load_file(folder / "adapter.safetensors")
        weights[name] = change(weights[name])
        save_file(weights, folder / "adapter.safetensors")

    return spoil


def truncate(name, share):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return spoil


def flip_header(folder):
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[12] ^= 0xFF
    (folder / "adapter.safetensors").write_bytes(data)


def set_last(value):
    def change(u):
        u.flatten()[-1] = value
        return u

    return change


def describe(**changes):
    def spoil(folder):
        path = folder / "adapter.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


A_LOG, O_PROJ = "layers.1.A_log", "layers.2.o_proj.weight"
ADAPTERS = {
    "infinite": (spoil_weight(O_PROJ, set_last(float("inf"))), "layer 2 'o_proj.weight'", "not finite"),
    "not a number": (spoil_weight(A_LOG, set_last(float("nan"))), "layer 1 'A_log'", "not finite"),
    "shape": (spoil_weight(A_LOG, lambda u: u[:-1].clone()), "layer 1 'A_log' has shape (3,)", "expected (4,)"),
    "transposed": (
        spoil_weight("layers.0.a_proj.weight", lambda u: u.T.contiguous()), "layer 0 'a_proj.weight'", "(32, 4)",
        "expected (4, 32)",
    ),
    "cut in the header": (truncate("adapter.safetensors", 0.01), "adapter.safetensors", "damaged or truncated"),
    "cut in the data": (truncate("adapter.safetensors", 0.99), "adapter.safetensors", "damaged or truncated"),
    "a bit in the header": (flip_header, "adapter.safetensors", "damaged or truncated"),
    "description cut": (truncate("adapter.json", 0.5), "adapter.json", "not the description of an adapter"),
    "another window size kind": (describe(sizes={}), "the adapter has sizes={}", "the model has"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_are_refused(case, tmp_path):
    spoil, *parts = ADAPTERS[case]
    save_adapter(retrofitted(dtype=torch.float32), tmp_path)
    spoil(tmp_path)
    model, ids = put(base(dtype=torch.float32)), tokens(1, LONG)
    expected = logits(model, ids)
    with refused(ValueError, str(tmp_path), *parts):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["cache", "state"])
def test_files_that_are_cut(kind, share, tmp_path):
    model = retrofitted(dtype=torch.float32)
    cache = model(tokens(1, LONG)).past_key_values
    for layer in cache.layers:
        layer.state = layer.state.clone()
    path = tmp_path / "file.safetensors"
    if kind == "cache":
        HippocampalCache.of(cache).save(path)
    else:
        cache.layers[0].state.save(path)
    truncate("file.safetensors", share)(tmp_path)
    with refused(ValueError, "file.safetensors", "damaged or truncated"):
        (HippocampalCache if kind == "cache" else MemoryState).load(path)
    with refused(FileNotFoundError, "no.safetensors: no such file."):
        (HippocampalCache if kind == "cache" else MemoryState).load(tmp_path / "no.safetensors")


# --- calling a store


def store_and_tokens(compressor=GatedDeltaNet, window=5, length=20):
    memory = None if compressor is None else compressor(16, 4, 8, num_kv_heads=2)
    for parameter in () if memory is None else memory.parameters():
        nn.init.normal_(parameter, std=0.5)
    sizes = {"q": (2, 4, length, 8), "k": (2, 2, length, 8), "v": (2, 2, length, 8), "x": (2, length, 16)}
    return MemoryStore(Window(window, num_sinks=2), memory), {name: torch.randn(size) for name, size in sizes.items()}


def part(call, start, stop):
    return {name: u[..., start:stop, :] for name, u in call.items()}


def as_dtype(state, dtype):
    return state._map(lambda u: u.to(dtype) if u.is_floating_point() else u)


def fewer_heads(state):
    return MemoryState(state.window, state.slots.map(lambda u: u[:, :1]), state.seen, state.memory)


def of_another(compressor=GatedDeltaNet, window=5):
    def make(_):
        store, call = store_and_tokens(compressor, window)
        return store(**call)[1]

    return make


def changed(name, function):
    return lambda call: call | {name: function(call[name])}


CALLS = {
    "no batch": (changed("k", lambda u: u[0]), "k has shape (2, 1, 8)", "expected floating (batch, heads, tokens"),
    "integers": (changed("v", lambda u: u.long()), "v has shape", "torch.int64", "expected floating"),
    "no tokens": (lambda c: part(c, 0, 0), "no tokens", "at least one"),
    "the cached keys again": (changed("k", lambda u: u.repeat(1, 1, 2, 1)), "k (2, 2, 2, 8)", "the new tokens only"),
    "heads that do not divide": (
        lambda c: c | {name: c[name].repeat(1, 2, 1, 1)[:, :3] for name in "kv"}, "4 query heads and 3", "a multiple",
    ),
    "two dtypes": (changed("v", lambda u: u.double()), "v torch.float64 on cpu", "one dtype and one device"),
    "two devices": (changed("k", lambda u: u.to("meta")), "k torch.float32 on meta", "one dtype and one device"),
    "size of keys": (
        lambda c: c | {name: c[name][..., :4] for name in "qk"}, "GatedDeltaNet", "head_dim=8", "has 4", "make it with",
    ),
    "size of values": (changed("v", lambda u: u[..., :6]), "value_dim=8, the attention has 6", "value_dim=6"),
    "number of heads": (changed("q", lambda u: u[:, :2]), "num_heads=4, the attention has 2", "num_heads=2"),
    "no hidden states": (lambda c: c | {"x": None}, "x=None", "needs the hidden states"),
    "hidden states of all tokens": (
        changed("x", lambda u: u.repeat(1, 2, 1)), "x has shape (2, 2, 16)", "(2, 1, 16)", "x[:, -1:]",
    ),
    "mask of floats": (lambda c: c | {"valid": torch.ones(2, 1)}, "torch.float32", "boolean mask of shape (2, 1)"),
    "mask of all tokens": (
        lambda c: c | {"valid": torch.ones(2, 21) > 0}, "(2, 21)", "boolean mask of shape (2, 1)", "valid[:, -1:]",
    ),
    "mask of integers": (lambda c: c | {"valid": torch.ones(2, 1).long()}, "int64", "a boolean mask", "valid.bool()"),
    "hidden states of integers": (changed("x", lambda u: u.long()), "x has shape", "int64", "expected floating"),
    "hidden states of another layer": (changed("x", lambda u: u[..., :12]), "x has shape (2, 1, 12)", "(2, 1, 16)"),
    "hidden states, tokens first": (changed("x", lambda u: u.transpose(0, 1)), "(1, 2, 16)", "Pass x.transpose(0, 1)"),
    "hidden states elsewhere": (changed("x", lambda u: u.to("meta")), "x is on meta, q on cpu", "x.to(q.device)"),
    "another batch": (
        lambda c: {name: u[:1] for name, u in c.items()}, "state has 2 rows, the tokens have 1", "state.reorder(index)",
    ),
    "another dtype": (lambda c: {name: u.double() for name, u in c.items()}, "float32 on cpu, k is torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_calls_that_a_store_refuses(case, inplace):
    """The state of the failed call is bit for bit what it was, and goes on as if nothing had happened."""
    spoil, *parts = CALLS[case]
    store, call = store_and_tokens()
    with torch.no_grad():
        state = store(**part(call, 0, 18))[1]
        before, description = state.clone(), state.description()
        state.inplace = inplace
        with refused(ValueError, *parts):
            store(**spoil(part(call, 18, 19)), state=state)
        assert state.description() == description
        assert all(torch.equal(u, before.tensors()[name]) for name, u in state.tensors().items())
        out, end = store(**part(call, 18, 19), state=state)
        expected, other = store(**part(call, 18, 19), state=before)
        assert torch.equal(out, expected)
        assert all(torch.equal(u, other.tensors()[name]) for name, u in end.tensors().items())


ORDERS = {
    "tokens before heads": ((0, 2, 1, 3), "qkv", "q", "(batch, tokens, heads, size)"),
    "size before tokens": ((0, 1, 3, 2), "qkv", "q", "(batch, heads, size, tokens)"),
    "tokens first": ((2, 0, 1, 3), "qkv", "q", "(tokens, batch, heads, size)"),
    "heads first": ((1, 0, 2, 3), "qkv", "q", "(heads, batch, tokens, size)"),
    "the keys alone": ((0, 2, 1, 3), "k", "k", "(batch, tokens, heads, size)"),
    "the values alone": ((0, 2, 1, 3), "v", "v", "(batch, tokens, heads, size)"),
    "keys and values": ((0, 2, 1, 3), "kv", "k", "(batch, tokens, heads, size)"),
}


@pytest.mark.parametrize("compressor", [GatedDeltaNet, None])
@pytest.mark.parametrize("case", ORDERS)
def test_tensors_in_another_order_are_told_how_to_turn(case, compressor):
    order, names, blamed, looks = ORDERS[case]
    if compressor is None and names == "qkv" and order != (0, 2, 1, 3):
        pytest.skip("nothing is known of the sizes")
    store, call = store_and_tokens(compressor, length=21)
    expected = store(**call)[0]
    turned = call | {name: call[name].permute(order) for name in names}
    with refused(ValueError, f"{blamed} has shape {tuple(turned[blamed].shape)}", looks, f"Pass {blamed}.permute"):
        store(**turned)
    back = [order.index(i) for i in range(4)]
    assert torch.equal(store(**turned | {name: turned[name].permute(back) for name in names})[0], expected)


def test_keys_that_were_repeated_for_the_query_heads():
    """Right where every query head has its own state, and no reason to make another compressor where they share."""
    store, call = store_and_tokens(GatedDeltaNet, length=21)
    repeated = call | {name: call[name].repeat_interleave(2, dim=1) for name in "kv"}
    assert torch.allclose(store(**repeated)[0], store(**call)[0], atol=1e-5)
    state = store(**part(call, 0, 20))[1]
    with refused(ValueError, "the state holds k with 2 heads of 8, the tokens have 4", "repeated for the query heads"):
        store(**part(repeated, 20, 21), state=state)
    twice = call | {name: call[name].repeat_interleave(4, dim=1) for name in "kv"}
    with refused(ValueError, "4 query heads and 8 key/value heads", "not repeated for the query heads"):
        store(**twice)
    store = MemoryStore(store.window, GatedDeltaNet(16, 4, 8, num_kv_heads=2, shared_state=True))
    with refused(ValueError, "num_kv_heads=2, the attention has 4", "not repeated for the query heads"):
        store(**repeated)


def test_what_a_store_returned_is_not_the_state():
    store, call = store_and_tokens()
    with refused(TypeError, "state is a tuple", "the state that the last call returned"):
        store(**part(call, 18, 19), state=store(**part(call, 0, 18)))


STATES = {
    "window": (of_another(window=6), "Window(window_size=6", "Window(window_size=5", "the same window"),
    "compressor": (of_another(DeltaNet), "['beta']", "['beta', 'g']", "another compressor"),
    "no compressor": (of_another(None), "made without the long-term", "continued with", "state=None"),
    "batch": (lambda s: s.reorder(torch.tensor([0, 1, 1])), "3 rows, the tokens have 2", "state=None"),
    "dtype": (lambda s: as_dtype(s, torch.bfloat16), "torch.bfloat16 on cpu, k is torch.float32", "computed anew"),
    "device": (lambda s: s.to("meta"), "torch.float32 on meta, k is torch.float32 on cpu", "state.to(device)"),
    "layer": (fewer_heads, "k with 1 heads of 8, the tokens have 2 heads of 8", "another layer or model"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", STATES)
def test_states_that_a_store_refuses(case, inplace):
    make, *parts = STATES[case]
    store, call = store_and_tokens()
    with torch.no_grad():
        own = store(**part(call, 0, 18))[1]
        state, kept = make(own), own.clone()
        before = state.clone()
        state.inplace = inplace
        for stop in (19, 20):
            with refused(ValueError, *parts):
                store(**part(call, 18, stop), state=state)
        for one, other in ((state, before), (own, kept)):
            for name, u in one.tensors().items():
                assert u.is_meta or torch.equal(u, other.tensors()[name]), name


# --- calling a model


def filled(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True).past_key_values


def held(cache):
    """Every tensor of a cache, copied."""
    found = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, MemoryLayer):
            held = {} if layer.state is None else layer.state.tensors()
            found |= {f"{i}.{name}": u.clone() for name, u in held.items()} | {f"{i}.length": layer.get_seq_length()}
        elif layer.is_initialized:
            found |= {f"{i}.keys": layer.keys.clone(), f"{i}.values": layer.values.clone()}
    return found


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(u, other[name]) if isinstance(u, torch.Tensor) else u == other[name] for name, u in one.items()
    )


def passing(**options):
    """Pass these to the call."""
    return lambda model, ids, cache: model(ids, cache=cache, **options)


def in_training(model, ids, cache):
    model.train()
    try:
        for attention in (layer.self_attn for layer in model.model.layers):
            attention.block.attention_dropout = 0.25
        model(ids, cache=cache)
    finally:
        for attention in (layer.self_attn for layer in model.model.layers):
            attention.block.attention_dropout = 0.0
        model.eval()


def inside(switch):
    def call(model, ids, cache):
        with switch(model):
            model(ids, cache=cache)

    return call


def restored(model, ids, cache):
    base()(ids, **{CACHE: cache})


def hiding(new, column):
    """A mask that says that a token of the second row was padding, long after it has been folded."""
    mask = torch.ones(2, LONG + new.shape[1], dtype=torch.long)
    mask[1, column] = 0
    return mask


def attend(model, cache, length, **options):
    """Call the first attention block alone: the models themselves stumble over some arguments before."""
    x, ones = torch.randn(2, length, 32, dtype=torch.float64), torch.ones(1, length, 8, dtype=torch.float64)
    arguments = {"position_embeddings": (ones, 0 * ones), "attention_mask": None, CACHE: cache}
    return model.model.layers[0].self_attn(x, **arguments | options)


DROP = ("attention dropout=0.25: expected 0", "config.attention_dropout = 0 or call model.eval()")
MODEL_CALLS = {
    "dropout": (in_training, *DROP),
    "a 4-D mask": (
        passing(attention_mask=torch.zeros(2, 1, 3, LONG + 3)), f"attention_mask has shape (2, 1, 3, {LONG + 3})",
        "causality, padding and images", "2-D mask",
    ),
    "a 4-D mask of bool": (
        passing(attention_mask=torch.ones(2, 1, 1, LONG + 3).bool()), "attention_mask has shape", "Pass a 2-D mask",
    ),
    "output_attentions": (passing(output_attentions=True), "output_attentions", "Leave output_attentions off"),
    "packed": (passing(cu_seq_lens_q=torch.tensor([0, 2])), "cu_seq_lens=[0, 2] for 2 rows", "expected one row"),
    "seq_idx": (passing(seq_idx=torch.arange(4)[None]), "seq_idx has shape (1, 4)", "expected (2, "),
    "a mask that is too short": (
        passing(attention_mask=torch.ones(2, LONG).long()), f"attention_mask has shape (2, {LONG})",
        f"the {LONG} tokens in the cache",
    ),
    "a mask over folded tokens": (
        lambda m, ids, cache: m(ids, cache=cache, attention_mask=hiding(ids, column=9)), "hides tokens of rows [1]",
        "cannot be undone", "clone",
    ),
    "a bias": (passing(position_bias=torch.zeros(1)), "position_bias", "not supported"),
    "both directions": (
        lambda m, ids, cache: attend(m, cache, ids.shape[1], is_causal=False), "is_causal=False", "expected causal",
    ),
    "fewer rows": (lambda m, ids, cache: m(ids[:1], cache=cache), "2 rows", "have 1", "state.reorder(index)"),
    "without its memory": (inside(window_only), "made with the long-term memory", "continued without", "Keep to one"),
    "full attention": (inside(full_attention), "filled by the bounded memory", "Begin a new cache"),
    "the base model": (restored, "filled by the bounded memory", "Begin a new cache", "after restore"),
    "another window": (
        lambda m, ids, cache: retrofitted(window_size=7)(ids, cache=cache), "window_size=6", "window_size=7",
        "same window",
    ),
    "another compressor": (
        lambda m, ids, cache: retrofitted(compressor=Mamba2)(ids, cache=cache),
        "filled with other memory weights", "another compressor",
        "begin a new cache",
    ),
    "another dtype": (
        lambda m, ids, cache: retrofitted(dtype=torch.float32)(ids, cache=cache), "float64 on cpu",
        "k is torch.float32", "computed anew",
    ),
    "another model": (
        lambda m, ids, cache: retrofitted(model=base(num_key_value_heads=4))(ids, cache=cache),
        "k with 2 heads of 8, the tokens have 4 heads of 8", "another layer or model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("case", MODEL_CALLS)
def test_calls_that_a_model_refuses(case, length):
    """In a text far beyond the window: the cache is bit for bit what it was, and goes on."""
    provoke, *parts = MODEL_CALLS[case]
    model, ids = retrofitted(), tokens(2, LONG + 3)
    new = ids[:, LONG : LONG + length]
    cache = filled(model, ids[:, :LONG])
    before = held(cache)
    with torch.no_grad(), refused(ValueError, *parts):
        provoke(model, new, cache)
    assert equal(held(cache), before)
    with torch.no_grad():
        out = model(new, cache=cache).logits
        expected = model(new, cache=filled(model, ids[:, :LONG])).logits
    assert torch.equal(out, expected)


def offloaded():
    cache = DynamicCache()
    cache.offloading = True
    return cache


CACHES = {
    "quantised": (lambda: QuantizedCache.__new__(QuantizedCache), "of type QuantizedCache", "Leave cache_impl"),
    "of an encoder-decoder": (
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "of type EncoderDecoderCache", "'static'",
    ),
    "offloaded": (offloaded, "cannot use a cache that is offloaded", "Leave cache_implementation unset"),
    "of full attention": (
        lambda: filled(base(), tokens(2, 7)), "layer 0 of this cache holds 7 tokens", "Begin with an empty cache",
    ),
    "static, of full attention": (
        lambda: filled(base(), tokens(2, 7), StaticCache(config=base().config, max_cache_len=32)),
        "layer 0 of this cache holds 7 tokens", "Begin with an empty cache",
    ),
    "filled inside full_attention": (
        lambda: filled_inside(full_attention), "holds 7 tokens of full attention", "Begin with an empty cache",
    ),
    "filled inside window_only": (lambda: filled_inside(window_only), "made without the long-term", "Keep to one mode"),
    "of a model without memory": (
        lambda: filled(retrofitted(compressor=None), tokens(2, 7)), "made without the long-term", "state=None",
    ),
}  # fmt: skip


def filled_inside(switch):
    model = retrofitted()
    with switch(model):
        return filled(model, tokens(2, 7))


@pytest.mark.parametrize("case", CACHES)
def test_caches_that_a_model_refuses(case):
    make, *parts = CACHES[case]
    model, cache = retrofitted(), make()
    before = held(cache) if "holds" in parts[0] or "made" in parts[0] else None
    for length in (1, 3):
        with torch.no_grad(), refused(ValueError, *parts):
            attend(model, cache, length)
    if before is not None:
        assert equal(held(cache), before)
        with torch.no_grad(), refused(ValueError, *parts):
            model(tokens(2, 1), cache=cache)
        assert equal(held(cache), before)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="transformers asks for a CUDA stream"
)
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_generate_with_an_offloaded_cache_is_refused(kind):
    with refused(ValueError, "cannot use a cache that is offloaded", "Leave cache_implementation unset"):
        generate(retrofitted(), tokens(1, LONG), cache_implementation=kind)


def test_a_cache_on_another_device_is_refused():
    model, ids = retrofitted(), tokens(1, LONG)
    cache = HippocampalCache.of(filled(model, ids)).clone("meta")
    with (
        torch.no_grad(),
        refused(ValueError, "float64 on meta, k is torch.float64 on cpu", "cache.clone(device)"),
    ):
        model(ids[:, :1], cache=cache)


def test_tokens_that_were_folded_cannot_be_taken_back():
    model, ids = retrofitted(), tokens(2, LONG + 1)
    cache = filled(model, ids[:, :LONG])
    before = held(cache)
    with refused(RuntimeError, "crop(-3): 0 tokens are recorded", "activate_past_recording()", "clone"):
        cache.crop(-3)
    assert equal(held(cache), before)
    static = StaticCache(config=model.config, max_cache_len=64)
    filled(model, ids[:, :LONG], static)
    with refused(RuntimeError, "crop(-1): a static memory cannot be cropped", "dynamic cache"):
        static.layers[0].crop(-1)


def test_a_beam_that_is_not_there():
    cache = filled(retrofitted(), tokens(2, LONG))
    before = held(cache)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    assert equal(held(cache), before)
