"""An inference engine in numpy that follows `runtime/backend.py`, with step graphs that a lane cannot tell from real
ones, and `alone`, which is a request's run without any engine, lane or batch.

The networks use + - * / only, which round the same in every batch, so equal means equal bit for bit. The last columns
of a row, which are DiM's, say which request it belongs to and which of its rows it is, so that the engine's log shows
what was run, and whether a run of it has to fail.

Letters: B batch, L tokens, d latent width, m modalities.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mdm.plugins.errors import EngineError
from mdm.runtime.backend import Spec
from mdm.runtime.lane import Job
from mdm.runtime.noise import START, normal
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import PARTS, ROW, run_table, solver_table

Array = Any
WIDTH, PICTURE = 2, 3  # d, and tokens of a picture
OWNER, NUMBER, TROUBLE = (ROW.index(name) for name in ("w", "inv_sqrt_power", "tau"))  # columns no network here reads
FAILS, OVERFLOWS = 1.0, 2.0  # in TROUBLE: the run raises; the run gives what is not finite


@dataclass(frozen=True)
class Kind:
    """A step graph: its inputs, and the number that tells its network from the others'."""

    twist: float
    text: bool = False
    picture: bool = True
    guided: bool = False
    selects: bool = False

    @property
    def modalities(self) -> int:
        return self.text + self.picture

    def specs(self) -> tuple[dict[str, Spec], dict[str, Spec]]:
        f, length = np.dtype(np.float32), "tokens" if self.text else PICTURE
        latent, flat = Spec(f, ("batch", length, WIDTH)), Spec(f, ("batch", length))
        history, row = Spec(f, ("batch", 3, length, WIDTH)), Spec(f, ("batch", self.modalities, len(ROW)))
        given, number = Spec(np.dtype(bool), ("batch", length)), Spec(np.dtype(np.int64), ("batch",))
        inputs = {"base": latent, "point": latent, "history": history, "row": row, "noise": latent, "given": given}
        inputs["y"] = number
        outputs = {"base_next": latent, "point_next": latent, "history_next": history, "x0": latent}
        if self.guided:
            inputs |= {"guidance": Spec(f, ("batch",)), "uncond": latent, "uncond_y": number}
        if self.selects:
            inputs |= {"mask": flat, "x0_before": latent}
            outputs |= {"mask_next": flat}
        return inputs, outputs

    def network(self, point: Array, t: Array, y: Array, mask: Array) -> Array:
        """eps of each token, from its neighbour too if the mask lets it. [...,L,d]"""
        v = np.float32(self.twist) * point + np.float32(0.3) * np.roll(point * mask, 1, axis=-2) + np.float32(0.1) * y
        v = v + np.float32(0.002) * t
        return v / (1 + np.abs(v))

    def estimate(self, x: Mapping[str, Array], point: Array, t: Array, mask: Array) -> Array:
        """Guided eps; `x` holds inputs with axes to go with [...,L,d]."""
        eps = self.network(point, t, x["y"], mask)
        if not self.guided:
            return eps
        untold = self.network(np.where(x["given"], x["uncond"], point), t, x["uncond_y"], mask)
        return eps + x["guidance"] * (eps - untold)

    def select(self, x0: Array, before: Array) -> Array:
        """Which tokens others see next. [...,L]"""
        moved = x0 - before
        return np.float32(1) * (sum(moved[..., i] * moved[..., i] for i in range(WIDTH)) > 0.05)

    def run(self, x: Mapping[str, Array]) -> dict[str, Array]:
        """The whole graph on a batch."""
        point, rows = x["point"], x["row"]
        tokens = point.shape[1]
        counts = [tokens] if self.modalities == 1 else [tokens - PICTURE, PICTURE]
        c = dict(zip(ROW, np.repeat(rows, counts, axis=1).transpose(2, 0, 1)[..., None], strict=True))  # [B,L,1] each
        given = x["given"][..., None]
        wide = {name: np.float32(x[name])[:, None, None] for name in ("y", "uncond_y", "guidance") if name in x}
        wide |= {"given": given, "uncond": x.get("uncond")}
        mask = x["mask"][..., None] if self.selects else np.float32(1)
        eps = self.estimate(wide, point, rows[:, 0, 0, None, None], mask)
        m = c["p"] * point + c["q"] * eps
        history = [np.where(c[f"slot{k}"] == 1, m, x["history"][:, k]) for k in range(3)]
        tensors = dict(zip(PARTS, (x["base"], *history, x["noise"]), strict=True))
        base, moved = (sum(c[f"{to}_{part}"] * v for part, v in tensors.items()) for to in ("base", "point"))
        x0 = np.where(given, point, (point - c["sigma"] * eps) / c["alpha"])
        found = {
            "base_next": np.where(given, x["base"], base), "point_next": np.where(given, point, moved),
            "history_next": np.stack(history, axis=1), "x0": x0,
        }  # fmt: skip
        if self.selects:
            found["mask_next"] = self.select(x0, x["x0_before"])
        return found


