"""The shipped checkpoint and tokenizer: small, readable, and knowing what the README says it knows.

24 requests a task here; `mdm evaluate` measures on 200. A floor lies three standard errors (at 24 requests) below
the README's figure, so that a broken sampler, loader or network is noticed and chance is not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER, Tokenizer, load_config, load_model
from mdm.reference.multimodal import MDM
from mdm.reference.world.measure import measure

COUNT = 24
README = (Path(__file__).parents[2] / "README.md").read_text()
CLAIMED = {name: float(share) / 100 for name, share in re.findall(r"^\| ([a-z][^|]+?) \| ([\d.]+)% \|", README, re.M)}


def test_size_is_at_most_8_mb(figure: Callable[[str, float, float], None]) -> None:
    figure(
        "shipped weights and tokenizer, MB",
        sum(p.stat().st_size for p in (SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER)) / 1e6,
        8,
    )


def test_file_says_what_it_is() -> None:
    with safe_open(SHIPPED_CHECKPOINT, "pt") as file:
        facts = json.loads(file.metadata()["mdm"])
    assert load_config(facts["config"]) == load_config("mdm-tiny")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    model = load_model(SHIPPED_CHECKPOINT, "mdm-tiny")
    assert isinstance(model, MDM)
    return {f.name: f.value for f in measure(model, Tokenizer(SHIPPED_TOKENIZER), COUNT)}


def test_readme_claims_every_figure(measured: dict[str, float]) -> None:
    assert set(CLAIMED) == set(measured)


def floor(name: str) -> float:
    claimed = CLAIMED[name]
    return claimed - 3 * math.sqrt(max(claimed * (1 - claimed), 0.01) / COUNT)


# Where chance alone could pass there is nothing to hold: of the attributes the likeliest guess is right half the time.
@pytest.mark.parametrize("name", [name for name in CLAIMED if floor(name) > 0.25])
def test_knows_what_the_readme_says(
    name: str, measured: dict[str, float], figure: Callable[[str, float, float], None]
) -> None:
    figure(f"shipped, {name}: share wrong", 1 - measured[name], 1 - floor(name))
