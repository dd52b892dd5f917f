"""Writing checkpoints while training goes on.

Owns when one is due by the clock, the copy that is taken of the training state, and the
threads that write it. Does not own what lies in its directory (`trainer.checkpoint`) or
how parts become one checkpoint (`trainer.placing`, `trainer.remote_checkpoints`).

A save stops training for a copy to the host's memory. Each rank then hands in its part
in a thread, with a record beside it once the bytes are durable; rank 0's thread waits
for all records, writes the completion marker and prunes. One checkpoint is in flight at
most. A kill at any moment leaves it whole or without a marker.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.engine import World
from trainer.options import CheckpointConfig
from trainer.partition import adam_steps, shapes, shares
from trainer.placing import Draft, Place, SharedFolder

# How long a rank that ends with an error lets a checkpoint finish.
_PATIENCE_S = 20.0


class Checkpoints:
    """Writes the checkpoints of one run. Every rank has one and calls it alike.

    Args:
        run: run directory, or this node's working copy of it.
        place: where they go; None for `run`, seen by every rank.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        world: World,
        place: Place | None = None,
    ) -> None:
        self._run, self._config, self._world = run, config, world
        self._place = place or SharedFolder(run)
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self._failure: Exception | None = None
        self._last = time.monotonic()
        found = checkpoint.best(run) if world.first else None
        self._lowest = found[1][checkpoint.VAL_LOSS] if found else None

    @property
    def due(self) -> bool:
        """Have `every_minutes` gone by since the last one, by the clock of rank 0?"""
        minutes = self._config.every_minutes
        if minutes is None or not self._world.first:
            return False
        return time.monotonic() - self._last >= 60 * minutes

    @property
    def failed(self) -> bool:
        """Could this rank not write its part? Then every rank calls `wait`."""
        return self._failure is not None

    def is_best(self, val_loss: float) -> bool:
        """Is `val_loss` lower than that of any checkpoint, and is the best to be kept?
        Then save one, with it. Rank 0 decides for all.
        """
        if not self._config.keep_best:
            return False
        return bool(self._world.broadcast(self._is_lowest(val_loss)))

    def save(
        self, engine: Any, data_state: dict[str, Any], *, val_loss: float | None = None
    ) -> None:
        """Take a checkpoint after step `data_state["step"]`: copy what this rank holds
        and begin to write it. Waits for the one before.

        Raises:
            ValueError, OSError: the one before could not be written.
        """
        self.wait()
        marker = {**data_state, "world_size": self._world.size}
        marker["adam_steps"] = adam_steps(engine)
        if val_loss is not None and math.isfinite(val_loss):
            marker[checkpoint.VAL_LOSS] = val_loss
            if self._is_lowest(val_loss):
                self._lowest = val_loss
        self._copy(engine)
        draft = Draft(
            step=data_state["step"],
            attempt=self._world.broadcast(uuid.uuid4().hex[:12]),
            world_size=self._world.size,
        )
        self._written.clear()
        self._thread = threading.Thread(
            target=self._write, args=(draft, marker, shapes(engine)), daemon=True
        )
        self._thread.start()
        self._last = time.monotonic()

    def delete(self, path: Path) -> None:
        """Rank 0: delete a complete checkpoint; none is in flight."""
        self._place.delete(path)

    def wait(self) -> None:
        """Wait until the checkpoint in flight is complete. When any rank could not
        write its part, that rank raises and the others exit.
        """
        if self._thread is None:
            return
        self._written.wait()
        self._agree()
        # Rank 0 goes on to complete it.
        self._thread.join()
        self._agree()
        self._thread = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread:
            # No collectives: other ranks may be anywhere.
            self._thread.join(_PATIENCE_S)

    def _is_lowest(self, val_loss: float) -> bool:
        known = self._lowest
        return math.isfinite(val_loss) and (known is None or val_loss < known)

    def _agree(self) -> None:
        failed = torch.tensor([self.failed], dtype=torch.int64)
        if not self._world.sum(failed).item():
            return
        self._abandoned.set()
        self._world.leave()
        if self._failure:
            raise self._failure
        sys.exit(1)

    def _copy(self, engine: Any) -> None:
        """Copy to buffers that are kept for the next time; pinned where a GPU fills
        them.
        """
        held = {
            checkpoint.piece_key(kind, piece.name, piece.start): tensor
            for piece in shares(engine, self._world)
            for kind, tensor in piece.tensors.items()
        }
        for key, tensor in held.items():
            if key not in self._host:
                pinned = tensor.is_cuda
                self._host[key] = torch.empty(tensor.shape, pin_memory=pinned)
            self._host[key].copy_(tensor, non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()

    def _write(
        self, draft: Draft, marker: dict[str, Any], whole: dict[str, list[int]]
    ) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            metadata = {"shapes": json.dumps(whole)}
            write = functools.partial(save_file, self._host, metadata=metadata)
            self._place.hand_in(draft, self._world.rank, write)
            self._written.set()
            if self._world.first:
                self._complete(draft, marker)
        except SafetensorError as error:
            # A full disk is no error of the system to it.
            self._fail(
                OSError(
                    f"cannot write the checkpoint of step {draft.step} below "
                    f"{self._run}: {error}"
                )
            )
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._written.set()

    def _complete(self, draft: Draft, marker: dict[str, Any]) -> None:
        """Rank 0: the marker, once every part is there."""
        while not self._place.is_whole(draft):
            if self._abandoned.wait(self._place.poll_s):
                return
        self._place.complete(draft, marker)
        keep, keep_best = self._config.keep, self._config.keep_best
        for path in checkpoint.superfluous(self._run, keep=keep, keep_best=keep_best):
            self._place.delete(path)
