# SPDX-License-Identifier: Apache-2.0
"""The user function that every hand-over calls."""

from collections import OrderedDict

import numpy as np
import pytest

from optax_rms.dialects._shared.converter import Converter


def test_a_function_may_use_its_memory_again():
    memory = np.zeros((3, 2), np.float32)

    def transpose(tree):
        memory[...] = tree["weight"].T
        return {"kernel": memory}

    shape = (2, 3)
    converter = Converter("convert", transpose, {"weight": np.ones(shape, np.float32)})
    first = converter("first", {"weight": np.full(shape, 1.0)})
    converter("second", {"weight": np.full(shape, 2.0)})
    np.testing.assert_array_equal(first["kernel"], 1.0)


def make(function, names=("b", "a"), **options):
    template = OrderedDict((name, np.ones(2, np.float32)) for name in names)
    return Converter("convert", function, template, **options)


def test_functions_are_given_a_dict_in_order():
    """A function that returns its argument then returns a tree that JAX knows."""
    given = []
    slot = OrderedDict((name, np.zeros(2, np.float32)) for name in ("b", "a"))
    result = make(lambda tree: given.append(tree) or tree)("slot", slot)
    assert type(result) is dict
    assert [type(tree) for tree in given] == [dict, dict]
    assert [list(tree) for tree in given] == [["b", "a"]] * 2


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(ValueError, match=r"'c'. The names are \['b', 'a'\]. Strip."):
        make(lambda tree: tree["c"], name_hint="Strip.")
    names = [f"layer{i}" for i in range(12)]
    with pytest.raises(ValueError, match=r"'layer9'\] and 2 more."):
        make(lambda tree: tree["c"], names)


def test_tied_weights_are_named():
    def tie(tree):
        return {"embed": tree["a"], "head": tree["a"], "rest": tree["b"]}

    with pytest.raises(ValueError, match=r"4 came back\. Weights that two layers"):
        make(tie)
    with pytest.raises(ValueError, match=r"0 came back\.$"):
        make(lambda tree: {"b": tree["b"]})
