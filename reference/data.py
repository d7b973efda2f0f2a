"""Where training rows come from: the project's own picture world, or a folder of pictures.

A row is one sample of one task; a batch of rows has one shape. Everything is drawn from the generator that is handed
in, so a run is the same every time and can be resumed at any step.

Letters: B rows, T text tokens, k pictures in a row, L latent tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.config import Config
from mdm.reference.tasks import TASKS, check_tokenizer
from mdm.reference.tokenizer import Tokenizer
from mdm.reference.world import language
from mdm.reference.world.render import SHIFTS, SIDE, picture_table
from mdm.reference.world.scene import SHAPES, Scene, all_scenes, held_out

EMPTY_PROMPT = 0.1  # share of rows whose class or prompt is left out, for classifier-free guidance


@dataclass(frozen=True)
class Rows:
    """A batch of training rows of one shape."""

    ids: Tensor  # [B,T] the whole text, prompt and answer; T may be 0
    pictures: Tensor  # [B,k,C,H,W] in [-1,1]; k may be 0
    given: Tensor  # [B,L] bool: prompt tokens and shown pictures
    y: Tensor  # [B] class
    makes_text: Tensor  # [B] bool
    makes_image: Tensor  # [B] bool


class Data(Protocol):
    """Something rows can be drawn from."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks it has rows for."""

    def draw(self, tasks: Sequence[str], length: int, generator: torch.Generator) -> Rows:
        """A row for each name in `tasks`, which all have the same number of pictures, with `length` text tokens."""

    def pictures(self, count: int, generator: torch.Generator) -> Tensor:
        """Pictures to train the VAE on [count,C,H,W]."""


@dataclass(frozen=True)
class Sample:
    """One row's content before it becomes tensors. `pictures` are indices; the last is what an image task generates."""

    prompt: str = ""
    answer: str = ""
    pictures: tuple[int, ...] = ()
    y: int | None = None
    hidden: bool = False  # pads in the prompt's place, as the unguided half of classifier-free guidance sees it


def rows_of(
    samples: Sequence[Sample],
    tasks: Sequence[str],
    length: int,
    config: Config,
    tokenizer: Tokenizer | None,
    load: Callable[[int], Tensor],
) -> Rows:
    """Tensors out of samples, with every token marked as given or not by its task."""
    ids, text_given, pictures = [], [], []
    for sample, name in zip(samples, tasks, strict=True):
        task = TASKS[name]
        if task.text and tokenizer is not None:
            prompt = tokenizer.encode_pieces(sample.prompt)
            whole = tokenizer.encode(f"{sample.prompt} {sample.answer}".strip(), length)
            ids.append([tokenizer.pad] * len(prompt) + whole[len(prompt) :] if sample.hidden else whole)
            known = length if task.text == "given" else len(prompt)
            text_given.append([position < known for position in range(length)])
        if task.image:
            pictures.append(torch.stack([load(index) for index in sample.pictures]))  # [k,C,H,W]
    count, chosen = len(samples), [TASKS[name] for name in tasks]
    tokens = config.side**2
    shown = torch.tensor(
        [[task.image in ("given", "both")] + [task.image == "given"] * (task.pictures - 1) for task in chosen]
    )
    image_given = shown[:, : chosen[0].pictures].repeat_interleave(tokens, dim=1)
    return Rows(
        ids=torch.tensor(ids, dtype=torch.long).reshape(count, -1),
        pictures=torch.stack(pictures) if pictures else torch.zeros(count, 0),
        given=torch.cat([torch.tensor(text_given, dtype=torch.bool).reshape(count, -1), image_given], dim=1),
        y=torch.tensor([config.classes if sample.y is None else sample.y for sample in samples]),
        makes_text=torch.tensor([task.makes_text for task in chosen]),
        makes_image=torch.tensor([task.makes_image for task in chosen]),
    )


