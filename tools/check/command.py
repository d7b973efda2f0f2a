"""`mdm check`: whether a deployment computes what the model computes, and where a difference begins."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdm.plugins.errors import EnvironmentLackError, InputError, ParityError
from mdm.tools.check.finding import LEVELS, OF_RUNS, Finding, Verdict, worst_of
from mdm.tools.options import FILE, engine_options, json_option, print_json, progress_bar

if TYPE_CHECKING:
    from mdm.runtime.bundle import Bundle
    from mdm.runtime.model import Model
    from mdm.tools.check.report import Report
    from mdm.tools.check.run import Check

SEED, COUNT = click.IntRange(0, 2**63 - 1), click.IntRange(1)


@click.command("check")
@click.argument("bundle", type=FILE, required=False)
@engine_options
@click.option(
    "--against",
    help="The standard: reference (the PyTorch model), golden (recorded outputs), another backend, or another bundle "
    "of the same model. Default: reference where it can run, else golden.",
)
@click.option("--checkpoint", type=FILE, help="What the bundle was exported from. Default: the copy in the bundle.")
@click.option("--autoencoder", type=FILE, help="The image autoencoder it was exported with, if any.")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS), help="Only this level; may be repeated.")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="The first seed; golden files have their own.")
@click.option("--seeds", default=1, show_default=True, type=COUNT, help="How many seeds, counted on from the first.")
@click.option("--steps", type=COUNT, help="Steps of a run at most. Default: the task's own; 4 for large models.")
@click.option(
    "--ambiguous", type=click.Choice(["pass", "fail"]), default="pass", show_default=True,
    help="What exit code a verdict of AMBIGUOUS has.",
)  # fmt: skip
@click.option("--report", "folder", type=FILE, help="Write report.json, junit.xml, report.html, summary.md here.")
@click.option("--history", type=FILE, help="A folder with earlier reports, for the trend.")
@click.option("--replay", type=FILE, help="Run one sub-model of an earlier report again, instead of a bundle.")
@json_option
@click.pass_context
def command(context: click.Context, /, bundle: Path | None, replay: Path | None, **options: Any) -> None:
    """Check that BUNDLE computes what the model computes, in levels from files to pictures.

    Exit code 0: it does; 1: it does not.
    """
    if (bundle is None) == (replay is None):
        raise click.UsageError("name a bundle, or a folder with --replay")
    passed = again(replay, options) if replay is not None else whole(bundle, options)  # type: ignore[arg-type]
    if not passed:
        context.exit(ParityError.exit_code)


def again(folder: Path, options: dict[str, Any]) -> bool:
    """One sub-model."""
    from mdm.tools.check.forms.as_json import plain
    from mdm.tools.check.limits import amounts
    from mdm.tools.check.nodes.replay import replay

    error, limits = replay(folder, options["backend"])
    used = limits.used(error)
    if options["as_json"]:
        print_json(plain({"used": used, "rms": error.rms, "worst": error.worst, "limit": limits.rms}))
    else:
        click.echo(f"{'PASS' if used <= 1 else 'FAIL'}: {amounts(error, limits)}")
    return used <= 1


def whole(path: Path, options: dict[str, Any]) -> bool:
    from mdm.tools.check.forms.write import make_folder, write_report
    from mdm.tools.check.run import new_report

    folder: Path | None = options["folder"]
    history: Path | None = options["history"]
    if history is not None and (folder is None or not os.path.isdir(history)):
        raise InputError(
            f"the trend of '{history}' is part of a report: name a folder with --report" if folder is None
            else f"history '{history}' is no folder\nexpected one with report.json files, at any depth"
        )  # fmt: skip
    if folder is not None:
        make_folder(folder)
    check = make_check(path, options)
    report = new_report(check, shlex.join(["mdm", *sys.argv[1:]]))
    with progress_bar(options["as_json"], transient=True) as bar:
        shown = {level: bar.add_task(level, total=None, note="", visible=False) for level in LEVELS}

        def progress(level: str, done: int, total: int) -> None:
            bar.update(shown[level], completed=done, total=total, visible=True)

        check.run(report, options["levels"] or LEVELS, progress)
    if report.verdict is Verdict.SKIPPED:
        raise EnvironmentLackError(
            "nothing was checked: every level asked for was skipped\n"
            + "; ".join(dict.fromkeys(finding.said for finding in report.findings))
        )
    report.findings = [with_command(finding, path, options) for finding in report.findings]
    written = [] if folder is None else write_report(report, folder, history)
    tell(report, written, options["as_json"])
    return report.verdict is Verdict.PASS or (report.verdict is Verdict.AMBIGUOUS and options["ambiguous"] == "pass")


def with_command(finding: Finding, path: Path, options: dict[str, Any]) -> Finding:
    """What did not pass tells how to see it again: its level and task, with its own seed."""
    if finding.reproduce or finding.verdict not in (Verdict.FAIL, Verdict.AMBIGUOUS):
        return finding
    words = ["mdm", "check", str(path), "--level", finding.level, "--backend", options["backend"]]
    for name in ("against", "checkpoint", "autoencoder", "steps"):
        words += [f"--{name}", str(options[name])] if options[name] is not None else []
    words += ["--task", finding.subject] if finding.level in OF_RUNS else []
    seed = re.search(r"seed (\d+)", finding.case)
    return replace(finding, reproduce=shlex.join([*words, *(["--seed", seed[1]] if seed else [])]))


def make_check(path: Path, options: dict[str, Any]) -> Check:
    from mdm.tools.check.run import Check, chosen_tasks
    from mdm.tools.check.standards.golden import GoldenStandard

    model = opened(path, options["backend"], options)
    bundle, seeds = model.bundle, range(options["seed"], options["seed"] + options["seeds"])
    tasks = chosen_tasks(model, options["tasks"])
    checkpoint: Path | None = options["checkpoint"] or own_checkpoint(bundle)
    against = options["against"] or default_standard(checkpoint, options["as_json"])
    if against == "golden":
        return Check(model, GoldenStandard(model), tasks, seeds, why_not="needs the model: --against reference")
    if against != "reference":
        from mdm.runtime.backends import BACKENDS
        from mdm.runtime.json_schema import told
        from mdm.runtime.words import nearest
        from mdm.tools.check.standards.other import EngineStandard

        if against == options["backend"]:
            raise InputError(f"--against {against} compares the bundle with itself\nname another backend, or a bundle")
        is_bundle = os.path.isdir(against)  # unlike Path.is_dir, it takes a name that is too long
        if not is_bundle and against not in BACKENDS:
            known = ["reference", "golden", *BACKENDS]
            raise InputError(
                f"--against is {told(against)}{nearest(against, known)}\n"
                f"expected {', '.join(known)}, or the folder of another bundle"
            )
        other = opened(Path(against) if is_bundle else path, options["backend"] if is_bundle else against, options)
        name = other.manifest["name"] if is_bundle else against
        return Check(model, EngineStandard(model, other, name), tasks, seeds, why_not="needs the model")
    if checkpoint is None:
        raise InputError(
            f"bundle '{path}' holds no copy of its checkpoint, which the reference is made of\n"
            "name the file it was exported from: --checkpoint FILE"
        )
    import torch

    from mdm.export.golden import LARGE
    from mdm.plugins.machine import cores
    from mdm.tools.check.levels.blocks import Placer
    from mdm.tools.check.levels.facts import check_facts
    from mdm.tools.check.limits import Multiples
    from mdm.tools.check.standards.blueprint import make_blueprint
    from mdm.tools.check.standards.live import ReferenceStandard

    blueprint = make_blueprint(bundle, checkpoint, options["autoencoder"])
    # On small tensors a second thread of torch gains little, and on a busy machine its waiting takes 6 times as long.
    # Left alone, torch starts one for each core of the machine, also where a process may use but few.
    many = options["threads"] or min(torch.get_num_threads(), cores().threads)
    torch.set_num_threads(many if blueprint.plan.parameters > LARGE else 1)
    standard = ReferenceStandard(model, blueprint, seeds, options["steps"])
    folder = options["folder"]
    multiples = Multiples()
    place = Placer(standard, multiples, None if folder is None else folder / "divergence")
    return Check(model, standard, tasks, seeds, multiples, place, facts=lambda: check_facts(bundle, blueprint))


def opened(path: Path, backend: str, options: dict[str, Any]) -> Model:
    from mdm.runtime.backends import TENSORRT, backend_for
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.model import Model

    bundle = open_bundle(path)
    threads = None if backend == TENSORRT else options["threads"]  # they are for the reference then
    profile = options["profile"] if backend == options["backend"] else None
    return Model(bundle, backend_for(bundle, backend, threads, options["memory"], profile=profile))


def own_checkpoint(bundle: Bundle) -> Path | None:
    """The bundle's weights, where they are the checkpoint byte for byte."""
    signed = bundle.manifest["provenance"]["checkpoint"]["sha256"]
    for name, file in bundle.manifest["files"].items():
        if file["sha256"] == signed:
            return bundle.file(name)
    return None


