"""Network namespaces: nodes of the local cluster with addresses of their own.

Owns the bridge, the namespaces and the veth pairs that join them, their names, and
cutting a node off. Does not own what runs in a namespace (`cluster.local_node`).

Each cluster has a subnet, derived from its folder's path. The bridge, with the subnet's
first address, lies in the namespace that the cluster was started from, which gets a
name as well, so that the autoscaler can make nodes from within the head's.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

INTERFACE = "eth0"
"""What a node's way to the others is called in its namespace."""
_RUN = Path("/run/netns")
# Reserved for benchmarks of networks: no route of anybody's goes there.
_POOL = ipaddress.ip_network("198.18.0.0/15")
_FIRST_NODE = 2


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network of one cluster.

    Args:
        folder: of the cluster.
    """

    PLACES: ClassVar[int] = 250
    """Nodes at most, beside the head."""
    folder: Path

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        """Addresses of the cluster."""
        places = list(_POOL.subnets(new_prefix=24))
        return places[int(self._mark, 16) % len(places)]  # type: ignore[return-value]

    @property
    def gateway(self) -> str:
        """This machine's address, as nodes see it. It lets nothing out of here."""
        return str(self.subnet[1])

    def namespace(self, node_id: str) -> str:
        """Name of a node's namespace."""
        return f"pal-{self._mark}-{node_id}"

    def within(self, node_id: str) -> list[str]:
        """Words in front of a command, which run it on the node's network."""
        return ["nsenter", f"--net={_RUN / self.namespace(node_id)}"]

    def create(self) -> None:
        """Make the bridge.

        Raises:
            OSError: the environment does not allow it, or the subnet is in use.
        """
        for tool in ("ip", "nsenter"):
            if not shutil.which(tool):
                raise OSError(
                    f"--namespaces needs the command {tool}: install iproute2 and "
                    "util-linux, or leave --namespaces out"
                )
        if os.geteuid():
            raise OSError("--namespaces needs root: leave it out, or use sudo")
        if _ip("route", "show", "root", str(self.subnet)):
            raise OSError(
                f"{self.subnet} is in use here already: give the cluster another --name"
            )
        try:
            _ip("netns", "attach", self._home, str(os.getpid()))
            self._at_home("link", "add", self._bridge, "type", "bridge")
            self._at_home("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
            self._at_home("link", "set", self._bridge, "up")
        except OSError as error:
            self.remove()
            raise OSError(
                f"--namespaces is not possible here ({error}): leave it out, or allow "
                "network namespaces (in a container, --privileged)"
            ) from error

    def remove(self) -> None:
        """Remove everything that this cluster's network has, as far as it is there."""
        for namespace in _RUN.glob(f"pal-{self._mark}-*"):
            if namespace.name != self._home:
                _ip("netns", "del", namespace.name)
        if (_RUN / self._home).exists():
            links = json.loads(self._at_home("-json", "link", "show"))
            for name in (link["ifname"] for link in links):
                if name == self._bridge or name.startswith(f"{self._bridge}n"):
                    # A veth goes with its other end, so it may be gone by now.
                    self._at_home("link", "del", name, check=False)
            _ip("netns", "del", self._home)

    def add(self, node_id: str, address: str) -> None:
        """Make a node's namespace, with `address` of the subnet."""
        name, outside = self.namespace(node_id), self._outside(node_id)
        _ip("netns", "add", name)
        within = ("netns", name)
        self._at_home(
            "link", "add", outside, "type", "veth", "peer", INTERFACE, *within
        )
        self._at_home("link", "set", outside, "master", self._bridge, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", name, "link", "set", INTERFACE, "up")
        # What looks for its own address asks for the way out.
        _ip("-n", name, "route", "add", "default", "via", self.gateway)

    def address(self, place: int) -> str:
        """Address number `place` of nodes, from 0, the head's, to PLACES."""
        return str(self.subnet[place + _FIRST_NODE])

    def take_away(self, node_id: str) -> None:
        """Remove a node's namespace, if it is there."""
        if (_RUN / self.namespace(node_id)).exists():
            # Its veth would stay as long as a socket of the namespace does.
            self._at_home("link", "del", self._outside(node_id), check=False)
            _ip("netns", "del", self.namespace(node_id))

    def cut_off(self, node_id: str) -> None:
        """Let nothing through between a node and the others, in either direction.

        Raises:
            OSError: there is no such node.
        """
        self._at_home("link", "set", self._outside(node_id), "down")

    def reconnect(self, node_id: str) -> None:
        """Take back `cut_off`.

        Raises:
            OSError: there is no such node any more.
        """
        self._at_home("link", "set", self._outside(node_id), "up")

    @property
    def _mark(self) -> str:
        return hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:6]

    @property
    def _home(self) -> str:
        return f"pal-{self._mark}-home"

    @property
    def _bridge(self) -> str:
        return f"p{self._mark}"

    def _outside(self, node_id: str) -> str:
        # A name of an interface has at most 15 characters.
        return f"{self._bridge}n{hashlib.sha256(node_id.encode()).hexdigest()[:6]}"

    def _at_home(self, *words: str, check: bool = True) -> str:
        return _ip("-n", self._home, *words, check=check)


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], text=True, capture_output=True, check=False)
    if check and done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise OSError(f"ip {' '.join(words)}: {said[-1]}")
    return done.stdout
