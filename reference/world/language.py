"""The world's language: captions, questions with answers, dialogue turns, and the corpus of its tokenizer.

    caption   count size colour shape place    "two big red circles on the left"
    question  of the five kinds below          "what colour?" -> "red"
    text      caption. question answer         "two big red circles on the left. what colour? red"
    dialogue  caption. now value               "two big red circles on the left. now blue"

One word is one token, and so are `.` and `?`: a caption has 7 tokens, a question at most 3, an answer at most
3, a text at most 13, a dialogue prompt 10.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..tokenizer import train_tokenizer
from .scene import COLOURS, COUNTS, SIZES, Scene, all_scenes, held_out

COUNT_WORDS = dict(zip(COUNTS, ("one", "two", "three"), strict=True))
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
PLACE_PHRASES = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
}
QUESTIONS = ("how many?", "what size?", "what colour?", "what shape?", "where?")


def shape_word(scene: Scene) -> str:
    """The shape as a caption says it: "circle" for one, "circles" for more."""
    return scene.shape if scene.count == 1 else PLURALS[scene.shape]


def phrases(scene: Scene) -> tuple[str, str, str, str, str]:
    """Count, size, colour, shape and place in words; each is also the answer to the question about it."""
    place = PLACE_PHRASES[scene.place]
    return COUNT_WORDS[scene.count], scene.size, scene.colour, shape_word(scene), place


def caption(scene: Scene) -> str:
    """The one caption of a scene."""
    return " ".join(phrases(scene))


_BY_CAPTION = {caption(scene): scene for scene in all_scenes()}


def parse_caption(text: str) -> Scene | None:
    """The scene of exactly this caption; None for any other text, also one that is only nearly a caption."""
    return _BY_CAPTION.get(text)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """The five questions about a scene with their answers, in the caption's own words."""
    return list(zip(QUESTIONS, phrases(scene), strict=True))


def described_questions(scene: Scene) -> list[tuple[str, str]]:
    """Text-only items (prompt, answer): the prompt is the caption, a full stop and a question."""
    return [(f"{caption(scene)}. {question}", answer) for question, answer in questions(scene)]


def changes(scene: Scene) -> list[tuple[str, Scene]]:
    """Every dialogue request about a scene and the scene it leads to: another colour, the other size."""
    recoloured = [(f"now {c}", replace(scene, colour=c)) for c in COLOURS if c != scene.colour]
    resized = [(f"now {s}", replace(scene, size=s)) for s in SIZES if s != scene.size]
    return recoloured + resized


def dialogue(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Scene]:
    """A dialogue turn that starts at `scene`: its caption, a request, the new scene.

    Half of the requests change the size. A scene of the training set never leads to a held-out one.
    """
    allowed = [change for change in changes(scene) if held_out(scene) or not held_out(change[1])]
    resizes = [change for change in allowed if change[1].colour == scene.colour]
    recolours = [change for change in allowed if change[1].colour != scene.colour]
    choices = resizes if rng.random() < 0.5 else recolours
    request, new = choices[rng.integers(len(choices))]
    return caption(scene), request, new


def dialogue_prompt(earlier: str, request: str) -> str:
    """The text a dialogue turn is asked with."""
    return f"{earlier}. {request}"


def corpus() -> list[str]:
    """Every line the tokenizer is trained on: all texts and all dialogue prompts."""
    lines = [f"{prompt} {answer}" for scene in all_scenes() for prompt, answer in described_questions(scene)]
    turns = [dialogue_prompt(caption(scene), ask) for scene in all_scenes() for ask, _ in changes(scene)]
    return lines + turns


def train_world_tokenizer(model_path: Path) -> None:
    """Writes the shipped tokenizer model of `mdm-tiny`, byte by byte the same at every call.

    Every word and the question mark are whole pieces; the full stop alone is left to the unigram statistics,
    which need at least one character. So no letter is a piece, and an unknown word is an error, not a
    spelling.
    """
    lines = corpus()
    words = sorted({word for line in lines for word in line.replace(".", " ").replace("?", " ").split()})
    whole = [f"▁{word}" for word in words] + ["?"]
    size = len(whole) + 3  # and pad, unknown, full stop
    train_tokenizer(lines, model_path, size, whole_pieces=whole, normalization="nmt_nfkc_cf")
