"""LoRA on top of a retrofitted model, and below it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ahn_layers import adapter_parameters, full_attention, load_adapter, memory_report, restore, save_adapter

from ..models import CAPACITY, base, generate, greedy, logits, retrofitted, tokens, train_memory
from .retrofits import LONG, blocks, same_memory


def with_lora(model, **options):
    """A LoRA that changes something, the same at every call."""
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lora.eval()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_lora_on_top(name):
    ids, model = tokens(2, LONG), retrofitted(name, torch.float32)
    before = logits(model, ids)
    lora = with_lora(model)
    after = logits(lora, ids)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(generate(lora, ids), greedy(lora, ids, 8))
    # within the window it is LoRA on the base model
    plain = with_lora(base(name, torch.float32))
    assert torch.equal(logits(lora, ids[:, :CAPACITY]), logits(plain, ids[:, :CAPACITY]))
    with full_attention(lora):
        assert torch.equal(logits(lora, ids), logits(plain, ids))
    with lora.disable_adapter():
        assert torch.equal(logits(lora, ids), before)
    merged = lora.merge_and_unload()
    assert len(blocks(merged)) == 3 and not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, ids), after, rtol=0, atol=2e-4)
    assert torch.equal(generate(merged, ids), generate(lora, ids))
    restore(merged)
    torch.testing.assert_close(logits(merged, ids), logits(plain.merge_and_unload(), ids), rtol=0, atol=2e-4)


def test_lora_does_not_swallow_the_memory(tmp_path):
    model = retrofitted(dtype=torch.float32)
    own = [name for name, _ in adapter_parameters(model)]
    lora = with_lora(model)
    assert [name for name, _ in adapter_parameters(lora)] == [f"base_model.model.{name}" for name in own]
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all("lora" in name for name in trained)
    assert len(memory_report(lora).splitlines()) == 6
    save_adapter(lora, tmp_path)
    for other in (with_lora(retrofitted(dtype=torch.float32)), base(dtype=torch.float32)):
        if blocks(other):
            train_memory(other, seed=1)
        load_adapter(other, tmp_path)
        assert same_memory(other, model)


def test_a_model_inside_lora_can_be_retrofitted_and_restored():
    ids = tokens(2, LONG)
    lora = with_lora(base(dtype=torch.float32))
    plain = logits(lora, ids)
    retrofitted(model=lora.get_base_model())
    torch.testing.assert_close(logits(lora, ids), logits(with_lora(retrofitted(dtype=torch.float32)), ids))
    with full_attention(lora):
        assert torch.equal(logits(lora, ids), plain)
    assert restore(lora) is lora
    assert torch.equal(logits(lora, ids), plain)
