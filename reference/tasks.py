"""What a request is made of: which tokens are given and which are generated, for every task of the model.

One table serves training and sampling. Text and picture latents of a sample stand in one tensor, text first; a
dialogue turn stacks the earlier picture on top of the new one.

Letters: B batch, L latent tokens, T text tokens, d latent width; a side is the picture's side in patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.config import Config, nearest
from mdm.reference.multimodal import MDM
from mdm.reference.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """`text` and `image`: "" absent, "given", "made" (generated), or "both": a given part, then a generated one."""

    text: str
    image: str
    drops: str  # what the unguided half of classifier-free guidance is not told: "class", "text" or nothing

    @property
    def makes_text(self) -> bool:
        return self.text in ("made", "both")

    @property
    def makes_image(self) -> bool:
        return self.image in ("made", "both")

    @property
    def pictures(self) -> int:
        return {"": 0, "both": 2}.get(self.image, 1)


TASKS: dict[str, Task] = {
    "class_to_image": Task(text="", image="made", drops="class"),
    "text_to_image": Task(text="given", image="made", drops="text"),
    "caption": Task(text="made", image="given", drops=""),
    "ask": Task(text="both", image="given", drops=""),
    "complete": Task(text="both", image="", drops=""),
    "joint": Task(text="made", image="made", drops="class"),
    "turn": Task(text="both", image="both", drops="text"),
}


def task_of(name: str) -> Task:
    if name not in TASKS:
        raise InputError(f"unknown task '{name}'{nearest(name, TASKS)}\ntasks: {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Request:
    """A batch as the network gets it. `clean` holds the given tokens' latents; elsewhere its content is not used."""

    task: Task
    text_tokens: int  # T
    clean: Tensor  # [B,L,d]
    given: Tensor  # [B,L] bool
    y: Tensor  # [B]
    unguided_clean: Tensor  # [B,L,d]
    unguided_y: Tensor  # [B]


def text_length(config: Config, tokens: int, generates: bool) -> int:
    """The segment length for a prompt: the smallest that holds it, with room if text is generated."""
    need = tokens + (min(config.text_lengths) // 2 if generates else 0)
    for length in sorted(config.text_lengths):
        if need <= length:
            return length
    room = f" and {need - tokens} are left free for the text to come" if generates else ""
    raise InputError(
        f"the prompt has {tokens} tokens{room}\nexpected at most {max(config.text_lengths)} in all: shorten it"
    )


def check_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    """Ids beyond the vocabulary fail anyway; ids of another tokenizer inside it would be wrong without a word."""
    if tokenizer.size != config.vocabulary:
        raise InputError(
            f"the tokenizer has {tokenizer.size} pieces, the model's vocabulary {config.vocabulary}\n"
            "expected the tokenizer that the model was trained with"
        )


def make_request(
    model: MDM,
    tokenizer: Tokenizer,
    task_name: str,
    prompts: list[str] | None = None,
    pictures: Tensor | None = None,  # [B,C,H,W] in [-1,1]: the given picture of each sample
    classes: list[int] | None = None,
    negative: list[str] | None = None,  # what the unguided half is told in the prompt's place; default the empty text
    batch: int | None = None,  # for tasks that need nothing given
) -> Request:
    """Checks what the task needs and puts every token in its place."""
    task, config = task_of(task_name), model.config
    check_tokenizer(tokenizer, config)
    needs = {"prompts": task.text in ("given", "both"), "pictures": task.image in ("given", "both")}
    if negative is not None and task.drops != "text":
        raise InputError(f"task '{task_name}' takes no negative prompts")
    values = {"prompts": prompts, "pictures": pictures, "classes": classes, "negative": negative}
    for name, needed in needs.items():
        if (needed and values[name] is None) or (not needed and values[name] is not None):
            raise InputError(f"task '{task_name}' {'needs' if needed else 'takes no'} {name}")
    sizes = {name: len(value) for name, value in values.items() if value is not None}
    sizes |= {} if batch is None else {"as batch": batch}
    count = next(iter(sizes.values()), 1)
    if count < 1 or any(size != count for size in sizes.values()):
        raise InputError(f"task '{task_name}': a batch of " + ", ".join(f"{n} {name}" for name, n in sizes.items()))
    if pictures is not None and tuple(pictures.shape[1:]) != (config.in_channels, config.image_size, config.image_size):
        side = config.image_size
        raise InputError(
            f"picture batch has shape {tuple(pictures.shape)}, expected ({count}, {config.in_channels}, {side}, {side})"
        )

    clean: list[Tensor] = []
    given: list[Tensor] = []
    unguided: list[Tensor] = []
    length = 0
    if task.text:
        encoded = [tokenizer.encode_pieces(prompt) for prompt in prompts or [""] * count]
        refused = [tokenizer.encode_pieces(prompt) for prompt in negative or [""] * count]
        longest = max(len(ids) for ids in encoded + (refused if task.drops == "text" else []))
        length = text_length(config, longest, task.makes_text)
        for ids, target in ((encoded, clean), (refused if task.drops == "text" else encoded, unguided)):
            padded = torch.tensor([row + [tokenizer.pad] * (length - len(row)) for row in ids])
            target.append(model.vae.encode_text(padded))  # [B,T,d]
        known = length if task.text == "given" else 0
        given.append(torch.stack([torch.arange(length) < (known or len(row)) for row in encoded]))
    if task.image:
        tokens = config.side**2
        blank = torch.zeros(count, tokens, config.latent)
        shown = blank if pictures is None else model.vae.encode_image(pictures)  # [B,h*w,d]
        stack = torch.cat([shown, blank], dim=1) if task.image == "both" else shown
        clean.append(stack)
        unguided.append(stack)
        given.append((torch.arange(stack.shape[1]) < (0 if pictures is None else tokens)).expand(count, -1))
    null = torch.full((count,), config.classes)
    y = null if classes is None else torch.tensor(classes)
    return Request(
        task, length, torch.cat(clean, 1), torch.cat(given, 1), y,
        torch.cat(unguided, 1), null if task.drops == "class" else y,
    )  # fmt: skip
