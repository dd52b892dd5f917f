"""What fine-tuning and evaluation know of a task: the interface that each implements.

Owns the interface. Does not own the tasks (modules of this package, found by
`trainer.tasks.names`), the loop (`trainer.tasks.training`), where a model comes from
(`trainer.tasks.pretrained`) or how results are written (`trainer.tasks.results`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainer.dataset import Dataset
from trainer.options import PretrainConfig
from trainer.storage import StorageConfig, open_files, read_manifest
from trainer.tasks.pretrained import NO_DATA
from trainer.tasks.results import Result


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a task is made with."""

    keys: Any
    """The command's keys, those of the task among them: an instance of `Spec.finetune`
    in fine-tuning, of `Spec.evaluate` in evaluation."""
    tuned: Any
    """The keys that fine-tuning had, an instance of `Spec.finetune`; None: the model
    is as it was pretrained."""
    pretraining: PretrainConfig
    """Keys of the run that the model comes from: `model`, `image`, `text`, `mask`."""
    tokenizer_file: Path
    """`tokenizer.json` that the model's words are numbered by."""
    tokenizer_sha256: str
    special_ids: Mapping[str, int]
    """Ids of its special tokens by name."""
    folder: Path
    """Output of fine-tuning, which holds `Spec.files` once it has begun; RUN in an
    evaluation."""
    device: torch.device
    seed: int

    def dataset(self, split: str) -> Dataset:
        """A split of the dataset `--data`, by default the one of the model.

        Raises:
            ValueError: no such dataset or split, or tokens of another tokenizer.
        """
        return self._checked(Dataset(self.data, split, storage=self._storage))

    def splits(self) -> list[Dataset]:
        """Every split of every directory of it.

        Raises:
            ValueError: no such dataset, or tokens of another tokenizer.
        """
        roots = [self.data] if isinstance(self.data, str) else self.data
        found = []
        for root in roots:
            manifest, _ = read_manifest(open_files(root, self._storage))
            for split in dict.fromkeys(shard.split for shard in manifest.shards):
                dataset = Dataset(root, split, storage=self._storage)
                found.append(self._checked(dataset))
        return found

    @property
    def data(self) -> list[str] | str:
        """The dataset directories.

        Raises:
            ValueError: the model comes from an export, and none are given.
        """
        found = getattr(self.keys, "data", None) or self.pretraining.data
        if found == NO_DATA:
            raise ValueError(
                "an export does not say where its dataset lies: give --data DATASET "
                "(what pipeline.preprocess wrote, with the export's tokenizer)"
            )
        return found

    @property
    def _storage(self) -> StorageConfig:
        return self.pretraining.storage

    def _checked(self, found: Dataset) -> Dataset:
        if found.tokenizer.sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"the tokens of {found.name} were made with tokenizer "
                f"{found.tokenizer.sha256}, and the model was trained on tokens of "
                f"{self.tokenizer_sha256}: make the dataset anew with the model's "
                f"(python -m pipeline.retokenize {found.name} --tokenizer TOKENIZER "
                "--output NEW)"
            )
        return found


class Task(Protocol):
    """A task on its data. Making one reads what it needs to refuse wrong input."""

    n_train: int
    """Examples of an epoch; 0 in an evaluation."""
    dev_metric: str | None
    """Name of the metric of `dev` by which the best checkpoint is kept, higher is
    better; None: there are no dev examples."""

    def model(self, model: nn.Module) -> nn.Module:
        """The pretrained model with the task's head around it. Weights of a head are
        drawn by torch's generator, which the caller has seeded.
        """
        ...

    def batch(self, numbers: np.ndarray, *, epoch: int) -> Any:
        """Examples (B,) of an epoch, on the host. Called ahead in another thread; a
        pure function of its arguments and the seed.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss over a batch, a scalar with gradient."""
        ...

    def dev(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the dev examples; empty without any."""
        ...

    def evaluate(self, model: nn.Module) -> Result:
        """What `trainer.evaluate` writes down."""
        ...


class EvaluatedOnly:
    """What a `Task` that learns nothing by steps has of training: nothing."""

    n_train: int = 0
    dev_metric: str | None = None

    def batch(self, numbers: np.ndarray, *, epoch: int) -> Any:
        """Never called: there is nothing to train."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Never called: there is nothing to train."""
        raise NotImplementedError

    def dev(self, model: nn.Module) -> dict[str, float]:
        """No metrics: there are no dev examples."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A task, before there is data: its keys, and how it is made of them."""

    name: str
    finetune: type | None
    """Frozen dataclass of the task's keys in `trainer.finetune`; None: it is not
    fine-tuned."""
    evaluate: type
    """Frozen dataclass of the task's keys in `trainer.evaluate`."""
    zero_shot: bool
    """It can be evaluated on a model that was only pretrained."""
    accepts: tuple[str, ...]
    """Tasks whose fine-tuned model it can be evaluated on, its own name among them if
    it is fine-tuned. `Task.model` has to give a module with the same weights."""
    training: Callable[[Context], Task] | None
    """Makes the task of fine-tuning."""
    evaluation: Callable[[Context], Task]
    """Makes the task of an evaluation."""
    files: Callable[[Any], Mapping[str, str]] | None = None
    """Texts by the names of files in which fine-tuning keeps them, beside its
    checkpoints, of a task that `training` made (an answer vocabulary, say). Resuming
    with others is refused. What examples are read from belongs there: the hash of the
    dataset, too."""


DATA = "data.sha256"
"""Name of the file that keeps the hash of the dataset, for tasks that read one."""
