"""What a deployment is measured against: cases for a graph, and whole runs of a task, with the right answers.

A `Standard` is the PyTorch model (`live.py`), the bundle's golden files (`golden.py`), or another engine (`other.py`).

Letters: S evaluations, B samples, L latent tokens, T text tokens, d latent width (for DiM latents are [C,H,W]),
m modalities, R columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mdm.tools.check.finding import Array

State = dict[str, Array]  # what a step graph carries on: base, point, history; mask and x0_before where it selects
Advance = Callable[["Run", int, State], State]  # one evaluation: run, its number, the state before it -> after it


@dataclass(frozen=True)
class Case:
    """Inputs for a graph and what it should say; `deployed`: what the model itself says in the graph's types."""

    label: str
    inputs: State
    expected: State
    deployed: State | None = None


@dataclass(frozen=True)
class Decoded:
    """What latents say: pieces [B,T] and the margin by which each won over the next, pictures [B,C,H,W]."""

    ids: Array | None = None
    margin: Array | None = None
    picture: Array | None = None
    logits: Array | None = None  # [B,T,V], where they are at hand


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a task as it should be. `states` are those before each evaluation, and the last one's result."""

    task: str
    graph: str
    seed: int
    rows: Array  # float64 [S,m,R], as the runtime computes them now
    inputs: State  # what stays the same: y, guidance, given, uncond, uncond_y
    noise: Array | None  # [S,B,..]
    states: list[State]
    decoded: Decoded
    points: Array | None = None  # [S,B,..], where each evaluation led the model's own solver; None where none ran
    recorded: str = "float64"  # the type of the noise estimates that `states` rest on
    deployed: Deployed | None = None

    @property
    def label(self) -> str:
        return f"seed {self.seed}"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def batch(self) -> int:
        return len(self.states[0]["base"])

    def result(self, state: State, evaluation: int) -> Array:
        """What to compare after an evaluation: the point of the next one, and after the last the result."""
        return state["base" if evaluation == len(self) - 1 else "point"]


@dataclass(frozen=True)
class Walk:
    """States after each evaluation: with errors building up, and each from the true state before it."""

    free: list[State]
    forced: list[State]


class Deployed(Protocol):
    """The model itself in the graph's types: it gives the noise floor."""

    def walk(self, run: Run) -> Walk: ...

    def advance(self, run: Run, evaluation: int, state: State) -> State: ...

    def end(self, run: Run) -> Array: ...

    def decode(self, run: Run, z: Array) -> Decoded: ...


class Standard(Protocol):
    name: str
    precision: str  # which row of the fixed table serves where there is no floor

    def cases(self, graph: str) -> Iterator[Case]: ...

    def runs(self, task: str) -> Iterator[Run]: ...
