"""A tiny MDM with engines of all that its tasks need, and what the fake driver wrote down."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.runtime.bundle import open_bundle
from mdm.runtime.tensorrt.facts import Options
from mdm.runtime.tensorrt.profiles import PROFILES
from mdm.tools.engines.run import build_engines, graphs_of

PICTURE = np.random.default_rng(3).integers(0, 255, (32, 32, 3), np.uint8)
TOLD: dict[str, dict[str, Any]] = {
    "class_to_image": {"label": 2},
    "text_to_image": {"prompt": "two big red circles", "negative": "one"},
    "caption": {"picture": PICTURE},
    "ask": {"picture": PICTURE, "prompt": "what colour?"},
    "complete": {"prompt": "two big red"},
    "joint": {},
    "turn": {"picture": PICTURE, "prompt": "now small"},
}


def build(folder: Path, graphs: tuple[str, ...] = (), profiles: tuple[str, ...] = ("latency",), **options: Any) -> None:
    bundle = open_bundle(folder)
    chosen = [PROFILES[name] for name in profiles]
    made = build_engines(bundle, graphs_of(bundle, graphs), chosen, Options(**options), False, lambda step: None)
    assert all(one.record.bytes for one in made)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny: Any, tiny_model: Any) -> Path:
    """The bundle without engines."""
    folder = tmp_path_factory.mktemp("model")
    fields = {"state": 16, "head": 32, "keep": 0.5}
    save_file(tiny_model(**fields).state_dict(), folder / "model.safetensors")
    return export_bundle(
        folder / "model.safetensors", load_config(tiny(**fields)), folder / "tiny.bundle",
        tokenizer=SHIPPED_TOKENIZER, validate=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def built(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "tiny.bundle"
    shutil.copytree(plain, folder)
    build(folder)
    return folder


@pytest.fixture
def own(plain: Path, tmp_path: Path) -> Path:
    """A copy of the bundle without engines, for a test's own."""
    return shutil.copytree(plain, tmp_path / "own.bundle")


class Calls:
    def __init__(self, log: Path) -> None:
        self.log = log
        self.seen = 0

    def __call__(self) -> list[str]:
        """The names of the driver's functions that were called since the last time."""
        names = [line.split()[0] for line in self.log.read_text(errors="replace").splitlines()]
        new, self.seen = names[self.seen :], len(names)
        return new


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    log = tmp_path / "driver.log"
    log.touch()
    monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
    return Calls(log)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fails("execute:1"): the next time the stand-in is to do that it fails."""
    from tensorrt import words

    def plant(what: str) -> None:
        words._happened.clear()
        monkeypatch.setenv("STAND_IN_FAILS", what)

    return plant


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """A test's backends are gone before the next one begins."""
    yield
    gc.collect()
