"""Checkpoints: weights, optimizer and the data state, atomic by a completion marker.

Owns saving, finding, loading and deleting. The layout that others rely on is in
`trainer.contract`.

How a run starts (the order matters):
1. the newest complete checkpoint in RUN, if there is one, with everything in it;
2. else fresh weights from the seed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract import (
    CHECKPOINTS,
    COMPLETE,
    checkpoint_name,
    complete_checkpoints,
)
from trainer.engine import World, quiet_deepspeed
from trainer.files import write_text

_TEMPORARY = "tmp-"


def save(
    engine: Any, run: Path, *, data_state: dict[str, Any], world: World, keep: int
) -> None:
    """Write a checkpoint after step `data_state["step"]`, and delete the oldest.

    It is written under a name of its own attempt, marked complete and renamed, so that
    a kill at any moment leaves either a whole checkpoint or none.
    """
    folder = run / CHECKPOINTS
    tag = world.broadcast(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}")
    engine.save_checkpoint(
        str(folder), tag=tag, client_state={"data_state": data_state}, save_latest=False
    )
    world.barrier()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # The marker must not outlive what it marks when a node loses power.
        for path in (folder / tag).iterdir():
            _fsync(path)
    world.barrier()
    if world.first:
        write_json(folder / tag / COMPLETE, {**data_state, "world_size": world.size})
        target = folder / checkpoint_name(data_state["step"])
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder / tag, target)
        _fsync(folder)
        _prune(run, keep)
    world.barrier()


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Directory and marker of the newest complete checkpoint, if any."""
    found = complete_checkpoints(run)
    if not found:
        return None
    path = found[-1][1]
    return path, json.loads((path / COMPLETE).read_text())


def check_loads(
    path: Path, marker: dict[str, Any], *, world_size: int, zero_stage: int
) -> None:
    """Raise ValueError for optimizer shards of another world size."""
    if marker["world_size"] != world_size and zero_stage > 0:
        raise ValueError(
            f"{path} was written by {marker['world_size']} ranks with ZeRO stage "
            f"{zero_stage}, which shards the optimizer over them; this call has "
            f"{world_size}: start {marker['world_size']} ranks, or use "
            "deepspeed.zero_stage 0 in runs that change size"
        )


def load(engine: Any, path: Path) -> None:
    """Load weights and optimizer from the checkpoint at `path`, which `check_loads`
    has passed.
    """
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path} is complete but DeepSpeed could not load it")


def load_weights(path: Path) -> dict[str, Tensor]:
    """fp32 weights by name from a checkpoint of any ZeRO stage, on the CPU."""
    quiet_deepspeed()
    from deepspeed.utils.zero_to_fp32 import (
        get_fp32_state_dict_from_zero_checkpoint,
    )

    if any(path.glob("*optim_states.pt")):
        # It tells each of its steps to the terminal.
        with (
            open(os.devnull, "w") as null,
            redirect_stdout(null),
            redirect_stderr(null),
        ):
            return dict(
                get_fp32_state_dict_from_zero_checkpoint(str(path.parent), path.name)
            )
    file = path / "mp_rank_00_model_states.pt"
    states = torch.load(file, map_location="cpu", weights_only=False)
    return {name: value.float() for name, value in states["module"].items()}


def discard_unfinished(run: Path) -> None:
    """Delete what attempts that died left behind, half-written or half-deleted. Call
    before any rank saves.
    """
    complete = {path for _, path in complete_checkpoints(run)}
    for pattern in (f"{_TEMPORARY}*", "step-*"):
        for path in (run / CHECKPOINTS).glob(pattern):
            if path not in complete:
                shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _prune(run: Path, keep: int) -> None:
    for _, path in complete_checkpoints(run)[:-keep]:
        # Without its marker it no longer exists; then its bytes may go one by one.
        (path / COMPLETE).unlink()
        shutil.rmtree(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
