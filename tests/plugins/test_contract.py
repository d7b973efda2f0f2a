"""The contract holds together, and its C++ form says the same."""

from __future__ import annotations

import re

import pytest

from mdm.plugins import contract
from mdm.plugins.contract import OPERATORS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator

SIZES = {"B": 2, "L": 5, "D": 6, "H": 6, "P": 4, "N": 3, "G": 2, "K": 4}


def shapes(operator: Operator, **other: int) -> dict[str, list[int | None]]:
    sizes = SIZES | other
    return {spec.name: [sizes[letter] for letter in spec.dims] for spec in operator.inputs}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_presence_bits_name_the_inputs_there_and_back(operator: Operator) -> None:
    for has in range(operator.has_all + 1):
        names = [spec.name for spec in operator.present(has)]
        assert names == [i.name for i in operator.inputs if i.name in names], "the order is fixed"
        assert operator.has_of(name for name in names if name not in {i.name for i in operator.required}) == has
    more = operator.has_all + 1
    with pytest.raises(ValueError, match=rf"'has' is {more}, expected a sum of 1 \({operator.optional[0].name}\)"):
        operator.present(more)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_shapes_that_fit_pass_and_every_other_is_named(operator: Operator) -> None:
    good = shapes(operator)
    operator.check(good)
    operator.check({name: [None] * len(shape) for name, shape in good.items()})
    for name, shape in good.items():
        with pytest.raises(ValueError, match=rf"{operator.name}: input '{name}' has {len(shape) + 1} dimensions"):
            operator.check(good | {name: [*shape, 1]})
        for axis, letter in enumerate(next(i.dims for i in operator.inputs if i.name == name)):
            if sum(letter in spec.dims for spec in operator.inputs) == 1:
                continue  # any size fits
            wrong = [*shape[:axis], 7, *shape[axis + 1 :]]
            with pytest.raises(ValueError, match=rf"{operator.name}: input '\w+' has \w = \d, '\w+' has \d|divide"):
                operator.check(good | {name: wrong})


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="'Bm' has G = 4, which does not divide H = 6 of 'x'"):
        SSD_SCAN.check(shapes(SSD_SCAN, G=4))
    with pytest.raises(ValueError, match="G = 0"):
        SELECTIVE_SCAN.check(shapes(SELECTIVE_SCAN, G=0))


def test_a_convolution_has_taps() -> None:
    with pytest.raises(ValueError, match="MambaShortConv: input 'weight' has K = 0, expected at least one tap"):
        SHORT_CONV.check(shapes(SHORT_CONV, K=0))


def test_the_cpp_header_lists_every_input() -> None:
    header = contract.cpp_header()
    for operator in OPERATORS.values():
        listed = re.search(rf"struct {operator.name} .*?kGrouped = (\S+);.*?kInputs\[\] = {{(.*?)}};", header, re.S)
        assert listed is not None
        assert listed[1] == (f"'{operator.grouped}'" if "G" in "".join(i.dims for i in operator.inputs) else "0")
        rows = re.findall(r'{"(\w+)", "(\w+)", (true|false), (\d)}', listed[2])
        assert rows == [(i.name, i.dims, str(i.activation).lower(), str(i.bit)) for i in operator.inputs]
