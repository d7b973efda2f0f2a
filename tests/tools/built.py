"""A tiny DiM's bundle with engines, for commands on the backend tensorrt: each runs in a process of its own, which has
the stand-in for TensorRT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GRAPH = "step_image_guided"  # what its one task runs


@dataclass(frozen=True)
class Built:
    bundle: Path
    environment: Mapping[str, str]

    def mdm(self, *words: object, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """`mdm WORDS`; `first`: Python that runs before it in its process."""
        code = f"import sys\n{first}\nfrom mdm.tools.main import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], env={**self.environment, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def told(self, *words: object, code: int = 0, first: str = "", **environment: str) -> dict[str, Any]:
        """What it prints as JSON."""
        run = self.mdm(*words, "--json", first=first, **environment)
        assert run.returncode == code, run.stdout[-3000:] + run.stderr[-2000:]
        return dict(json.loads(run.stdout))

    def copy(self, folder: Path) -> Built:
        """One for a test to spoil, whose engines are trusted as these are."""
        return replace(self, bundle=Path(shutil.copytree(self.bundle, folder / "own.bundle")))


def build(folder: Path, config: Mapping[str, Any], stand_in: Mapping[str, str], golden: bool = False) -> Built:
    import torch
    from safetensors.torch import save_file

    from mdm.export import export_bundle
    from mdm.reference import build_model, load_config

    with torch.random.fork_rng():
        torch.manual_seed(4)
        save_file(build_model(load_config(config)).state_dict(), folder / "dim.safetensors")
    bundle = export_bundle(folder / "dim.safetensors", load_config(config), folder / "dim.bundle", validate=golden)
    built = Built(bundle, {**stand_in, "XDG_CACHE_HOME": str(folder / "caches")})
    engines = built.told("build", bundle)["engines"]
    assert [engine["contents"]["plugins"] > 0 for engine in engines] == [True] * len(engines)
    return built
