"""The tests see wrong shapes: the checks around the library's functions are there, and can be taken off."""

import ast
import inspect
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

import ahn_layers
from ahn_layers.ops.pointwise.normalize import rms_normalize

from .checking import jaxtyped

MODULES = sorted(Path(inspect.getfile(ahn_layers)).parent.rglob("*.py"))


def add(x: Float[Tensor, "b t"], y: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    return x + y


def flat(x: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    return x.flatten()


def first(x: Float[Tensor, "b t"], count: int) -> Float[Tensor, "b {count}"]:
    return x[:, :2]


def count(x: list[int]) -> int:
    return len(x) if x else "none"


WRONG = {
    "axes that differ": (add, torch.ones(2, 3), torch.ones(2, 1)),
    "a dtype": (add, torch.ones(2, 3).int(), torch.ones(2, 3).int()),
    "a result's shape": (flat, torch.ones(2, 3)),
    "a size that an argument gives": (first, torch.ones(2, 3), 3),
    "a type": (count, "text"),
    "a result's type": (count, []),
}


@pytest.mark.parametrize("function, arguments", [(f, rest) for f, *rest in WRONG.values()], ids=WRONG)
def test_what_does_not_fit_is_an_error(function, arguments):
    checked = jaxtyped(typechecker=None)(function)
    with pytest.raises((BeartypeCallHintViolation, jaxtyping.TypeCheckError)):
        checked(*arguments)


def test_sizes_of_one_call_do_not_bind_another():
    checked = jaxtyped(typechecker=None)(add)
    assert checked(torch.ones(2, 3), torch.ones(2, 3)).shape == (2, 3)
    assert checked(torch.ones(4, 5), torch.ones(4, 5)).shape == (4, 5)


def test_the_library_is_checked():
    with pytest.raises(BeartypeCallHintViolation):
        rms_normalize("text")


def test_checks_can_be_taken_off(unchecked):
    assert jaxtyped(typechecker=None)(flat)(torch.ones(2, 3)).shape == (6,)


def test_no_nested_function_is_annotated_with_shapes():
    """They are not checked."""
    for path in MODULES:
        functions = [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]
        for nested in (f for outer in functions for f in ast.walk(outer) if f is not outer):
            if isinstance(nested, ast.FunctionDef):
                parameters = [*nested.args.posonlyargs, *nested.args.args, *nested.args.kwonlyargs]
                annotations = [nested.returns, *(p.annotation for p in parameters)]
                assert "[Tensor, '" not in " ".join(ast.unparse(a) for a in annotations if a), f"{path}: {nested.name}"
