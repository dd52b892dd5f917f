"""Tokenizers: trained to the same bytes every time, loaded only if they can be used."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.manifest import SPECIAL_TOKENS, captions_of
from pipeline.tokenizer import (
    CaptionEncoder,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from tests.pipeline.corpora import REPOSITORY, SPECIAL_CAPTION

CAPTIONS = [
    "A child in a pink dress is climbing up a set of stairs",
    "Two dogs of different breeds looking at each other on the road",
    "Ein Mädchen läuft über die Straße, das Café ist geschlossen",
    "medium-dark skin tone: thumbs up! 100 % \N{THUMBS UP SIGN}",
    "一只黑色的狗在草地上奔跑",
] * 3

_TRAIN = """
import hashlib
from tests.pipeline.test_tokenizer import CAPTIONS
from pipeline.tokenizer import train_tokenizer
files = train_tokenizer(CAPTIONS, 220).files
print(hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest())
"""


def test_training_gives_the_same_bytes_in_every_process() -> None:
    digests = set()
    for seed in ("0", "1", "2", "3", "random"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _TRAIN]
        result = subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
        )
        digests.add(result.stdout)
    assert len(digests) == 1


def test_training_depends_on_the_captions_alone() -> None:
    assert train_tokenizer(CAPTIONS, 220) == train_tokenizer(CAPTIONS[::-1], 220)
    assert train_tokenizer(CAPTIONS, 220) != train_tokenizer(CAPTIONS[1:], 220)


def test_the_vocabulary_is_bounded_and_starts_with_the_special_tokens() -> None:
    info = train_tokenizer(CAPTIONS, 220).info
    assert 150 < info.vocab_size <= 220
    assert info.special_ids == {name: n for n, name in enumerate(SPECIAL_TOKENS)}


def test_a_corpus_of_many_characters_still_fits_the_vocabulary() -> None:
    every = [" ".join(chr(0x0400 + n) * 3 for n in range(200))] * 2
    assert train_tokenizer(every, 64).info.vocab_size <= 64


def test_words_of_known_characters_are_never_unknown() -> None:
    stored = train_tokenizer(CAPTIONS, 400)
    encoder = CaptionEncoder(stored)
    _, ids = encoder.encode(["Dress dresses, straight café drosd"])
    assert stored.info.special_ids["unk"] not in ids


def test_special_tokens_in_captions_are_text() -> None:
    stored = train_tokenizer([*CAPTIONS, SPECIAL_CAPTION], 400)
    _, ids = CaptionEncoder(stored).encode([SPECIAL_CAPTION, "a dog"])
    special = stored.info.special_ids
    assert len(captions_of(ids, special["sep"])) == 2
    assert not np.isin(ids, [special[name] for name in ("cls", "mask", "unk")]).any()


def test_captions_without_tokens_are_dropped() -> None:
    encoder = CaptionEncoder(train_tokenizer(CAPTIONS, 220))
    # Nothing but a character that the normaliser removes.
    kept, ids = encoder.encode(["a dog", "\u200b"])
    assert kept == ["a dog"]
    assert np.count_nonzero(ids == 3) == 1


def test_a_batch_gives_every_input_what_it_would_get_alone() -> None:
    encoder = CaptionEncoder(train_tokenizer(CAPTIONS, 300))
    batch = [CAPTIONS[:2], [], ["\u200b"], ["\u200b", "a dog", "", "\u0301"], CAPTIONS]
    together = encoder.encode_batch(batch)
    assert [kept for kept, _ in together] == [CAPTIONS[:2], [], [], ["a dog"], CAPTIONS]
    for captions, (kept, ids) in zip(batch, together, strict=True):
        alone, expected = encoder.encode(captions)
        assert kept == alone
        assert ids.dtype == np.uint16
        assert ids.tolist() == expected.tolist()
        assert len(captions_of(ids, 3)) == len(kept)
        assert not len(ids) or ids[-1] == 3
    assert encoder.encode_batch([]) == []


def test_a_caption_in_a_batch_is_neither_padded_nor_cut() -> None:
    stored = train_tokenizer(CAPTIONS, 300)
    tokenizer = Tokenizer.from_str(stored.files["tokenizer.json"].decode())
    tokenizer.enable_padding()
    tokenizer.enable_truncation(3)
    files = {**stored.files, "tokenizer.json": tokenizer.to_str().encode()}
    encoder = CaptionEncoder(dataclasses.replace(stored, files=files))
    for captions in (["a"], ["a dog " * 40]):
        _, alone = CaptionEncoder(stored).encode(captions)
        encoded = encoder.encode_batch([["a"], ["a dog " * 40]])
        ids = [ids.tolist() for kept, ids in encoded if kept == captions]
        assert ids == [alone.tolist()]


_LOAD = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.mask_token == "[MASK]" and tokenizer.sep_token_id == 3
print(tokenizer.decode(tokenizer("A pink dress", add_special_tokens=False).input_ids))
"""


