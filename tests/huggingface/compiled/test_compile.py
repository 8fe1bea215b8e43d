"""``torch.compile``: whole graphs without a break, and one graph for all of decoding with a static cache."""

# ruff: noqa: F811 - fixtures are imported

import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...methods import NAMES
from .graphs import HEADS, SIZE, Graphs, columns, fresh, models, same_states, store_and_tokens  # noqa: F401 - fixtures


def test_compiled_models_notice_packed_texts(models):
    """They read one text a row, and assert that there is no second."""
    model, row = models.retrofitted(), models.tokens(1, 30)
    compiled = torch.compile(model, backend="eager")
    positions = torch.cat((torch.arange(20), torch.arange(10)))[None]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="begin again"):
            compiled(row, position_ids=positions, use_cache=False)
        assert compiled(row, position_ids=torch.arange(30)[None], use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    "compressor, padded",
    [*((name, False) for name in (*NAMES, None)), *((name, True) for name in ("GatedDeltaNet", "MaxPooling", None))],
)
def test_a_store_is_one_graph(compressor, padded, models):
    ahn = sys.modules["ahn_layers"]
    store, tokens = store_and_tokens(ahn, compressor)
    valid = torch.rand(2, 30) < 0.7 if padded else torch.ones(2, 30, dtype=torch.bool)
    compiled = torch.compile(store, fullgraph=True, dynamic=False, backend="eager")
    state = expected_state = None
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 21), (21, 30)):
            mask = {"valid": valid[:, start:stop]} if padded else {}
            out, state = compiled(*columns(tokens, start, stop), state, **mask)
            expected, expected_state = store(*columns(tokens, start, stop), expected_state, **mask)
            if padded:  # compiled code does not cut a call where real tokens go on after padding
                follows = (mask["valid"].flip(1).cumsum(dim=1) == 0).flip(1)
                shown = (mask["valid"] | follows)[:, None, :, None]
                out, expected = out.masked_fill(~shown, 0), expected.masked_fill(~shown, 0)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    same_states(state, expected_state)


