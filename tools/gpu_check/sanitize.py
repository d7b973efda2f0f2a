"""Runs a part of `verify` again in a child under compute-sanitizer, where that is.

memcheck finds reads and writes outside of every allocation, so torch gives each tensor one of its own there. racecheck
finds threads of a block that meet in shared memory without a barrier between them; it is slower still.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdm.tools.gpu_check.buffers import ALONE

TOOL = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
CASES = {"memcheck": 40, "racecheck": 6}
SHARE = {"memcheck": 0.6, "racecheck": 1.0}  # of the seconds left
FOUND_ERRORS = 86  # its exit code then, which is none of ours


@dataclass(frozen=True)
class Sanitized:
    tool: str
    done: bool
    holds: bool
    said: str


def sanitize(out: Path, words: Sequence[str], seconds_left: Callable[[], float]) -> list[Sanitized]:
    """`words`: what gpu_check was started with besides."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *PLACES))
    tool = shutil.which(TOOL, path=path)
    if tool is None:
        return [Sanitized(name, False, True, f"{TOOL} is not here: it comes with the CUDA toolkit") for name in CASES]
    return [_run(tool, name, out, words, seconds_left() * SHARE[name]) for name in CASES]


def _run(tool: str, name: str, out: Path, words: Sequence[str], seconds: float) -> Sanitized:
    script = str(Path(__file__).parent)
    command = [tool, "--tool", name, "--error-exitcode", str(FOUND_ERRORS), sys.executable, script, *words]
    command += ["--part", "verify", "--cases", str(CASES[name]), "--out", str(out / name)]
    environment = {**os.environ, ALONE: "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        try:
            output, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # with the program it runs, or that would go on beside the timing
            return Sanitized(name, False, True, f"not done after {seconds:.0f} seconds")
    return read(name, run.returncode, output)


def read(name: str, code: int, output: str) -> Sanitized:
    """What its output says of `CASES[name]` scans."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    first = re.search(r"========= ((?:Invalid|Error|Warning|Hazard|Misaligned|Program hit).*)", output)
    if not summary:
        said = (output.strip().splitlines() or ["and said nothing"])[-1]
        return Sanitized(name, False, True, f"not done: ended with {code}: {said}")
    clean = code == 0 and re.match(r"0 (errors|hazards)", summary[-1]) is not None
    found = f"; first: {first[1]}" if first and not clean else ""
    return Sanitized(name, True, clean, f"{summary[-1]} in {CASES[name]} scans{found}")
