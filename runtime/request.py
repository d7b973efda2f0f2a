"""What is asked for and what comes of it, in the words that Python, the command line and JSON share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told
from mdm.runtime.solver import GRID, SOLVERS, pinned
from mdm.runtime.words import nearest

MOST_STEPS = 10_000
# Every setting of a sampler, of whatever solver; each may be given with a request.
KIND_OF_SETTING: dict[str, type] = {
    "solver": str, "steps": int, "guidance": float,
    "spacing": str, "t_start": float, "t_end": float, "final_zero": bool,
} | {name: type(default) for solver in SOLVERS.values() for name, default in solver.options.items()}  # fmt: skip
LARGEST = float(np.finfo(np.float32).max)
NAME_OF_KIND = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Request:
    """One sample. What a task does not need is left out.

    `sampler` overrides settings of the model's own: solver, steps, guidance, spacing, ...
    """

    task: str
    prompt: str | None = None
    picture: Any = None  # a path, a PIL image, or an array uint8 [H,W,3]
    label: int | None = None  # a class
    negative: str | None = None  # what guidance leads away from; default the empty text
    seed: int = 0
    sample: int = 0  # which of the seed's samples
    size: int | None = None  # of the new picture, in pixels
    upsample: int | None = None  # DiM's upsample guidance by this factor
    noise: npt.NDArray[np.float32] | None = field(default=None, repr=False)  # the start, in place of the seed's
    sampler: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if value is not None or name in ("task", "seed", "sample"):
                check_kind(name, value, kind)
        for name, value in self.sampler.items():
            if name not in KIND_OF_SETTING:
                known = ", ".join(KIND_OF_SETTING)
                raise InputError(
                    f"a sampler has no setting {told(name)}{nearest(name, KIND_OF_SETTING)}\nsettings: {known}"
                )
            check_kind(name, value, KIND_OF_SETTING[name])

    @classmethod
    def of(cls, task: str, **given: Any) -> Request:
        """From words as they come; the settings of the sampler stand among the others. None is as good as absent."""
        words = [name for name in WORDS if name != "task"]
        for name in given:
            if name not in words:
                raise InputError(
                    f"a request has no field {told(name)}{nearest(name, words)}\nfields: {', '.join(words)}"
                )
        given = {name: plain(value) for name, value in given.items() if value is not None}
        sampler = {name: given.pop(name) for name in KIND_OF_SETTING if name in given}
        return cls(task, **given, sampler=sampler)


KINDS = {
    "task": str, "prompt": str, "label": int, "negative": str, "seed": int, "sample": int, "size": int, "upsample": int,
}  # fmt: skip


def check_kind(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name} is {told(value)}, expected {NAME_OF_KIND[kind]}")
    if kind is float and not abs(value) <= LARGEST:  # also NaN
        raise InputError(f"{name} is {told(value)}, expected a finite number of float32")


def plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


WORDS = (*(f.name for f in fields(Request) if f.name != "sampler"), *KIND_OF_SETTING)


@dataclass(frozen=True)
class Result:
    """What a request came to. A task without text has no text, one without a new picture no picture."""

    request: Request
    sampler: dict[str, Any]  # every setting that was used
    text: str | None
    picture: npt.NDArray[np.uint8] | None  # [H,W,C]
    latents: npt.NDArray[np.float32]  # [L,d], for DiM [C,H,W]
    evaluations: int  # of the network
    seconds: float  # from its first step to its last, others' steps between them included
    waited: float  # seconds before that

    def facts(self) -> dict[str, Any]:
        """The request and its outcome as JSON has it; a picture or noise that was given is not in it."""
        asked = {name: value for name in KINDS if (value := getattr(self.request, name)) is not None}
        text = {} if self.text is None else {"text": self.text}
        return asked | self.sampler | text | {"evaluations": self.evaluations, "seconds": round(self.seconds, 4)}


def sampler_for(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own sampler with what was asked for instead, every setting checked and pinned."""
    if asked.get("solver", own["solver"]) != own["solver"]:
        # Another solver keeps the times, not the options; it ends where it is published to end.
        kept = ("steps", "guidance", *(name for name in GRID if name != "final_zero"))
        own = {name: own[name] for name in kept}
    sampler = pinned({**own, **asked}, "the request")
    if not 1 <= sampler["steps"] <= MOST_STEPS:
        raise InputError(f"steps is {told(sampler['steps'])}, expected 1 to {MOST_STEPS}")
    return sampler
