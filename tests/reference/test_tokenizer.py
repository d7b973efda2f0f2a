"""The tokenizer: the shipped model of `mdm-tiny` on every text of its world, training, and errors."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm.plugins.errors import InputError
from mdm.reference.tokenizer import Tokenizer, train_tokenizer
from mdm.reference.world import language
from mdm.reference.world.scene import all_scenes


def shipped() -> Tokenizer:
    with as_file(files("mdm.reference") / "assets" / "mdm-tiny.tokenizer.model") as path:
        return Tokenizer(path)


TINY = shipped()
ids = st.lists(st.integers(1, TINY.size - 1), max_size=20)


def test_every_text_of_the_world_round_trips() -> None:
    asked = [item for s in all_scenes() for item in language.questions(s)]
    texts = {language.caption(s) for s in all_scenes()}.union(*asked, language.corpus())
    for text in texts:
        assert TINY.decode(TINY.encode(text, 16)) == text
    print(f"{len(texts)} texts round trip in a vocabulary of {TINY.size}")


def test_lengths() -> None:
    asked = [item for s in all_scenes() for item in language.questions(s)]
    longest = {
        "caption": max(len(TINY.encode_pieces(language.caption(s))) for s in all_scenes()),
        "question": max(len(TINY.encode_pieces(question)) for question, _ in asked),
        "answer": max(len(TINY.encode_pieces(answer)) for _, answer in asked),
        "any text": max(len(TINY.encode_pieces(line)) for line in language.corpus()),
    }
    print(longest, "tokens")
    assert longest == {"caption": 7, "question": 3, "answer": 3, "any text": 13}


def test_padding_ends_the_text_and_an_empty_text_is_all_padding() -> None:
    one = TINY.encode("red", 3)
    assert one[1:] == [TINY.pad, TINY.pad]
    assert TINY.decode([*one, *TINY.encode("blue", 2)]) == "red"
    assert TINY.encode("", 4) == [TINY.pad] * 4
    assert TINY.decode([]) == ""


def test_upper_case_is_folded() -> None:
    assert TINY.encode("Two Big Red Circles", 8) == TINY.encode("two big red circles", 8)


@given(ids)
def test_any_ids_decode(some: list[int]) -> None:
    assert isinstance(TINY.decode(some), str)


def test_too_long_is_an_error() -> None:
    with pytest.raises(InputError, match="found 7 tokens, expected at most 6"):
        TINY.encode("two big red circles on the left", 6)


@pytest.mark.parametrize("word", ["pink", "redder", "円"])
def test_an_unknown_word_is_named(word: str) -> None:
    with pytest.raises(InputError, match=f"no piece for {word}$"):
        TINY.encode(f"two big {word} circles", 16)


@pytest.mark.parametrize("bad", [-1, TINY.size])
def test_an_id_out_of_range_is_an_error(bad: int) -> None:
    with pytest.raises(InputError, match=f"token id {bad}: expected 0 to {TINY.size - 1}"):
        TINY.decode([2, bad])


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_broken_model_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.model").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "broken.model")
    with pytest.raises(InputError, match=r"missing\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "missing.model")


def test_training_repeats_byte_by_byte_and_gives_the_shipped_pieces(tmp_path: Path) -> None:
    first, second = tmp_path / "first.model", tmp_path / "second.model"
    language.train_world_tokenizer(first)
    language.train_world_tokenizer(second)
    assert first.read_bytes() == second.read_bytes()
    # The shipped bytes hold settings too, which may differ between SentencePiece versions; pieces may not.
    again = Tokenizer(first)
    pieces = [[t.model.id_to_piece(i) for i in range(t.size)] for t in (TINY, again)]
    assert pieces[0] == pieces[1]


def test_general_training_spells_unseen_words(tmp_path: Path) -> None:
    path = tmp_path / "general.model"
    train_tokenizer(language.corpus(), path, vocab_size=60)
    general = Tokenizer(path)
    assert general.size == 60
    for text in ("two big red circles on the left", "hat in the shoe"):  # known letters, unknown words
        assert general.decode(general.encode(text, 64)) == text


def test_more_pieces_than_the_corpus_has_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.model"
    with pytest.raises(InputError, match="no tokenizer of 5000 pieces"):
        train_tokenizer(language.corpus(), path, vocab_size=5000)
    assert not path.exists()
