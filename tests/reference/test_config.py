"""The config: presets and their published sizes, the round trip through a file, and what a wrong field is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference.checkpoint import build_model
from mdm.reference.config import FAMILIES, PRESETS, Config, config_from_dict, load_config
from mdm.reference.order import Layout

Figure = Callable[[str, float, float], None]
each_preset = pytest.mark.parametrize("name", list(PRESETS))


def parameters(name: str, part: str = "") -> int:
    """Of a preset, built without memory; only those whose name contains `part`."""
    with torch.device("meta"):
        model = build_model(load_config(name))
    return sum(parameter.numel() for key, parameter in model.named_parameters() if part in key)


# ------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dim-small", 50_568_716),
        ("dim-large", 386_063_376),
        ("dim-huge-256", 862_407_184),
        ("dim-huge-512", 863_586_832),
    ],
)
def test_dim_presets_have_the_published_size(name: str, count: int) -> None:
    assert parameters(name) == count


def test_mdm_7b_is_the_papers_7b(figure: Figure) -> None:
    """In billions, as model.md derives them: mixers, mixers and skips, everything."""
    mixers, skips = parameters("mdm-7b", ".mixers."), parameters("mdm-7b", ".skip.")
    figure("mdm-7b mixers, from 7.60 B", abs(mixers / 1e9 - 7.60), 0.01)
    figure("mdm-7b mixers and skips, from 7.80 B", abs((mixers + skips) / 1e9 - 7.80), 0.01)
    figure("mdm-7b, from 7.95 B", abs(parameters("mdm-7b") / 1e9 - 7.95), 0.05)


def test_mdm_49x2048_is_the_papers_49x2048(figure: Figure) -> None:
    """1.49 B without the vocabulary (the VAE), and 17 x 17 = 289 image tokens."""
    figure("mdm-49x2048 backbone, from 1.49 B", abs(parameters("mdm-49x2048", "backbone.") / 1e9 - 1.49), 0.01)
    config = load_config("mdm-49x2048")
    padded = config.side + config.pad
    assert Layout(2 + config.pad, 0, padded, padded).length - (2 + config.pad) == 289


# -------------------------------------------------------------------------------------------------- round trip


@each_preset
def test_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert load_config(file) == load_config(str(file)) == config
    assert load_config(json.loads(config.to_json())) == load_config(config) == config
    assert json.loads(config.to_json())["width"] == config.width
    assert isinstance(load_config(file).text_lengths, tuple)


@each_preset
def test_every_preset_differs_from_its_family_only_where_it_says_so(name: str) -> None:
    config = load_config(name)
    for key, value in (FAMILIES[config.family] | PRESETS[name]).items():
        assert getattr(config, key) == value, key


def test_a_config_is_frozen_and_a_changed_copy_is_checked() -> None:
    config = load_config("mdm-tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 5  # type: ignore[misc]
    with pytest.raises(InputError, match="blocks"):
        dataclasses.replace(config, blocks=4)


def test_no_int_field_is_left_unchecked() -> None:
    """The types are read as text: an alias or a union would silently switch the check off."""
    types = {str(field.type) for field in dataclasses.fields(Config)}
    assert types == {"str", "int", "float", "Mapping[str, Any]", "tuple[int, ...]"}


# ---------------------------------------------------------------------------------------------------- mistakes

TINY: dict[str, Any] = PRESETS["mdm-tiny"]


def message(source: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_config(source)
    assert 1 <= len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("widht", "width"), ("block", "blocks"), ("vocabulry", "vocabulary"), ("scan_order", "scan_orders")],
)
def test_an_unknown_key_names_the_nearest(wrong: str, right: str) -> None:
    told = message({**TINY, wrong: 1})
    assert f"'{wrong}'" in told
    assert f"did you mean '{right}'?" in told


def test_an_unknown_preset_names_the_nearest() -> None:
    told = message("dim-larg")
    assert "did you mean 'dim-large'?" in told
    assert all(name in told for name in PRESETS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", "128"), ("width", 128.0), ("width", True), ("width", None), ("width", -128), ("width", 0),
        ("blocks", 6), ("blocks", 0), ("patch", 0), ("state", 0), ("conv", 0), ("pad", 0), ("classes", -1),
        ("family", "mmd"), ("family", None), ("family", []), ("mixer", "mamba3"), ("mixer", ["mamba1"]),
        ("padding", "Rho"), ("scan", "both"), ("predict_image", "noise"), ("predict_text", 3),
        ("scan_orders", "1234"), ("scan_orders", "/12"), ("scan_orders", "1234/"), ("scan_orders", "1235/12"),
        ("scan_orders", "1234/123"), ("scan_orders", "1/1/1"), ("scan_orders", 12), ("scan_orders", None),
        ("keep", 0), ("keep", 1.5), ("keep", float("nan")), ("keep", "half"), ("keep", None),
        ("latent", 0), ("vae_width", 0), ("vocabulary", 0),
        ("text_lengths", ()), ("text_lengths", 20), ("text_lengths", [8, "20"]), ("text_lengths", [0]),
        ("text_lengths", [-8]), ("text_lengths", [8.5]),
        ("schedule_image", "cosine"), ("schedule_text", None), ("sampler", "dim"), ("sampler", 5),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_key(key: str, value: Any) -> None:
    assert f"'{key}'" in message({**TINY, key: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 30},  # not a multiple of patch 4
        {"head": 7},  # does not divide the inner width
        {"head": 0},
        {"groups": 3},  # does not divide the four heads
        {"groups": 0},
        {"width": 65, "mixer": "mamba1"},  # the sinusoid is half cosines, half sines
    ],
)
def test_sizes_that_do_not_fit_together(fields: dict[str, Any]) -> None:
    told = message({**TINY, **fields})
    assert any(key in told for key in fields)
    assert any(str(value) in told for value in fields.values())


def test_what_a_family_cannot_default_must_be_given() -> None:
    told = message({"family": "dim", "width": 64, "blocks": 9})
    assert "'image_size'" in told
    assert "'dim'" in told
    assert "'text_lengths'" not in told


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "3", "null", '{"family": "dim"', "\ufeff{}"], ids=lambda text: repr(text)
)
def test_a_file_that_is_not_a_config(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    assert str(file) in message(file)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\x80\x02\xff\x00")
    assert "config.json" in message(tmp_path / "config.json")


@pytest.mark.parametrize("source", ["", "no-such-file.json", ".", "x" * 300, "a\0b"])
def test_a_name_that_is_neither_preset_nor_file(source: str) -> None:
    assert "neither a preset nor a file" in message(source)


def test_keys_that_are_not_words() -> None:
    assert "1" in message({"family": "dim", 1: 2})


@pytest.mark.parametrize("blocks", [1, 3, 5])
@pytest.mark.parametrize("scan", ["alternate", "parallel"])
def test_small_sizes_that_do_fit_build(blocks: int, scan: str) -> None:
    config = config_from_dict({**TINY, "blocks": blocks, "scan": scan, "groups": 2, "scan_orders": "3/2"})
    with torch.device("meta"):
        build_model(config)
