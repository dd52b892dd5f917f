"""The tokenizer of a dataset: trained on the corpus or loaded, stored, and encoding.

Owns the files of `DATASET/tokenizer/` and how captions become ids. Does not own
caption cleaning (`pipeline.captions`) or the choice of training captions
(`pipeline.plan`). Uses `tokenizers` alone: `transformers` would bring torch along.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from pipeline.manifest import (
    DATASET_JSON,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TokenizerInfo,
    words_file,
)

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_READ = (TOKENIZER_JSON, DATASET_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
_TRAINED_SPECIALS = {name: f"[{name.upper()}]" for name in SPECIAL_TOKENS}
_KNOWN_SPECIALS = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# RoBERTa's kin name the same roles differently.
_STAND_INS = {"cls": "bos", "sep": "eos"}
# BERT's vocabularies hold about as many characters; the rarer ones become [UNK].
_MAX_ALPHABET = 1000


@dataclass(frozen=True, kw_only=True)
class StoredTokenizer:
    """Files of `tokenizer/` by name, and what the manifest says about them."""

    files: Mapping[str, bytes]
    info: TokenizerInfo

    def write(self, directory: Path) -> None:
        """Write the files below `directory`."""
        directory.mkdir(exist_ok=True)
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


class CaptionEncoder:
    """Captions to ids: each caption ended by the separator, nothing else added."""

    def __init__(self, stored: StoredTokenizer) -> None:
        self._tokenizer = _plain(stored.files[TOKENIZER_JSON])
        self._sep = stored.info.special_ids["sep"]
        self._dtype = stored.info.dtype

    def encode(self, captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """The captions that have tokens, and their ids (tokens,) end to end."""
        return self.encode_batch([captions])[0]

    def encode_batch(
        self, batch: Sequence[Sequence[str]]
    ) -> list[tuple[list[str], np.ndarray]]:
        """The same for the captions of each of many inputs, in order."""
        flat = [caption for captions in batch for caption in captions]
        # "Fast" leaves out the places of the tokens in the text.
        encodings = iter(
            self._tokenizer.encode_batch_fast(flat, add_special_tokens=False)
        )
        return [
            self._joined(captions, [next(encodings).ids for _ in captions])
            for captions in batch
        ]

    def _joined(
        self, captions: Sequence[str], ids: Sequence[list[int]]
    ) -> tuple[list[str], np.ndarray]:
        pairs = [pair for pair in zip(captions, ids, strict=True) if pair[1]]
        joined = [token for _, one in pairs for token in (*one, self._sep)]
        return [caption for caption, _ in pairs], np.array(joined, self._dtype)


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> StoredTokenizer:
    """A lower-case WordPiece of at most `vocabulary` entries: equal captions in equal
    order, equal bytes.

    The library numbers the `##` alphabet in hash order and breaks ties of its merges by
    those numbers, so runs differ. Here the alphabet is counted and numbered before
    training, its `##` half as special tokens; the model is then rebuilt from the
    vocabulary, where they are entries like any other.
    """
    tokenizer = _untrained({})
    words = _word_counts(tokenizer, captions)
    alphabet, continuing = _alphabet(words, vocabulary)
    specials = list(_TRAINED_SPECIALS.values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=specials + [f"##{character}" for character in continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    entries = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer = _untrained(entries)
    tokenizer.add_special_tokens(specials)
    data = tokenizer.to_str(pretty=True).encode()
    return _stored(data, _TRAINED_SPECIALS, "the trained tokenizer")


def load_tokenizer(name: str) -> StoredTokenizer:
    """A fast tokenizer from a local directory or, where there is none, the hub.

    Raises:
        ValueError: not there, not a fast one, or without the roles the trainer needs.
    """
    directory = Path(name)
    if not directory.is_dir():
        directory = _downloaded(name)
    if not (directory / TOKENIZER_JSON).is_file():
        raise ValueError(
            f"--tokenizer {name}: no {TOKENIZER_JSON} in it, so it is not a fast "
            f"tokenizer; convert it once with transformers: AutoTokenizer."
            f"from_pretrained({name!r}).save_pretrained(DIR), and give DIR"
        )
    return _read(directory, f"--tokenizer {name}")


def read_tokenizer(directory: Path, place: str | None = None) -> StoredTokenizer:
    """The tokenizer that a dataset already holds.

    Args:
        directory: its files, or copies of them.
        place: where the dataset has them, where `directory` holds copies.

    Raises:
        ValueError: it is gone or damaged.
    """
    place = place or str(directory)
    try:
        return _read(directory, place)
    except (OSError, ValueError) as error:
        cause = str(error)
        if isinstance(error, OSError):
            cause = f"{Path(error.filename).name}: {error.strerror}"
        raise ValueError(
            f"the tokenizer of this dataset cannot be read ({cause}); put {place} "
            "back from a copy, or choose a new --output"
        ) from error


def _read(directory: Path, name: str) -> StoredTokenizer:
    configured: dict[str, Any] = {}
    for file in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        path = directory / file
        try:
            configured |= json.loads(path.read_bytes()) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {file} is no JSON object: {error}") from error
    return _stored(words_file(directory).read_bytes(), _texts(configured), name)


def _untrained(entries: Mapping[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece(dict(entries), unk_token=_TRAINED_SPECIALS["unk"])
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _word_counts(tokenizer: Tokenizer, captions: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for caption in captions:
        text = tokenizer.normalizer.normalize_str(caption)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return words


def _alphabet(words: Mapping[str, int], vocabulary: int) -> tuple[list[str], list[str]]:
    """The commonest characters, and those of them that also occur inside words."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    room = min(_MAX_ALPHABET, (vocabulary - len(SPECIAL_TOKENS)) // 2)
    common = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted(common[:room])
    inside = {character for word in words if len(word) > 1 for character in word}
    return alphabet, [character for character in alphabet if character in inside]


