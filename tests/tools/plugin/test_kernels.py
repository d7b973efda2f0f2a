"""`mdm plugin kernels` and `report`, on one small kernel for one architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdm.plugins.gpu import resources
from mdm.plugins.gpu.pack import Pack
from mdm.plugins.gpu.variants import variants
from mdm.tools.main import main

WORDS = ["plugin", "kernels", "--arch", "90", "--kernel", "carry_states", "--jobs", "1"]


def test_a_pack_is_built_and_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="triton compiles the kernels")
    out = tmp_path / "kernels.pack"
    assert main([*WORDS, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [variant] = [variant for variant in variants() if variant.kernel == "carry_states"]
    pack = Pack.open(out)
    assert told["bytes"] == out.stat().st_size
    assert [row["architecture"] for row in told["entries"]] == ["90"]
    assert len(pack.image(pack.entry(variant), (9, 0))) > 1000
    assert main(["plugin", "report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == told["entries"]
    assert main(["plugin", "report", str(out), "--arch", "90"]) == 0
    assert "carry_states float32 BLOCK=256" in capsys.readouterr().out


def test_a_kernel_that_spills_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton compiles the kernels")
    monkeypatch.setattr(resources, "problems", lambda table: ["carry_states spills"])
    assert main([*WORDS, "--out", str(tmp_path / "kernels.pack")]) == 4
    assert "carry_states spills" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kernels", "--arch", "61"], "expected one of: 80"),
        (["kernels", "--kernel", "scan"], "kernels: "),
        (["kernels", "--arch", "90"], "name another with --out"),
        (["kernels", "--kernel", "ssd_scan"], "name another with --out"),
        (["report", "--arch", "61"], "expected one of: 80"),
        (["report", "nowhere.pack"], "nowhere.pack"),
    ],
)
def test_what_is_not_there_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", *words]) == 2
    assert said in capsys.readouterr().err
