"""Products of matrices and a single row, put together: a pass over the graph of a decode step before it is compiled."""

import operator
from collections import defaultdict

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from .triton_forms import has_triton


def merge_matvecs(graph: Graph) -> None:
    """Linear layers that are given the same row become one operation, ``ahn_layers::matvec``, in place.

    A layer on its own takes the sum with the residual in as well.

    Left alone are rows in other precisions than half, several rows at once, and weights that the graph computes.

    Args:
        graph: as TorchDynamo made it.
    """
    groups: dict[Node, list[tuple[Node, Node, Node | None]]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.linear, torch._C._nn.linear) and _is_matvec(node):
            x, weight, *bias = (_source(u) for u in node.args)
            groups[x].append((node, weight, bias[0] if bias else None))  # type: ignore[index, arg-type]
    for linears in groups.values():
        _merge(graph, linears)


def _merge(graph: Graph, linears: list[tuple[Node, Node, Node | None]]) -> None:
    from . import triton_matvec

    for first in range(0, len(linears), triton_matvec.MOST):
        nodes, weights, biases = (list(u) for u in zip(*linears[first : first + triton_matvec.MOST], strict=True))
        x = _source(nodes[0].args[0])  # as it is now: a merge before this one may have put another in its place
        total = _sum_with_residual(nodes[0]) if len(nodes) == 1 else None
        if total is not None:
            residual = next(u for u in total.args if u is not nodes[0])
            with graph.inserting_before(total):
                merged = graph.call_function(torch.ops.ahn_layers.matvec.default, (x, weights, biases, residual))
                _replace(graph, total, merged)
            graph.erase_node(total)
            graph.erase_node(nodes[0])
            continue
        with graph.inserting_before(nodes[0]):
            merged = graph.call_function(torch.ops.ahn_layers.matvec.default, (x, weights, biases))
        start = 0
        for node in nodes:
            shape = _value(node).shape
            with graph.inserting_before(node):
                _replace(graph, node, graph.call_function(torch.narrow, (merged, 0, start, shape[-1])))
            graph.erase_node(node)
            start += shape[-1]


def _replace(graph: Graph, node: Node, flat: Node) -> None:
    """Put the elements of ``flat``, in the shape of ``node``, in its place."""
    shaped = graph.call_function(torch.reshape, (flat, tuple(_value(node).shape)))
    shaped.meta["example_value"] = _value(node)  # what stands after it in the graph looks at it
    node.replace_all_uses_with(shaped)


def _sum_with_residual(linear: Node) -> Node | None:
    """The sum that is the only use of a layer's output, if both summands are alike."""
    users = list(linear.users)
    if len(users) != 1 or users[0].target not in (operator.add, torch.add) or users[0].kwargs:
        return None
    values = [_value(u) for u in users[0].args]
    same = all(isinstance(u, Tensor) for u in values) and len({(u.shape, u.dtype, u.device) for u in values}) == 1
    return users[0] if same else None


def _is_matvec(node: Node) -> bool:
    x = _value(node.args[0])
    given = [u for u in (_source(u) for u in node.args[1:]) if u is not None]
    return (
        not node.kwargs
        and x is not None
        and has_triton(x)
        and x.numel() == x.shape[-1]
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(u.op in ("placeholder", "get_attr") for u in given)
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
