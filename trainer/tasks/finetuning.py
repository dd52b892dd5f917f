"""One run of fine-tuning: what `trainer.finetune` does once its keys are parsed.

Owns the keys that every task has and the order of things. Does not own the loop
(`trainer.tasks.training`), files (`trainer.tasks.tuned`) or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.local_run import local_run
from trainer.philox import check_seed
from trainer.storage import local_path
from trainer.tasks import tuned
from trainer.tasks.base import Context, Task
from trainer.tasks.command import joined
from trainer.tasks.names import find
from trainer.tasks.pretrained import Pretrained, load_pretrained
from trainer.tasks.training import LoopKeys, train


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopKeys):
    """Which model learns which task, from what."""

    run: str
    """Run directory that trainer.pretrain wrote, its URL, or an export (the first word
    of the command)."""
    task: str
    """What to learn."""
    output: str
    """Directory to write; one that holds a checkpoint is resumed."""
    data: str | None = None
    """Dataset directory; by default the one that the run was trained on."""
    from_scratch: bool = False
    """Draw the weights instead of loading them: the same model without pretraining."""
    seed: int = 0
    """Seed of new weights, of the examples' order, and of what the task draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


def keys_of(task: str | None) -> type[FinetuneConfig]:
    """The keys of the command for a task; None: those that every task has.

    Raises:
        ConfigError: no such task, or one that is not fine-tuned.
    """
    if task is None:
        return FinetuneConfig
    spec = find(task)
    if spec.finetune is None:
        from pipeline.config import ConfigError

        raise ConfigError(
            f"{task} is measured on a model as it is: python -m trainer.evaluate RUN "
            f"--task {task}"
        )
    return joined(FinetuneConfig, spec.finetune)


def finetune(config: FinetuneConfig, *, command: str) -> str:
    """Fine-tune to the end; the output.

    Raises:
        ValueError: no such model, data that does not fit it, or an output that holds
            another run. The message has the cure.
    """
    if local_path(config.output) is None:
        raise ValueError(
            f"--output {config.output} is a URL: fine-tuning writes to a local disk; "
            "copy the folder afterwards"
        )
    output = Path(config.output)
    with local_run(config.run, weights=True) as folder:
        if tuned.is_tuned(folder):
            raise ValueError(
                f"{config.run} was fine-tuned already: give the run that it came from"
            )
        start = load_pretrained(
            folder,
            data=config.data,
            from_scratch=config.from_scratch,
            seed=config.seed,
        )
        # Before the task puts a head on the model.
        origin = tuned.origin_of(start, command=command)
        task, model = prepare(start, config, folder=output)
        files = find(config.task).files
        kept = files(task) if files else {}
        with tuned.locked(output):
            tuned.begin(output, config, start, kept, origin=origin)
            train(task, model, config, output=output, seed=config.seed)
    return config.output


def prepare(
    start: Pretrained, config: FinetuneConfig, *, folder: Path
) -> tuple[Task, nn.Module]:
    """The task of fine-tuning and the model with its head, on the device."""
    spec = find(config.task)
    assert spec.training is not None
    device = the_device()
    task = spec.training(
        Context(
            keys=config,
            tuned=config,
            pretraining=start.config,
            tokenizer_file=start.tokenizer_file,
            tokenizer_sha256=start.tokenizer.sha256,
            special_ids=start.tokenizer.special_ids,
            folder=folder,
            device=device,
            seed=config.seed,
        )
    )
    return task, with_head(task, start.model, seed=config.seed).to(device)


def with_head(task: Task, model: nn.Module, *, seed: int) -> nn.Module:
    """The model with the task's head, the same whether or not it was pretrained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return task.model(model)


def the_device() -> torch.device:
    """Where there is something to compute with."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_tuned(values: dict[str, Any]) -> FinetuneConfig:
    """The keys that a fine-tuning was started with."""
    return keys_of(values["task"])(**_tuples(values))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
