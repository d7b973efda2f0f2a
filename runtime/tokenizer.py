"""Text to ids and back, by the SentencePiece model of a bundle. Text ends at the first pad."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told

MAX_TEXT = 100_000  # characters of a prompt: more is refused before it is split
NAMED = 3  # unknown words in a message
SPACE = "\u2581"  # SentencePiece's, before a word


class Tokenizer:
    def __init__(self, model: bytes, vocabulary: int, pad: int) -> None:
        import sentencepiece  # many models have no text

        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"the bundle's tokenizer is not a SentencePiece model: {error}") from error
        found = self.model.get_piece_size()
        if found != vocabulary:
            raise InputError(
                f"the bundle's tokenizer has {found} pieces, its model's vocabulary {vocabulary}\n"
                "expected the tokenizer that the model was trained with: export it again with that one"
            )
        self.pad = pad

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without padding."""
        if len(text) > MAX_TEXT:
            raise InputError(f"the prompt has {len(text)} characters, expected at most {MAX_TEXT}: shorten it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt {told(text)} is not sound Unicode") from error
        ids: list[int] = self.model.encode(text)
        if self.model.unk_id() in ids:
            words = dict.fromkeys(word for word in text.split() if self.model.unk_id() in self.model.encode(word))
            known = [self.model.id_to_piece(number).lstrip(SPACE) for number in range(self.model.get_piece_size())]
            named = ", ".join(told(word) + meant(word, known) for word in [*words][:NAMED] or [text])
            raise InputError(f"the model does not know {named}{', ...' if len(words) > NAMED else ''}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: list[int] = []
        for id_ in map(int, ids):
            if id_ == self.pad:
                break
            text.append(id_)
        return str(self.model.decode(text))


def meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