def default_standard(checkpoint: Path | None, quiet: bool) -> str:
    missing = [name for name in ("torch", "onnx") if find_spec(name) is None]
    if not missing and checkpoint is not None:
        return "reference"
    if not quiet:
        why = f"{' and '.join(missing)} not installed" if missing else "no checkpoint named (--checkpoint)"
        click.echo(f"Checking against the golden files: {why}.", err=True)
    return "golden"


def tell(report: Report, written: Sequence[Path], as_json: bool) -> None:
    from mdm.tools.check.forms.as_json import as_json as as_dictionary

    if as_json:
        print_json(as_dictionary(report))
        return
    click.echo(f"{report.bundle} on {report.backend} against {report.against}")
    for level in LEVELS:
        if found := report.of_level(level):
            click.echo(line_of(level, found))
    for finding in report.findings:
        if finding.verdict in (Verdict.FAIL, Verdict.AMBIGUOUS):
            where = " ".join(part for part in (finding.subject, finding.part, finding.case) if part)
            click.echo(f"{finding.verdict} {finding.level}: {where}: {finding.said}")
    for one in report.divergences:
        click.echo(f"first divergence in {one.graph}: {one.node} ({one.op}): {one.said}")
        if one.reproduce:
            click.echo(f"  {one.reproduce}")
    for path in written:
        click.echo(f"wrote {path}")
    counts = ", ".join(f"{count} {name}" for name, count in report.counts().items() if count)
    click.echo(f"{report.verdict}: {counts}")


def line_of(level: str, found: Sequence[Finding]) -> str:
    """A level in one line; what was skipped tells why."""
    ran = [finding for finding in found if finding.verdict is not Verdict.SKIPPED]
    if not ran:
        return f"  {level:13} skipped: {found[0].said}"
    used = max((finding.used for finding in ran if finding.used is not None), default=math.nan)
    share = f", at most {used:.0%} of a limit used" if math.isfinite(used) else ""
    skipped = f", {len(found) - len(ran)} skipped" if len(ran) < len(found) else ""
    return f"  {level:13} {worst_of(finding.verdict for finding in ran)}: {len(ran)} checked{skipped}{share}"
