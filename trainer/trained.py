"""A trained run, loaded for use: its configuration, weights and step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import parse
from pipeline.manifest import load_manifest
from trainer import checkpoint
from trainer.contract import CONFIG
from trainer.loop import build_model
from trainer.models.mlim import MlimForPreTraining
from trainer.options import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's newest checkpoint."""

    config: PretrainConfig
    model: MlimForPreTraining
    step: int


def load_config(run: Path, *, data: str | None = None) -> PretrainConfig:
    """The configuration that `run` was last started with.

    Args:
        data: dataset directory instead of the one in it.

    Raises:
        ValueError: no run.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is no run: it has no {CONFIG}; train it first")
    words = ["--config", str(run / CONFIG), *(["--data", data] if data else [])]
    return parse(PretrainConfig, words, prog="", description="")


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
    manifest = load_manifest(config.data)
    if manifest.sha256 != marker["manifest_hash"] and data is None:
        raise ValueError(
            f"{config.data} is not the dataset that {run} was trained on; name one "
            "with --data"
        )
    if manifest.tokenizer.sha256 != marker["tokenizer_sha256"]:
        raise ValueError(
            f"the tokens of {config.data} were made with tokenizer "
            f"{manifest.tokenizer.sha256}, and {run} was trained on tokens of "
            f"{marker['tokenizer_sha256']}: preprocess the data with the run's "
            "tokenizer, --tokenizer DATASET/tokenizer"
        )
    model = build_model(config, manifest)
    model.load_state_dict(checkpoint.load_weights(path))
    return Trained(config=config, model=model, step=int(marker["step"]))
