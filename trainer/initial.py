"""`--init DIR`: the weights that a run starts from, when they are not drawn.

Owns where weights are looked for and whether they fit the model. Does not own
checkpoints (`trainer.checkpoint`) or export (`trainer.export`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pipeline.manifest import file_sha256, words_file
from trainer import checkpoint
from trainer.contract import CHECKPOINTS, COMPLETE, CONFIG
from trainer.models.base import ModelConfig

_SHOWN = 5


def read_weights(folder: str | Path, *, tokenizer_sha256: str) -> dict[str, Tensor]:
    """fp32 weights by name, on the CPU, from a run directory (its newest checkpoint), a
    checkpoint, or a directory with safetensors files of an export.

    Args:
        tokenizer_sha256: of the dataset; a run trained with another is refused.

    Raises:
        ValueError: nothing there that could be loaded, or words numbered differently.
    """
    folder = Path(folder)
    found = checkpoint.newest(folder)
    path = found[0] if found else folder
    if (path / COMPLETE).is_file() and "world_size" in checkpoint.read_marker(path):
        _require_tokenizer(path, tokenizer_sha256)
        return checkpoint.load_weights(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"--init {folder} holds no weights: give a run directory with a complete "
            "checkpoint, a checkpoint (RUN/checkpoints/step-...), or a directory that "
            "trainer.export made"
        )
    words = words_file(folder)
    if words.is_file():
        _require_same(folder, file_sha256(words), tokenizer_sha256, words=str(folder))
    return _read_files(files, _model_keys(folder).get("name", ""))


def require_alike(folder: str | Path, config: ModelConfig) -> None:
    """Raise ValueError, with the keys to change, where the model that the weights in
    `folder` were trained in differs from `config` in what no shape shows. A folder that
    does not say how it was trained is taken as it is.
    """
    stored = _model_keys(Path(folder))
    cures = [
        f"--model.{key} {stored[key]} (now {getattr(config, key)})"
        for key in ("name", *config.unshaped)
        if key in stored and stored[key] != getattr(config, key)
    ]
    if cures:
        raise ValueError(
            f"--init {folder} holds the weights of a model that computes otherwise: "
            f"give {', '.join(cures)}"
        )


def _model_keys(folder: Path) -> dict[str, Any]:
    """Model keys that a run, a checkpoint of one, or an export was trained with."""
    folder = folder.resolve()
    for run in (folder, folder.parent.parent):
        if (run / CONFIG).is_file() and (run / CHECKPOINTS).is_dir():
            found = yaml.safe_load((run / CONFIG).read_text())
            return dict(found.get("model", {}))
    if (folder / "config.json").is_file():
        found = json.loads((folder / "config.json").read_text())
        return {**found, "name": found.get("model_type", "")}
    return {}


def require_fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    *,
    source: str,
    optional: Sequence[str],
) -> None:
    """Raise ValueError, naming what differs, unless `weights` are all that `model`
    needs. It may lie on the meta device. What begins as one of `optional` may be on one
    side alone: it is drawn, or left.
    """
    own = model.state_dict(keep_vars=True)
    for start in optional:
        heads = [{n for n in names if n.startswith(start)} for names in (own, weights)]
        if not all(heads):
            own = {name: own[name] for name in own if name not in heads[0]}
            weights = {name: weights[name] for name in weights if name not in heads[1]}
    # Of a tensor under several names, a file holds one.
    present = {id(own[name]) for name in own.keys() & weights.keys()}
    missing = [
        name for name in own if name not in weights and id(own[name]) not in present
    ]
    wrong = [
        f"{name} is {list(weights[name].shape)}, the model's {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    unknown = sorted(weights.keys() - own.keys())
    problems = _some("lacks", missing) + _some("also has", unknown)
    problems += _some("differs in shape:", sorted(wrong))
    if problems:
        raise ValueError(
            f"--init {source} does not fit the model of this recipe: "
            f"{'; '.join(problems)}. Take the recipe that it was trained with (model.*,"
            " image.size, text.max_tokens and the tokenizer give the shapes)"
        )


def _some(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"it {what} {', '.join(names[:_SHOWN])}{more}"]


def _require_tokenizer(path: Path, tokenizer_sha256: str) -> None:
    trained = checkpoint.read_marker(path)["tokenizer_sha256"]
    _require_same(path, trained, tokenizer_sha256, words="DATASET/tokenizer")


def _require_same(path: Path, trained: str, tokenizer_sha256: str, words: str) -> None:
    if trained != tokenizer_sha256:
        raise ValueError(
            f"--init {path} was trained on tokens of tokenizer {trained}, and the "
            f"dataset's were made with {tokenizer_sha256}: preprocess the data with "
            f"the run's tokenizer, --tokenizer {words}"
        )


def _read_files(files: list[Path], model: str) -> dict[str, Tensor]:
    # An export's names begin with that of the model in its `transformers` class.
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return {
        name.removeprefix(f"{model}."): value.to(torch.float32)
        for name, value in weights.items()
    }
