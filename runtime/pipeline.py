"""`load` opens a bundle; a `Pipeline` runs its tasks.

    pipeline = load("tiny.bundle")
    [result] = pipeline.generate("two big red circles on the left", seed=7)
    result.picture                                            uint8 [H,W,3]
    pipeline.caption([picture, another], steps=[20, 40])      a list gives each sample its own value

Every method makes requests and hands them to `run`, which drives a step-level scheduler until all have ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.backend import Array
from mdm.runtime.backends import backend_for
from mdm.runtime.bundle import open_bundle
from mdm.runtime.denoiser import Denoiser
from mdm.runtime.json_schema import told
from mdm.runtime.lane import Lanes
from mdm.runtime.model import Model, Prepared
from mdm.runtime.request import Request, Result
from mdm.runtime.scheduler import Scheduler, Ticket

BATCH = 8  # samples that share a step; on a CPU more gain nothing, and each keeps its latents fourteen times

MOST = 100_000  # samples of a call


@dataclass(frozen=True)
class Step:
    """What a callback is told after each evaluation of the network for one sample."""

    index: int  # of the request in the call
    done: int  # evaluations
    of: int
    x0: Array  # the clean latents as they are estimated now
    prepared: Prepared


def load(
    bundle: str | Path,
    backend: str = "ort-cpu",
    *,
    batch: int = BATCH,
    threads: int | None = None,
    memory: int | None = None,
    device: int = 0,
    profile: str | None = None,
) -> Pipeline:
    """Open a bundle on one of `backends.BACKENDS`; the options after `batch` are those of `backend_for`.

    `batch`: samples that share a step at most.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}, expected at least 1")
    opened = open_bundle(bundle)
    return Pipeline(Model(opened, backend_for(opened, backend, threads, memory, device, profile)), batch)


class Pipeline:
    def __init__(self, model: Model, batch: int = BATCH) -> None:
        self.model, self.batch = model, batch
        self.lanes = Lanes(model.backend, batch)  # of the run before, for the next one

    @property
    def tasks(self) -> list[str]:
        return list(self.model.manifest["tasks"])

    # ---------------------------------------------------------------------------------------------------- the tasks

    def generate(self, prompt: Any = None, *, label: Any = None, **fields: Any) -> list[Result]:
        """A picture from a prompt, or from a class; `negative` is what guidance leads away from."""
        return self.sample(
            "class_to_image" if prompt is None else "text_to_image", prompt=prompt, label=label, **fields
        )

    def caption(self, picture: Any, **fields: Any) -> list[Result]:
        """The text to a picture."""
        return self.sample("caption", picture=picture, **fields)

    def ask(self, picture: Any, prompt: Any, **fields: Any) -> list[Result]:
        """The answer to a question about a picture."""
        return self.sample("ask", picture=picture, prompt=prompt, **fields)

    def complete(self, prompt: Any, **fields: Any) -> list[Result]:
        """Text that goes on from a text."""
        return self.sample("complete", prompt=prompt, **fields)

    def joint(self, **fields: Any) -> list[Result]:
        """A picture and its text, made together."""
        return self.sample("joint", **fields)

    def turn(self, picture: Any, prompt: Any, **fields: Any) -> list[Result]:
        """A further turn of a dialogue: from a picture and a text to a new picture and new text."""
        return self.sample("turn", picture=picture, prompt=prompt, **fields)

    def sample(
        self, task: str, *, batch: int = 1, callback: Callable[[Step], None] | None = None, **fields: Any
    ) -> list[Result]:
        """Any task by name. A field that is a list has a value for each sample; `batch` samples are made of each."""
        return self.run(requests_of(task, batch, **fields), callback)

    def denoise(self, task: str, **fields: Any) -> Denoiser:
        """The network alone, for your own sampler: what is told stands in the fields, as for `sample`."""
        if fields.get("upsample") is not None:
            raise InputError("denoise is the network alone: upsample guidance is part of the steps, see sample")
        return Denoiser(self.model, [self.model.prepare(request) for request in requests_of(task, 1, **fields)])

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self, requests: Sequence[Request], callback: Callable[[Step], None] | None = None) -> list[Result]:
        """All of these requests, in their order, whatever their tasks; the first that fails ends the call."""
        results = dict(self.stream(requests, callback))
        return [results[index] for index in range(len(requests))]

    def stream(
        self, requests: Sequence[Request | Prepared], callback: Callable[[Step], None] | None = None
    ) -> Iterator[tuple[int, Result]]:
        """The same, each with its place among the requests, as soon as it is there."""
        prepared = [one if isinstance(one, Prepared) else self.model.prepare(one) for one in requests]
        # Another run, begun before this one ends, makes its own lanes.
        lanes, self.lanes = self.lanes, Lanes(self.model.backend, self.batch)
        scheduler = Scheduler(lanes, queue=len(prepared), burst=sys.maxsize)  # nobody joins a run that has begun
        index_of: dict[Ticket, int] = {}

        def watch(ticket: Ticket) -> None:
            index, job = index_of[ticket], ticket.job
            assert callback is not None
            assert job.x0 is not None
            callback(Step(index, job.done, len(job.rows), job.x0, prepared[index]))

        try:
            for index, one in enumerate(prepared):
                index_of[scheduler.submit(one.job, on_step=watch if callback else None)] = index
            while scheduler.busy:
                for ticket in scheduler.tick():
                    if ticket.error is not None:
                        raise ticket.error
                    yield index_of[ticket], self.finish(prepared[index_of[ticket]], ticket)
            self.lanes = lanes
        except BaseException as error:  # also where the caller goes away
            scheduler.close(error)
            raise

    def finish(self, prepared: Prepared, ticket: Ticket) -> Result:
        """Latents to text and picture."""
        z = ticket.job.state["base"]
        ticket.job.state = {}  # a long list of requests need not keep what its first ones ended with
        self.model.check_finite(z)
        assert ticket.started is not None
        assert ticket.ended is not None
        return Result(
            prepared.request, prepared.sampler, self.model.new_text(prepared, z), self.model.pixels(prepared, z), z,
            len(ticket.job.rows), ticket.ended - ticket.started, ticket.started - ticket.submitted,
        )  # fmt: skip


def requests_of(task: str, batch: int, **fields: Any) -> list[Request]:
    """Requests from fields of which some are lists, of one length; `batch` samples of each, counted on."""
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple)}
    lengths = {name: len(value) for name, value in lists.items()}
    count = next(iter(lengths.values()), 1)
    if type(batch) is not int or batch < 1 or count < 1 or set(lengths.values()) - {count}:
        said = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise InputError(f"batch is {told(batch)}{said and ' and there are ' + said}\nexpected lists of one length")
    if batch * count > MOST:
        raise InputError(f"{batch * count} samples in one call, expected at most {MOST}")
    requests = []
    for index in range(count):
        first = Request.of(task, **fields | {name: value[index] for name, value in lists.items()})
        requests += [replace(first, sample=first.sample + further) for further in range(batch)]
    return requests
