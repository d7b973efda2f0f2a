"""Backends by their names, and which options each takes."""

from __future__ import annotations

from typing import Any

import pytest

from mdm.plugins.errors import InputError
from mdm.runtime import backends
from mdm.runtime.backends import BACKENDS, TENSORRT, backend_for
from mdm.runtime.tensorrt import backend as tensorrt

Made = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What backends were asked for, each with its arguments: none is made."""
    found: Made = []
    for module, name in ((backends, "OrtBackend"), (tensorrt, "TensorRtBackend")):
        monkeypatch.setattr(module, name, lambda *words, name=name, **named: found.append((name, words, named)))
    return found


def test_each_name_has_its_backend(made: Made) -> None:
    assert BACKENDS == ("ort-cpu", "ort-cuda", "tensorrt-rtx", TENSORRT)
    bundle: Any = object()
    for name in BACKENDS:
        backend_for(bundle, name)
    backend_for(bundle)
    classes = [one for one, _, _ in made]
    assert classes == ["OrtBackend", "OrtBackend", "OrtBackend", "TensorRtBackend", "OrtBackend"]
    assert [words[1] for one, words, _ in made if one == "OrtBackend"] == [*BACKENDS[:3], "ort-cpu"]
    assert all(words[0] is bundle for _, words, _ in made)


def test_options_arrive(made: Made) -> None:
    bundle: Any = object()
    backend_for(bundle, "ort-cuda", threads=2, memory=3, device=1)
    backend_for(bundle, TENSORRT, memory=3, device=1, profile="edge")
    assert made == [
        ("OrtBackend", (bundle, "ort-cuda"), {"threads": 2, "memory": 3, "device": 1}),
        ("TensorRtBackend", (bundle, 3, 1, "edge"), {}),
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tensort", {}, "unknown backend 'tensort'; did you mean 'tensorrt'?\nbackends: ort-cpu, ort-cuda, "),
        ("", {}, "unknown backend ''\nbackends: "),
        ("ort-cpu", {"profile": "edge"}, "backend 'ort-cpu' has no profiles\nleave the profile out"),
        ("tensorrt-rtx", {"profile": "edge"}, "backend 'tensorrt-rtx' has no profiles\n"),
        (TENSORRT, {"threads": 1}, "backend 'tensorrt' runs on a GPU, and takes no threads"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], said: str, made: Made) -> None:
    bundle: Any = object()
    with pytest.raises(InputError) as refused:
        backend_for(bundle, name, **options)
    assert str(refused.value).startswith(said)
    assert not made
