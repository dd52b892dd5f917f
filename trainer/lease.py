"""One trainer per run behind a URL: a lease that its holder renews.

Owns the lease's file, RUN/.lease.json, and when the holder counts as dead. Does not own
what a trainer that has lost it may still do (`trainer.run_copy`: nothing that shows).

A lease is free at once where its holder was told to go under the same name
(`storage.writer`), or where this process can see that it is dead: on the same boot of
the same host. Any other holder is watched: one that does not renew for `DEAD_SECONDS`
is dead. Nobody's clock is compared with another's. Whoever is taken for dead and is not
finds that out before it completes its next checkpoint, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract import LOCKED
from trainer.store import Store

LEASE = ".lease.json"
DEAD_SECONDS = 30.0
_RENEWAL_SECONDS = 5.0
_LOOK_SECONDS = 1.0


class Lease:
    """The right to write the run in `store`.

    Args:
        writer: name under which a lease passes at once, if any.
    """

    def __init__(self, store: Store, writer: str | None) -> None:
        self._store, self._writer = store, writer
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._stop = threading.Event()
        self._renewal: threading.Thread | None = None

    def take(self) -> None:
        """Take it, which may take `DEAD_SECONDS`.

        Raises:
            ValueError: another trainer holds it, and renews it.
            OSError: storage failed.
        """
        seen: str | None = None
        since = time.monotonic()
        while True:
            holder, version = self._read()
            if holder.get("token") == self._token:
                break
            if version != seen:
                if seen is not None and version is not None:
                    self._refuse(holder)
                seen, since = version, time.monotonic()
            waited = time.monotonic() - since
            if version is None or self._is_free(holder) or waited >= DEAD_SECONDS:
                self._store.replace(LEASE, self._content(), version)
                # Whatever became of the answer, the file says who holds it.
                seen = None
                continue
            time.sleep(_LOOK_SECONDS)
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewal.start()

    @property
    def held(self) -> bool:
        """Was it taken, and not released?"""
        return self._renewal is not None

    def check(self) -> None:
        """Raise ValueError where another trainer has taken over."""
        if self._read()[0].get("token") != self._token:
            raise ValueError(
                f"another trainer took over {self._store.shown}, so this one stops; "
                "every checkpoint that it completed stays"
            )

    def release(self) -> None:
        """Let go of it, if it is held."""
        self._stop.set()
        if self._renewal is None:
            return
        self._renewal.join()
        self._renewal = None
        # One that storage does not let go of is free as soon as it counts as dead.
        with contextlib.suppress(OSError, ValueError):
            if self._read()[0].get("token") == self._token:
                self._store.remove([LEASE])

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWAL_SECONDS):
            # While storage is away, nobody can take it either.
            with contextlib.suppress(OSError, ValueError):
                holder, version = self._read()
                if version is None or holder.get("token") != self._token:
                    return
                self._beat += 1
                self._store.replace(LEASE, self._content(), version)

    def _content(self) -> bytes:
        holder = {
            "token": self._token,
            "beat": self._beat,
            "writer": self._writer,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "started": _started(os.getpid()),
        }
        return json.dumps(holder).encode()

    def _read(self) -> tuple[Mapping[str, Any], str | None]:
        """Holder, and version of the file; empty and None where there is none."""
        found = self._store.read_version(LEASE)
        if found is None:
            return {}, None
        try:
            holder = json.loads(found[0])
        except ValueError:
            holder = {}
        return holder if isinstance(holder, dict) else {}, found[1]

    def _is_free(self, holder: Mapping[str, Any]) -> bool:
        same = self._writer is not None and holder.get("writer") == self._writer
        return same or _gone(holder)

    def _refuse(self, holder: Mapping[str, Any]) -> None:
        raise ValueError(
            f"{LOCKED} to {self._store.shown}: process "
            f"{holder.get('pid')} on {holder.get('host')}; wait for it or stop it, or "
            "take another --output"
        )


def _machine() -> str | None:
    """Where a process number means one process: a host, since it was started, and a
    PID namespace on it; None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process that runs started, in clock ticks since the host did; None where
    there is none. The number of a dead process is given to another in time.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, in brackets, is a name with any characters.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]


def _gone(holder: Mapping[str, Any]) -> bool:
    """Is the holder's process known to have ended?"""
    pid, machine = holder.get("pid"), _machine()
    if machine is None or holder.get("machine") != machine or not isinstance(pid, int):
        return False
    return _started(pid) != holder.get("started")
