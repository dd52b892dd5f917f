"""How many file descriptors a process may have, and how many open shards may take.

Owns the limit (`ulimit -n`): it is raised as far as a process may raise its own, and
divided. Does not own the files (`trainer.folder`, `trainer.reading`).

A batch may have each of its samples from another shard. What is left over is for
sockets, logs, checkpoints and libraries.
"""

from __future__ import annotations

import functools
import resource
from contextlib import suppress

# Some systems allow a billion, and programs that are started close them one by one.
_MOST = 1 << 16


@functools.cache
def for_shards() -> int:
    """Descriptors that open shards may take: half of all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return (_MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)) // 2


def kept_by(folders: int) -> int:
    """Shards that each of some folders may keep open between batches; one takes two
    descriptors.
    """
    return max(for_shards() // (4 * 2 * folders), 1)


def of_a_batch() -> int:
    """Shards that a batch may hold open while it is read. Two are read at once, for a
    moment three where damage was found.
    """
    return max(for_shards() // (2 * 2 * 2), 1)
