"""`mdm bench export`: seconds, memory and graph sizes of an export, on a checkpoint of the right size that holds zeros.

The file is sparse, so a model of 16 GB needs no disk. Zeros cannot be validated: the model is not run. Each preset is
exported by a process of its own, whose largest resident memory is reported.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from mdm.tools.options import json_option, print_json

# What the child runs: checkpoint, preset, target, precision, tokenizer or "".
CHILD = """
import json, resource, sys
from mdm.export import export_bundle
checkpoint, preset, out, precision, tokenizer = sys.argv[1:]
phases = {}
export_bundle(
    checkpoint, preset, out, precision=precision, tokenizer=tokenizer or None, validate=False,
    report=lambda phase, seconds: phases.update({phase: seconds}) if seconds is not None else None,
)
print(json.dumps({"phases": phases, "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@click.command("export")
@click.option("--preset", "presets", multiple=True, default=("dim-huge-512", "mdm-7b"), show_default=True)
@click.option("--precision", default="fp16", show_default=True, help="Of the graphs and of the checkpoint.")
@json_option
def command(presets: tuple[str, ...], precision: str, as_json: bool) -> None:
    """Export sparse checkpoints of these presets, without validation."""
    results = {preset: measure(preset, precision) for preset in presets}
    if as_json:
        print_json({"precision": precision, "exports": results})
        return
    rows = {
        "checkpoint, GB": lambda r: f"{r['checkpoint'] / 1e9:.1f}",
        "graphs": lambda r: str(r["graphs"]),
        "nodes of the largest": lambda r: str(r["nodes"]),
        "largest graph, MB": lambda r: f"{r['largest'] / 1e6:.2f}",
        "seconds beside the copy": lambda r: f"{r['seconds'] - r['phases']['copy weights']:.1f}",
        "of them hashing alone": lambda r: f"{r['phases']['hash checkpoint']:.1f}",
        "seconds of the copy": lambda r: f"{r['phases']['copy weights']:.1f}",
        "resident, GB": lambda r: f"{r['resident'] / 1e9:.2f}",
    }
    click.echo(" | ".join([f"export in {precision}, not validated", *presets]))
    click.echo("|".join(["---"] * (1 + len(presets))))
    for name, said in rows.items():
        click.echo(" | ".join([name, *(said(results[preset]) for preset in presets)]))


def measure(preset: str, precision: str) -> dict[str, Any]:
    from mdm.reference.config import load_config
    from mdm.runtime.bundle import open_bundle

    config = load_config(preset)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = write_zeros(folder / "model.safetensors", preset, precision)
        tokenizer = ""
        if config.vocabulary:
            tokenizer = str(folder / "tokenizer.model")
            write_tokenizer(Path(tokenizer), config.vocabulary)
        words = [str(folder / "model.safetensors"), preset, str(folder / "out.bundle"), precision, tokenizer]
        done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        manifest = open_bundle(folder / "out.bundle").manifest
        graphs = manifest["graphs"].values()
        return found | {
            "checkpoint": size,
            "seconds": sum(found["phases"].values()),
            "graphs": len(manifest["graphs"]),
            "nodes": max(graph["nodes"] for graph in graphs),
            "largest": max(manifest["files"][graph["file"]]["size"] for graph in graphs),
        }


def write_zeros(path: Path, preset: str, precision: str) -> int:
    """A checkpoint of that preset in which every value is a hole -> its size."""
    from mdm.export.precision import PRECISIONS
    from mdm.export.weights import DTYPES, SAFETENSORS, empty_model, shapes_of
    from mdm.reference.config import load_config
    from mdm.runtime.safetensors_header import Entry, write_header

    dtype = PRECISIONS[precision]
    entries: dict[str, Entry] = {}
    end = 0
    for name, shape in shapes_of(empty_model(load_config(preset))).items():
        length = math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(SAFETENSORS[dtype], shape, end, length)
        end += length
    header = write_header(entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return len(header) + end


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A SentencePiece model with that many pieces and nothing learned."""
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    special = {"<pad>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}
    for piece, kind in special.items():
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for number in range(vocabulary - len(special)):
        model.pieces.add(piece=f"piece{number}", score=-float(number), type=kinds.NORMAL)
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = vocabulary
    for name, number in (("pad_id", 0), ("unk_id", 1), ("bos_id", -1), ("eos_id", -1)):
        setattr(model.trainer_spec, name, number)
    path.write_bytes(model.SerializeToString())
