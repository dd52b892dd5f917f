"""The tokenizer of an exported model, as `transformers.AutoTokenizer` loads it.

Owns what an export's tokenizer adds to the dataset's: [CLS] and [SEP] around a text, as
in training, and the longest text. A dataset's own may add neither, since its shards
hold the words alone. Does not own the words (`pipeline.tokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, processors

from pipeline.manifest import DATASET_JSON, TOKENIZER_CONFIG, TOKENIZER_JSON


def write_tokenizer(
    words: Path, folder: Path, special_ids: Mapping[str, int], *, max_text: int
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`. Where the first
    is not the dataset's, that lies beside it as `dataset_tokenizer.json`: by its sha256
    the export is known to fit a dataset.

    Args:
        words: `tokenizer.json` of the dataset. The other file is written anew, because
            of a dataset behind a URL only this one is here.
        special_ids: ids by name, `cls` and `sep` among them.
        max_text: longest text in tokens, [CLS] and [SEP] included, which `truncation=
            True` cuts to.
    """
    data = words.read_bytes()
    tokenizer = Tokenizer.from_str(data.decode())
    if not _adds_both(tokenizer, special_ids):
        (folder / DATASET_JSON).write_bytes(data)
        tokenizer.post_processor = _template(tokenizer, special_ids)
        data = tokenizer.to_str(pretty=True).encode()
    (folder / TOKENIZER_JSON).write_bytes(data)
    tokens = {
        f"{role}_token": tokenizer.id_to_token(number)
        for role, number in special_ids.items()
    }
    config = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_text,
        **tokens,
    }
    text = json.dumps(config, indent=1) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _adds_both(tokenizer: Tokenizer, special_ids: Mapping[str, int]) -> bool:
    ends = tokenizer.encode("").ids
    return bool(ends == [special_ids["cls"], special_ids["sep"]])


def _template(
    tokenizer: Tokenizer, special_ids: Mapping[str, int]
) -> processors.TemplateProcessing:
    ids = special_ids["cls"], special_ids["sep"]
    cls, sep = (tokenizer.id_to_token(number) for number in ids)
    return processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B", sep],
        special_tokens=list(zip((cls, sep), ids, strict=True)),
    )
