"""Texts of the user's own, as the model was trained to read captions.

Owns their way to token ids, and that of ids back to text for people. Does not own the
captions in shards, whose ids the pipeline made (`trainer.dataset`), or the tokenizer,
which lies beside them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextEncoder:
    """Texts to [CLS] words [SEP].

    Args:
        tokenizer_file: `tokenizer.json` of the run's dataset.
        special_ids: its ids by name; `cls` and `sep` are needed.
        max_tokens: longest text, both included; the rest is cut.
    """

    def __init__(
        self, tokenizer_file: Path, special_ids: Mapping[str, int], *, max_tokens: int
    ) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "[SEP]" in a text is text, as it is in a caption.
        self._tokenizer.encode_special_tokens = True
        self._cls, self._sep = special_ids["cls"], special_ids["sep"]
        self._room = max_tokens - 2

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Ids (n,) int64 of each text, and how many texts were cut. Text is brought to
        NFC and its whitespace to single blanks, as captions are.
        """
        plain = [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
        # "Fast" leaves out the places of the tokens in the text.
        found = self._tokenizer.encode_batch_fast(plain, add_special_tokens=False)
        words = [encoding.ids for encoding in found]
        ids = [
            np.array([self._cls, *one[: self._room], self._sep], dtype=np.int64)
            for one in words
        ]
        return ids, sum(len(one) > self._room for one in words)


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """What token ids say."""
    # [UNK], which counts as special, stands for a word.
    said: str = tokenizer.decode([int(one) for one in ids], skip_special_tokens=False)
    return said
