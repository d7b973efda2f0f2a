"""Export: from a checkpoint to a bundle, in phases. What is not right is never published.

Everything is written into a hidden folder beside the target, which takes the target's name in the end: a killed export
leaves nothing at the target.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mdm.export.golden import write_cases, write_runs, write_tables
from mdm.export.graphs import Built, External, Plan, check_sizes, plan_graphs
from mdm.export.manifest import facts_of, graph_entry
from mdm.export.precision import Precision, make_precision
from mdm.export.weights import WEIGHTS, Checkpoint, Weights
from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.reference.autoencoder import load_autoencoder
from mdm.reference.config import Config, load_config
from mdm.reference.tasks import check_tokenizer
from mdm.reference.tokenizer import Tokenizer
from mdm.runtime.bundle import MANIFEST, open_bundle, sha256_of

OPSETS = range(20, 26)  # 26 is not in ONNX Runtime's released set; below 20 some operators have other inputs
BF16_OPSET = 22  # the first with a bfloat16 Conv
TOKENIZER = "tokenizer.model"
SD_SCALE = 0.18215  # what Stable Diffusion's autoencoder, and DiM's with it, scales its latents by

NO_PLACE = (errno.ENOENT, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EFBIG)

Report = Callable[[str, float | None], None]  # phase; seconds it took, None when it begins


@dataclass(frozen=True)
class Export:
    """One export under way; `folder` is where it is written before it is published."""

    plan: Plan
    folder: Path
    report: Report

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.report(name, None)
        start = time.monotonic()
        yield
        self.report(name, time.monotonic() - start)

    def write(self) -> tuple[str, list[Built]]:
        """Weights and graphs -> the checkpoint's hash, and the graphs."""
        weights = Weights(self.plan.checkpoint, self.plan.precision.activations)
        with ThreadPoolExecutor(1) as pool:
            with self.phase("build graphs"):
                built = self.plan.build(weights)
            with self.phase("copy weights"):
                weights.copy(self.folder)
            source = self.folder / WEIGHTS if weights.verbatim else self.plan.checkpoint.path
            # 16 GB take half a minute to hash, and hashing lets go of Python's lock.
            sha256 = pool.submit(sha256_of, source)
            with self.phase("derive weights"):
                self.check_space(weights.derived_bytes)
                weights.write_derived(self.folder)
            with self.phase("hash checkpoint"):
                digest = sha256.result()
            with self.phase("write graphs"):
                for one in built:
                    self.write_graph(one, weights, digest)
        return digest, built

    def write_graph(self, built: Built, weights: Weights, sha256: str) -> None:
        model, plan = built.model, self.plan
        weights.place(model, built.stored)
        found = {entry.domain: entry.version for entry in model.opset_import}
        if found.get("") != plan.opset:
            raise AssertionError(f"graph '{built.spec.name}' came out with opsets {found}, asked was {plan.opset}")
        facts = {
            "mdm.graph": built.spec.name, "mdm.version": version("mdm-deploy"), "mdm.opset": str(plan.opset),
            "mdm.precision": plan.precision.name, "mdm.checkpoint.sha256": sha256,
            "mdm.config": json.dumps(json.loads(plan.config.to_json()), sort_keys=True),
        }  # fmt: skip
        for key, value in facts.items():
            model.metadata_props.add(key=key, value=value)
        (self.folder / f"{built.spec.name}.onnx").write_bytes(model.SerializeToString(deterministic=True))

    def prove(self, built: Sequence[Built]) -> tuple[dict[str, Any], dict[str, str]]:
        """Validate what was written and write the golden files -> the manifest's record, and what is golden."""
        from mdm.export.validate import Validation  # needs onnxruntime, which an export without proof does not

        validation = Validation(self.folder, self.plan, built)
        with self.phase("check graphs"):
            validation.check_files()
        with self.phase("validate"):
            record = validation.run()
        if not validation.fits:
            return record | {"golden": "skipped: the whole model does not fit into this machine's memory"}, {}
        with self.phase("golden outputs"):
            folder = self.folder / "golden"
            folder.mkdir()
            golden = write_cases(folder, self.plan, validation.truth)
            golden |= write_runs(folder, self.plan, validation.truth)
        with self.phase("validate runs"):
            record |= validation.runs(golden)
        return record, golden

    def check_space(self, wanted: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            raise no_space(self.folder, f"{wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def export_bundle(
    checkpoint: str | Path,
    config: str | Path | Mapping[str, Any] | Config,
    out: str | Path,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    image_sizes: Sequence[int] = (),
    upsample: Sequence[int] = (),
    fp32_layers: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    latent_scale: float | None = None,
    validate: bool = True,
    force: bool = False,
    report: Report = lambda phase, seconds: None,
) -> Path:
    """Write the bundle `out` for a checkpoint; config, precision and sizes as in `mdm export --help`.

    `validate=False` leaves out all that runs the model: validation and golden outputs.
    """
    out = Path(out)
    plan = make_plan(
        Path(checkpoint), load_config(config), make_precision(precision, fp32_layers), opset, image_sizes, upsample,
        external_of(autoencoder, latent_scale),
    )  # fmt: skip
    check_target(out, force)
    pieces = tokenizer_file(plan.config, plan.checkpoint.path, tokenizer)
    folder = None
    try:
        folder = beside(out, ".partial")
        job = Export(plan, folder, report)
        sha256, built = job.write()
        if pieces is not None:
            shutil.copyfile(pieces, folder / TOKENIZER)
        write_tables(folder / "sampler", plan.config, plan.specs)
        record, golden = job.prove(built) if validate else ({"state": "skipped", "reason": "--no-validate"}, {})
        with job.phase("sign"):
            manifest = {
                "name": out.name.removesuffix(".bundle") or out.name,
                "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                **facts_of(plan, sha256, TOKENIZER if pieces else None),
                "graphs": {one.spec.name: graph_entry(one) for one in built},
                "files": signed_files(folder, sha256),
                "validation": record,
                "golden": golden,
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            open_bundle(folder)
        publish(folder, out, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(out.parent, "the disk became full") from error
        if error.errno in NO_PLACE:
            raise InputError(f"no bundle can be written at '{out}': {error.strerror}\nname another target") from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return out


def beside(out: Path, suffix: str) -> Path:
    """A new hidden folder beside the target."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=suffix, dir=out.parent))


def external_of(autoencoder: str | Path | None, scale: float | None) -> External | None:
    if autoencoder is None:
        if scale is not None:
            raise InputError("a latent scale was given without an autoencoder: it belongs to one")
        return None
    scale = SD_SCALE if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"latent scale is {scale}, expected a number above 0")
    return External(load_autoencoder(autoencoder), scale)


def make_plan(
    checkpoint: Path,
    config: Config,
    precision: Precision,
    opset: int | None,
    image_sizes: Sequence[int],
    upsample: Sequence[int],
    external: External | None,
) -> Plan:
    """Checks what was asked, before a byte is written."""
    opset = checked_opset(opset, precision)
    sizes = list(dict.fromkeys([config.image_size, *image_sizes]))
    check_sizes(config, sizes, upsample)
    if external is not None:
        if config.family != "dim" or config.in_channels == 3:
            raise InputError("an external autoencoder belongs to a DiM on latents; this config works on pixels or text")
        if external.model.shape.latent != config.in_channels:
            raise InputError(
                f"the autoencoder has {external.model.shape.latent} latent channels, the config {config.in_channels}\n"
                "expected the autoencoder that the checkpoint was trained with"
            )
    specs = plan_graphs(config, sizes, sorted(set(upsample)), external is not None)
    return Plan(Checkpoint(checkpoint, config), config, precision, opset, tuple(specs), external)


def checked_opset(opset: int | None, precision: Precision) -> int:
    least = BF16_OPSET if precision.name == "bf16" else OPSETS[0]
    if opset is None:
        return least
    if opset not in OPSETS or opset < least:
        raise InputError(f"opset {opset} cannot be exported in {precision.name}\nexpected {least} to {OPSETS[-1]}")
    return opset


def check_target(out: Path, force: bool) -> None:
    """A target may be overwritten only if it is a bundle, and only when asked."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not looks_like_a_bundle(out):
        raise InputError(f"'{out}' exists and is not a bundle\nname another target; it is not overwritten")
    if not force:
        raise InputError(f"bundle '{out}' exists\nto replace it, say --force (in Python: force=True)")


def looks_like_a_bundle(folder: Path) -> bool:
    """Also a damaged one; but not any folder that has some program's manifest.json."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    kinds = {"schema": int, "graphs": dict, "files": dict, "provenance": dict}
    return isinstance(manifest, dict) and all(isinstance(manifest.get(key), kind) for key, kind in kinds.items())


def tokenizer_file(config: Config, checkpoint: Path, given: str | Path | None) -> Path | None:
    """The tokenizer that was asked for, or that lies beside the checkpoint, as the trainer puts it."""
    if config.family != "mdm":
        if given is not None:
            raise InputError("family 'dim' has no text: it takes no tokenizer")
        return None
    path = checkpoint.with_suffix(".tokenizer.model") if given is None else Path(given)
    if given is None and not path.is_file():
        raise InputError(
            f"no tokenizer was given, and there is no '{path}'\n"
            "name the SentencePiece model that the checkpoint was trained with: --tokenizer FILE"
        )
    check_tokenizer(Tokenizer(path), config)
    return path


def signed_files(folder: Path, weights_sha256: str) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            known = weights_sha256 if name == WEIGHTS else None
            files[name] = {"size": path.stat().st_size, "sha256": known or sha256_of(path)}
    return files


def publish(folder: Path, out: Path, force: bool) -> None:
    """Give the finished folder its name; an earlier bundle goes once the new one stands."""
    folder.chmod(0o755)
    check_target(out, force)
    if not out.exists():
        os.rename(folder, out)
        return
    earlier = beside(out, ".replaced")
    try:
        os.rename(out, earlier)
        try:
            os.rename(folder, out)
        except BaseException:
            os.rename(earlier, out)
            raise
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


def no_space(place: Path, found: str) -> EnvironmentLackError:
    return EnvironmentLackError(
        f"not enough space for the bundle in '{place}': {found}\nmake room or name another place; nothing was written"
    )
