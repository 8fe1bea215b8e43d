"""Kernels of flash-linear-attention: when they run, what they are given, and that they are right, which needs a GPU."""

import sys
import types
import warnings

import pytest
import torch
from torch.nn import functional as F

from ahn_layers.ops.recurrence import flash_linear, forms
from ahn_layers.ops.recurrence.channel_scan import channel_scan, rank_one_scan

KINDS = ("gla", "kda", "rwkv7")


def inputs(kind, *, tokens=70, states=2, heads=4, groups=2, d=16, e=24, dtype=torch.float32, strong=False):
    """Arguments of a scan; keys and values of the key/value heads, gates of the states."""
    mixed = -5 * torch.rand(2, states, tokens, d) ** 4
    if strong:
        mixed = mixed * torch.where(torch.rand_like(mixed) < 0.3, 10.0, 1e-2)
    given = {
        "state": torch.randn(2, states, d, e),
        "q": (d**-0.5 * torch.randn(2, heads, tokens, d)).to(dtype),
        "k": F.normalize(torch.randn(2, groups, tokens, d), dim=-1).to(dtype),
        "v": torch.randn(2, groups, tokens, e).to(dtype),
        "g": mixed,
    }
    if kind == "kda":
        given["beta"] = torch.rand(2, states, tokens)
    if kind == "rwkv7":
        given["g"] = 0.6 * mixed.clamp(min=-1)  # as RWKV-7 has it
        given["a"] = F.normalize(torch.randn(2, states, tokens, d), dim=-1).to(dtype)
        given["b"] = (-torch.rand(2, states, tokens, d) * given["a"]).to(dtype)
    return given


def scan(kind, given, **options):
    return (rank_one_scan if kind == "rwkv7" else channel_scan)(**given, **options)


def recurrent(q, k, v, g, strength, a, b, scale, state):
    """The recurrences once more, in the layout of flash-linear-attention, ``(B, T, H, D)``."""
    reads = []
    for t in range(q.shape[1]):
        before, state = state, state * g[:, t].exp()[..., None]
        if a is not None:
            state = state + b[:, t][..., None] * torch.einsum("bhd,bhde->bhe", a[:, t], before)[:, :, None]
        written = v[:, t]
        if strength is not None:
            written = strength[:, t][..., None] * (written - torch.einsum("bhd,bhde->bhe", k[:, t], state))
        state = state + k[:, t][..., None] * written[:, :, None]
        reads.append(torch.einsum("bhd,bhde->bhe", scale * q[:, t], state))
    return torch.stack(reads, dim=1), state


