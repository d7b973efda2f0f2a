"""`mdm bench scaling` on something small: what it prints, and that exponents and crossover are read right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

from mdm.tools.bench.scaling import MAMBA, TRANSFORMER, Point, crossover, draw, exponent, summary, table
from mdm.tools.main import main

SMALL = ["bench", "scaling", "--width", "64", "--blocks", "3", "--threads", "1", "--seconds", "0"]
SIZES = ["--tokens", "100", "--tokens", "17", "--tokens", "60"]
LENGTHS = [256, 529, 1024, 2025, 4096, 8281, 16384]
Out = pytest.CaptureFixture[str]


def points(mamba: Callable[[int], float], transformer: Callable[[int], float]) -> list[Point]:
    return [Point(n, {MAMBA: mamba(n), TRANSFORMER: transformer(n)}, {MAMBA: 80.0, TRANSFORMER: 60.0}) for n in LENGTHS]


def test_both_models_are_measured_at_the_nearest_squares(capsys: Out) -> None:
    for family in ("mdm", "dim"):
        assert main([*SMALL, *SIZES, "--family", family, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [point["tokens"] for point in report["points"]] == [16, 64, 100]
        for point in report["points"]:
            assert set(point["milliseconds"]) == {MAMBA, TRANSFORMER}
            assert min(point["milliseconds"].values()) > 0
        assert set(report["exponents"]) == {MAMBA, TRANSFORMER}
        assert {name: model["blocks"] for name, model in report["models"].items()} == {MAMBA: 3, TRANSFORMER: 2}


def test_table_and_plot(capsys: Out, tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    assert main([*SMALL, *SIZES, "--transformer-blocks", "1", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Mamba: 3 blocks of width 64, ")
    assert lines[1].startswith("transformer: 1 blocks of width 64, ")
    assert [line.partition(" | ")[0] for line in lines[4:7]] == ["16", "64", "100"]
    assert lines[7].startswith("time ~ tokens^k from 16 to 100 tokens: Mamba k = ")
    assert lines[8].startswith("crossover: ")
    with Image.open(plot) as picture:
        assert len(picture.getcolors(1 << 20)) > 20


def test_exponent_and_crossover_of_power_laws_are_exact() -> None:
    found = points(lambda n: 0.3 * n, lambda n: 1e-4 * n**2)
    assert exponent(found, MAMBA) == pytest.approx(1)
    assert exponent(found, TRANSFORMER) == pytest.approx(2)
    assert crossover(found) == pytest.approx(3000)
    assert list(summary(found, {MAMBA: 1.0, TRANSFORMER: 2.0}, 3000.0)) == [
        "time ~ tokens^k from 2,025 to 16,384 tokens: Mamba k = 1.00, transformer k = 2.00",
        "crossover: 3,000 tokens",
    ]
    assert list(table(found))[2] == "256 | 76.8 | 6.6 | 0.09 | 80 | 60"


def test_a_crossover_outside_is_said_to_be_outside() -> None:
    faster, slower = points(lambda n: 1.0, lambda n: 2.0), points(lambda n: 2.0, lambda n: 1.0)
    assert crossover(faster) == 0
    assert crossover(slower) is None
    slopes = {MAMBA: 1.0, TRANSFORMER: 2.0}
    assert list(summary(faster, slopes, 0.0))[1] == "crossover: below 256 tokens"
    assert list(summary(slower, slopes, None))[1] == "crossover: above 16,384 tokens"


def test_the_last_of_several_crossings_counts() -> None:
    wave = points(lambda n: 1.0, lambda n: {256: 2.0, 529: 0.5, 1024: 2.0, 2025: 0.5}.get(n, 2.0))
    assert crossover(wave) == pytest.approx((2025 * 4096) ** 0.5)


def test_memory_that_is_not_known_is_a_dash() -> None:
    assert list(table([Point(256, {MAMBA: 1.0, TRANSFORMER: 2.0}, {})]))[2] == "256 | 1.0 | 2.0 | 2.00 | - | -"


def test_the_plot_marks_the_crossover() -> None:
    found = points(lambda n: 0.3 * n, lambda n: 1e-4 * n**2)
    slopes = {MAMBA: 1.0, TRANSFORMER: 2.0}
    marked, plain = draw(found, slopes, 3000.0), draw(found, slopes, None)
    assert (np.asarray(marked) != np.asarray(plain)).any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", "100"], "--width is 100, expected a multiple of 64"),
        (["--tokens", "256"], "--tokens is 256: a line takes two lengths or more"),
        (["--blocks", "4"], "'blocks' is 4, expected an odd number"),
        (["--transformer-blocks", "40"], "40 transformer blocks of width 64 are heavier without their MLPs"),
        (["--plot", "scaling.jpg"], "expected a file name that ends in .png"),
        (["--plot", "nowhere/scaling.png"], "in a folder that exists"),
        (["--family", "vit"], "'vit' is not one of"),
        (["--threads", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_call_is_told(capsys: Out, words: list[str], said: str) -> None:
    assert main([*SMALL, *words]) == 2
    assert said in capsys.readouterr().err
