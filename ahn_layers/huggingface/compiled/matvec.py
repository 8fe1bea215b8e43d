"""Merges products of matrices with one row: a pass over the graph of a decode step before it is compiled."""

import operator
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from ...ops.triton_forms import has_triton

_LINEAR = (F.linear, torch._C._nn.linear)
_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)
_HARMLESS: tuple[object, ...] = (
    *_LINEAR, *_ADD, *_MULTIPLY, F.silu, torch.rms_norm, torch.rsqrt, operator.getitem, "to", "float", "pow", "mean",
    "sum", "unsqueeze", "transpose",
)  # fmt: skip
"""Operations that do nothing but return something."""
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""Weights of other classes, quantized ones for example, know themselves what a product with them is."""


def merge_matvecs(graph: Graph) -> None:
    """Linear layers that are given the same row become one operation, ``ahn_layers::matvec``, in place.

    It takes in what stands around them in a decoder layer: the RMS norm of the row, the product of an MLP's two layers
    of which one has gone through SiLU, the sum with the residual after a single layer. What else looks at the normed
    row gets it from there.

    Left alone are rows in other precisions than half, several rows at once, and weights that the graph computes.
    """
    _erase_dead(graph)  # the plain form of what a kernel computes by itself: it would be merged too
    groups: dict[Node, list[_Linear]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR and _is_matvec(node):
            x, weight, *bias = (_source(u) for u in node.args)
            groups[x].append(_Linear(node, weight, bias[0] if bias else None))  # type: ignore[index, arg-type]
    for linears in groups.values():
        _merge(graph, linears)


class _Linear(NamedTuple):
    node: Node
    weight: Node
    bias: Node | None


def _merge(graph: Graph, linears: list[_Linear]) -> None:
    from . import triton_matvec

    for first in range(0, len(linears), triton_matvec.MOST):
        part = linears[first : first + triton_matvec.MOST]
        row = _source(part[0].node.args[0])  # as it is now: a merge before may have put another in its place
        x, *norm = _rms_norm(row) or (row, None, 0.0)
        gated, earliest = _gated(part), part[0].node
        part, end = (part, None) if gated is None else (list(gated[:2]), gated[2])
        nodes, weights, biases = (list(u) for u in zip(*part, strict=True))
        arguments = [x, weights, biases, *norm, gated is not None]
        total = _sum_with_residual(earliest) if len(nodes) == 1 else None
        if total is not None:
            arguments.append(next(u for u in total.args if u is not earliest))
            earliest = end = total
        with graph.inserting_before(earliest):
            merged = graph.call_function(torch.ops.ahn_layers.matvec.default, tuple(arguments))
        if end is not None:
            with graph.inserting_after(merged):
                _replace(graph, end, merged)
            _erase(graph, end)
            continue
        start = 0
        for node in nodes:
            shape = _value(node).shape
            with graph.inserting_before(node):
                _replace(graph, node, graph.call_function(torch.narrow, (merged, 0, start, shape[-1])))
            graph.erase_node(node)
            start += shape[-1]
        if row is not None and norm[0] is not None:
            _share_row(graph, row, merged, start)


def _share_row(graph: Graph, row: Node, merged: Node, start: int) -> None:
    """What still asks for the normed row gets it from the product, behind the ``start`` elements that come first."""
    _erase_dead(graph)
    if row.users and all(merged < user for user in row.users):
        merged.args = (*merged.args, None, True)
        with graph.inserting_after(merged):
            kept = graph.call_function(torch.narrow, (merged, 0, start, _value(row).shape[-1]))
        with graph.inserting_after(kept):
            _replace(graph, row, kept)


def _erase_dead(graph: Graph) -> None:
    """Erase what nothing asks for, among the operations that do nothing but return something."""
    graph.eliminate_dead_code(lambda node: not node.op.startswith("call_") or node.target not in _HARMLESS)


def _replace(graph: Graph, node: Node, flat: Node) -> None:
    """Put the elements of ``flat``, in the shape of ``node``, in its place."""
    shaped = graph.call_function(torch.reshape, (flat, tuple(_value(node).shape)))
    shaped.meta["example_value"] = _value(node)  # what stands after it in the graph looks at it
    node.replace_all_uses_with(shaped)


def _erase(graph: Graph, node: Node) -> None:
    """A node that nothing asks for, and what nothing else has asked for before it, back to the linear layers."""
    before = [u for u in node.args if isinstance(u, Node)]
    graph.erase_node(node)
    if node.target not in _LINEAR:
        for u in dict.fromkeys(before):
            if not u.users and u.target in (*_LINEAR, F.silu):
                _erase(graph, u)


def _sum_with_residual(linear: Node) -> Node | None:
    """The sum that is the only use of a layer's output, if both summands are alike."""
    total = _only_user(linear)
    if total is None or total.target not in _ADD or total.kwargs:
        return None
    values = [_value(u) for u in total.args]
    same = all(isinstance(u, Tensor) for u in values) and len({(u.shape, u.dtype, u.device) for u in values}) == 1
    return total if same else None


