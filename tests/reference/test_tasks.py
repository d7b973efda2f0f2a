"""Requests: every task marks the right tokens as given, and whatever does not fit the task is told in three lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer
from mdm.reference.multimodal import MDM
from mdm.reference.tasks import TASKS, Request, make_request, text_length

Make = Callable[..., MDM]
CAPTION = "two big red circles on the left"  # 7 tokens
TURN = f"{CAPTION}. now blue"  # 10 tokens


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


# task: its inputs, then its tokens in the model's order, p text and P picture given, t text and I picture generated
EVERY_TASK: dict[str, tuple[dict[str, Any], str]] = {
    "class_to_image": ({"classes": [2, 0]}, "I" * 16),
    "text_to_image": ({"prompts": [CAPTION] * 2}, "p" * 8 + "I" * 16),
    "caption": ({"pictures": pictures()}, "t" * 8 + "P" * 16),
    "ask": ({"prompts": ["what colour?"] * 2, "pictures": pictures()}, "ppp" + "t" * 5 + "P" * 16),
    "complete": ({"prompts": [f"{CAPTION}. where?"] * 2}, "p" * 10 + "t" * 10),
    "joint": ({"batch": 2}, "t" * 8 + "I" * 16),
    "turn": ({"prompts": [TURN] * 2, "pictures": pictures()}, "p" * 10 + "t" * 10 + "P" * 16 + "I" * 16),
}


def request(model: MDM, tokenizer: Tokenizer, task: str, **changes: Any) -> Request:
    return make_request(model, tokenizer, task, **(EVERY_TASK[task][0] | changes))


def test_every_task_of_the_model_is_tested() -> None:
    assert EVERY_TASK.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_a_request_gives_and_leaves_the_right_tokens(tiny_model: Make, tokenizer: Tokenizer, task: str) -> None:
    model = tiny_model()
    inputs, tokens = EVERY_TASK[task]
    made = request(model, tokenizer, task)
    assert made.text_tokens == tokens.count("p") + tokens.count("t")
    assert made.clean.shape == made.unguided_clean.shape == (2, len(tokens), 12)
    for row in made.given:
        assert row.tolist() == [kind in "pP" for kind in tokens]
    assert made.y.tolist() == inputs.get("classes", [4, 4])

    if "prompts" in inputs:
        ids = torch.tensor([tokenizer.encode(inputs["prompts"][0], made.text_tokens)])
        known = tokens.count("p")
        assert torch.equal(made.clean[:, :known], model.vae.encode_text(ids).expand(2, -1, -1)[:, :known])
    if "pictures" in inputs:  # the earlier picture stands above the new one
        shown = model.vae.encode_image(inputs["pictures"])
        assert torch.equal(made.clean[:, made.text_tokens : made.text_tokens + 16], shown)


@pytest.mark.parametrize("task", TASKS)
def test_the_unguided_half_is_not_told_what_the_task_drops(tiny_model: Make, tokenizer: Tokenizer, task: str) -> None:
    model = tiny_model()
    made = request(model, tokenizer, task)
    T, empty = made.text_tokens, model.vae.encode_text(torch.zeros(1, 20, dtype=torch.long))
    drops = {"class_to_image": "class", "joint": "class", "text_to_image": "text", "turn": "text"}.get(task, "")
    assert TASKS[task].drops == drops
    assert made.unguided_y.tolist() == [4, 4]
    told = made.unguided_clean[made.given]
    if drops == "text":
        text = made.given[:, :T]
        assert torch.equal(made.unguided_clean[:, :T][text], empty[:, :T].expand(2, -1, -1)[text])
        assert torch.equal(made.unguided_clean[:, T:], made.clean[:, T:])
    else:
        assert torch.equal(told, made.clean[made.given])


def test_a_class_beside_a_prompt_stays_where_only_the_text_is_dropped(tiny_model: Make, tokenizer: Tokenizer) -> None:
    made = request(tiny_model(), tokenizer, "text_to_image", classes=[1, 2])
    assert made.unguided_y.tolist() == made.y.tolist() == [1, 2]
    joint = make_request(tiny_model(), tokenizer, "joint", classes=[1, 2])
    assert (joint.y.tolist(), joint.unguided_y.tolist()) == ([1, 2], [4, 4])


def test_a_negative_prompt_stands_in_the_prompts_place(tiny_model: Make, tokenizer: Tokenizer) -> None:
    model = tiny_model()
    made = request(model, tokenizer, "text_to_image", negative=["green", "black crosses"])
    ids = torch.tensor([tokenizer.encode(text, 8) for text in ("green", "black crosses")])
    assert torch.equal(made.unguided_clean[:, :8], model.vae.encode_text(ids))
    assert torch.equal(made.clean, request(model, tokenizer, "text_to_image").clean)


def test_a_prompt_of_each_row_keeps_its_own_length(tiny_model: Make, tokenizer: Tokenizer) -> None:
    made = make_request(tiny_model(), tokenizer, "complete", prompts=["two", "two big red", ""])
    assert made.given.sum(1).tolist() == [1, 3, 0]
    assert made.given[1].tolist() == [True] * 3 + [False] * 5


# ------------------------------------------------------------------------------------- segment lengths


@pytest.mark.parametrize(
    ("tokens", "generates", "length"),
    [
        (0, False, 8),
        (8, False, 8),
        (9, False, 20),
        (20, False, 20),
        (0, True, 8),
        (4, True, 8),
        (5, True, 20),
        (16, True, 20),
    ],
)
def test_the_smallest_segment_that_fits(tiny_model: Make, tokens: int, generates: bool, length: int) -> None:
    assert text_length(tiny_model().config, tokens, generates) == length


@pytest.mark.parametrize(("tokens", "generates"), [(21, False), (17, True)])
def test_a_prompt_that_fits_no_segment_is_an_error(tiny_model: Make, tokens: int, generates: bool) -> None:
    with pytest.raises(InputError, match=f"the prompt has {tokens} tokens.*\nexpected at most 20 in all: shorten it"):
        text_length(tiny_model().config, tokens, generates)


def test_the_length_follows_from_the_request_alone(tiny_model: Make, tokenizer: Tokenizer) -> None:
    """Neither model state nor earlier requests count; a long negative prompt does, for it must fit too."""
    model = tiny_model()
    long = " ".join(["red"] * 9)
    for _ in range(2):
        assert make_request(model, tokenizer, "text_to_image", prompts=["red"]).text_tokens == 8
        assert make_request(model, tokenizer, "text_to_image", prompts=[long]).text_tokens == 20
    assert make_request(model, tokenizer, "text_to_image", prompts=["red"], negative=[long]).text_tokens == 20


# ---------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("task", "inputs", "said"),
    [
        ("text_to_img", {"prompts": ["red"]}, "unknown task 'text_to_img'; did you mean 'text_to_image'?"),
        ("", {}, "unknown task ''"),
        ("text_to_image", {}, "task 'text_to_image' needs prompts"),
        ("ask", {"prompts": ["where?"]}, "task 'ask' needs pictures"),
        ("caption", {}, "task 'caption' needs pictures"),
        ("joint", {"pictures": pictures()}, "task 'joint' takes no pictures"),
        ("caption", {"pictures": pictures(), "prompts": ["red"] * 2}, "task 'caption' takes no prompts"),
        ("class_to_image", {"classes": [1], "prompts": ["red"]}, "task 'class_to_image' takes no prompts"),
        ("ask", {"prompts": ["where?"] * 3, "pictures": pictures()}, "a batch of 3 prompts, 2 pictures"),
        ("text_to_image", {"prompts": ["red"] * 2, "classes": [1]}, "a batch of 2 prompts, 1 classes"),
        ("text_to_image", {"prompts": ["red"] * 2, "negative": ["blue"]}, "2 prompts, 1 negative"),
        ("text_to_image", {"prompts": ["red"] * 3, "negative": ["blue"] * 2}, "3 prompts, 2 negative"),
        ("text_to_image", {"prompts": ["red"] * 2, "batch": 3}, "2 prompts, 3"),
        ("caption", {"pictures": pictures(), "negative": ["red"] * 2}, "task 'caption' takes no negative"),
        ("text_to_image", {"prompts": []}, "prompts"),
        ("caption", {"pictures": pictures(0)}, "pictures"),
        ("class_to_image", {"classes": []}, "classes"),
        ("joint", {"batch": -1}, "batch"),
        ("text_to_image", {"prompts": ["a pink circle"]}, "no piece for a, pink"),
        ("text_to_image", {"prompts": ["red " * 21]}, "the prompt has 21 tokens"),
        ("ask", {"prompts": ["red " * 17], "pictures": pictures(1)}, "17 tokens and 4 are left free"),
        ("caption", {"pictures": torch.zeros(2, 3, 16, 32)}, r"\(2, 3, 16, 32\), expected \(2, 3, 32, 32\)"),
        ("caption", {"pictures": torch.zeros(2, 1, 32, 32)}, r"\(2, 1, 32, 32\), expected \(2, 3, 32, 32\)"),
        ("caption", {"pictures": torch.zeros(3, 32, 32)}, r"\(3, 32, 32\), expected"),
    ],
)
def test_what_does_not_fit_the_task_is_an_error(
    tiny_model: Make, tokenizer: Tokenizer, task: str, inputs: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make_request(tiny_model(), tokenizer, task, **inputs)
    assert len(str(caught.value).splitlines()) <= 3
