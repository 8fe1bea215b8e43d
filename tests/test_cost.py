"""The paper's cost figures (arXiv 2510.07318), to the digit, and bytes against real tensors."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ahn_layers import DeltaNet, GatedDeltaNet, Mamba2, SalientSlots, memory_report, restore, retrofit
from ahn_layers.cost import Sizes, cache_ratio, cost_report, memory_parameters, mixing_flops, model_flops, num_gates

L, C = 128_000, 32_768
QWEN_3B = Sizes(36, 2048, 16, 2, 128, 11008, 151936)
QWEN_7B = Sizes(28, 3584, 28, 4, 128, 18944, 152064)
QWEN_14B = Sizes(48, 5120, 40, 8, 128, 13824, 152064)


def test_flops_of_the_3b_model():
    full = model_flops(QWEN_3B, L)
    assert f"{full:.3e}" == "3.286e+15"
    assert f"{100 * model_flops(QWEN_3B, L, C) / full:.2f}" == "59.30"
    assert f"{100 * model_flops(QWEN_3B, L, C, 3) / full:.2f}" == "59.43"
    mixing = mixing_flops(QWEN_3B, L)
    assert f"{100 * mixing_flops(QWEN_3B, L, C) / mixing:.2f}" == "46.57"
    assert f"{100 * mixing_flops(QWEN_3B, L, C, 3) / mixing:.2f}" == "46.74"


def test_flops_of_the_14b_model():
    full = model_flops(QWEN_14B, L)
    assert f"{full / 1e15:.3f}" == "11.834"
    assert f"{100 * model_flops(QWEN_14B, L, C) / full:.2f}" == "62.33"


@pytest.mark.parametrize(("sizes", "percent"), [(QWEN_3B, "26.000"), (QWEN_7B, "25.95"), (QWEN_14B, "25.85")])
def test_cache_ratio(sizes, percent):
    digits = len(percent.split(".")[1])
    assert f"{100 * cache_ratio(sizes, L, C):.{digits}f}" == percent


def test_inside_the_capacity_nothing_is_saved():
    assert model_flops(QWEN_3B, C, C, 3) == model_flops(QWEN_3B, C)
    assert cache_ratio(QWEN_3B, C, C) == 1
    assert cache_ratio(QWEN_3B, L, C, num_states=0) == C / L


@pytest.mark.parametrize(
    ("compressor", "gates", "millions"),
    [
        (GatedDeltaNet, 3, ("12.98", "21.27", "60.95")),
        (DeltaNet, 2, ("11.8", "18.5", "51.1")),
        (Mamba2, 2, ("11.9", "18.6", "51.4")),
    ],
)
def test_parameter_counts_of_the_papers_table(compressor, gates, millions):
    for sizes, expected in zip((QWEN_3B, QWEN_7B, QWEN_14B), millions, strict=True):
        with torch.device("meta"):
            memory = compressor(sizes.hidden_size, sizes.num_heads, sizes.head_dim, num_kv_heads=sizes.num_kv_heads)
        assert num_gates(memory) == gates
        matrices = sizes.num_layers * sum(p.numel() for p in memory.parameters() if p.ndim > 1)
        assert matrices == memory_parameters(sizes, gates)
        # the table counts the matrices, and for Mamba2 also its norm over all heads together
        count = sizes.num_layers * sum(p.numel() for p in memory.parameters()) if compressor is Mamba2 else matrices
        assert f"{count / 1e6:.{len(expected.split('.')[1])}f}" == expected


def small(dtype=torch.float32, **options):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return retrofit(LlamaForCausalLM(config).to(dtype), GatedDeltaNet, window_size=12, num_sinks=4, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [7, 16, 40])
def test_bytes_are_those_of_the_real_tensors(dtype, shared, length):
    model = small(dtype, shared_state=shared)
    row = cost_report(model, [length]).rows[0]
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(length)[None], cache=cache)
    assert row.state_bytes == sum(layer.state.nbytes for layer in cache.layers)
    assert row.full_bytes == 2 * length * 2 * 2 * 8 * dtype.itemsize  # k and v, layers, heads, size


def test_report_prints_plots_and_measures(tmp_path):
    report = cost_report(small(), [16, 64, 256], measure=True)
    text = str(report)
    assert "256" in text and "100.00 %" in text and "measured, 64 tokens, memory" in text
    report.plot(str(tmp_path / "cost.png"))
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_sizes_come_from_any_config():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert Sizes.of(config).head_dim == 16 and Sizes.of(config).num_kv_heads == 2
    with pytest.raises(ValueError, match="hidden_size"):
        Sizes.of(type("Config", (), {"num_hidden_layers": 2})())


def test_a_window_alone_has_no_memory_to_report_on():
    model = retrofit(restore(small()), None, window_size=4)
    with pytest.raises(ValueError, match="without a compressor"):
        cost_report(model, [8])


def test_what_the_formulas_do_not_count_is_refused():
    with pytest.raises(ValueError, match=r"8 slots .* keeps tokens beside the window: the formulas are for sinks"):
        cost_report(small(eviction=SalientSlots(8)), [64])
    with pytest.raises(ValueError, match="length=0: expected a positive whole number"):
        cost_report(small(), [64, 0])


def test_a_report_needs_no_weights():
    """Bytes of a model that is too large to be made here."""
    options = {"eviction": SalientSlots(8)}
    expected = memory_report(small(**options))
    with torch.device("meta"):
        assert memory_report(small(**options)) == expected
