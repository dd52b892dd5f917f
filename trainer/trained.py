"""A trained run, loaded for use: its configuration, weights and step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.build import build_model
from trainer.data_state import DataState, difference
from trainer.dataset import Dataset
from trainer.options import PretrainConfig, load_config
from trainer.sources import sources_of


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's newest checkpoint."""

    config: PretrainConfig
    model: Any
    """What `config.model` builds."""
    step: int


def load_trained(run: Path, *, data: str | None = None) -> Trained:
    """Load the newest complete checkpoint of `run`, weights in fp32 on the CPU.

    Args:
        data: dataset directory instead of the one in the run's configuration.

    Raises:
        ValueError: no run, no checkpoint yet, or a dataset of another tokenizer.
    """
    config = load_config(run, data=data)
    found = checkpoint.newest(run)
    if found is None:
        raise ValueError(f"{run} has no complete checkpoint yet")
    path, marker = found
    dataset = Dataset(config.data, config.split, growing=True, storage=config.storage)
    if data is None:
        sources = sources_of(dataset, config.mixture)
        what = difference(DataState.from_plain(marker), dataset, sources)
        if what:
            raise ValueError(
                f"{dataset.name} is not the dataset that {run} was trained on "
                f"({what}); name one with --data"
            )
    if dataset.tokenizer.sha256 != marker["tokenizer_sha256"]:
        raise ValueError(
            f"the tokens of {dataset.name} were made with tokenizer "
            f"{dataset.tokenizer.sha256}, and {run} was trained on tokens of "
            f"{marker['tokenizer_sha256']}: preprocess the data with the run's "
            "tokenizer, --tokenizer DATASET/tokenizer"
        )
    model = build_model(config, dataset.tokenizer)
    model.load_state_dict(checkpoint.load_weights(path))
    return Trained(config=config, model=model, step=int(marker["step"]))