def _gated(linears: list[_Linear]) -> tuple[_Linear, _Linear, Node] | None:
    """The layer that goes through SiLU, the other one, and their product, if there is no other use of the two."""
    if len(linears) != 2 or _value(linears[0].node).shape != _value(linears[1].node).shape:
        return None
    for gate, other in (linears, linears[::-1]):
        activation, product = _only_user(gate.node), _only_user(other.node)
        if activation is None or activation.target is not F.silu or product is None or product.target not in _MULTIPLY:
            continue
        if _only_user(activation) is product and not product.kwargs:
            return gate, other, product
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _rms_norm(node: Node | None) -> tuple[Node, Node, float] | None:
    """``x``, the weight and epsilon, if this is ``weight * (x / sqrt(mean(x^2) + eps))`` as models write it."""
    for weight, normal in _factors(node):
        for x, root in _factors(_first(normal, "to")):
            total = _first(root, torch.rsqrt)
            mean = _first(total, *_ADD)
            power = _first(mean, "mean")
            row = _source(_first(x, "to"))
            if _first(power, "pow") is not x or row is None or weight.op not in ("placeholder", "get_attr"):
                continue
            eps, exponent, last = total.args[1], power.args[1], mean.args[1:]  # type: ignore[union-attr]
            values = [_value(u) for u in (row, weight, node)]
            alike = len({(u.dtype, u.shape[-1]) for u in values}) == 1 and values[1].is_contiguous()
            if alike and exponent == 2 and last in [(-1,), ([-1],)] and isinstance(eps, float):
                return (row, weight, eps) if _value(x).dtype == torch.float32 else None
    return None


def _factors(node: Node | None) -> list[tuple[Node, Node]]:
    """Both orders of the tensors that a product is made of."""
    if not isinstance(node, Node) or node.target not in _MULTIPLY or not all(isinstance(u, Node) for u in node.args):
        return []
    return [node.args, node.args[::-1]]  # type: ignore[list-item]


def _first(node: object, *targets: object) -> Node | None:
    """What this operation is given first, if it is one of these."""
    return node.args[0] if isinstance(node, Node) and node.target in targets else None  # type: ignore[return-value]


def _is_matvec(node: Node) -> bool:
    x = _value(node.args[0])
    given = [u for u in (_source(u) for u in node.args[1:]) if u is not None]
    return (
        not node.kwargs
        and x is not None
        and has_triton(x)
        and x.numel() == x.shape[-1]
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(u.op in ("placeholder", "get_attr") and type(_value(u)) in _PLAIN for u in given)
        and all(
            _value(u).dtype == x.dtype and _value(u).is_contiguous() and _value(u).device == x.device for u in given
        )
    )


def _value(node: object) -> Tensor:
    return node.meta["example_value"] if isinstance(node, Node) else None  # type: ignore[return-value]


def _source(node: object) -> Node | None:
    """What a chain of ``.to`` begins with that changed nothing."""
    while isinstance(node, Node) and node.op == "call_method" and node.target == "to":
        before = node.args[0]
        if _value(before).dtype != _value(node).dtype or _value(before).device != _value(node).device:
            break
        node = before
    return node  # type: ignore[return-value]