class World:
    """Rows of the picture world; held-out scenes never occur. A scene's class is its shape."""

    tasks = tuple(TASKS)

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        check_tokenizer(tokenizer, config)
        if (config.in_channels, config.image_size) != (3, SIDE) or config.classes < len(SHAPES):
            raise InputError(
                f"the picture world has 3 channels, image_size {SIDE} and {len(SHAPES)} classes; this config has "
                f"{config.in_channels}, {config.image_size} and {config.classes}\ngive --data FOLDER for other pictures"
            )
        self.config, self.tokenizer = config, tokenizer
        self.scenes = [scene for scene in all_scenes() if not held_out(scene)]
        self.index = {scene: i for i, scene in enumerate(all_scenes())}
        table = torch.from_numpy(picture_table()).flatten(0, 1)  # [720*2,H,W,C]
        self.table = table.movedim(-1, 1).contiguous()

    def draw(self, tasks: Sequence[str], length: int, generator: torch.Generator) -> Rows:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        samples = [self.sample(task, rng) for task in tasks]
        return rows_of(samples, tasks, length, self.config, self.tokenizer, self.load)

    def pictures(self, count: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([self.load(self.picture(self.pick(rng), rng)) for _ in range(count)])

    def load(self, index: int) -> Tensor:
        return self.table[index].float() / 127.5 - 1

    def pick(self, rng: np.random.Generator) -> Scene:
        return self.scenes[rng.integers(len(self.scenes))]

    def picture(self, scene: Scene, rng: np.random.Generator) -> int:
        return self.index[scene] * len(SHIFTS) + int(rng.integers(len(SHIFTS)))

    def sample(self, task: str, rng: np.random.Generator) -> Sample:
        scene = self.pick(rng)
        picture = (self.picture(scene, rng),)
        caption, shape = language.caption(scene), SHAPES.index(scene.shape)
        blank = rng.random() < EMPTY_PROMPT
        if task == "class_to_image":
            return Sample(pictures=picture, y=None if blank else shape)
        if task == "text_to_image":
            return Sample(prompt=caption, pictures=picture, hidden=blank)
        if task == "caption":
            return Sample(answer=caption, pictures=picture)
        if task == "joint":
            return Sample(answer=caption, pictures=picture, y=shape if rng.random() < 0.5 else None)
        if task == "ask":
            question, answer = language.questions(scene)[rng.integers(5)]
            return Sample(question, answer, picture)
        if task == "complete":
            if rng.random() < 0.5:
                prompt, answer = language.described_questions(scene)[rng.integers(5)]
                return Sample(prompt, answer)
            words, cut = caption.split(), int(rng.integers(5))
            return Sample(" ".join(words[:cut]), " ".join(words[cut:]))
        earlier, request, new = language.dialogue(scene, rng)
        after = self.picture(new, rng)
        return Sample(
            language.dialogue_prompt(earlier, request), language.caption(new), (*picture, after), hidden=blank
        )


class Folder:
    """Pictures in a folder with `captions.jsonl`: {"file": "a.png", "caption": "...", "class": 3} a line.

    A picture file is anything Pillow reads, brought to the config's size, or for models over an external autoencoder
    a `.npy` array of latents (channels, side, side). Lines without a caption serve only tasks without text.
    """

    LARGEST = 64_000_000  # pixels; a decompression bomb is refused before it is decoded

    def __init__(self, path: Path, config: Config, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None:
            check_tokenizer(tokenizer, config)
        self.config, self.tokenizer = config, tokenizer
        self.items = read_listing(path, config.classes)
        for item in self.items:
            if tokenizer is not None:  # a caption has to fit the shortest segment: see Trainer.text_length
                tokenizer.encode(item.caption, min(config.text_lengths))
        captioned = [i for i, item in enumerate(self.items) if item.caption]
        self.having = {name: captioned if task.text else list(range(len(self.items))) for name, task in TASKS.items()}
        possible = (
            ("class_to_image", "text_to_image", "caption", "joint", "complete") if tokenizer else ("class_to_image",)
        )
        self.tasks = tuple(task for task in possible if self.having[task])

    def draw(self, tasks: Sequence[str], length: int, generator: torch.Generator) -> Rows:
        samples = [self.sample(task, generator) for task in tasks]
        return rows_of(samples, tasks, length, self.config, self.tokenizer, self.load)

    def sample(self, task: str, generator: torch.Generator) -> Sample:
        choices = self.having[task]
        index = choices[int(torch.randint(len(choices), (), generator=generator))]
        item, blank = self.items[index], float(torch.rand((), generator=generator)) < EMPTY_PROMPT
        y = None if blank else item.y
        if task == "complete":
            words = item.caption.split()
            cut = int(torch.randint(len(words), (), generator=generator))
            return Sample(" ".join(words[:cut]), " ".join(words[cut:]))
        if task == "text_to_image":
            return Sample(prompt=item.caption, pictures=(index,), y=y, hidden=blank)
        if task in ("caption", "joint"):
            return Sample(answer=item.caption, pictures=(index,), y=y if task == "joint" else None)
        return Sample(pictures=(index,), y=y)

    def pictures(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.items), (count,), generator=generator)
        return torch.stack([self.load(int(i)) for i in chosen])

    def load(self, index: int) -> Tensor:
        file, config = self.items[index].file, self.config
        shape = (config.in_channels, config.image_size, config.image_size)
        if file.suffix == ".npy":
            return load_latents(file, shape)
        if config.in_channels != 3:
            raise InputError(
                f"'{file}' is a picture, but this config has {config.in_channels} channels: latents of an autoencoder\n"
                f"encode the pictures first and give .npy files of shape {shape}"
            )
        return load_picture(file, config.image_size, self.LARGEST)


@dataclass(frozen=True)
class Item:
    """A line of a folder's listing."""

    file: Path
    caption: str
    y: int | None


def read_listing(folder: Path, classes: int) -> list[Item]:
    """The lines of `captions.jsonl`, each checked before anything is opened."""
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        example = '{"file": "a.png", "caption": "...", "class": 3}'
        raise InputError(f"data folder '{folder}' has no captions.jsonl\nexpected a line a picture: {example}")
    try:
        text = listing.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"'{listing}' is not UTF-8: {error}") from error
    lines = enumerate(text.split("\n"), 1)  # not splitlines, which also cuts at U+2028 inside a caption
    items = [_item(folder, f"line {number} of '{listing}'", line, classes) for number, line in lines if line.strip()]
    if not items:
        raise InputError(f"'{listing}' lists no picture")
    return items


