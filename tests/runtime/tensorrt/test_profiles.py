"""Profiles: shapes that a model can have, and files that say what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.errors import InputError
from mdm.runtime.tensorrt.profiles import PROFILES, Profile, Span, find_profile, find_profiles, shapes_of

MANIFEST: dict[str, Any] = {
    "picture": {"size": 32, "factor": 1, "patch": 4},
    "text": {"lengths": [20, 8]},
    "graphs": {
        "step_joint": {
            "role": "step", "image_size": 32, "pictures": 1,
            "inputs": [{"name": "base", "shape": ["batch", "tokens", 16]}, {"name": "row", "shape": ["batch", 2, 22]}],
        },
        "step_turn": {
            "role": "step", "image_size": 32, "pictures": 2,
            "inputs": [{"name": "given", "shape": ["batch", "tokens"]}],
        },
        "step_text": {
            "role": "step", "image_size": None, "pictures": 0, "inputs": [{"name": "y", "shape": ["tokens"]}]
        },
        "decode_text": {
            "role": "decode", "image_size": 32, "pictures": 0, "inputs": [{"name": "z", "shape": ["batch", "tokens"]}]
        },
    },
}  # fmt: skip


def test_shapes_follow_from_texts_and_pictures() -> None:
    """64 tokens a picture; a half of the text's autoencoder sees the text alone."""
    assert shapes_of(MANIFEST, "step_joint", PROFILES["throughput"]) == {
        "base": ((1, 72, 16), (8, 84, 16), (16, 84, 16)), "row": ((1, 2, 22), (8, 2, 22), (16, 2, 22)),
    }  # fmt: skip
    assert shapes_of(MANIFEST, "step_turn", PROFILES["edge"])["given"] == ((1, 136), (1, 148), (1, 148))
    assert shapes_of(MANIFEST, "step_text", PROFILES["latency"])["y"] == ((8,), (20,), (20,))
    assert shapes_of(MANIFEST, "decode_text", PROFILES["latency"])["z"] == ((1, 8), (1, 20), (4, 20))
    some = Profile("some", Span(1, 2, 3), (20,))
    assert shapes_of(MANIFEST, "step_joint", some)["base"] == ((1, 84, 16), (2, 84, 16), (3, 84, 16))


def test_the_halves_of_an_autoencoder_get_samples_one_by_one() -> None:
    """However many the steps take at a time."""
    for name, most in (("latency", 4), ("throughput", 16), ("edge", 1)):
        assert shapes_of(MANIFEST, "decode_text", PROFILES[name])["z"] == ((1, 8), (1, 20), (most, 20))
    assert shapes_of(MANIFEST, "decode_text", Profile("some", Span(3, 5, 7)))["z"] == ((1, 8), (1, 20), (7, 20))


def test_several_profiles_have_a_name_each(tmp_path: Path) -> None:
    (tmp_path / "edge.json").write_text("{}")
    named = find_profiles(["edge", "latency"])
    assert named == [PROFILES["edge"], PROFILES["latency"]]
    for twice in (["latency", "edge", "latency"], ["edge", str(tmp_path / "edge.json")]):
        with pytest.raises(InputError, match=f"two profiles have the name '{twice[0]}'"):
            find_profiles(twice)


def test_an_autoencoder_of_any_size_is_built_for_the_models_pictures() -> None:
    graph = {
        "role": "decode", "image_size": None, "pictures": 0,
        "inputs": [{"name": "z", "shape": ["batch", 4, "height", "width"]}],
    }  # fmt: skip
    manifest = {"picture": {"size": 256, "factor": 8, "patch": 2}, "text": None, "graphs": {"decode": graph}}
    assert shapes_of(manifest, "decode", PROFILES["latency"])["z"] == ((1, 4, 32, 32), (1, 4, 32, 32), (4, 4, 32, 32))
    graph["inputs"] = [{"name": "z", "shape": ["batch", "depth"]}]
    with pytest.raises(InputError, match="graph 'decode': input 'z' leaves 'depth' open"):
        shapes_of(manifest, "decode", PROFILES["latency"])


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"batch": [1, 4, 8], "text": [20, 8], "workspace": 512, "level": 0}))
    assert find_profile(str(path)) == Profile("mine", Span(1, 4, 8), (8, 20), 512 * 2**20, 0)
    path.write_text("{}")
    assert find_profile(str(path)) == Profile("mine", Span(1, 1, 4), level=4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected an object of batch, text"),
        ('{"batches": [1, 1, 1]}', "expected an object of batch, text"),
        ('{"batch": [1, 2]}', "'batch' is .1, 2., expected three sizes: least, usual, most"),
        ('{"batch": [4, 2, 8]}', "expected three sizes"),
        ('{"batch": [0, 1, 1]}', "expected numbers from 1 to 4096"),
        ('{"batch": [1, 1, 5000]}', "expected numbers from 1 to 4096"),
        ('{"text": [true]}', "'text' is .*, expected numbers"),
        ('{"text": 8}', "'text' is 8, expected numbers"),
        ('{"workspace": 0}', "'workspace' is .*, expected numbers"),
        ('{"level": 6}', "'level' is 6, expected 0 to 5"),
        ('{"level": 2.0}', "'level' is 2.0, expected 0 to 5"),
        ("{", "mine.json"),
    ],
)
def test_a_file_that_says_what_cannot_be(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        find_profile(str(path))
    assert len(str(caught.value).splitlines()) <= 3


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no profile 'latancy'.*did you mean 'latency'"):
        find_profile("latancy")
    with pytest.raises(InputError, match="texts of 9 tokens, for graph 'step_text'\nthe model has 8, 20"):
        shapes_of(MANIFEST, "step_text", Profile("some", Span(1, 1, 1), (8, 9)))
