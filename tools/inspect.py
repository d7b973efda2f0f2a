"""`mdm inspect`: what is in a bundle, as tables. Needs neither PyTorch nor an engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mdm.plugins.contract import DOMAIN, SCANS, SHORT_CONV
from mdm.plugins.errors import InputError, in_one_line
from mdm.tools.options import FILE, json_option, print_json

if TYPE_CHECKING:
    from mdm.runtime.bundle import Bundle


@click.command("inspect")
@click.argument("bundle", type=FILE)
@click.option("--verify", is_flag=True, help="Hash every file and compare with the manifest.")
@json_option
def command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show a bundle's tasks, graphs, shapes, weights, sampler, where it comes from, and what mdm build made of it."""
    from mdm.runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    if verify:
        opened.verify()
    built = list(engines(opened, verify))
    if as_json:
        print_json(opened.manifest | {"verified": verify, "extra_files": opened.extra_files(), "engines": built})
        return
    console = Console()
    for table in (facts(opened.manifest), tasks(opened.manifest), graphs(opened.manifest)):
        console.print(table)
    for part in engine_tables(built):
        console.print(part)
    if verify:
        console.print(f"all {len(opened.manifest['files'])} files are the ones the manifest signs")
    if extra := opened.extra_files():
        console.print(shown(f"not in the manifest, and never read: {', '.join(extra)}"))


def shown(text: object) -> Text:
    """A stranger's text: no markup in it works, and nothing in it steers the terminal."""
    return Text("".join(c if c.isprintable() else "?" for c in str(text)))


def plain_table(*columns: str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")


def facts(manifest: dict[str, Any]) -> Table:
    from mdm.tools.export import said_of

    table = Table(title=shown(manifest["name"]), title_justify="left", box=None, pad_edge=False, show_header=False)
    config, source = defaultdict(lambda: "?", manifest["config"]), manifest["provenance"]["checkpoint"]
    sizes = {path: file["size"] for path, file in manifest["files"].items()}
    weights = {path: size for path, size in sizes.items() if path.endswith(".safetensors") and "/" not in path}
    sampler = ", ".join(f"{key} {value}" for key, value in manifest["sampler"].items())
    rows = {
        "model": f"{config['family']}, {config['blocks']} blocks x {config['width']}, {config['mixer']}, "
        f"{manifest['parameters'] / 1e6:.1f}M parameters",
        "precision": f"{manifest['precision']}, opset {manifest['opset']}",
        "size": f"{sum(sizes.values()) / 1e6:.1f} MB; "
        + ", ".join(
            f"{path} {size / 1e6:.1f} MB" if size > 1e5 else f"{path} {size} bytes" for path, size in weights.items()
        ),
        "sampler": sampler,
        "checkpoint": f"{source['file']}, {source['dtype']}, sha256 {source['sha256'][:16]}..",
        "made": manifest["created"]
        + " with "
        + ", ".join(f"{k} {v}" for k, v in manifest["provenance"]["tools"].items()),
        "validation": said_of(manifest["validation"]),
        "golden": f"{len(manifest['golden'])} files" if manifest["golden"] else "none",
    }
    for name, value in rows.items():
        table.add_row(name, shown(value))
    return table


def tasks(manifest: dict[str, Any]) -> Table:
    table = plain_table(
        "task",
        "text",
        "picture",
        "guidance drops",
        "step graph",
        "solver",
        "steps",
        title="\nTasks (both: a given part, then a made one)",
    )
    for name, task in manifest["tasks"].items():
        sampler = manifest["sampler_for"].get(name, manifest["sampler"])
        held = [task[key] or "-" for key in ("text", "image", "drops")]
        table.add_row(shown(name), *held, shown(task["step"]), shown(sampler["solver"]), str(sampler["steps"]))
    return table


def graphs(manifest: dict[str, Any]) -> Table:
    table = plain_table("graph", "nodes", "MatMul", "scans", "short convs", "KB", "inputs", title="\nGraphs")
    table.columns[0].no_wrap = True
    for name, graph in manifest["graphs"].items():
        operators = graph["operators"]
        shapes = "  ".join(f"{i['name']}[{','.join(map(str, i['shape']))}]" for i in graph["inputs"])
        table.add_row(
            shown(name), str(graph["nodes"]), str(operators.get("MatMul", 0)),
            str(sum(operators.get(f"{DOMAIN}.{scan.name}", 0) for scan in SCANS)),
            str(operators.get(f"{DOMAIN}.{SHORT_CONV.name}", 0)),
            f"{manifest['files'][graph['file']]['size'] / 1e3:.0f}", shown(shapes),
        )  # fmt: skip
    return table


def engines(bundle: Bundle, verify: bool) -> Iterator[dict[str, Any]]:
    """What the bundle says of its engines, whoever built them, and whether this user trusts them. `verify`: each is
    the file that was built."""
    from mdm.runtime.tensorrt.records import known_records, manifests, read_record

    for graph in bundle.manifest["graphs"]:
        for engine, manifest in manifests(bundle, graph):
            told: dict[str, Any] = {"graph": graph, "file": engine.name}
            try:
                record = read_record(manifest, engine)
                if verify:
                    record.check_engine(engine)
            except InputError as error:
                yield told | {"wrong": in_one_line(error)}
            else:
                trusted = any(map(record.is_of, known_records(engine)))
                told |= {"for": record.built_for, "profiles": record.profiles, "bytes": record.bytes}
                yield told | {"how": record.how, "built": record.built, "trusted": trusted}


def engine_tables(built: list[dict[str, Any]]) -> Iterator[Table | Text]:
    """One for each machine that they are for."""
    for place in dict.fromkeys(one["for"] for one in built if "for" in one):
        yield Text("\n") + shown(f"TensorRT engines for {place}")  # a table's title is broken at its width
        table = plain_table("graph", "profiles", "how", "MB", "asked for", "trusted here")
        for one in built:
            if one.get("for") == place:
                size, day, trusted = f"{one['bytes'] / 1e6:.1f}", one["built"][:10], "yes" if one["trusted"] else "no"
                words = (shown(", ".join(words) or "-") for words in (one["profiles"], one["how"]))
                table.add_row(shown(one["graph"]), *words, size, day, trusted)
        yield table
    if any("wrong" in one for one in built):
        yield Text("\nTensorRT engines that cannot be used")
        table = plain_table("graph", "what is wrong")
        for one in built:
            if "wrong" in one:
                table.add_row(shown(one["graph"]), shown(one["wrong"]))
        yield table
