"""One driver per dataset: a lease that its holder renews and that expires.

Owns the lease's file. Does not own what the holder may do (`pipeline.dataset`) or how a
conditional write is made (`pipeline.storage`): of several drivers that find no lease,
or an expired one, at the same moment, exactly one takes it where storage compares and
writes in one step.
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
from types import TracebackType
from typing import Any

from pipeline.staging import TakenOver
from pipeline.storage import Storage

EXPIRY_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0
# A lease that changes hands between every look and write is held by somebody.
_TAKING_TRIES = 10


class Lease:
    """Held between entering and leaving the context.

    A dead holder is succeeded at once where this process can see that it is dead: on
    the same boot of the same Linux host, in the same PID namespace. Any other is when
    its lease has expired: its process may be alive where this one cannot look.
    """

    def __init__(self, storage: Storage, name: str = ".palimpsest/lease.json") -> None:
        self._storage = storage
        self._name = name
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def refuse_if_held(self) -> None:
        """Raise ValueError where another driver holds the lease, without taking it."""
        self._refuse_if_alive(self._read()[0])

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            ValueError: another driver holds it.
        """
        self._take()
        # Where storage has no conditional writes, the last of several holds it.
        self.check()
        self._renewal.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._renewal.join()
        # A lease that storage does not let go of expires.
        with contextlib.suppress(OSError):
            holder, version = self._read()
            if version is not None and holder.get("token") == self._token:
                self._storage.discard(self._name, version)

    def check(self) -> None:
        """Raise ValueError where another driver has taken over."""
        if self._read()[0].get("token") != self._token:
            raise TakenOver(
                f"another driver took over {self._storage.url}, so this one stops; "
                "nothing that it committed is lost"
            )

    def _take(self) -> None:
        for _ in range(_TAKING_TRIES):
            holder, version = self._read()
            if version is None:
                taken = self._storage.create(self._name, self._content())
            else:
                self._refuse_if_alive(holder)
                taken = self._storage.replace(self._name, self._content(), version)
            if taken:
                return
        raise ValueError(
            f"several drivers try to write {self._storage.url} at once; stop all but "
            "one, or choose another --output"
        )

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWAL_SECONDS):
            # While storage is away, nobody can take the lease either.
            with contextlib.suppress(OSError, ValueError):
                holder, version = self._read()
                if version is None or holder.get("token") != self._token:
                    return
                self._storage.replace(self._name, self._content(), version)

    def _content(self) -> bytes:
        holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "expires": time.time() + EXPIRY_SECONDS,
        }
        return json.dumps(holder).encode()

    def _read(self) -> tuple[Mapping[str, Any], str | None]:
        """Holder (empty where the file is torn) and version of the lease; no version
        where there is none.
        """
        found = self._storage.read_version(self._name)
        if found is None:
            return {}, None
        try:
            holder = json.loads(found[0])
        except ValueError:
            holder = {}
        return holder if isinstance(holder, dict) else {}, found[1]

    def _refuse_if_alive(self, holder: Mapping[str, Any]) -> None:
        left = holder.get("expires", 0) - time.time()
        if left <= 0 or _gone(holder):
            return
        raise ValueError(
            f"{self._storage.url} is being written by process {holder.get('pid')} on "
            f"{holder.get('host')}; wait for it or stop it (if it is dead, its lease "
            f"expires in {left:.0f} s), or choose another --output"
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
    """When a process started, in clock ticks since the host did; None where nobody
    says. The number of a dead process is given to another in time.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, in brackets, is a name with any characters.
    return stat.rpartition(")")[2].split()[19]


def _gone(holder: Mapping[str, Any]) -> bool:
    """Is the holder's process known to have ended?"""
    pid, machine = holder.get("pid"), _machine()
    if machine is None or holder.get("machine") != machine or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    now, then = _started(pid), holder.get("started")
    return None not in (now, then) and now != then