def _item(folder: Path, where: str, line: str, classes: int) -> Item:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file"), str):
        raise InputError(f'{where} has no "file"')
    try:
        file = (folder / fields["file"]).resolve()
        inside = file.is_relative_to(folder.resolve()) and file.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        inside = False
    if not inside:
        raise InputError(f"{where}: {fields['file']!r} is not a file inside the folder")
    y = fields.get("class")
    if y is not None and (type(y) is not int or not 0 <= y < classes):
        raise InputError(f'{where}: "class" is {y!r}, expected 0 to {classes - 1}')
    caption = fields.get("caption") or ""
    if not isinstance(caption, str):
        raise InputError(f'{where}: "caption" is {caption!r}, expected text')
    return Item(file, caption.strip(), y)


def load_picture(file: Path, side: int, largest: int) -> Tensor:
    """A picture cropped to its central square and resized -> [3,side,side] in [-1,1]."""
    try:
        with Image.open(file) as picture:
            if picture.width * picture.height > largest:
                raise OSError(f"{picture.width}x{picture.height} pixels, expected at most {largest}")
            short = min(picture.size)
            left, top = (picture.width - short) // 2, (picture.height - short) // 2
            square = (
                picture.convert("RGB")
                .crop((left, top, left + short, top + short))
                .resize((side, side), Image.Resampling.LANCZOS)
            )
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise InputError(f"'{file}' is not a picture that can be read: {error}") from error
    return torch.from_numpy(np.array(square)).movedim(-1, 0).float() / 127.5 - 1


def load_latents(file: Path, shape: tuple[int, ...]) -> Tensor:
    """An array of that shape. It is mapped: a header may promise terabytes, and objects (pickles) cannot be mapped."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"'{file}' is not an array that can be read: {error}") from error
    if array.shape != shape or array.dtype.kind != "f":
        raise InputError(
            f"latents '{file}' have shape {array.shape} and type {array.dtype}, expected {shape} of floating point"
        )
    with np.errstate(over="ignore"):
        latents = torch.from_numpy(array.astype(np.float32))
    if not latents.isfinite().all():
        raise InputError(f"latents '{file}' hold values that are not finite float32 numbers")
    return latents
