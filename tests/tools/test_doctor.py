"""`mdm doctor`: what is there, what is not and what to do; it never fails."""

from __future__ import annotations

import json

import pytest

from mdm.plugins import library
from mdm.plugins.library import instruction_set
from mdm.tools.main import main

Out = pytest.CaptureFixture[str]


def report(capsys: Out) -> dict[str, dict[str, object]]:
    assert main(["doctor", "--json"]) == 0
    return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_it_finds_the_library_and_registers_it(capsys: Out) -> None:
    found = report(capsys)
    assert found["scan library"]["there"]
    assert str(found["scan library"]["said"]).startswith(instruction_set())
    assert found["scan library works"]["there"]
    assert found["torch"]["there"]


def test_a_lacking_library_comes_with_advice(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FILE", "nowhere.so")
    found = report(capsys)
    assert not found["scan library"]["there"]
    assert "install g++ or clang++" in str(found["scan library"]["said"])
    assert main(["doctor"]) == 0
    assert "no   scan library " in capsys.readouterr().out


def test_an_absent_package_names_its_extra(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm.tools.doctor.PARTS", {"no-such-package": ("gpu", "flies")})
    found = report(capsys)
    assert found["no-such-package"] == {
        "name": "no-such-package",
        "there": False,
        "said": 'flies; pip install "mdm-deploy[gpu]"',
    }