@pytest.fixture
def stand_in(monkeypatch):
    """Something in the place of the package that computes the same, in its layout."""

    def checked(**u):
        initial = u.pop("initial_state")
        heads = {x.shape[2] for x in u.values() if isinstance(x, torch.Tensor)}
        assert u.pop("output_final_state") and heads == {initial.shape[1]}
        assert all(x.is_contiguous() for x in u.values() if isinstance(x, torch.Tensor))
        return recurrent(**u, state=initial)

    none = {"strength": None, "a": None, "b": None}
    kernels = {
        "gla": {"chunk_gla": lambda q, k, v, g, **o: checked(q=q, k=k, v=v, g=g, **none | o)},
        "kda": {
            "chunk_kda": lambda q, k, v, g, beta, **o: checked(q=q, k=k, v=v, g=g, **none | {"strength": beta} | o)
        },
        "rwkv7": {
            "chunk_rwkv7": lambda r, w, k, v, a, b, **o: checked(q=r, k=k, v=v, g=w, **none | {"a": a, "b": b} | o)
        },
    }
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, functions in kernels.items():
        module = types.ModuleType(f"fla.ops.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)


@pytest.mark.parametrize("states, groups", [(4, 4), (4, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_given_the_same_recurrence(kind, states, groups, stand_in):
    given = inputs(kind, states=states, groups=groups)
    expected = scan(kind, given)
    run = flash_linear.rank_one_scan if kind == "rwkv7" else flash_linear.channel_scan
    found = run(**{"beta": None} | given if kind == "gla" else given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("found", ["0.5.2", "0.7.0", ""])
def test_other_releases_are_not_used_and_it_is_said_once(found, monkeypatch, unchecked):
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 9, 64))
    state = torch.zeros(1, 1, 64, 64)
    monkeypatch.setattr(forms, "_said", [])
    monkeypatch.setattr(forms, "_FOUND", "0.6.3")
    assert forms.runs_in_fla(state, on_gpu) and not forms.runs_in_fla(state, state)
    monkeypatch.setattr(forms, "_FOUND", found)
    with pytest.warns(UserWarning, match=rf"fla-core is {found or 'not installed'}, expected 0\.6\.x"):
        assert not forms.runs_in_fla(state, on_gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not forms.runs_in_fla(state, on_gpu)


def relative(one, other):
    one, other = (u.detach().double().cpu() for u in (one, other))
    return float((one - other).norm() / other.norm())


def naive(kind, given):
    """The token-by-token form of flash-linear-attention itself, in float32."""
    wide = {name: u.float() for name, u in given.items()}
    heads = wide["q"].shape[1]
    state = wide.pop("state").repeat_interleave(heads // given["state"].shape[1], 1)
    u = {name: x.repeat_interleave(heads // x.shape[1], 1) for name, x in wide.items()}
    u["q"] = u["q"] * u["q"].shape[-1] ** 0.5  # it scales them by that
    if kind == "rwkv7":
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

        return dplr_recurrence(u["q"], u["k"], u["v"], u["a"], u["b"], u["g"], initial_state=state)
    u = {name: x.transpose(1, 2) for name, x in u.items()}
    if kind == "gla":
        from fla.ops.gla.naive import naive_recurrent_gla as run

        r, end = run(u["q"], u["k"], u["v"], u["g"], initial_state=state, output_final_state=True)
    else:
        from fla.ops.kda.naive import naive_recurrent_kda as run

        r, end = run(u["q"], u["k"], u["v"], u["g"], u["beta"], initial_state=state, output_final_state=True)
    return r.transpose(1, 2), end


@pytest.mark.parametrize("states", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_form_is_the_one_of_the_package(kind, states):
    """Its own loop, which needs Triton to be imported, and no GPU."""
    pytest.importorskip("fla")
    given = inputs(kind, states=states, heads=4, groups=2, e=16, strong=True)
    given = {name: u.requires_grad_() for name, u in given.items()}
    results = []
    for outs in (scan(kind, given), naive(kind, given)):
        outs = outs[0], outs[1][:, :: outs[1].shape[1] // states]
        weights = [torch.ones_like(u).cumsum(-1) for u in outs]
        results.append([*outs, *torch.autograd.grad(outs, list(given.values()), weights)])
    assert all(relative(one, other) < 3e-6 for one, other in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("strong", [False, True], ids=["", "strong"])
@pytest.mark.parametrize("states, heads, tokens, d", [(9, 9, 300, 64), (3, 9, 129, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_the_plain_form_and_the_naive_one(kind, states, heads, tokens, d, strong):
    """Values and gradients in bfloat16: against float64, whose inputs are rounded too, and against its own loop."""
    pytest.importorskip("fla")
    flash_linear.without_autotuning()
    sizes = {"tokens": tokens, "states": states, "heads": heads, "groups": 3, "d": d, "e": d}
    given = inputs(kind, **sizes, dtype=torch.bfloat16, strong=strong)
    weights = [torch.randn(2, heads, tokens, d).bfloat16(), torch.randn(2, states, d, d)]

    def run(compute, convert):
        u = {name: convert(x).requires_grad_() for name, x in given.items()}
        outs = compute(u)
        if outs[1].shape[1] != states:
            outs = outs[0], outs[1][:, :: heads // states]
        grads = torch.autograd.grad(outs, list(u.values()), [w.to(o) for w, o in zip(weights, outs, strict=True)])
        return [*outs, *grads]

    kernels = run(lambda u: scan(kind, u), lambda x: x.cuda())
    assert kernels[0].dtype == torch.bfloat16 and kernels[1].dtype == torch.float32, "no kernel ran"
    plain = run(lambda u: scan(kind, u, chunk_size=32), lambda x: x.double())
    loop = run(lambda u: naive(kind, u), lambda x: x.cuda())
    names = ["readings", "end", *given]
    against = {
        name: (relative(a, b), relative(c, b)) for name, a, b, c in zip(names, kernels, plain, loop, strict=True)
    }
    print(kind, states, tokens, "strong" if strong else "", {n: f"{a:.1e} {b:.1e}" for n, (a, b) in against.items()})
    assert all(own < 1e-2 for _, own in against.values()), against  # the naive form is ours
    assert all(error < 2e-2 for error, _ in against.values()), against


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["GLA", "KDA", "RWKV7", "Titans", "AveragePooling", "RetNet", "GatedDeltaProduct"])
def test_a_compressor_on_a_gpu_is_what_it_is_on_a_cpu(name):
    """Folding and reading in bfloat16 against float64, values and the gradients of all parameters."""
    from ahn_layers import Compressor

    memory = Compressor.by_name[name](96, 6, 64, num_kv_heads=2)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    q, k, v = torch.randn(2, 6, 200, 64), torch.randn(2, 2, 200, 64), torch.randn(2, 2, 200, 64)
    x, weight, results = torch.randn(2, 200, 96), torch.randn(2, 6, 200, 64), []
    q, k, v, x = (u.bfloat16() for u in (q, k, v, x))
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        memory = memory.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        given = [u.to(device, dtype) for u in (q, k, v, x)]
        like = torch.zeros((), device=device, dtype=torch.promote_types(dtype, torch.float32))
        gates = {n: g.to(dtype) for n, g in memory.gates(given[3]).items()}
        r, _ = memory.scan(memory.init_state(2, like), *given[:3], gates)
        out = memory.output(r, given[3])
        grads = torch.autograd.grad((out * weight.to(out)).sum(), list(memory.parameters()), materialize_grads=True)
        results.append([out, *grads])
    names = ["output", *(n for n, _ in memory.named_parameters())]
    errors = {n: relative(b, a) for n, a, b in zip(names, *results, strict=True) if a.norm() > 1e-6}
    print(name, {n: f"{e:.1e}" for n, e in errors.items()})
    assert all(error < 0.05 for error in errors.values()), errors
