"""Checks the GPU kernels on the GPU of this machine, in one call of at most nine minutes:

    python tools/gpu_check                      # verify, sanitize, ceilings, times -> a report on stdout and in --out
    python tools/gpu_check --counts H200        # what scans must take of a chip and do take, as Markdown; needs no GPU

It wants torch, Triton and numpy, and of this project the checkout alone: where mdm is not installed, its import names
are a folder of links. Exit codes: 0 all is right, 1 a kernel is not, 2 wrong use, 3 the machine lacks something,
4 internal error. A goal that is missed is told, and is no error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
# `mdm.reference` as a whole would want packages that are not needed here.
LINKS = ("plugins", "tools", "reference/scan.py", "reference/short_conv.py")
PARTS = ("verify", "sanitize", "ceilings", "times")
SECONDS = 540.0
UNTIL = {"verify": 200.0, "sanitize": 320.0}  # seconds from the start; the times have the rest


def make_names() -> TemporaryDirectory[str] | None:
    """Make `mdm` importable; the folder lasts as long as what this gives."""
    if find_spec("mdm") is not None:
        return None
    folder = TemporaryDirectory(prefix="mdm_names")
    for name in LINKS:
        link = Path(folder.name) / "mdm" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / name)
    sys.path.insert(0, folder.name)
    return folder


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_check", description="Checks and times the GPU kernels on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"), help="folder for the report")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--cases", type=int, help="verify only so many scans, all of them small")
    parser.add_argument("--sources", action="store_true", help="the Triton sources instead of the shipped pack")
    parser.add_argument(
        "--counts", nargs="?", const="H200", metavar="CHIP", help="print the counts for a chip, and end"
    )
    return parser.parse_args(words)


def check(words: list[str], start: float) -> int:
    asked = arguments(words)
    if asked.counts:
        from mdm.tools.gpu_check.counted import chip_named, counted

        print("\n".join(counted(chip_named(asked.counts))))
        return 0
    return run(asked, words, start)


def run(asked: argparse.Namespace, words: list[str], start: float) -> int:
    from mdm.plugins.errors import EnvironmentLackError
    from mdm.plugins.gpu.driver import Driver

    Driver()  # before torch, which is slow to import, and says less
    for package in ("torch", "triton", "numpy"):
        if find_spec(package) is None:
            raise EnvironmentLackError(f"gpu_check needs {package}, which is not installed\npip install {package}")

    import torch

    if not torch.cuda.is_available():
        raise EnvironmentLackError(
            f"torch {torch.__version__} does not reach this machine's GPU\nexpected a build for CUDA\n"
            "install one that the driver serves"
        )
    from mdm.plugins.gpu.pack import SHIPPED
    from mdm.tools.gpu_check import about, cases, measure, report, runners, sanitize, times, verify

    def left(until: float) -> float:
        return start + until - time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {line}", file=sys.stderr, flush=True)

    parts = asked.part or PARTS
    runner: runners.Runner = runners.open_sources() if asked.sources else runners.open_pack(SHIPPED)
    made = report.Report(about.look(runner.name, words))
    if "verify" in parts:
        tried, kernels = cases.named() + cases.small(), runner.kernels
        if asked.cases is not None:
            tried, kernels = cases.small(asked.cases), frozenset()
        made.verified = verify.verify(runner, tried, kernels, lambda: left(UNTIL["verify"]), progress)
        report.write(made, asked.out)  # whatever comes later
    if "sanitize" in parts:
        progress("sanitize")
        given = ["--sources"] if asked.sources else []
        made.sanitized = sanitize.sanitize(asked.out, given, lambda: left(UNTIL["sanitize"]))
    if {"ceilings", "times"} & {*parts} and not (made.verified and made.verified.broken):
        progress("ceilings")
        watch = measure.Stopwatch()
        made.ceilings = measure.ceilings(watch)
        if "times" in parts:
            chip = about.measured_chip(made.about, made.ceilings)
            made.rows = times.time_all(runner, chip, watch, lambda: left(SECONDS), progress)
    print(report.markdown(made))
    print("wrote", *report.write(made, asked.out))
    return 0 if made.holds else 1


def main(words: list[str]) -> int:
    start = time.monotonic()
    # Python put this file's folder first, whose modules are not to be found under their bare names.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    names = make_names()
    from mdm.plugins.errors import MdmError

    try:
        return check(words, start)
    except MdmError as error:
        print("Error: " + "\n".join(str(error).splitlines()[:3]), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # `... --counts | head`: Python would flush stdout once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        traceback.print_exc()
        return 4
    finally:
        if names is not None:
            names.cleanup()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