def test_gradients_of_a_compiled_store(models):
    store, tokens = store_and_tokens(sys.modules["ahn_layers"], "GatedDeltaNet")
    gradients = []
    for run in (store, torch.compile(store, fullgraph=True, backend="aot_eager_decomp_partition")):
        out, _ = run(*tokens)
        gradients.append(torch.autograd.grad(out.square().sum(), list(store.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    """A user's block."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, 16)

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def test_a_custom_block_is_one_graph(models):
    ahn = sys.modules["ahn_layers"]
    memory = ahn.GatedDeltaNet(16, HEADS, SIZE)
    layer = ahn.HippocampalAttention(Block(), ahn.MemoryStore(ahn.Window(5, num_sinks=2), memory)).double()
    nn.init.normal_(memory.o_proj.weight)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
    state = expected_state = None
    with torch.no_grad():
        for part in x.split([20, 1, 9], dim=1):
            out, state = compiled(part, state)
            expected, expected_state = layer(part, expected_state)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    same_states(state, expected_state)


@pytest.mark.parametrize("training", [False, True])
def test_tokens_that_are_folded_one_by_one_are_left_to_python(training, models):
    """Compiled code does not grow with the text: the compiler would repeat fold and read for each token."""
    ahn, sizes = sys.modules["ahn_layers"], []

    class Fading(ahn.Compressor):
        def fold(self, state, k, v):
            return 0.9 * state + ahn.outer(k, v)

    layer = ahn.HippocampalAttention(Block(), ahn.MemoryStore(ahn.Window(5), Fading(16, HEADS, SIZE))).double()
    nn.init.normal_(layer.memory.compressor.o_proj.weight)

    def count(graph, _):
        sizes[-1] += len(graph.graph.nodes)
        return graph.forward

    for length in (30, 60):
        torch._dynamo.reset()
        sizes.append(0)
        x = torch.randn(2, length, 16, dtype=torch.float64)
        compiled = torch.compile(layer, dynamic=False, backend=count)
        with torch.set_grad_enabled(training):
            (out, state), (expected, expected_state) = compiled(x), layer(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        same_states(state, expected_state)
        if training:
            grads = [torch.autograd.grad(u.square().sum(), list(layer.parameters())) for u in (out, expected)]
            torch.testing.assert_close(*grads, rtol=0, atol=1e-9)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_uncached_forward_is_one_graph(name, models):
    model, ids = models.retrofitted(name), models.tokens(2, 3 * models.CAPACITY)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    with torch.no_grad():
        out = compiled(input_ids=ids, use_cache=False).logits
    assert graphs.count == 1
    torch.testing.assert_close(out, models.logits(model, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_pads", [0, 99])
def test_padding_on_the_left_has_any_positions(of_pads, models):
    model, ids = models.retrofitted(), models.tokens(2, 2 * models.CAPACITY)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, of_pads)}
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    with torch.no_grad():
        one, other = (run(input_ids=ids, use_cache=False, **given).logits for run in (compiled, model))
    torch.testing.assert_close(one[0, 5:], other[0, 5:], rtol=0, atol=1e-9)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-9)


def test_gradients_of_a_compiled_model(models):
    ahn = sys.modules["ahn_layers"]
    model, ids = models.retrofitted(), models.tokens(2, 3 * models.CAPACITY)
    memory = [parameter for _, parameter in ahn.adapter_parameters(model)]
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")):
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, memory))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # norms are float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_as_they_do_without(checkpointing, models):
    """Teacher and student, whose first layer gets no gradient; the second window makes code for all the others."""
    distillation, graphs = importlib.import_module("ahn_layers.distillation"), Graphs()
    model, ids = models.retrofitted(), models.tokens(2, 9 * models.CAPACITY)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    memory = distillation.freeze_base(model)

    def gradients(window, **options):
        with distillation.use_window(model, *window):
            found = distillation.distillation_loss(model, ids, ce_weight=0.5, **options)
            return torch.autograd.grad(found.loss, memory)

    windows = [(6, 2), (12, 3), (33, 3)]
    expected = [gradients(window) for window in windows]
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False, recompile_limit=8):  # put back at the end
        distillation.compile_layers(model, fullgraph=not checkpointing, backend=graphs.backend)
        counts = []
        for window, others in zip(windows, expected, strict=True):
            for one, other in zip(gradients(window), others, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # norms are float32
            counts.append(graphs.count)
        assert counts[0] == 3 and counts[1] <= 5 and counts[1:] == counts[1:2] * 2
        gradients((30, 4), layer_weight=0.3)  # eager: hooks tell layers apart
        distillation.align_layers(model, ids)
        assert graphs.count == counts[-1]
    with pytest.raises(ValueError, match="Linear has no HippocampalAttention: call retrofit"):
        distillation.compile_layers(nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", ["GatedDeltaNet", "Mamba2"])
def test_compiled_layers_on_the_gpu(compressor, models):
    """The fused kernels inside compiled code: about as far from float32 as without, for odd lengths too."""
    ahn, distillation = sys.modules["ahn_layers"], importlib.import_module("ahn_layers.distillation")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).cuda().bfloat16()
    model = ahn.retrofit(base, ahn.Compressor.by_name[compressor], window_size=200, num_sinks=8)
    memory = distillation.freeze_base(model)
    for parameter in memory:
        parameter.data += 0.05 * torch.randn_like(parameter)
    exact = copy.deepcopy(model).float()
    ids, goal = torch.randint(64, (2, 1504), device="cuda"), torch.randn(2, 1504, 256, device="cuda")

    def gradients(model, length, window):
        with distillation.use_window(model, *window):
            x = model.get_input_embeddings()(ids[:, :length]).detach().requires_grad_()
            hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        names, given = zip(*ahn.adapter_parameters(model), strict=True)
        found = torch.autograd.grad((hidden.float() * goal[:, :length]).sum(), [x, *given])
        return dict(zip(["x", *names], found, strict=True))

    cases = [(1504, (248, 8)), (1504, (500, 12)), (1500, (248, 8)), (1504, (700, 4)), (1504, (247, 8))]
    expected = [gradients(exact, *case) for case in cases]
    eager = [gradients(model, *case) for case in cases]
    errors = {}
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False, recompile_limit=8):
        distillation.compile_layers(model, fullgraph=True)
        for case, right, others in zip(cases, expected, eager, strict=True):
            for name, found in gradients(model, *case).items():
                near, far = (float((u - right[name]).norm() / right[name].norm()) for u in (others[name], found))
                if far > 3 * near + 0.05:
                    errors[case, name] = (near, far)
    assert not errors
