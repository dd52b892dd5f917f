"""Checkpoints on disk: finding, reading, deleting.

Owns what lies in a checkpoint's directory and which of them are kept. Does not own
writing one while training goes on (`trainer.saving`, `trainer.placing`), what of the
training state lies on which rank (`trainer.partition`), or the names that others rely
on (`trainer.contract`).

A checkpoint holds pieces of named parameters, in fp32, and both moments of Adam: one
safetensors file of each rank that wrote it. Any number of ranks in any ZeRO stage reads
what it needs out of all of them, so nothing is ever converted.

How a run starts (the order matters):
1. the newest complete checkpoint in RUN, if there is one, with everything in it;
2. else the weights of `--init` (`trainer.initial`);
3. else, over fresh weights from the seed, those of `model.body`
   (`trainer.models.bert`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract import CHECKPOINTS, COMPLETE, complete_checkpoints
from trainer.files import write_text
from trainer.partition import KINDS, pieces, publish, set_adam_steps

TEMPORARY = "tmp-"
VAL_LOSS = "val_loss"
"""Key of a marker: validation loss after that step, where it was measured."""


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Directory and marker of the newest complete checkpoint, if any."""
    found = complete_checkpoints(run)
    if not found:
        return None
    path = found[-1][1]
    return path, read_marker(path)


def best(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Directory and marker of the checkpoint with the lowest validation loss (of equal
    ones the oldest), if any was measured.
    """
    found = [(path, read_marker(path)) for _, path in complete_checkpoints(run)]
    measured = [one for one in found if VAL_LOSS in one[1]]
    return min(measured, key=lambda one: one[1][VAL_LOSS]) if measured else None


def read_marker(path: Path) -> dict[str, Any]:
    """What the completion marker of a checkpoint says."""
    marker: dict[str, Any] = json.loads((path / COMPLETE).read_text())
    return marker


def load(engine: Any, path: Path) -> None:
    """Load weights and optimizer from the checkpoint at `path`, at any time, written
    by any number of ranks in any ZeRO stage. Every rank calls it.

    Raises:
        ValueError: it lacks something that the model has.
    """
    stored = Stored(path)
    for piece in pieces(engine):
        for kind, tensor in piece.tensors.items():
            stored.read(kind, piece.name, piece.start, tensor)
    set_adam_steps(engine, int(read_marker(path)["adam_steps"]))
    publish(engine)


def load_weights(path: Path) -> dict[str, Tensor]:
    """fp32 weights by name from the checkpoint at `path`, on the CPU."""
    stored, weights = Stored(path), {}
    for name, shape in stored.shapes.items():
        flat = torch.empty(math.prod(shape))
        stored.read("weight", name, 0, flat)
        weights[name] = flat.view(shape)
    return weights


class Stored:
    """Files of a complete checkpoint, mapped into memory and read by the range.

    Raises:
        ValueError: a file is missing or shorter than it was written.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self.shapes: dict[str, list[int]] = {}
        self._files = []
        self._found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        marker = read_marker(path)
        for number in range(int(marker["world_size"])):
            part = path / part_name(number, marker.get("attempt"))
            try:
                file = safe_open(part, framework="pt")
            except Exception as error:
                raise ValueError(self._damaged(f"{error}")) from error
            self.shapes |= json.loads(file.metadata()["shapes"])
            for key in file.keys():  # noqa: SIM118
                kind, start, name = key.split("/", 2)
                (size,) = file.get_slice(key).get_shape()
                self._found.setdefault((kind, name), []).append(
                    (int(start), size, number)
                )
            self._files.append(file)

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill the 1-D `into` with elements from `start` on of a parameter."""
        missing, end = into.numel(), start + into.numel()
        for first, size, number in self._found.get((kind, name), ()):
            low, high = max(start, first), min(end, first + size)
            if low >= high:
                continue
            piece = self._files[number].get_slice(f"{kind}/{first}/{name}")
            part = piece[low - first : high - first]
            into[low - start : high - start].copy_(part)
            missing -= high - low
        if missing:
            raise ValueError(self._damaged(f"{missing} elements of {name} are missing"))

    def _damaged(self, what: str) -> str:
        return (
            f"{self.path} is not whole, or was written for another model ({what}): "
            "delete it to continue from the checkpoint before"
        )


def part_name(rank: int, attempt: str | None = None) -> str:
    """File of a checkpoint that a rank wrote. `attempt`: what the marker says, of one
    that was written behind a URL.
    """
    own = f"-{attempt}" if attempt else ""
    return f"rank-{rank:05d}{own}.safetensors"


def piece_key(kind: str, name: str, start: int) -> str:
    """Key of a piece in such a file."""
    assert kind in KINDS
    return f"{kind}/{start}/{name}"


def discard_unfinished(run: Path) -> None:
    """Delete what attempts that died left behind, half-written or half-deleted. Call
    before any rank saves.
    """
    complete = {path for _, path in complete_checkpoints(run)}
    for pattern in (f"{TEMPORARY}*", "step-*"):
        for path in (run / CHECKPOINTS).glob(pattern):
            if path not in complete:
                shutil.rmtree(path, ignore_errors=True)


def delete(path: Path) -> None:
    """Delete a checkpoint. Without its marker it no longer exists; then its bytes may
    go one by one.
    """
    (path / COMPLETE).unlink(missing_ok=True)
    fsync(path)
    shutil.rmtree(path)


def superfluous(run: Path, *, keep: int, keep_best: bool) -> list[Path]:
    """All checkpoints but the newest `keep` and, if wanted, the best."""
    lowest = best(run) if keep_best else None
    return [
        path
        for _, path in complete_checkpoints(run)[:-keep]
        if lowest is None or path != lowest[0]
    ]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
