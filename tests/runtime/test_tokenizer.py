"""The tokenizer of a bundle: the reference's ids, and words for whatever it cannot take."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from mdm.plugins.errors import InputError
from mdm.reference import SHIPPED_TOKENIZER
from mdm.reference import Tokenizer as Reference
from mdm.reference.tokenizer import train_tokenizer
from mdm.reference.world.language import caption, questions
from mdm.reference.world.scene import all_scenes
from mdm.runtime.tokenizer import MAX_TEXT, Tokenizer

MODEL = SHIPPED_TOKENIZER.read_bytes()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(MODEL, 40, 0)


def test_ids_are_the_references(ours: Tokenizer, tokenizer: Reference) -> None:
    scenes = random.Random(0).sample(all_scenes(), 40)
    texts = [caption(scene) for scene in scenes] + [question for scene in scenes for question, _ in questions(scene)]
    for text in ["", " ", "  two   big ", "Two BIG", "two\tbig", "two big?", *texts]:
        ids = ours.encode(text)
        assert ids == tokenizer.encode_pieces(text)
        assert 0 not in ids
        assert ours.decode(ids) == tokenizer.decode(ids)
    assert ours.decode(ours.encode(texts[0])) == texts[0]


def test_text_ends_at_the_first_pad(ours: Tokenizer) -> None:
    red, blue = ours.encode("red"), ours.encode("blue")
    assert ours.decode([*red, 0, *blue]) == "red"
    assert ours.decode([*red, *blue, 0, 0]) == "red blue"
    assert ours.decode([0, *red]) == ours.decode([]) == ""
    other = Tokenizer(MODEL, 40, red[0])
    assert other.decode([*blue, *red, *blue]) == "blue"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("two blorps on the left", "'blorps'"),
        ("green zebra blue quagga", "'zebra', 'quagga'"),
        ("日本", "'日本'"),
        ("\0", "'\\x00'"),
        ("red\x1b[31mred", "'red\\x1b[31mred'"),
        ("red\n\n\n\nzebra", "'zebra'"),
    ],
)
def test_words_without_a_piece_are_named(text: str, named: str, ours: Tokenizer) -> None:
    with pytest.raises(InputError) as error:
        ours.encode(text)
    assert named in str(error.value)
    assert str(error.value).startswith("the model does not know ")
    assert len(str(error.value).splitlines()) == 1


def test_text_that_is_none_is_refused(ours: Tokenizer) -> None:
    """A lone surrogate, as JSON can write it, has no bytes in UTF-8."""
    with pytest.raises(InputError):
        ours.encode("red \ud800")


def test_many_unknown_words_make_no_long_message(ours: Tokenizer) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        ours.encode("zebra " * (MAX_TEXT // 6))
    assert time.perf_counter() - start < 2
    assert len(str(error.value)) < 1000


def test_a_text_too_long_is_refused_before_it_is_split(ours: Tokenizer) -> None:
    assert len(ours.encode("red " * (MAX_TEXT // 4))) == MAX_TEXT // 4
    ours.model = None  # any use of it is an error
    try:
        with pytest.raises(InputError, match="the prompt has 100001 characters, expected at most 100000: shorten it"):
            ours.encode("x" * (MAX_TEXT + 1))
    finally:
        ours.model = Tokenizer(MODEL, 40, 0).model


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 40 pieces, its model's vocabulary 41\nexpected the tokenizer that"):
        Tokenizer(MODEL, 41, 0)
    train_tokenizer(["a b c d e f"] * 5, tmp_path / "other.model", vocab_size=10)
    with pytest.raises(InputError, match="has 10 pieces, its model's vocabulary 40"):
        Tokenizer((tmp_path / "other.model").read_bytes(), 40, 0)


@pytest.mark.parametrize(
    "model", [b"", b"\0", b"not a model", MODEL[:100], MODEL[:-7], MODEL[50:], b"{}" * 1000, bytes(10**6)],
    ids=lambda model: str(len(model)),
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(model: bytes) -> None:
    with pytest.raises(InputError) as error:
        Tokenizer(model, 40, 0)
    assert len(str(error.value).splitlines()) <= 3


def test_a_damaged_tokenizer_never_ends_in_a_crash() -> None:
    """Bytes changed at random: taken, or refused in our words."""
    draw, said = random.Random(0), []
    for _ in range(150):
        damaged = bytearray(MODEL)
        for _ in range(draw.choice((1, 3))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            made = Tokenizer(bytes(damaged), 40, 0)
            made.decode(made.encode("two big red circles on the left"))
        except InputError as error:
            said.append(str(error))
    print(f"{len(said)} of 150 refused")
    assert 0 < len(said) < 150
    assert max(len(one.splitlines()) for one in said) <= 3