def test_transformers_loads_the_stored_directory(tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, 300).write(tmp_path / "tokenizer")
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "tokenizer")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "a pink dress", result.stderr


_ROLES = """
import sys, json
from transformers import AutoTokenizer
found = {}
for name in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    found[name] = {
        role: getattr(tokenizer, f"{role}_token_id")
        for role in ("pad", "unk", "cls", "sep", "mask")
    }
    text = "a dog [MASK] <mask> bird"
    found[name]["ids"] = tokenizer(text, add_special_tokens=False).input_ids
print(json.dumps(found))
"""


def hub_like(folder: Path, kind: str) -> Path:
    """A directory as the hub has it, for `bert` and for `roberta`."""
    bert = kind == "bert"
    marks = (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        if bert
        else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    words = [*marks, "a", "dog", "bird", *"[]<>/"]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, marks[1])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(marks)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if bert:
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
        config = {"do_lower_case": True, "name_or_path": str(folder)}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_transformers_finds_the_roles_of_a_loaded_tokenizer(tmp_path: Path) -> None:
    loaded = {}
    for kind in ("bert", "roberta"):
        stored = load_tokenizer(str(hub_like(tmp_path / kind, kind)))
        stored.write(tmp_path / f"{kind}-stored")
        loaded[str(tmp_path / f"{kind}-stored")] = stored
        assert not any(str(tmp_path).encode() in data for data in stored.files.values())
    result = subprocess.run(
        [sys.executable, "-c", _ROLES, *loaded],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name, found in json.loads(result.stdout).items():
        special = dict(loaded[name].info.special_ids)
        ids = found.pop("ids")
        assert found == special
        assert ids[:2] == [5, 6]
        assert ids.count(special["mask"]) == 1


def test_a_lost_or_damaged_tokenizer_of_a_dataset_names_the_cure(
    tmp_path: Path,
) -> None:
    says = "put .* back from a copy, or choose a new --output"
    with pytest.raises(ValueError, match=says):
        read_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        train_tokenizer(CAPTIONS, 220).write(tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / name).write_text("{")
        with pytest.raises(ValueError, match=says):
            read_tokenizer(tmp_path / "tokenizer")


def test_a_stored_tokenizer_is_loaded_as_it_is(tmp_path: Path) -> None:
    trained = train_tokenizer(CAPTIONS, 220)
    trained.write(tmp_path / "tokenizer")
    assert load_tokenizer(str(tmp_path / "tokenizer")) == trained


def stored(folder: Path, entries: list[str], config: dict[str, object]) -> str:
    """A word-level tokenizer of `entries` in `folder`."""
    model = models.WordLevel({word: n for n, word in enumerate(entries)}, entries[0])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(4)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_bos_and_eos_stand_in_for_cls_and_sep_and_nothing_is_cut(
    tmp_path: Path,
) -> None:
    entries = ["<unk>", "<begin>", "<end>", "<gap>", "<pad>", "a", "dog"]
    config = {"bos_token": "<begin>", "eos_token": {"content": "<end>"}}
    name = stored(tmp_path / "t", entries, {**config, "mask_token": "<gap>"})
    # WhitespaceSplit with such words in the model reads "<end>" in a caption as one.
    with pytest.raises(ValueError, match="inside a caption"):
        load_tokenizer(name)
    tokenizer = Tokenizer.from_file(f"{name}/tokenizer.json")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(f"{name}/tokenizer.json")
    loaded = load_tokenizer(name)
    special = loaded.info.special_ids
    assert special == {
        "unk": 0,
        "cls": 1,
        "sep": 2,
        "mask": 3,
        "pad": 4,
    }
    _, ids = CaptionEncoder(loaded).encode(["a dog a dog a dog"])
    assert ids.tolist() == [5, 6, 5, 6, 5, 6, 2]


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    name = stored(tmp_path / "t", ["[UNK]", "[CLS]", "[SEP]", "[PAD]"], {})
    with pytest.raises(ValueError, match="no mask token"):
        load_tokenizer(name)


def test_large_vocabularies_have_wide_ids(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(70_000)]
    entries = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *words]
    name = stored(tmp_path / "t", entries, {})
    tokenizer = Tokenizer.from_file(f"{name}/tokenizer.json")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(f"{name}/tokenizer.json")
    loaded = load_tokenizer(name)
    _, ids = CaptionEncoder(loaded).encode(["w69999"])
    assert ids.dtype == loaded.info.dtype == np.uint32
    assert ids.tolist() == [70_004, 2]