def _repeated(words: Mapping[str, int]) -> Iterable[str]:
    """Words as often as they occurred, in an order that depends on nothing else."""
    for word in sorted(words):
        for start in range(0, words[word], 1000):
            yield " ".join([word] * min(1000, words[word] - start))


def _downloaded(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_READ)))
    except HFValidationError:
        cause = "no such directory"
    except Exception as error:  # offline, unknown name, gated: all mean "not loaded"
        cause = str(error).strip().splitlines()[0]
    raise ValueError(
        f"--tokenizer {name!r} is neither a directory here nor loadable from the hub "
        f"({cause}); give a directory with {TOKENIZER_JSON}, or train:8000 to train one"
    )


def _plain(tokenizer_json: bytes) -> Tokenizer:
    """A tokenizer that reads "[SEP]" in a caption as text and never cuts or pads."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _texts(configured: Mapping[str, Any]) -> dict[str, str]:
    """Configured text of the token of each role, where there is one."""
    texts = {}
    for role in SPECIAL_TOKENS:
        for key in (role, _STAND_INS.get(role, role)):
            value = configured.get(f"{key}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text and role not in texts:
                texts[role] = str(text)
    return texts


def _config(tokens: Mapping[str, str]) -> bytes:
    """A `tokenizer_config.json` that `AutoTokenizer` needs nothing beside.

    Written anew for loaded tokenizers too: theirs may lean on a `config.json`, name
    code of their own or the place they came from, or leave the special tokens to a
    class that is not named.
    """
    config = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[role] for role in SPECIAL_TOKENS},
    }
    return (json.dumps(config, indent=1) + "\n").encode()


def _stored(data: bytes, configured: Mapping[str, str], name: str) -> StoredTokenizer:
    """The tokenizer of `tokenizer.json` bytes, its roles as configured or usual."""
    try:
        tokenizer = _plain(data)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{name}: {TOKENIZER_JSON} does not load: {error}") from error
    tokens = _special_tokens(configured, tokenizer, name)
    entries = tokenizer.get_vocab(with_added_tokens=True)
    special_ids = {role: entries[token] for role, token in tokens.items()}
    for token in tokens.values():
        ids = tokenizer.encode(f"a {token} b", add_special_tokens=False).ids
        forbidden = set(ids) & {
            special_ids["sep"],
            special_ids["cls"],
            special_ids["mask"],
        }
        if forbidden:
            raise ValueError(
                f"{name} turns the text {token!r} inside a caption into a special "
                "token, which would split captions; mark it special in "
                f"{TOKENIZER_JSON} (added_tokens), or use train:8000"
            )
    info = TokenizerInfo(
        path=TOKENIZER,
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=max(entries.values()) + 1,
        special_ids=special_ids,
    )
    files = {TOKENIZER_JSON: data, TOKENIZER_CONFIG: _config(tokens)}
    return StoredTokenizer(files=files, info=info)


def _special_tokens(
    configured: Mapping[str, str], tokenizer: Tokenizer, name: str
) -> dict[str, str]:
    """Text of the token of each role: as configured, else by its usual name."""
    tokens = {}
    for role in SPECIAL_TOKENS:
        candidates = [configured[role]] if role in configured else []
        candidates += _KNOWN_SPECIALS[role]
        present = [
            text for text in candidates if tokenizer.token_to_id(text) is not None
        ]
        if present:
            tokens[role] = present[0]
    missing = [role for role in SPECIAL_TOKENS if role not in tokens]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(missing)} token, which masked training "
            "needs; use a BERT- or RoBERTa-like tokenizer, or train:8000"
        )
    return tokens
