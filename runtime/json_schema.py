"""Strict JSON, and the part of JSON Schema (draft 2020-12) that `manifest.schema.json` uses.

What strangers send is parsed and checked here before anything else reads it; the first fault is an InputError that
names the place in the document. Stricter than the standard in three points: 1.0 is no integer, a pattern has to match
the whole text (Python's `$` lets a final newline by), and a document may not nest deeper than 32 levels.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from mdm.plugins.errors import InputError
from mdm.runtime.words import nearest

MAX_DEPTH = 32  # a manifest needs 7
TOO_DEEP = f"it nests deeper than {MAX_DEPTH} levels"
MAX_DIGITS = 20  # of a whole number: 64 bits

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def parse_json(content: bytes, what: str, limit: int) -> Any:
    """The value of UTF-8 JSON text of at most `limit` bytes; `what` names the document in errors."""
    if len(content) > limit:
        raise InputError(f"{what} has {len(content)} bytes, expected at most {limit}")
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_int=_int,
            parse_float=_float,
        )  # fmt: skip
        _check_depth_and_texts(value)
    except RecursionError as error:
        raise InputError(f"{what} is not sound JSON: {TOO_DEEP}") from error
    except ValueError as error:  # JSONDecodeError, UnicodeError, and the hooks' own
        raise InputError(f"{what} is not sound JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {told(key)} stands {times} times in one object")
    return made


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS or digits == "-0":  # other parsers read -0 as a float
        raise ValueError(f"the number {told(digits)} is no whole number of at most {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {told(digits)} is too large")
    return number


def _check_depth_and_texts(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        texts = [item for item in level if isinstance(item, str)]
        for text in itertools.chain(texts, *(item for item in containers if isinstance(item, dict))):
            text.encode()  # a lone surrogate, which JSON can write as an escape, cannot be printed
        if not containers:
            return
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(TOO_DEEP)


def validate(value: Any, schema: Mapping[str, Any], what: str) -> None:
    """Raise the first fault of `value`; `what` names the document."""
    _walk(value, schema, schema, what, "")


def _walk(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], what: str, path: str) -> None:
    def refuse(expected: str, found: str = "") -> NoReturn:
        raise InputError(f"{what}: {path or 'the document'} {found or f'is {told(value)}'}\nexpected {expected}")

    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    names = schema.get("type", list(TYPES))
    names = [names] if isinstance(names, str) else names
    if not any(_is(value, name) for name in names):
        refuse(" or ".join(names))
    if "const" in schema and value != schema["const"]:
        refuse(told(schema["const"]))
    if "enum" in schema and value not in schema["enum"]:
        refuse("one of: " + ", ".join(map(told, schema["enum"])))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
            refuse(f"a number from {schema.get('minimum', 'any')} to {schema.get('maximum', 'any')}")
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            refuse(f"{schema.get('minLength', 0)} to {schema.get('maxLength', 'any number of')} characters")
        if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
            refuse(schema.get("description", f"a text that matches {schema['pattern']}"))
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            refuse(f"{schema.get('minItems', 0)} to {schema.get('maxItems', 'any number of')} items")
        if schema.get("uniqueItems") and any(item in value[:index] for index, item in enumerate(value)):
            refuse("no item twice")
        for index, item in enumerate(value):
            _walk(item, schema.get("items", {}), root, what, f"{path}[{index}]")
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in value:
                refuse("the keys " + ", ".join(schema["required"]), f"lacks the key {told(key)}")
        for key, item in value.items():
            inner = f"{path}[{told(key)}]" if path else told(key)
            if "propertyNames" in schema:
                _walk(key, schema["propertyNames"], root, what, f"{path}: a key")
            if key not in known and schema.get("additionalProperties") is False:
                refuse("the keys " + ", ".join(known), f"has the unknown key {told(key)}{nearest(key[:100], known)}")
            _walk(item, known.get(key, schema.get("additionalProperties", {})), root, what, inner)


def _is(value: Any, name: str) -> bool:
    # In Python, unlike in JSON, True is a whole number.
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def told(value: Any) -> str:
    """A stranger's value in an error: one short line whatever it holds."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number beyond 4300 digits
        return "a very long number"
    length = len(value) if isinstance(value, str) else len(text)
    return text if len(text) <= 80 else f"{text[:60]}... ({length} characters)"
