"""What limits a run: storage, decoding, the copy to the device, computing, or the rest
of what the host does.

Owns the one-line verdict and the cure in it. Does not own what is measured: waiting and
copies are `trainer.feed`'s, reading and decoding `trainer.loader`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

# A device that waits less than this is fed.
_FED = 0.03
# What makes the device wait is at work while it does; measured in other threads than
# the waiting is, it may seem to be so for a part of that time.
_EXPLAINS = 0.5


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where the seconds of some steps went on one rank, or on several together."""

    elapsed: float = 0.0
    waited: float = 0.0
    """The device had no data."""
    read: float = 0.0
    """Loader threads waited for storage; in thread seconds."""
    decode: float = 0.0
    """They decoded and resized."""
    copy: float = 0.0
    """The copy stream was busy."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            elapsed=self.elapsed + other.elapsed,
            waited=self.waited + other.waited,
            read=self.read + other.read,
            decode=self.decode + other.decode,
            copy=self.copy + other.copy,
        )


class Steps:
    """The steps of a process since the last verdict, but for its first: nothing could
    be made ahead of that, so its wait is a part of the start.
    """

    def __init__(self) -> None:
        self._begun, self._spent = False, Spent()

    def add(self, spent: Spent) -> None:
        """Another step, in order."""
        if self._begun:
            self._spent += spent
        self._begun = True

    def verdict(self, *, threads: int) -> str | None:
        """What limits the run, if there has been a step; counts anew from here."""
        spent, self._spent = self._spent, Spent()
        return verdict(spent, threads=threads) if spent.elapsed else None


def verdict(spent: Spent, *, threads: int) -> str:
    """What limits the run, in one line, with what to do about it. `threads` are the
    loader's of a rank.
    """
    elapsed = max(spent.elapsed, 1e-9)
    share = spent.waited / elapsed
    waited = f"the device waited {share:.1%} of the time for data"
    if share < _FED:
        return f"compute limits the run: {waited}"
    busy = {
        "storage": min(spent.read / threads / elapsed, 1.0),
        "decode": min(spent.decode / threads / elapsed, 1.0),
        "copy": min(spent.copy / elapsed, 1.0),
    }
    limit = max(busy, key=lambda name: busy[name])
    if busy[limit] < _EXPLAINS * share:
        limit = "host"
    ways = {
        "host": f"reads took {busy['storage']:.0%} of the loader threads' time, "
        f"decoding {busy['decode']:.0%} and copies {busy['copy']:.0%}, which is less: "
        "these are the first batches of a short run, or putting batches together takes "
        "long (with --digest full masks are drawn for it), or other processes have the "
        "cores",
        "storage": f"{threads} loader threads spent {busy['storage']:.0%} of theirs on "
        "reads: give more --threads, faster storage, or a larger --storage.cache_bytes",
        "decode": f"{threads} loader threads spent {busy['decode']:.0%} of theirs on "
        "decoding: give more --threads, or preprocess images nearer to the size that "
        "the model sees",
        "copy": f"copies took {busy['copy']:.0%} of it: see that the host's memory is "
        "pinned and no other process uses the bus",
    }
    return f"{limit} limits the run: {waited}; {ways[limit]}"
