"""Indexed tars again with other tokens: linked, and indexed anew with that tokenizer.

Owns bringing the tars to the new dataset. Does not own what lies beside them
(`pipeline.indexing`). Tars are hard links where both datasets lie on one disk.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipeline.index import IndexConfig
from pipeline.indexed import STATE
from pipeline.indexing import index
from pipeline.manifest import Manifest
from pipeline.options import TextOptions
from pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    from pipeline.retokenize import RetokenizeConfig

# Where a tar arrives before it gets its name: files are staged in folders only.
_LINKED = f"{STATE}/linked"


def retokenize_indexed(config: RetokenizeConfig) -> Manifest:
    """Index the tars of an indexed dataset in another folder with another tokenizer.

    Raises:
        ValueError: the dataset has lost its state, or the output holds other files.
    """
    source, target = open_storage(config.dataset), open_storage(config.output)
    try:
        transform = json.loads(source.read(f"{STATE}/index.json"))["transform"]
    except FileNotFoundError:
        raise ValueError(
            f"{config.dataset} lacks {STATE}/index.json: it was copied without hidden "
            "files. Run `python -m pipeline.index` on it first"
        ) from None
    tars = [name for name in source.names() if name.endswith(".tar")]
    _refuse_other_files(target, set(tars))
    for name in tqdm(tars, unit="tar", desc="link"):
        _bring(source, target, name)
    return index(
        IndexConfig(
            dataset=config.output,
            tokenizer=config.tokenizer,
            name=transform["source"]["name"],
            split=transform["indexed"]["split"],
            check=transform["indexed"]["check"],
            text=TextOptions(**transform["text"]),
            workers=config.workers,
        )
    )


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
