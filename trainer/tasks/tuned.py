"""What fine-tuning writes: a folder with everything that evaluation needs.

Owns the layout, checkpoints, resuming, and refusing a folder that holds another run.
Does not own the loop (`trainer.tasks.training`).

    OUTPUT/finetune.yaml            keys of the command, resolved
    OUTPUT/pretraining/config.yaml  keys of the run that the model comes from
    OUTPUT/origin.json              its step, the hash of its weights, tokenizer's hash
                                    and special ids, and the first command
    OUTPUT/tokenizer.json           its words
    OUTPUT/NAME                     what a task keeps (`Spec.files`)
    OUTPUT/metrics.jsonl            a line a step; `dev_*` where there was a checkpoint
    OUTPUT/checkpoints/step-…/      weights, Adam's moments, complete.json (the marker)

A checkpoint exists when its marker does. The newest is kept, and the one with the best
dev metric, which is what evaluation takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import differences, to_yaml
from pipeline.manifest import TokenizerInfo
from trainer import checkpoint
from trainer.contract import (
    CHECKPOINTS,
    COMPLETE,
    CONFIG,
    FINETUNE,
    checkpoint_name,
    complete_checkpoints,
)
from trainer.files import write_text
from trainer.options import load_config
from trainer.tasks.base import DATA
from trainer.tasks.pretrained import Pretrained, drawn_model

_ORIGIN, _PRETRAINING, _WORDS = "origin.json", "pretraining", "tokenizer.json"
_WEIGHTS, _MOMENTS = "weights.safetensors", "moments.safetensors"
# No name of pretraining's own: that there is one says that fine-tuning began there.
_LOCK = ".finetune.lock"
_MEASURED = "dev"
# What may differ between the calls that make up one run; `data`, too, where
# `_may_move`.
_MAY_CHANGE = ("output", "max_steps")


def begin(
    output: Path,
    keys: Any,
    start: Pretrained,
    files: Mapping[str, str],
    *,
    origin: Mapping[str, Any],
) -> None:
    """Write what every fine-tuning has, and the task's `files` (text by name), or see
    that it is the same there. `locked` keeps others out meanwhile.

    Args:
        origin: `origin_of` the model that the keys name now. A fine-tuning that has a
            checkpoint goes on from that, whatever became of the model: its own origin
            stays written down.

    Raises:
        ValueError: the folder holds a run of other keys or examples that has a
            checkpoint, or one of another task, or of another model that has none yet.
    """
    # All of it before anything is written: a call that is refused leaves no trace.
    if not _nothing_learned(output, keys):
        _require_same_keys(output, keys, files)
        _require_same_files(output, files)
    same_model = _is_its_origin(output, origin)
    for name, text in files.items():
        write_text(output / name, text)
    if same_model:
        (output / _PRETRAINING).mkdir(parents=True, exist_ok=True)
        write_text(output / _PRETRAINING / CONFIG, to_yaml(start.config))
    if not (output / _ORIGIN).is_file():
        checkpoint.write_json(output / _ORIGIN, dict(origin))
    if not (output / _WORDS).is_file():
        write_text(output / _WORDS, start.tokenizer_file.read_text(encoding="utf-8"))
    # Last: with it the folder is a fine-tuning.
    write_text(output / FINETUNE, to_yaml(keys))


def _nothing_learned(output: Path, keys: Any) -> bool:
    """Has the task's fine-tuning in a folder no checkpoint, so that other keys, such as
    one that its first error recommends, or other examples begin it anew?
    """
    path = output / FINETUNE
    if not path.is_file() or complete_checkpoints(output):
        return False
    return bool(yaml.safe_load(path.read_text())["task"] == keys.task)


def _require_same_keys(output: Path, keys: Any, files: Mapping[str, str]) -> None:
    path = output / FINETUNE
    if not path.is_file():
        return
    may_change = (*_MAY_CHANGE, *["data"] * _may_move(output, files))
    changed = [
        line
        for line in differences(
            _with_defaults(path, keys), yaml.safe_load(to_yaml(keys))
        )
        if line.split(":")[0] not in may_change
    ]
    if changed:
        raise ValueError(
            f"{output} holds a fine-tuning with other keys ({'; '.join(changed)}): "
            "take another --output, or delete it"
        )


def _may_move(output: Path, files: Mapping[str, str]) -> bool:
    """May the dataset lie elsewhere? Its hash tells whether it is the same one. Without
    a hash in the folder, as before there were any, only its path can. A task that keeps
    none takes no examples from it.
    """
    return DATA not in files or (output / DATA).is_file()


def _with_defaults(path: Path, keys: Any) -> dict[str, Any]:
    """The keys in a file, and the default of each that there was not yet."""
    found: dict[str, Any] = {
        one.name: one.default for one in fields(keys) if one.default is not MISSING
    }
    found = yaml.safe_load(yaml.safe_dump(found))
    return found | yaml.safe_load(path.read_text())


def origin_of(start: Pretrained, *, command: str) -> dict[str, Any]:
    """What is written down of the model that fine-tuning starts from, before a head is
    put on it.
    """
    digest = sha256()
    for name, value in sorted(start.model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return {
        "step": start.step,
        "weights_sha256": digest.hexdigest(),
        "tokenizer": asdict(start.tokenizer),
        "command": command,
    }


def _is_its_origin(output: Path, origin: Mapping[str, Any]) -> bool:
    """Did the fine-tuning in a folder, if there is one, begin with this model?

    Raises:
        ValueError: it did not, and what it began with is lost or no longer fits.
    """
    path = output / _ORIGIN
    if not path.is_file():
        return True
    old = json.loads(path.read_text())
    if old["tokenizer"]["sha256"] != origin["tokenizer"]["sha256"]:
        raise ValueError(
            f"{output} began with the words of tokenizer {old['tokenizer']['sha256']}, "
            f"and those of the model are now of {origin['tokenizer']['sha256']}: take "
            "another --output, or delete it"
        )
    # Without a hash, as before there were any, the step has to tell.
    by = "weights_sha256" if "weights_sha256" in old else "step"
    if old[by] == origin[by]:
        return True
    if not complete_checkpoints(output):
        raise ValueError(
            f"{output} began with a model of {_steps(old)}, which has changed (now "
            f"{_steps(origin)}), and has no checkpoint to go on from: delete it, or "
            "take another --output"
        )
    return False


def _steps(origin: Mapping[str, Any]) -> str:
    step = origin["step"]
    return "an unknown number of steps" if step is None else f"{step} steps"


def _require_same_files(output: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = output / name
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{path} is of other examples than those that would be learned now: "
                "restore the files and the dataset (--data) that this fine-tuning "
                "began with, or take another --output"
            )


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes of this machine from writing to a fine-tuning, or to a
    folder that becomes one.

    Raises:
        ValueError: one does, or the folder holds something else.
    """
    if output.is_file():
        raise ValueError(f"--output {output} is a file: give a folder")
    if (output / CONFIG).is_file() and not is_tuned(output):
        raise ValueError(
            f"{output} holds a run of trainer.pretrain: take another --output"
        )
    begun = is_tuned(output) or (output / _LOCK).is_file()
    if not begun and output.exists() and any(output.iterdir()):
        raise ValueError(
            f"{output} holds something else than a fine-tuning: take another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {output}: wait for it or stop it, or "
                "take another --output"
            ) from None
        yield


