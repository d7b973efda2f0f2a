"""A bundle's graph as an engine of TensorRT runs it, for lanes and for arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.backend import Array, Buffer, Spec
from mdm.runtime.tensorrt.engine import Engine, Run, check_aligned
from mdm.runtime.tensorrt.gpu import GpuBuffer

MOST_STAGED = 4  # sets of shapes for which a graph keeps buffers for arrays


class TensorRtGraph:
    metadata: Mapping[str, str] = {}  # an engine keeps none

    def __init__(self, engine: Engine, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec], size: int = 0) -> None:
        """`size`: bytes on the GPU, about."""
        self.engine, self.inputs, self.outputs, self.size = engine, inputs, outputs, size
        self.bound: WeakKeyDictionary[Any, dict[Any, Callable[[], None]]] = WeakKeyDictionary()
        self._staged: dict[Any, tuple[dict[str, GpuBuffer], dict[str, GpuBuffer], Callable[[], None]]] = {}

    def batches(self, tokens: int = 0, **sizes: int) -> Sequence[int]:
        """Of the profiles that take the other dimensions so. The batch is every tensor's first dimension."""
        sizes = {**sizes, "tokens": tokens} if tokens else sizes
        found: set[int] = set()
        for profile in self.engine.profiles:
            spans = {
                letter: (least, most)
                for name, spec in self.inputs.items()
                for letter, least, most in zip(spec.shape, profile[name][0], profile[name][2], strict=True)
                if isinstance(letter, str)
            }
            least, most = spans["batch"]
            if all(spans[letter][0] <= size <= spans[letter][1] for letter, size in sizes.items() if letter in spans):
                found |= {*range(least, most + 1)}
        return sorted(found)

    def bind(
        self, runs: Sequence[tuple[Mapping[str, Buffer], Mapping[str, Buffer]]], first: int, count: int
    ) -> Callable[[], None]:
        chain = []
        for buffers in ({**inputs, **outputs} for inputs, outputs in runs):
            if short := [name for name, buffer in buffers.items() if first + count > len(buffer.host)]:
                raise EngineError(
                    f"graph '{self.engine.name}': rows {first} to {first + count} are not all in {short[0]}"
                )
            chain.append({name: buffer.address(first) for name, buffer in buffers.items()})
            check_aligned(self.engine.name, chain[-1])
        shapes = tuple((name, (count, *buffer.host.shape[1:])) for name, buffer in runs[0][0].items())
        self.engine.profile_for(shapes)  # said now, not at the first run
        return Run(self.engine, shapes, chain)

    def run(self, wanted: Sequence[str], **inputs: Array) -> list[Array]:
        """Arrays of more samples than the engine takes go through it piece by piece."""
        if inputs.keys() != self.inputs.keys():
            raise InputError(
                f"graph '{self.engine.name}' was given {', '.join(inputs)}\nexpected {', '.join(self.inputs)}"
            )
        sizes = self._sizes({name: array.shape for name, array in inputs.items()})
        count = sizes.pop("batch")
        # None: the shapes are no profile's, which `bind` says in words.
        batches = self.batches(**sizes) or [count]
        most = batches[-1]
        pieces = [
            self._run_piece(wanted, {name: array[at : at + most] for name, array in inputs.items()}, batches)
            for at in range(0, count, most)
        ]
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Of the open dimensions, by name."""
        return {
            letter: size
            for name, shape in shapes.items()
            for letter, size in zip(self.inputs[name].shape, shape, strict=True)
            if isinstance(letter, str)
        }

    def _run_piece(self, wanted: Sequence[str], inputs: Mapping[str, Array], batches: Sequence[int]) -> list[Array]:
        count = len(next(iter(inputs.values())))
        room = next(size for size in batches if size >= count)
        with self.engine.gpu.mine():  # a thread that came between would use the same buffers
            here, there, run = self._stage(tuple((name, (room, *inputs[name].shape[1:])) for name in self.inputs))
            for name, buffer in here.items():
                buffer.host[:count] = inputs[name]
                buffer.host[count:] = inputs[name][-1]
                buffer.push()
            run()
            for name in wanted:
                there[name].pull()
            return [there[name].host[:count].copy() for name in wanted]

    def _stage(self, shapes: Any) -> tuple[dict[str, GpuBuffer], dict[str, GpuBuffer], Callable[[], None]]:
        """Buffers for inputs and outputs of these shapes."""
        if shapes not in self._staged:
            gpu, sizes = self.engine.gpu, self._sizes(dict(shapes))
            here, there = (
                {name: GpuBuffer(gpu, spec.sized(**sizes), spec.dtype) for name, spec in specs.items()}
                for specs in (self.inputs, self.outputs)
            )
            run = self.bind([(here, there)], 0, shapes[0][1][0])
            while len(self._staged) >= MOST_STAGED:
                del self._staged[next(iter(self._staged))]
            self._staged[shapes] = here, there, run
        return self._staged[shapes]
