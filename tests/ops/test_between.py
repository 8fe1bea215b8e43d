"""The kernels for kept tokens over many queries, against plain PyTorch: in Triton's interpreter, and on a GPU."""

import pytest
import torch

from ahn_layers import GatedDeltaNet, MemoryStore, Rotary, SalientSlots, Window
from ahn_layers.ops.attention import flash_attention
from ahn_layers.ops.attention.between import Between
from ahn_layers.ops.slots.top_slots import running_top

from ..interpreted import run_in_the_interpreter

TOP = [(1, 2, 5, 40), (2, 1, 70, 150), (1, 1, 64, 64), (1, 1, 3, 2)]  # rows, key/value heads, slots, arrivals
# rows, query heads, key/value heads, queries, slots, size of keys and values
ATTENTION = [(2, 4, 2, 300, 20, 16), (1, 3, 1, 70, 90, 40), (1, 2, 2, 513, 4, 64)]


def check_top(device, b, g, slots, count):
    """Equal priorities, infinite ones and some that are no numbers, slots half filled, places where none arrives."""
    held, arriving = torch.randn(b, g, slots).round(decimals=1), torch.randn(b, g, count).round(decimals=1)
    arriving[..., ::7], arriving[..., 3:4], held[..., 1:2] = float("-inf"), float("nan"), float("inf")
    where = torch.rand(b, g, count) > 0.1
    order = torch.cat(
        (torch.stack([torch.randperm(slots) for _ in range(g)]), slots + torch.arange(count).expand(g, -1)), 1
    )
    for filled in (torch.zeros(b, g).long(), torch.full((b, g), slots // 2), torch.full((b, g), slots)):
        priority, ranks = torch.cat((held, arriving), dim=2), torch.stack([order] * b)
        expected = running_top(priority.double(), ranks, filled, where)  # float64 never runs in the kernel
        found = running_top(*(u.to(device) for u in (priority, ranks, filled, where)))
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), other)


def check_attention(device, dtype, tolerance, b, h, g, queries, slots, d):
    """Against the mask written out; queries that see nothing get zeros."""
    keys = slots + queries
    q, k, v = (torch.randn(b, n, t, d).to(dtype) for n, t in ((h, queries), (g, keys), (g, keys)))
    first = (torch.arange(keys) - slots).clamp(min=0).expand(b, g, -1)
    life = torch.where(torch.rand(b, g, keys) < 0.6, 0, torch.rand(b, g, keys).square() * 2 * queries).long()
    last = torch.where(torch.rand(b, g, keys) < 0.02, Between.ALWAYS, first + life)
    seen = (first.unsqueeze(2) <= torch.arange(queries)[:, None]) & (torch.arange(queries)[:, None] < last.unsqueeze(2))
    part = Between(*(u.to(device) for u in (k, v, first, last)), most=int(seen.sum(dim=3).amax()))
    out, lse = flash_attention.attend_beside(q.to(device), part, 0.3)
    exact, mask = [u.double() for u in (q, k, v)], seen.repeat_interleave(h // g, dim=1)
    exact[1:] = [u.repeat_interleave(h // g, dim=1) for u in exact[1:]]
    logits = (0.3 * exact[0] @ exact[1].mT).masked_fill(~mask, float("-inf"))
    expected = (logits.softmax(dim=-1).nan_to_num() @ exact[2]).transpose(1, 2)
    assert (out.double().cpu() - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(lse.double().cpu(), logits.logsumexp(dim=-1), rtol=0, atol=20 * tolerance)


def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TOP, (1, 2, 1024, 8192), (2, 8, 352, 5000)])
def test_top_on_the_gpu(case):
    check_top("cuda", *case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*ATTENTION, (1, 16, 2, 3000, 600, 128), (2, 9, 3, 2048, 352, 64)])
def test_attention_on_the_gpu(case, dtype):
    with torch.no_grad():
        check_attention("cuda", dtype, {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype], *case)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_prompts_with_slots_on_the_gpu(size):
    """A store over a text in pieces, some of them full, against float64."""
    sizes = {"hidden_size": 64, "num_heads": 4, "head_dim": size, "num_kv_heads": 2, "value_dim": size}
    torch.manual_seed(0)
    rotary = Rotary(10.0 ** -torch.linspace(0, 4, size // 2, dtype=torch.float64), 1500)
    eviction = SalientSlots(200, score="value_norm", rate=1e-3).for_layer(**sizes)
    store = MemoryStore(Window(1000, 8), GatedDeltaNet(**sizes), rotary, eviction=eviction)
    total, sizes = 4200, [1024, 1024, 1100, 500, 552]
    q, k, v = (torch.randn(1, heads, total, size).bfloat16() for heads in (4, 2, 2))
    x = torch.randn(1, total, 64).bfloat16()
    with torch.no_grad():
        store.double()
        expected, _ = store(*(u.double() for u in (q, k, v, x)))
        store.cuda().bfloat16()
        state, start = None, 0
        for count in sizes:
            out, state = store(*(u.narrow(-2, start, count).cuda() for u in (q, k, v, x)), state)
            part = expected[:, :, start : start + count]
            assert (out.double().cpu() - part).norm() < 2e-2 * part.norm(), start
            start += count


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        for case in TOP:
            check_top("cpu", *case)
        for case in ATTENTION:
            check_attention("cpu", torch.float32, 1e-5, *case)
    print("kernels ran")