def is_tuned(folder: Path) -> bool:
    """Did fine-tuning write this folder?"""
    return (folder / FINETUNE).is_file()


def read_keys(folder: Path) -> dict[str, Any]:
    """The keys that it was started with."""
    found: dict[str, Any] = yaml.safe_load((folder / FINETUNE).read_text())
    return found


def load_start(folder: Path, *, seed: int) -> Pretrained:
    """The model that fine-tuning started from, with drawn weights: those of a
    checkpoint replace them.
    """
    origin = json.loads((folder / _ORIGIN).read_text())
    info = TokenizerInfo(**origin["tokenizer"])
    config = load_config(folder / _PRETRAINING)
    return Pretrained(
        config=config,
        model=drawn_model(config, info, seed=seed),
        tokenizer=info,
        tokenizer_file=folder / _WORDS,
        step=origin["step"],
    )


def load_best(folder: Path, model: nn.Module) -> int:
    """Load the checkpoint with the best dev metric, of equal ones the oldest; without
    any measured the newest. Its step.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    found = [
        (path, checkpoint.read_marker(path)) for _, path in complete_checkpoints(folder)
    ]
    if not found:
        raise ValueError(
            f"{folder} has no complete checkpoint yet: run trainer.finetune to its end"
        )
    path, marker = _best(found) or found[-1]
    model.load_state_dict(load_file(path / _WEIGHTS))
    return int(marker["step"])


def resume(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, if there is one; steps taken until then."""
    checkpoint.discard_unfinished(output)
    found = complete_checkpoints(output)
    if not found:
        return 0
    step, path = found[-1]
    model.load_state_dict(load_file(path / _WEIGHTS))
    moments = load_file(path / _MOMENTS)
    for name, parameter in model.named_parameters():
        if f"exp_avg/{name}" not in moments:
            continue
        optimizer.state[parameter] = {
            "step": torch.tensor(float(moments[f"step/{name}"])),
            "exp_avg": moments[f"exp_avg/{name}"].to(parameter.device),
            "exp_avg_sq": moments[f"exp_avg_sq/{name}"].to(parameter.device),
        }
    return step


def save(
    output: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    final: bool,
    measured: float | None,
) -> None:
    """Write a checkpoint, then delete those that are neither the newest nor the best.

    Args:
        final: the last of the schedule.
        measured: its dev metric, higher is better; None without dev examples.
    """
    folder = output / CHECKPOINTS / f"{checkpoint.TEMPORARY}{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    _write(folder / _WEIGHTS, dict(model.state_dict()))
    _write(folder / _MOMENTS, _moments(model, optimizer))
    marker: dict[str, Any] = {"step": step, "final": final}
    if measured is not None:
        marker[_MEASURED] = measured
    checkpoint.write_json(folder / COMPLETE, marker)
    checkpoint.fsync(folder)
    path = output / CHECKPOINTS / checkpoint_name(step)
    folder.rename(path)
    checkpoint.fsync(path.parent)
    found = [
        (path, checkpoint.read_marker(path)) for _, path in complete_checkpoints(output)
    ]
    best = _best(found)
    for path, _ in found[:-1]:
        if best is None or path != best[0]:
            checkpoint.delete(path)


def _best(
    found: list[tuple[Path, dict[str, Any]]],
) -> tuple[Path, dict[str, Any]] | None:
    measured = [one for one in found if _MEASURED in one[1]]
    # Of equal ones `max` takes the first, which is the oldest.
    return max(measured, key=lambda one: one[1][_MEASURED]) if measured else None


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{kind}/{name}"] = torch.as_tensor(value)
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # A tied tensor stands under each of its names: files hold no shared memory.
    save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, path)
    checkpoint.fsync(path)
