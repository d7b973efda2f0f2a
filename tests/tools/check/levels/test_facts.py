"""The manifest against what the exporter says, sound and changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest

from mdm.tools.check.finding import Verdict
from mdm.tools.check.levels.facts import check_facts

from ..deployed import Exported

Find = Callable[[str], Exported]


@pytest.mark.parametrize("name", ["mdm", "dim", "latent", "half", "keep"])
def test_a_sound_manifest_is_what_the_exporter_writes(exported: Find, name: str) -> None:
    [finding] = check_facts(exported(name).model.bundle, exported(name).reference.blueprint)
    assert finding.verdict is Verdict.PASS, finding.said


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("sampler", lambda manifest: manifest["sampler"].update(guidance=9.0)),
        ("sampler", lambda manifest: manifest["sampler"].update(steps=7)),
        ("null_class", lambda manifest: manifest.update(null_class=2)),
        ("picture", lambda manifest: manifest["picture"].update(range=[0.0, 1.0])),
        ("schedules", lambda manifest: manifest["schedules"]["image"].update(shift=0.7)),
        ("graph step_text", lambda manifest: manifest["graphs"]["step_text"].update(nodes=3)),
    ],
)
def test_a_manifest_that_says_otherwise_is_told(exported: Find, key: str, change: Callable[..., object]) -> None:
    bundle, blueprint = exported("mdm").model.bundle, exported("mdm").reference.blueprint
    manifest = deepcopy(bundle.manifest)
    change(manifest)
    [finding] = check_facts(replace(bundle, manifest=manifest), blueprint)
    assert (finding.verdict, finding.part) == (Verdict.FAIL, key)
