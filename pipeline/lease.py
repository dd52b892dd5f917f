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
from types import TracebackType
from typing import Any

from pipeline.storage import Storage

EXPIRY_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0
# A lease that changes hands between every look and write is held by somebody.
_TAKING_TRIES = 10


class Lease:
    """Held between entering and leaving the context.

    A dead holder on this machine is succeeded at once, any other when its lease has
    expired: its process may be alive where this one cannot look.
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
            raise ValueError(
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
        here = holder.get("host") == socket.gethostname()
        if left <= 0 or (here and not _alive(holder["pid"])):
            return
        raise ValueError(
            f"{self._storage.url} is being written by process {holder['pid']} on "
            f"{holder['host']}; wait for it or stop it (if it is dead, its lease "
            f"expires in {left:.0f} s), or choose another --output"
        )


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        # The number of a holder that died in an earlier life of this container.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
