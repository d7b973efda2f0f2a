"""How well a checkpoint knows the picture world, on scenes held out of training, judged by `detect` and the grammar.

Every figure is a share of right results. A joint sample counts when its caption is a sentence of the grammar and
describes exactly the picture beside it (count, size, colour, shape and place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdm.reference.generate import generate
from mdm.reference.multimodal import MDM
from mdm.reference.tokenizer import Tokenizer
from mdm.reference.world.detect import Detection, detect
from mdm.reference.world.language import (
    caption,
    changes,
    described_questions,
    dialogue_prompt,
    parse_caption,
    questions,
)
from mdm.reference.world.render import SHIFTS, render
from mdm.reference.world.scene import SHAPES, Scene, all_scenes, held_out

BATCH = 50
ATTRIBUTES = ("count", "size", "colour", "shape", "place")


@dataclass(frozen=True)
class Figure:
    """One measured share, and what was aimed at (0: nothing was)."""

    name: str
    value: float
    aim: float = 0.0


def to_picture(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [n,H,W,C] -> [n,C,H,W] in [-1,1]."""
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1


def to_pixels(pictures: Tensor) -> NDArray[np.uint8]:
    """[n,C,H,W] in [-1,1] -> uint8 [n,H,W,C]."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def measure(
    model: MDM,
    tokenizer: Tokenizer,
    count: int = 200,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda task, done, of: None,
    **settings: object,
) -> list[Figure]:
    """All figures on `count` requests a task; `settings` override the config's sampler."""
    rng = np.random.default_rng(seed)
    unseen = [scene for scene in all_scenes() if held_out(scene)]
    spread = np.arange(count) * max(1, len(unseen) // count) % len(unseen)  # few requests: not all of one object
    scenes = [unseen[i] for i in rng.permutation(spread)]
    shown = to_picture(np.stack([render(scene, SHIFTS[rng.integers(len(SHIFTS))]) for scene in scenes]))

    def run(task: str, **inputs: object) -> tuple[list[str], list[Detection]]:
        """The task over all samples in batches -> texts, detections."""
        texts: list[str] = []
        found: list[Detection] = []
        for part in batches(count):
            given = {name: value[part] for name, value in inputs.items()}  # type: ignore[index]
            free = {} if given else {"batch": part.stop - part.start}
            result = generate(model, tokenizer, task, seed=seed + part.start, **given, **free, **settings)  # type: ignore[arg-type]
            texts += result.texts
            found += [] if result.pictures is None else [detect(pixels) for pixels in to_pixels(result.pictures)]
            report(task, part.stop, count)
        return texts, found

    def share(hits: list[bool]) -> float:
        return float(np.mean(hits))

    figures = []
    _, found = run("text_to_image", prompts=[caption(scene) for scene in scenes])
    pairs = list(zip(found, scenes, strict=True))
    figures.append(
        Figure(
            "text to image: colour and shape",
            share([d.colour == s.colour and d.shape == s.shape for d, s in pairs]),
            0.9,
        )
    )
    for name in ATTRIBUTES:
        figures.append(
            Figure(f"text to image: {name}", share([getattr(d, name) == getattr(s, name) for d, s in pairs]))
        )
    figures.append(Figure("text to image: whole scene", share([d.scene == s for d, s in pairs])))

    texts, _ = run("caption", pictures=shown)
    figures.append(
        Figure("caption: exact", share([text == caption(s) for text, s in zip(texts, scenes, strict=True)]), 0.8)
    )

    asked = [questions(scene)[i % 5] for i, scene in enumerate(scenes)]
    texts, _ = run("ask", prompts=[question for question, _ in asked], pictures=shown)
    figures.append(
        Figure(
            "question about a picture",
            share([text == answer for text, (_, answer) in zip(texts, asked, strict=True)]),
            0.8,
        )
    )

    asked = [described_questions(scene)[i % 5] for i, scene in enumerate(scenes)]
    texts, _ = run("complete", prompts=[question for question, _ in asked])
    figures.append(
        Figure(
            "question about a description",
            share([text == answer for text, (_, answer) in zip(texts, asked, strict=True)]),
        )
    )

    texts, found = run("joint")
    matches = [(parse_caption(text), d) for text, d in zip(texts, found, strict=True)]
    figures.append(
        Figure("joint: caption describes the picture", share([s is not None and d.scene == s for s, d in matches]), 0.8)
    )
    figures.append(Figure("joint: caption is a sentence", share([s is not None for s, _ in matches])))

    classes = [i % len(SHAPES) for i in range(count)]
    _, found = run("class_to_image", classes=classes)
    figures.append(
        Figure("class to image: shape", share([d.shape == SHAPES[y] for d, y in zip(found, classes, strict=True)]))
    )

    turns = [_turn(scene, rng) for scene in scenes]
    texts, found = run("turn", prompts=[prompt for prompt, _ in turns], pictures=shown)
    figures.append(
        Figure(
            "dialogue turn: new text", share([text == caption(s) for text, (_, s) in zip(texts, turns, strict=True)])
        )
    )
    figures.append(
        Figure("dialogue turn: new picture", share([d.scene == s for d, (_, s) in zip(found, turns, strict=True)]))
    )
    return figures


def _turn(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """A request about a scene that leads to a held-out one, and that one; a change of size always does."""
    allowed = [(request, new) for request, new in changes(scene) if held_out(new)]
    request, new = allowed[rng.integers(len(allowed))]
    return dialogue_prompt(caption(scene), request), new


def batches(count: int) -> Iterator[slice]:
    for start in range(0, count, BATCH):
        yield slice(start, min(start + BATCH, count))
