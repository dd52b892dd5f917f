"""Indexed tars again with other tokens: linked, and indexed anew with that tokenizer.

Owns bringing the tars to the new dataset. Does not own what lies beside them
(`pipeline.indexing`). Tars are hard links where both datasets lie on one disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.index import IndexConfig
from pipeline.indexed import STATE
from pipeline.indexing import index
from pipeline.manifest import Manifest
from pipeline.manifest_checks import read_json, understood
from pipeline.options import TextOptions
from pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    from pipeline.retokenize import RetokenizeConfig

# Where a tar arrives before it gets its name: files are staged in folders only.
_LINKED = f"{STATE}/linked"
_RULES = {"placeholders"}


def retokenize_indexed(config: RetokenizeConfig) -> Manifest:
    """Index the tars of an indexed dataset in another folder with another tokenizer.

    Raises:
        ValueError: the dataset has lost its state, that is not to be used, or the
            output holds other files.
    """
    source, target = open_storage(config.dataset), open_storage(config.output)
    try:
        stored = source.read(f"{STATE}/index.json")
    except FileNotFoundError:
        raise ValueError(
            f"{config.dataset} lacks {STATE}/index.json: it was copied without hidden "
            "files. Run `python -m pipeline.index` on it first"
        ) from None
    keys = _stored_keys(config.dataset, stored)
    tars = [name for name in source.names() if name.endswith(".tar")]
    _refuse_other_files(target, set(tars))
    for name in tqdm(tars, unit="tar", desc="link"):
        _bring(source, target, name)
    return index(
        IndexConfig(
            dataset=config.output,
            tokenizer=config.tokenizer,
            workers=config.workers,
            **keys,
        )
    )


def _stored_keys(url: str, stored: bytes) -> dict[str, Any]:
    """Keys of the index command that the dataset was made with.

    Raises:
        ValueError: they are others, or have an expression of somebody else's, which may
            take for ever.
    """
    place = f"{url}/{STATE}/index.json"
    transform = read_json(stored, place)
    with understood(place):
        transform = transform["transform"]
        keys = {
            "name": transform["source"]["name"],
            "split": transform["indexed"]["split"],
            "check": transform["indexed"]["check"],
        }
        text = transform["text"]
        usual = asdict(TextOptions())
        if text.keys() != usual.keys() or not _alike(text, usual):
            raise KeyError("text")
        if not all(isinstance(value, str) for value in keys.values()):
            raise KeyError("source, indexed")
        rules = [rule for rule in text["placeholders"] if rule.startswith("/")]
    if rules:
        raise ValueError(
            f"{url} was indexed with --text.placeholders {rules[0]}, and expressions "
            "are not taken from a dataset: link its tars into a new folder and give "
            "them, with --tokenizer, to `python -m pipeline.index` there"
        )
    return keys | {"text": TextOptions(**text)}


def _alike(text: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Are all values of the kind of the default?"""
    rules = text["placeholders"]
    if not isinstance(rules, list) or not all(isinstance(r, str) for r in rules):
        return False
    return all(type(text[key]) is type(usual[key]) for key in usual.keys() - _RULES)


def _refuse_other_files(target: Storage, tars: set[str]) -> None:
    if target.size(f"{STATE}/index.json") is not None:
        return
    for name in target.names():
        if name not in tars and not name.startswith((f"{STATE}/", "tokenizer/")):
            raise ValueError(
                f"--output {target.url} is not empty and no run of this command "
                f"({name} lies in it); choose a new folder"
            )


def _bring(source: Storage, target: Storage, name: str) -> None:
    if target.size(name) == source.size(name):
        return
    file = name.rpartition("/")[2]
    with source.fetch(name) as path, target.stage(_LINKED) as staged:
        try:
            os.link(path, staged / file)
        except OSError:
            # Another disk, or one without links.
            shutil.copyfile(path, staged / file)
    target.move(f"{_LINKED}/{file}", name)
