"""The model that a task starts from: a pretraining run, or an export of one.

Owns what RUN of `trainer.finetune` may be, and the same model without pretraining. Does
not own runs (`trainer.loop`), exports (`trainer.export`) or what fine-tuning writes
(`trainer.tasks.tuned`).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pipeline.manifest import TOKENIZER, TokenizerInfo, file_sha256, words_file
from trainer import checkpoint
from trainer.build import build_model
from trainer.contract import CONFIG, PREPROCESSOR
from trainer.dataset import Dataset
from trainer.initial import read_weights
from trainer.models.base import find
from trainer.options import PretrainConfig, load_config
from trainer.storage import open_files, read_manifest

_EXPORTED = "config.json"
NO_DATA = "-"
"""Dataset of an export, which does not say on what it was trained."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model and what it was made with."""

    config: PretrainConfig
    model: nn.Module
    """fp32, on the CPU."""
    tokenizer: TokenizerInfo
    tokenizer_file: Path
    step: int | None
    """Steps of pretraining; 0: none; None: nobody wrote them down."""


def load_pretrained(
    run: Path, *, data: str | None, from_scratch: bool, seed: int | None
) -> Pretrained:
    """The model of a run or an export.

    Args:
        data: dataset directory instead of the one that the run was trained on.
        from_scratch: with drawn weights in place of the trained ones.
        seed: of drawn weights; None: the run's, so those that it began with if it did
            not begin with a checkpoint or a body. An export has none: 0.

    Raises:
        ValueError: neither run nor export, no checkpoint, or a dataset of another
            tokenizer. The message has the cure.
    """
    require_model(run)
    if (run / CONFIG).is_file():
        return _of_run(run, data, from_scratch, seed)
    return _of_export(run, data, from_scratch, seed)


def require_model(run: Path) -> None:
    """Raise ValueError for a folder that is neither a run nor an export."""
    cure = "give what trainer.pretrain or trainer.export wrote"
    if not run.is_dir():
        raise ValueError(f"{run} is no folder: {cure}")
    if not (run / CONFIG).is_file() and not (run / _EXPORTED).is_file():
        raise ValueError(
            f"{run} is neither a run nor an export: it has no {CONFIG} and no "
            f"{_EXPORTED}; {cure}"
        )


def drawn_model(config: PretrainConfig, info: TokenizerInfo, *, seed: int) -> nn.Module:
    """The model of a recipe with weights drawn by `seed`, as a run draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 63))
        return build_model(config, info)


def _of_run(
    run: Path, data: str | None, from_scratch: bool, seed: int | None
) -> Pretrained:
    config = load_config(run, data=data)
    dataset = Dataset(
        config.data, _any_split(config, data), growing=True, storage=config.storage
    )
    info, step = dataset.tokenizer, 0
    model = drawn_model(config, info, seed=config.seed if seed is None else seed)
    if not from_scratch:
        found = checkpoint.newest(run)
        if found is None:
            raise ValueError(f"{run} has no complete checkpoint yet: train it first")
        path, marker = found
        _require_words(run, marker["tokenizer_sha256"], dataset)
        model.load_state_dict(checkpoint.load_weights(path))
        step = int(marker["step"])
    return Pretrained(
        config=config,
        model=model,
        tokenizer=info,
        tokenizer_file=dataset.tokenizer_file,
        step=step,
    )


def _of_export(
    folder: Path, data: str | None, from_scratch: bool, seed: int | None
) -> Pretrained:
    keys = json.loads((folder / _EXPORTED).read_text())
    words = words_file(folder)
    if not words.is_file():
        raise ValueError(
            f"{words} is missing: export the run again (python -m trainer.export RUN "
            "OUT)"
        )
    config = _config_of(keys, json.loads((folder / PREPROCESSOR).read_text()), data)
    info = TokenizerInfo(
        path=TOKENIZER,
        sha256=file_sha256(words),
        vocab_size=keys["vocab_size"],
        special_ids=keys["special_ids"],
    )
    model = drawn_model(config, info, seed=config.seed if seed is None else seed)
    if not from_scratch:
        model.load_state_dict(read_weights(folder, tokenizer_sha256=info.sha256))
    return Pretrained(
        config=config,
        model=model,
        tokenizer=info,
        tokenizer_file=words,
        step=0 if from_scratch else None,
    )


def _config_of(
    keys: dict[str, Any], preprocessor: dict[str, Any], data: str | None
) -> PretrainConfig:
    """The keys of a run that would train what was exported."""
    name = keys["model_type"]
    known = [field.name for field in fields(find(name))]
    crops = preprocessor.get("do_center_crop", True)
    plain = {
        "data": data or NO_DATA,
        "output": "-",
        "model": {"name": name} | {key: keys[key] for key in known if key in keys},
        "image": {
            "size": keys["image_size"],
            "geometry": "center_crop" if crops else "resize",
        },
        "text": {"max_tokens": keys["max_text"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(yaml.safe_dump(plain))
        return load_config(Path(folder))


def _require_words(run: Path, trained: str, dataset: Dataset) -> None:
    found = dataset.tokenizer.sha256
    if found != trained:
        raise ValueError(
            f"the tokens of {dataset.name} were made with tokenizer {found}, and {run} "
            f"was trained on tokens of {trained}: make the dataset anew with the run's "
            f"(python -m pipeline.retokenize {dataset.name} --tokenizer "
            "DATASET/tokenizer --output NEW)"
        )


def _any_split(config: PretrainConfig, data: str | None) -> str:
    """A split to open the dataset by: one that is given may have been made for a task
    alone, and lack that of pretraining.
    """
    if data is None:
        return config.split
    manifest, _ = read_manifest(open_files(data, config.storage))
    splits = {shard.split for shard in manifest.shards}
    return config.split if config.split in splits else min(splits)
