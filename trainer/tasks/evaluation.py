"""One evaluation of a task: what `trainer.evaluate` does once its keys are parsed.

Owns the keys that every task has, and which model is measured. Does not own what is
measured (each task) or how it is written (`trainer.tasks.results`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.local_run import local_run
from trainer.philox import check_seed
from trainer.tasks import tuned
from trainer.tasks.base import Context, Spec, Task
from trainer.tasks.command import joined
from trainer.tasks.finetuning import as_tuned, the_device, with_head
from trainer.tasks.names import NAMES, find
from trainer.tasks.pretrained import Pretrained, load_pretrained, require_model
from trainer.tasks.results import print_table, require_name, write_result

_PROBES = "probes"
# What files beside an evaluation's are called, whether or not a folder has them yet.
_OTHERS = frozenset(
    {
        *("config", "complete", "environment", "wandb", "report", "replay"),
        *("origin", "answers", "examples", "tokenizer"),
        *("dataset_tokenizer", "tokenizer_config", "special_tokens_map"),
        *("preprocessor_config", "generation_config", "model.safetensors.index"),
    }
)
# A file system's names have at most 255 bytes.
_LONGEST_NAME = 60


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure of which model."""

    run: str
    """What trainer.finetune wrote; or a run or an export, where the task needs no
    fine-tuning (the first word of the command)."""
    task: str
    """What to measure."""
    data: str | None = None
    """Dataset directory; by default the one that the model was trained on."""
    seed: int = 0
    """Seed of the bootstrap, and of what the task draws."""
    name: str | None = None
    """Name of the files that are written to RUN, none that something else has; null:
    that of the task."""
    from_scratch: bool = False
    """Draw the weights of a run or an export instead of loading them, to compare with:
    by the run's seed, as pretraining does that starts from no checkpoint and no body
    (an export's is 0). What was fine-tuned has this key of its own in
    trainer.finetune."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.name is not None:
            _require_free(self.name, self.task)


def _require_free(name: str, task: str) -> None:
    """Raise ValueError where files of a name would be taken for others, or could not
    be written.
    """
    if not name or "/" in name or name.startswith(".") or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"--name {name!r} is no name of a file: give a short one without / that "
            f"does not begin with a dot, such as {task}-2"
        )
    if name != task and name in (_PROBES, *NAMES):
        raise ValueError(f"--name {name} is what --task {name} writes: take another")
    if name in _OTHERS:
        raise ValueError(
            f"--name {name} is kept for a file that runs, fine-tunings or exports "
            f"have: take another, such as {task}-2"
        )


def keys_of(task: str) -> type[EvaluateConfig]:
    """The keys of the command for a task.

    Raises:
        ConfigError: no such task.
    """
    return joined(EvaluateConfig, find(task, also=(_PROBES,)).evaluate)


def evaluate(config: EvaluateConfig, *, command: str) -> str:
    """Measure, write the files and print the metrics; the JSON file.

    Raises:
        ValueError: no such model, or data that does not fit it. The message has the
            cure.
    """
    spec = find(config.task)
    name = config.name or config.task
    with local_run(config.run, weights=True) as folder:
        require_name(folder, name, task=config.task)
        task, model, facts = _prepared(spec, folder, config)
        with torch.inference_mode():
            result = task.evaluate(model.eval())
        facts = {**facts, "seed": config.seed, "command": command}
        write_result(folder, name, result, facts=facts)
    print_table(result)
    return f"{config.run.rstrip('/')}/{name}.json"


def _prepared(
    spec: Spec, folder: Path, config: EvaluateConfig
) -> tuple[Task, nn.Module, dict[str, Any]]:
    """The task, the model on the device, and what the files say of it."""
    fine = tuned.is_tuned(folder)
    if fine:
        if config.from_scratch:
            raise ValueError(
                f"{config.run} was fine-tuned, and --from_scratch would measure it as "
                "it is: fine-tune with --from_scratch (python -m trainer.finetune RUN "
                f"--task {spec.name} --from_scratch --output OUT) and measure OUT"
            )
        keys = as_tuned(tuned.read_keys(folder))
        _require_accepted(folder, keys.task, spec)
        start = tuned.load_start(folder, seed=keys.seed)
    else:
        require_model(folder)
        _require_zero_shot(spec, config)
        keys = None
        start = load_pretrained(
            folder, data=config.data, from_scratch=config.from_scratch, seed=None
        )
    task = spec.evaluation(_context(config, keys, start, folder))
    model = with_head(task, start.model, seed=0 if keys is None else keys.seed)
    step = tuned.load_best(folder, model) if fine else start.step
    facts = {
        "task": config.task,
        "step": step,
        "fine_tuned": fine,
        "from_scratch": keys.from_scratch if keys else config.from_scratch,
        "pretraining_steps": start.step,
    }
    return task, model.to(the_device()), facts


def _context(
    config: EvaluateConfig, keys: Any, start: Pretrained, folder: Path
) -> Context:
    return Context(
        keys=config,
        tuned=keys,
        pretraining=start.config,
        tokenizer_file=start.tokenizer_file,
        tokenizer_sha256=start.tokenizer.sha256,
        special_ids=start.tokenizer.special_ids,
        folder=folder,
        device=the_device(),
        seed=config.seed,
    )


def _require_accepted(folder: Path, learned: str, spec: Spec) -> None:
    if learned in spec.accepts:
        return
    cure = f"python -m trainer.finetune RUN --task {spec.name} --output OUT"
    if spec.zero_shot:
        cure = "give the run that it came from"
    raise ValueError(f"{folder} has learned {learned}, not {spec.name}: {cure}")


def _require_zero_shot(spec: Spec, config: EvaluateConfig) -> None:
    if not spec.zero_shot:
        raise ValueError(
            f"{config.run} was not fine-tuned, and {spec.name} needs it: python -m "
            f"trainer.finetune {config.run} --task {spec.name} --output OUT, then "
            f"python -m trainer.evaluate OUT --task {spec.name}"
        )
