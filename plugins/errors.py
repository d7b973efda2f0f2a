"""The errors a person can cause, and the exit code each one ends a command with.

They live on the ground floor because every other folder may raise them. A message has at most three lines:
what is wrong with which thing, what was found and what was expected, what to do.
"""

from __future__ import annotations


def in_one_line(error: BaseException) -> str:
    """Our errors have up to three lines; some places have one."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line).replace(":; ", ": ")


class MdmError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = 4  # internal error


class ParityError(MdmError):
    """A deployment computes something else than the model."""

    exit_code = 1


class InputError(MdmError, ValueError):
    """Wrong use, or a file or request that is not what it should be."""

    exit_code = 2


class EngineError(MdmError):
    """An inference engine failed while it ran a graph."""


class EnvironmentLackError(MdmError):
    """This machine lacks something: a package, a library, a device."""

    exit_code = 3
