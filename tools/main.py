"""The command `mdm`: runs a verb and turns whatever goes wrong into an exit code and at most three lines.

Exit codes: 0 done, 1 parity failed, 2 wrong use or bad input, 3 the environment lacks something, 4 internal
error, 130 stopped by the user, 141 the reader of our output went away.
A verb reports a failure by raising; what it returns is ignored.
With `--json` anywhere among a verb's arguments an error is also one JSON object on stdout.
MDM_DEBUG=1 prints the traceback of any error. Verbs are imported when called, so `mdm --help` needs no torch.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import click

from mdm.plugins.errors import MdmError

# verb -> (module:attribute of its click command, line shown by `mdm --help`)
VERBS: Mapping[str, tuple[str, str]] = {
    "export": ("mdm.tools.export:command", "Make a bundle of ONNX graphs from a checkpoint."),
    "plan": ("mdm.tools.plan.command:command", "Say what a build would do: plugins, types, memory, versions."),
    "build": ("mdm.tools.engines.command:command", "Build a bundle's graphs into engines for this machine's GPU."),
    "inspect": ("mdm.tools.inspect:command", "Show what is in a bundle."),
    "generate": ("mdm.tools.sample:generate", "Make pictures from prompts or classes."),
    "caption": ("mdm.tools.sample:caption", "Say what pictures show."),
    "ask": ("mdm.tools.sample:ask", "Answer a question about a picture."),
    "complete": ("mdm.tools.sample:complete", "Go on from texts."),
    "joint": ("mdm.tools.sample:joint", "Make pictures together with texts that describe them."),
    "turn": ("mdm.tools.sample:turn", "Go on in a dialogue: from a picture and a request to new ones."),
    "check": ("mdm.tools.check.command:command", "Prove that a bundle computes what its model computes."),
    "plugin": ("mdm.tools.plugin.command:command", "Build TensorRT's plugins as a library, and try them."),
    "train": ("mdm.tools.train:command", "Train a model, or go on with one."),
    "bench": ("mdm.tools.bench.command:command", "Measure speed and memory."),
    "doctor": ("mdm.tools.doctor:command", "Say what works on this machine, and what to do about the rest."),
    "evaluate": ("mdm.tools.evaluate:command", "Measure a checkpoint on prompts held out of training."),
}

# optional module -> the extra of this package that brings it
EXTRA_OF_MODULE = {
    "torch": "export",
    "onnx": "export",
    "onnxruntime": "cpu",
    "tensorrt": "tensorrt",
    "polygraphy": "tensorrt",
    "starlette": "serve",
    "uvicorn": "serve",
}


class VerbGroup(click.Group):
    """A click group that knows its verbs by name and help line, and imports one only to run it."""

    def __init__(self, verbs: Mapping[str, tuple[str, str]]) -> None:
        # The commands held here are stand-ins: enough for the help page, completion and "Did you mean".
        stand_ins = {name: click.Command(name, short_help=line) for name, (_, line) in verbs.items()}
        super().__init__("mdm", commands=stand_ins, help="Deploys diffusion Mamba models.")
        self.verbs = verbs
        click.version_option(package_name="mdm-deploy", prog_name="mdm")(self)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        module, _, attribute = self.verbs[name][0].partition(":")
        return name, getattr(import_module(module), attribute), rest


@dataclass(frozen=True)
class Failure:
    """What the caller of the command is told about an exception."""

    exit_code: int
    message: str  # at most three lines


def failure_from_exception(error: BaseException) -> Failure:
    """The one place that decides what an exception means to the person at the terminal."""
    match error:
        case MdmError():
            return Failure(error.exit_code, "\n".join(str(error).splitlines()[:3]))
        case KeyboardInterrupt() | click.Abort():
            return Failure(130, "stopped")
        case click.UsageError(ctx=click.Context() as ctx):
            usage = (error.format_message(), ctx.get_usage(), f"Try: {ctx.command_path} --help")
            return Failure(2, "\n".join(" ".join(line.split()) for line in usage))
        case click.ClickException():
            return Failure(2, " ".join(error.format_message().split()))
        case FileNotFoundError() | PermissionError() | IsADirectoryError() | NotADirectoryError():
            found = " ".join(str(error.strerror or error).split())
            return Failure(2, found if error.filename is None else f"{error.filename}: {found}")
        case OSError(errno=errno.ENOSPC):
            return Failure(3, " ".join(str(error.strerror).split()))
        case ModuleNotFoundError() if (module := (error.name or "").partition(".")[0]) in EXTRA_OF_MODULE:
            extra = EXTRA_OF_MODULE[module]
            return Failure(
                3,
                f"This needs the Python module {module}, which is not installed.\n"
                f'Install it: pip install "mdm-deploy[{extra}]"',
            )
    said = " ".join(str(error).split()) or "no message"
    return Failure(4, f"Internal error, {type(error).__name__}: {said}\nTo see where, run it again with MDM_DEBUG=1.")


def report(error: BaseException, as_json: bool) -> int:
    """Print an exception for a person, and for a program if asked; return the exit code."""
    failure = failure_from_exception(error)
    if os.environ.get("MDM_DEBUG") == "1":
        traceback.print_exception(error)
    print(failure.message if failure.exit_code == 130 else f"Error: {failure.message}", file=sys.stderr)
    if as_json:
        fields = {"type": type(error).__name__, "exit_code": failure.exit_code, "message": failure.message}
        print(json.dumps({"error": fields}))
    return failure.exit_code


def main(args: Sequence[str] | None = None, verbs: Mapping[str, tuple[str, str]] = VERBS) -> int:
    """Run the command with these arguments (default: the process's) and return its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    group = VerbGroup(verbs)
    try:
        # Not group.main(): its own error output and its exit code 1 for an abort are not ours.
        with group.make_context("mdm", list(words)) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:  # --help and --version
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as bare:
        bare.show()
        return 2
    except BrokenPipeError:
        # `mdm ... | head`: Python would flush stdout once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        return report(error, as_json="--json" in words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
