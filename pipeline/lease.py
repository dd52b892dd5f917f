"""One driver per dataset: a lease that its holder renews and that expires.

Owns `.palimpsest/lease.json`. Does not own what the holder may do (`pipeline.dataset`).
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

EXPIRY_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0


class Lease:
    """Held between entering and leaving the context.

    A dead holder on this machine is succeeded at once, any other when its lease has
    expired: its process may be alive where this one cannot look.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def refuse_if_held(self) -> None:
        """Raise ValueError where another driver holds the lease, without taking it."""
        self._refuse_if_alive(self._read())

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            ValueError: another driver holds it.
        """
        temporary = self._written()
        try:
            try:
                # Unlike a rename, a link fails where another driver was first.
                os.link(temporary, self._path)
            except FileExistsError:
                self._refuse_if_alive(self._read())
                os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self.check()
        self._sweep()
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
        if self._read().get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise ValueError where another driver has taken over."""
        if self._read().get("token") != self._token:
            raise ValueError(
                f"another driver took over {self._path.parent.parent}, so this one "
                "stops; nothing that it committed is lost"
            )

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWAL_SECONDS):
            if self._read().get("token") != self._token:
                return
            os.replace(self._written(), self._path)

    def _sweep(self) -> None:
        """Remove what drivers left that died while they wrote a lease."""
        for path in self._path.parent.glob("lease-*"):
            with contextlib.suppress(ValueError):
                self._refuse_if_alive(_holder(path))
                path.unlink(missing_ok=True)

    def _written(self) -> Path:
        temporary = self._path.with_name(f"lease-{uuid.uuid4().hex}")
        holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "expires": time.time() + EXPIRY_SECONDS,
        }
        temporary.write_text(json.dumps(holder))
        return temporary

    def _read(self) -> Mapping[str, Any]:
        return _holder(self._path)

    def _refuse_if_alive(self, holder: Mapping[str, Any]) -> None:
        left = holder.get("expires", 0) - time.time()
        here = holder.get("host") == socket.gethostname()
        if left <= 0 or (here and not _alive(holder["pid"])):
            return
        raise ValueError(
            f"{self._path.parent.parent} is being written by process {holder['pid']} "
            f"on {holder['host']}; wait for it or stop it (if it is dead, its lease "
            f"expires in {left:.0f} s), or choose another --output"
        )


def _holder(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


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
