"""Tokens of captions for people: their texts, and how much of the vocabulary is used.

Owns what an inspection says about tokens. Does not own making them
(`pipeline.tokenizer`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pipeline.manifest import TOKENIZER_JSON, captions_of
from pipeline.tokenizer import CaptionEncoder, StoredTokenizer

_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token to show."""

    text: str
    unknown: str | None = None
    """The words that became the unknown token."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Use of the vocabulary by a number of captions."""

    captions: int
    lengths: np.ndarray
    """Tokens (captions,) without separators."""
    counts: np.ndarray
    """Occurrences (entries,) of every entry of the vocabulary."""
    unknown: int
    tokens: int
    common: Sequence[tuple[str, int]]
    unknown_words: Sequence[tuple[str, int]]

    @property
    def unknown_share(self) -> float:
        """Share of tokens that are the unknown one."""
        return self.unknown / max(self.tokens, 1)

    @property
    def used(self) -> int:
        """Entries that occur."""
        return int(np.count_nonzero(self.counts))


class Tokens:
    """The tokens of one dataset."""

    def __init__(self, stored: StoredTokenizer) -> None:
        self._encoder = CaptionEncoder(stored)
        self._info = stored.info
        self._tokenizer = Tokenizer.from_str(stored.files[TOKENIZER_JSON].decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def shown(self, caption: str, ids: np.ndarray) -> list[Token]:
        """The stored tokens of a caption, without its separator."""
        plain = [int(n) for n in ids if n != self._info.special_ids["sep"]]
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        same = encoding.ids == plain
        tokens = []
        for place, number in enumerate(plain):
            unknown = None
            if number == self._info.special_ids["unk"]:
                start, end = encoding.offsets[place] if same else (0, 0)
                unknown = caption[start:end]
            text = self._tokenizer.id_to_token(number) or f"#{number}"
            # Byte-level vocabularies write a space as a letter.
            text = text.replace("\u0120", "\u2423").replace("\u2581", "\u2423")
            tokens.append(Token(text=text, unknown=unknown))
        return tokens

    def count(self, captions: Sequence[str]) -> Vocabulary:
        """Count the tokens of captions."""
        counts = np.zeros(self._info.vocab_size, np.int64)
        lengths: list[int] = []
        unknown_words: Counter[str] = Counter()
        unk, sep = self._info.special_ids["unk"], self._info.special_ids["sep"]
        for start in range(0, len(captions), _BATCH):
            batch = list(captions[start : start + _BATCH])
            kept, ids = self._encoder.encode(batch)
            counts += np.bincount(ids, minlength=len(counts))
            for caption, part in zip(kept, captions_of(ids, sep), strict=True):
                lengths.append(len(part) - 1)
                if np.any(part == unk):
                    found = self.shown(caption, part)
                    unknown_words.update(t.unknown for t in found if t.unknown)
        counts[sep] = 0
        order = np.argsort(-counts, kind="stable")[:40]
        return Vocabulary(
            captions=len(lengths),
            lengths=np.array(lengths, np.int64),
            counts=counts,
            unknown=int(counts[unk]),
            tokens=int(counts.sum()),
            common=[
                (self._tokenizer.id_to_token(int(n)) or f"#{n}", int(counts[n]))
                for n in order
                if counts[n] and n != unk
            ],
            unknown_words=unknown_words.most_common(40),
        )
