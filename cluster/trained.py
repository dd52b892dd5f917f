"""How far a trainer's run is, read from its directory.

Owns asking, for a directory and for a URL alike. Does not own what lies there
(`trainer.contract`).
"""

from __future__ import annotations

from cluster.commands import Lanes
from cluster.store import Store
from trainer.contract import COMPLETE, complete_checkpoints, read_metrics


def saved_step(run: str) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    found = complete_checkpoints(run)
    return found[-1][0] if found else 0


def taken_step(run: str) -> int:
    """The last step that was written down, 0 without one."""
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else 0


def is_done(run: str, lanes: Lanes) -> bool:
    """Whether all steps that were asked for are taken and saved, and marked as such
    where the schedule ends.
    """
    marked = lanes.stops_early or Store(run).read(COMPLETE) is not None
    return marked and saved_step(run) >= lanes.steps
