"""A SentencePiece unigram tokenizer, trained as in the paper's supplement (10.1.2).

A text segment has a fixed length and is filled with the pad piece, id 0, which the network sees as an
ordinary token; text ends at the first pad, so there is no end-of-text piece and none for its beginning. Id 1
stands for whatever has no piece. Training is deterministic (one thread, fixed seed), and no path enters the
model file: the same lines give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from mdm.plugins.errors import InputError

PAD, UNKNOWN = 0, 1


def train_tokenizer(
    lines: Iterable[str],
    model_path: Path,
    vocab_size: int = 32000,
    whole_pieces: Sequence[str] = (),
    normalization: str = "nmt_nfkc",
) -> None:
    """Trains a unigram model on `lines` and writes it to `model_path`.

    The defaults are the paper's, for 16K-32K pieces. A small vocabulary needs `whole_pieces` ("▁the", where
    "▁" is the space before a word): left alone the unigram model drops short words and spells them. At least
    one character of the corpus must stay outside of these pieces. `normalization` "nmt_nfkc_cf" also folds
    upper case to lower.
    """
    model = io.BytesIO()
    spm.set_random_generator_seed(0)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=True,
            num_threads=1,
            normalization_rule_name=normalization,
            user_defined_symbols=list(whole_pieces),
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces from this corpus: {error}") from error
    model_path.write_bytes(model.getvalue())


class Tokenizer:
    """A trained model: text to ids of a fixed length and back."""

    def __init__(self, path: Path) -> None:
        self.model = spm.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a SentencePiece model that can be read: {error}") from error
        self.size: int = self.model.get_piece_size()
        self.pad = PAD

    def encode_pieces(self, text: str) -> list[int]:
        """Ids of a text, without padding."""
        ids: list[int] = self.model.encode(text)
        if self.model.unk_id() in ids:
            words = [word for word in text.split() if self.model.unk_id() in self.model.encode(word)]
            raise InputError(f"{text!r}: the tokenizer has no piece for {', '.join(words) or text}")
        return ids

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of a text, padded to `length`."""
        ids = self.encode_pieces(text)
        if len(ids) > length:
            raise InputError(f"{text!r}: found {len(ids)} tokens, expected at most {length}: shorten it")
        return ids + [self.pad] * (length - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids before the first pad."""
        text: list[int] = []
        for id_ in map(int, ids):
            if not 0 <= id_ < self.size:
                raise InputError(f"token id {id_}: expected 0 to {self.size - 1}")
            if id_ == self.pad:
                break
            text.append(id_)
        return str(self.model.decode(text))
