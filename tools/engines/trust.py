"""Trusts the engines that a bundle brings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import Bundle
from mdm.runtime.tensorrt.records import Record, manifests, read_record, record_path

WARNING = "TensorRT will run whatever is in these engines: trust only bundles from people you trust."


def trust_engines(bundle: Bundle, graphs: Iterable[str]) -> list[tuple[Path, Record]]:
    """Take over what the bundle says of its engines as if they had been built here, if all of it holds."""
    found = []
    for graph in graphs:
        for engine, manifest in manifests(bundle, graph):
            record = read_record(manifest, engine)
            record.check_engine(engine)
            found.append((engine, record))
    if not found:
        raise InputError(f"bundle '{bundle.path}' brings no engines to trust\nexpected what mdm build writes")
    for engine, record in found:
        record.write(record_path(engine, record.sha256))
    return found
