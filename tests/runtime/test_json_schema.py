"""Strict parsing, and the validator: each keyword, beside the jsonschema package, and the schema it is made for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import manifest_schema
from mdm.runtime.json_schema import TYPES, parse_json, told, validate

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=100)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "const": {"type": "integer", "const": 1},
        "word": {"type": "string", "enum": ["fp32", "fp16"]},
        "size": {"$ref": "#/$defs/size"},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "yes": {"type": "boolean"},
        "short": {"type": ["string", "null"], "minLength": 1, "maxLength": 3, "pattern": "^[a-z]*$"},
        "list": {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1, "maxItems": 3},
        "set": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "sizes": {
            "type": "object", "propertyNames": {"$ref": "#/$defs/key"},
            "additionalProperties": {"$ref": "#/$defs/size"},
        },
        "free": {"type": "object"},
    },
    "required": ["size"],
    "additionalProperties": False,
    "$defs": {
        "size": {"type": "integer", "minimum": 1, "maximum": 20},
        "key": {"type": "string", "pattern": "^[a-z]+$", "description": "small letters"},
    },
}  # fmt: skip

GOOD: dict[str, Any] = {
    "const": 1, "word": "fp16", "size": 20, "share": 1, "yes": True, "short": "abc", "list": [1, "B", -5],
    "set": ["a", "b"], "sizes": {"a": 1, "b": 2}, "free": {"x": {"y": [None, 1.5]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"const": 2}, "'const' is 2\nexpected 1"),
        ({"const": True}, "'const' is True\nexpected integer"),
        ({"const": 1.0}, "'const' is 1.0\nexpected integer"),
        ({"word": "fp8"}, "'word' is 'fp8'\nexpected one of: 'fp32', 'fp16'"),
        ({"word": ["fp16"]}, "'word' is a list of 1\nexpected string"),
        ({"size": 21}, "'size' is 21\nexpected a number from 1 to 20"),
        ({"size": 0}, "'size' is 0\nexpected a number from 1 to 20"),
        ({"size": 2**63}, "'size' is 9223372036854775808\nexpected a number from 1 to 20"),
        ({"size": None}, "'size' is None\nexpected integer"),
        ({"share": 1.01}, "'share' is 1.01\nexpected a number from 0 to 1"),
        ({"share": False}, "'share' is False\nexpected number"),
        ({"yes": 1}, "'yes' is 1\nexpected boolean"),
        ({"short": ""}, "'short' is ''\nexpected 1 to 3 characters"),
        ({"short": "abcd"}, "'short' is 'abcd'\nexpected 1 to 3 characters"),
        ({"short": "a\n"}, r"'short' is 'a\n'" + "\nexpected a text that matches ^[a-z]*$"),
        ({"short": 1}, "'short' is 1\nexpected string or null"),
        ({"list": []}, "'list' is a list of 0\nexpected 1 to 3 items"),
        ({"list": [1] * 4}, "'list' is a list of 4\nexpected 1 to 3 items"),
        ({"list": [1, 2, None]}, "'list'[2] is None\nexpected integer or string"),
        ({"set": ["a", "b", "a"]}, "'set' is a list of 3\nexpected no item twice"),
        ({"sizes": {"a": 0}}, "'sizes'['a'] is 0\nexpected a number"),
        ({"sizes": {"A\n": 1}}, r"'sizes': a key is 'A\n'" + "\nexpected small letters"),
        ({"sizes": {"a": {"b": 1}}}, "'sizes'['a'] is an object of 1\nexpected integer"),
        ({"shares": 1}, "the document has the unknown key 'shares'; did you mean 'share'?\nexpected the keys const"),
        ({"x" * 10**6: 1}, f"the unknown key '{'x' * 59}... (1000000 characters)\nexpected"),
    ],
)  # fmt: skip
def test_the_first_fault_is_told(change: dict[str, Any], said: str) -> None:
    validate(GOOD, SCHEMA, "the thing")
    with pytest.raises(InputError) as caught:
        validate(GOOD | change, SCHEMA, "the thing")
    assert str(caught.value).startswith("the thing: ")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_missing_key_is_told() -> None:
    with pytest.raises(InputError, match=r"^the thing: the document lacks the key 'size'\nexpected the keys size$"):
        validate({}, SCHEMA, "the thing")


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    yield schema
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    inner += [schema[key] for key in ("items", "propertyNames", "additionalProperties") if schema.get(key)]
    for one in inner:
        yield from subschemas(one)


# What sets an upper bound to a value of that type.
BOUNDS = {
    "integer": {"maximum", "const"}, "number": {"maximum"}, "string": {"maxLength", "enum"}, "array": {"maxItems"},
}  # fmt: skip


def test_the_manifest_schema_bounds_everything_and_uses_what_the_validator_knows() -> None:
    known = {
        "$schema", "$defs", "$ref", "title", "description", "type", "const", "enum", "required", "properties",
        "additionalProperties", "propertyNames", "items", "minItems", "maxItems", "uniqueItems", "minimum", "maximum",
        "minLength", "maxLength", "pattern",
    }  # fmt: skip
    schema = manifest_schema()
    for one in subschemas(schema):
        assert set(one) <= known
        assert "$ref" not in one or (set(one) == {"$ref"} and one["$ref"].removeprefix("#/$defs/") in schema["$defs"])
        kinds = one.get("type", [])
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        assert kinds <= set(TYPES)
        for kind, bounds in BOUNDS.items():
            assert kind not in kinds or bounds & set(one), f"{one} has no upper bound"
        pattern = one.get("pattern", "^$")
        assert pattern[0] + pattern[-1] == "^$"


KEYS = st.sampled_from([*GOOD, "other", "a", "A", "a\n"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 22) | st.sampled_from([2**63, -1, 0.5, 1.0, 1e300])
    | st.sampled_from(["", "a", "abc", "abcd", "A", "fp16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """The good one with some places replaced, or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    return GOOD | draw(st.dictionaries(KEYS, VALUES, max_size=3))


