"""Level "files", with the model at hand: the manifest says what the exporter says of this checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mdm.export.golden import UPSAMPLE_SAMPLER
from mdm.export.manifest import facts_of, graph_entry
from mdm.plugins.errors import InputError
from mdm.runtime.bundle import Bundle
from mdm.runtime.json_schema import parse_json, told
from mdm.runtime.model import MAX_TABLE
from mdm.runtime.solver import sampler_of
from mdm.tools.check.finding import Finding, Verdict
from mdm.tools.check.standards.blueprint import Blueprint

LEVEL = "files"


def check_facts(bundle: Bundle, blueprint: Blueprint) -> Iterator[Finding]:
    """What the manifest says of model, sampler, pictures and graphs, against what the exporter says of them."""
    manifest, plan = bundle.manifest, blueprint.plan
    source = manifest["provenance"]["checkpoint"]["sha256"]
    tokenizer = manifest["text"]["tokenizer"] if manifest["text"] else None
    expected = facts_of(plan, source, tokenizer)
    expected |= {f"graph {name}": graph_entry(one) for name, one in blueprint.built.items()}
    found = manifest | {f"graph {name}": graph for name, graph in manifest["graphs"].items()}
    unknown = ["provenance"]  # which tools made it
    if manifest["picture"] and manifest["picture"]["latent_scale"] is not None and plan.external is None:
        unknown.append("picture")  # it has an autoencoder that was not named
    for name, one in blueprint.built.items():
        if one.spec.upsample and one.spec.guided:
            key, table = f"sampler of {name}", f"sampler/{name.removeprefix('step_')}.json"
            expected[key] = sampler_of({"sampler": dict(plan.config.sampler) | UPSAMPLE_SAMPLER})
            found[key] = sampler_in(bundle, table)
    wrong = [key for key, fact in expected.items() if key not in unknown and found.get(key) != plain(fact)]
    for key in wrong:
        said = f"is {told(found.get(key))}, the exporter writes {told(plain(expected[key]))}"
        yield Finding(LEVEL, "manifest.json", key, "", Verdict.FAIL, said)
    if not wrong:
        yield Finding(LEVEL, "manifest.json", "as the exporter writes it", "", Verdict.PASS)


def plain(fact: Any) -> Any:
    """As it comes back out of JSON."""
    return json.loads(json.dumps(fact))


def sampler_in(bundle: Bundle, table: str) -> Any:
    """What a table's file says of its sampler; None where there is nothing to be read."""
    try:
        content = parse_json(bundle.content(table), f"'{table}'", MAX_TABLE)
    except InputError:
        return None
    return content.get("sampler") if isinstance(content, dict) else None
