"""Files know a class by its name, which must not mean two of them."""

import gc

import pytest

from ahn_layers import Compressor, DeltaNet, GatedDeltaNet, outer


def define(module="somewhere", qualname="Twice"):
    """A new compressor class called ``Twice``."""

    def fold(self, state, k, v):
        return state + outer(k, v)

    return type("Twice", (Compressor,), {"fold": fold, "__module__": module, "__qualname__": qualname})


def test_two_classes_cannot_have_one_name():
    first = define()
    with pytest.raises(ValueError, match=r"second compressor class is called 'Twice': elsewhere.Twice, after some"):
        define("elsewhere")
    with pytest.raises(ValueError, match=r"somewhere.Outer.Twice, after somewhere.Twice"):
        define(qualname="Outer.Twice")
    with pytest.raises(ValueError, match="called 'GatedDeltaNet'"):
        type("GatedDeltaNet", (DeltaNet,), {"__module__": "elsewhere"})
    assert Compressor.by_name["Twice"] is first and Compressor.by_name["GatedDeltaNet"] is GatedDeltaNet


def test_a_class_that_is_defined_again_replaces_the_old_one():
    first = define()
    second = define()
    assert Compressor.by_name["Twice"] is second is not first


def test_a_class_that_nobody_can_use_any_more_does_not_count():
    gc.disable()
    try:
        define()
        assert define("elsewhere") is Compressor.by_name["Twice"]
    finally:
        gc.enable()
