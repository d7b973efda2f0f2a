"""A bundle to build engines of, and caches of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mdm.export import export_bundle
from mdm.reference import SHIPPED_CHECKPOINT


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny.bundle"
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", out, precision="fp16", validate=False)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "tiny.bundle"))


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
