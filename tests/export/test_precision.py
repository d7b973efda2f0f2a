"""Which types the parts of a graph have."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mdm.export
from mdm.export.precision import ISLANDS, PRECISIONS, ROLES, make_precision
from mdm.plugins.errors import InputError

SOURCES = sorted(Path(mdm.export.__file__).parent.glob("*.py"))
HALF = pytest.mark.parametrize("name", ["fp16", "bf16"])
ROLE_PLACE = {"dtype": 0, "linear": 3, "embedding": 3}  # of the argument that is a role


@HALF
@pytest.mark.parametrize("role", ISLANDS)
def test_islands_stay_float32(name: str, role: str) -> None:
    assert make_precision(name).dtype(role, "backbone.blocks.3") == "float32"


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("role", ROLES)
def test_work_has_the_type_asked_for(name: str, role: str) -> None:
    assert make_precision(name).dtype(role, "backbone.blocks.3") == PRECISIONS[name]


@HALF
def test_patterns_keep_whole_paths(name: str) -> None:
    precision = make_precision(name, ["backbone.blocks.4?.*", "vae", "*.out_proj"])
    kept = ("backbone.blocks.48.mixers.0.in_proj", "backbone.blocks.40.skip", "vae", "backbone.blocks.1.x.out_proj")
    other = ("backbone.blocks.4.skip", "backbone.blocks.48", "vae.text_in", "Vae", "x.backbone.blocks.48.skip")
    assert {precision.dtype("mixer", path) for path in kept} == {"float32"}
    assert {precision.dtype("mixer", path) for path in other} == {PRECISIONS[name]}


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="'fp8', expected one of: fp32, fp16, bf16"):
        make_precision("fp8")


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(KeyError, match="mixr"):
        make_precision("fp16").dtype("mixr", "backbone")


def roles_in(path: Path) -> set[str]:
    """The text constants that a source hands over as roles."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            place = ROLE_PLACE.get(name, len(node.args))
            role = node.args[place] if place < len(node.args) else None
            if isinstance(role, ast.Constant) and isinstance(role.value, str):
                found.add(role.value)
    return found


def test_every_role_has_its_line_and_every_line_its_use() -> None:
    used = set.union(*map(roles_in, SOURCES))
    assert used == ISLANDS.keys() | set(ROLES)