@PROPERTY
@given(documents())
def test_a_document_is_taken_or_told(document: Any) -> None:
    said = "it"
    try:
        validate(document, SCHEMA, "it")
    except InputError as error:
        said = str(error)
    assert said.startswith("it")
    assert len(said.splitlines()) <= 3


def whole_as_float(value: Any) -> bool:
    """Where the validator is stricter on purpose: a 1.0, which the standard calls an integer; a final newline."""
    if isinstance(value, dict):
        return any(whole_as_float(item) for item in [*value, *value.values()])
    if isinstance(value, list):
        return any(map(whole_as_float, value))
    return (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and value.endswith("\n"))


@pytest.mark.skipif(find_spec("jsonschema") is None, reason="the package jsonschema is not installed")
@PROPERTY
@given(documents())
def test_the_jsonschema_package_agrees(document: Any) -> None:
    package = importlib.import_module("jsonschema").Draft202012Validator(SCHEMA)
    try:
        validate(document, SCHEMA, "it")
        taken = True
    except InputError:
        taken = False
    assert taken == package.is_valid(document) or (not taken and whole_as_float(document))


@pytest.mark.skipif(find_spec("jsonschema") is None, reason="the package jsonschema is not installed")
def test_the_manifest_schema_is_a_schema() -> None:
    package = importlib.import_module("jsonschema").Draft202012Validator
    package.check_schema(manifest_schema())
    package.check_schema(SCHEMA)


LIMIT = 10_000


@PROPERTY
@given(VALUES | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False))
def test_sound_json_is_parsed(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "it", LIMIT) == value


@PROPERTY
@given(st.binary(max_size=30) | st.text('{}[]",:0123456789.-+eEtrufalsn\\ \n\ud800', max_size=30).map(
    lambda text: text.encode("utf-8", "surrogatepass")
))  # fmt: skip
def test_anything_else_is_told(content: bytes) -> None:
    said = ""
    try:
        value = parse_json(content, "it", LIMIT)
    except InputError as error:
        said = str(error)
    assert said.startswith("it ") or value == json.loads(content.decode())
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"{} x", "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "can't decode byte 0xff"),
        (b'"\x00"', "Invalid control character"),
        (b"NaN", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"1e999", "the number '1e999' is too large"),
        (b"-0", "no whole number of at most 20 digits"),
        (b"1" * 21, "no whole number of at most 20 digits"),
        (b"9" * 9000, "no whole number of at most 20 digits"),
        (rb'{"a":1,"\u0061":2}', "the key 'a' stands 2 times"),
        (rb'{"x":[{"\n\n\n":1,"\n\n\n":2}]}', r"the key '\\n\\n\\n' stands 2 times"),
        (rb'["\ud800"]', "surrogates not allowed"),
        (rb'{"\udfff":1}', "surrogates not allowed"),
        (b"[" * 33 + b"]" * 33, "nests deeper than 32 levels"),
        (b'{"a":' * 32 + b"[]" + b"}" * 32, "nests deeper than 32 levels"),
        (b"[" * 5000, "nests deeper than 32 levels"),
        (b" " * (LIMIT + 1), "it has 10001 bytes, expected at most 10000"),
    ],
)
def test_unsound_json_is_told(content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_json(content, "it", LIMIT)
    assert len(str(caught.value).splitlines()) == 1


def test_32_levels_are_parsed() -> None:
    assert parse_json(b"[" * 32 + b"1" + b"]" * 32, "it", LIMIT)
    assert parse_json(rb'"\ud83d\ude00"', "it", LIMIT) == "😀"


def test_a_value_is_told_in_one_short_line() -> None:
    assert told("x" * 1000) == "'" + "x" * 59 + "... (1000 characters)"
    assert told("\u202eevil\n") == r"'\u202eevil\n'"
    assert told([1, 2]) == "a list of 2"
