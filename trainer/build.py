"""The model of a run, and the weights that it starts from.

Owns how recipe and dataset make a model. Does not own models (`trainer.models`) or
where weights are looked for (`trainer.initial`).
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.manifest import TokenizerInfo
from trainer.dataset import Dataset
from trainer.initial import read_weights, require_alike, require_fit
from trainer.models.base import Sizes
from trainer.options import PretrainConfig


def build_model(config: PretrainConfig, tokenizer: TokenizerInfo) -> Any:
    """The model of a recipe, sized by the dataset's tokenizer."""
    return config.model.build(model_sizes(config, tokenizer))


def model_sizes(config: PretrainConfig, tokenizer: TokenizerInfo) -> Sizes:
    """What a model is made with besides its keys."""
    return Sizes(
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        max_text=config.text.max_tokens,
        image_size=config.image.size,
    )


def initial_weights(
    config: PretrainConfig, dataset: Dataset
) -> dict[str, torch.Tensor]:
    """Weights, by name, of the checkpoint or the bodies that a run starts from."""
    if not config.init:
        return config.model.read_bodies(model_sizes(config, dataset.tokenizer))
    return read_weights(config.init, tokenizer_sha256=dataset.tokenizer.sha256)


def require_start(config: PretrainConfig, dataset: Dataset) -> None:
    """Raise ValueError, with the cure, unless the weights that a run is to start from,
    if any, are those of such a model.
    """
    if config.init:
        require_alike(config.init, config.model)
        with torch.device("meta"):
            model = build_model(config, dataset.tokenizer)
        weights = initial_weights(config, dataset)
        optional = config.model.optional
        require_fit(model, weights, source=config.init, optional=optional)
    if config.model.bodies:
        sizes = model_sizes(config, dataset.tokenizer)
        config.model.require_bodies(sizes, dataset.tokenizer_file)
