"""A request of each kind for a tiny model, and what tests ask of a result and of an error."""

from __future__ import annotations

import numpy as np
import pytest

from mdm.plugins.errors import MdmError
from mdm.runtime import Request, Result

PICTURE = np.full((32, 32, 3), 99, np.uint8)
REQUESTS = {
    "joint": Request.of("joint", seed=1, label=2),
    "text_to_image": Request.of("text_to_image", prompt="two big red circles", seed=2),
    "caption": Request.of("caption", picture=PICTURE, seed=3),
    "turn": Request.of("turn", picture=PICTURE, prompt="red", seed=4),
    "class_to_image": Request.of("class_to_image", label=1, seed=5),
}


def refused(error: pytest.ExceptionInfo[MdmError]) -> str:
    said = str(error.value)
    assert said
    assert len(said.splitlines()) <= 3
    return said


def same(a: Result, b: Result) -> bool:
    pictures = (a.picture is None and b.picture is None) or np.array_equal(a.picture, b.picture)  # type: ignore[arg-type]
    return np.array_equal(a.latents, b.latents) and a.text == b.text and pictures