KINDS = {
    "step_image": Kind(1.3),
    "step_image_up": Kind(0.7),  # same inputs: a run may change between the two
    "step_image_guided": Kind(1.1, guided=True),
    "step_text": Kind(0.9, text=True, picture=False, selects=True),
    "step_joint": Kind(1.2, text=True),
    "step_joint_guided": Kind(0.8, text=True, guided=True, selects=True),
}


# ----------------------------------------------------------------------------------------------------- the engine


class Memory:
    """A buffer; `apart`: the engine's memory is another than the host's."""

    def __init__(self, shape: Sequence[int], dtype: Any, apart: bool) -> None:
        self.host = np.zeros(shape, dtype)
        self.engine = np.zeros(shape, dtype) if apart else self.host
        self.moves: Counter[str] = Counter()

    def push(self) -> None:
        self.moves["push"] += 1
        self.engine[...] = self.host

    def pull(self) -> None:
        self.moves["pull"] += 1
        self.host[...] = self.engine

    def address(self, row: int) -> int:
        return self.engine.ctypes.data + row * self.engine.strides[0]


class FakeGraph:
    def __init__(self, engine: FakeEngine, name: str) -> None:
        self.engine, self.name, self.kind = engine, name, KINDS[name]
        self.bound: WeakKeyDictionary[Any, dict[Any, Callable[[], None]]] = WeakKeyDictionary()
        self.inputs, self.outputs = self.kind.specs()

    def batches(self, tokens: int) -> Sequence[int]:
        return self.engine.batches

    def bind(
        self, runs: Sequence[tuple[Mapping[str, Memory], Mapping[str, Memory]]], first: int, count: int
    ) -> Callable[[], None]:
        assert 0 < len(runs) <= self.engine.chain
        assert count in (self.engine.batches or [count])
        self.engine.binds += 1
        tied = [self.tie(inputs, outputs, first, count) for inputs, outputs in runs]

        def run() -> None:
            for x, out in tied:
                self.engine.execute(self, x, out)

        return run

    def tie(
        self, inputs: Mapping[str, Memory], outputs: Mapping[str, Memory], first: int, count: int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        assert inputs.keys() == self.inputs.keys()
        assert outputs.keys() == self.outputs.keys()
        assert not {id(buffer) for buffer in inputs.values()} & {id(buffer) for buffer in outputs.values()}
        for buffer in [*inputs.values(), *outputs.values()]:
            assert first >= 0
            assert first + count <= len(buffer.engine), "a run goes out of its buffers"
        x = {name: buffer.engine[first : first + count] for name, buffer in inputs.items()}
        out = {name: buffer.engine[first : first + count] for name, buffer in outputs.items()}
        assert all(not values.flags.owndata for values in [*x.values(), *out.values()])
        return x, out

    def run(self, wanted: Sequence[str], **inputs: Array) -> list[Array]:
        found = self.kind.run(inputs)
        return [found[name] for name in wanted]


class FakeEngine:
    """`fails(graph, rows)` may say of any run that it has to fail; what it leaves behind then is no number."""

    name = "fake"

    def __init__(
        self,
        batches: Sequence[int] = (),
        apart: bool = False,
        fails: Callable[[str, Array], bool] | None = None,
        chain: int = 1,
    ) -> None:
        self.batches, self.apart, self.fails, self.chain = batches, apart, fails, chain
        self.graphs = {name: FakeGraph(self, name) for name in KINDS}
        self.log: list[tuple[str, list[tuple[int, int]]]] = []  # runs that went well: graph; owner and number of rows
        self.failed_alone: list[int] = []  # owners
        self.idle = 0  # rows that were run for nobody
        self.binds = 0

    def graph(self, name: str) -> FakeGraph:
        return self.graphs[name]

    def buffer(self, shape: Sequence[int], dtype: Any) -> Memory:
        return Memory(shape, dtype, self.apart)

    def execute(self, graph: FakeGraph, x: Mapping[str, Array], out: Mapping[str, Array]) -> None:
        rows = x["row"][:, 0]
        sound = np.isfinite(x["base"]).all((1, 2)) & np.isfinite(x["history"]).all((1, 2, 3))
        trouble = rows[:, TROUBLE]
        if (trouble == FAILS).any() or (self.fails and self.fails(graph.name, rows)):
            for values in out.values():
                values[...] = np.nan if values.dtype.kind == "f" else 0
            if len(rows) == 1:
                self.failed_alone.append(int(rows[0, OWNER]))
            raise EngineError("the engine fails")
        for name, values in graph.kind.run(x).items():
            out[name][...] = values
        if (trouble == OVERFLOWS).any():
            out["base_next"][trouble == OVERFLOWS] = np.nan
        elif not np.isfinite(out["base_next"][sound]).all():
            raise AssertionError("rows that began finite are not any more")
        owners = [(int(row[OWNER]), int(row[NUMBER])) for row in rows if row[OWNER]]
        self.idle += len(rows) - len(owners)
        self.log.append((graph.name, owners))


# ---------------------------------------------------------------------------------------------------- its requests


@cache
def table(solver: str, steps: int, modalities: int) -> Array:
    schedules = [make_schedule({"kind": "cosine", "shift": shift}) for shift in (2.0, 0.5)[-modalities:]]
    rows = solver_table(schedules, solver=solver, steps=steps, t_start=0.99, t_end=0.02)
    return rows.astype(np.float32)


def make_job(
    graphs: str | Sequence[str],
    owner: int = 1,
    *,
    solver: str = "ddim",
    steps: int = 4,
    text: int = 2,
    seed: int = 0,
    y: int = 0,
    guidance: float = 1.5,
    given: int = 0,
    fails_at: int | None = None,
    trouble: float = FAILS,
) -> Job:
    """A sample; `graphs` are used in turn, the first `given` tokens are told."""
    names = [graphs] if isinstance(graphs, str) else list(graphs)
    kind = KINDS[names[0]]
    rows = table(solver, steps, kind.modalities).copy()
    rows[:, :, OWNER] = owner
    rows[:, :, NUMBER] = np.arange(len(rows))[:, None]
    if fails_at is not None:
        rows[fails_at, :, TROUBLE] = trouble
    length = text * kind.text + PICTURE * kind.picture
    shape = (length, WIDTH)
    base = normal(seed, 0, START, shape)
    inputs = {
        "y": np.int64(y), "uncond_y": np.int64(-1), "guidance": np.float32(guidance),
        "given": np.arange(length) < given, "uncond": normal(seed, 1, START, shape),
    }  # fmt: skip
    state = {
        "base": base, "point": base, "history": np.zeros((3, *shape), np.float32),
        "mask": np.ones(length, np.float32), "x0_before": np.zeros_like(base),
    }  # fmt: skip
    every = list(itertools.islice(itertools.cycle(names), len(rows)))
    return Job(every, rows, length if kind.text else 0, seed, 0, inputs, state)


def alone(job: Job) -> tuple[Array, list[Array]]:
    """The result of a run from the start, by `run_table`, and x0 after each row. Call it before the job is run."""
    z, given = job.state["base"].copy(), job.inputs["given"][:, None]
    x = job.inputs | {name: np.float32(job.inputs[name]) for name in ("y", "uncond_y")} | {"given": given}
    first = KINDS[job.graphs[0]]
    tokens = (len(z) - PICTURE, PICTURE) if first.modalities == 2 else ()
    x0s: list[Array] = []
    mask, before = np.ones_like(z[:, :1]), np.zeros_like(z)

    def network(point: Array, t: Array) -> Array:
        nonlocal mask, before
        row, kind = job.rows[len(x0s)], KINDS[job.graphs[len(x0s)]]
        c = dict(zip(ROW, np.repeat(row, tokens or (len(z),), axis=0).T[..., None], strict=True))
        point = np.where(given, z, point)
        eps = kind.estimate(x, point, t, mask)
        x0 = np.where(given, point, (point - c["sigma"] * eps) / c["alpha"])
        if kind.selects:
            mask = kind.select(x0, before)[:, None]
        before = x0
        x0s.append(x0)
        return eps

    noise = np.stack([normal(job.seed, job.sample, 1 + i, z.shape) for i in range(len(job.rows))])
    return np.where(given, z, run_table(job.rows, network, z, noise, tokens)), x0s
