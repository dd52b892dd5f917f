"""How far a trainer's run is, read from its directory or URL.

Owns asking, for both alike. Does not own what lies there (`trainer.contract`).
"""

from __future__ import annotations

import json
from contextlib import suppress

from cluster.commands import Lanes
from cluster.store import Store
from trainer.contract import CHECKPOINTS, COMPLETE, METRICS, checkpoint_name

# A line has some hundred bytes; a long run has a hundred thousand of them.
_TAIL = 1 << 16
_PREFIX = checkpoint_name(0).rstrip("0")


def saved_step(run: str) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    checkpoints = Store(run).below(CHECKPOINTS)
    for name in reversed(checkpoints.folders()):
        number = name.removeprefix(_PREFIX)
        if not number.isdecimal() or checkpoint_name(int(number)) != name:
            continue
        if checkpoints.below(name).read(COMPLETE) is not None:
            return int(number)
    return 0


def taken_step(run: str) -> int:
    """The last step that was written down, 0 without one. A run behind a URL writes its
    steps down with each checkpoint.
    """
    for line in reversed((Store(run).tail(METRICS, _TAIL) or b"").splitlines()):
        # The first one may be cut, the last one torn.
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def is_done(run: str, lanes: Lanes) -> bool:
    """Whether all steps that were asked for are taken and saved, and marked as such
    where the schedule ends.
    """
    marked = lanes.stops_early or Store(run).read(COMPLETE) is not None
    return marked and saved_step(run) >= lanes.steps
