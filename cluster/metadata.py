"""What a cloud tells a machine about its own end.

Owns the questions to the metadata services of AWS and Google Cloud. Does not own what
follows from the answer (cluster.notice). Kubernetes needs none of this: it sends
SIGTERM to the pod (cluster/kuberay).
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

# The services answer in milliseconds, or not at all on a machine of another cloud.
_TIMEOUT_SECONDS = 2.0
# Google sends the shutdown at most 30 s after the notice, best effort.
_GOOGLE_SECONDS = 25.0


@dataclass(frozen=True)
class Interruption:
    """`deadline` is in seconds since the epoch: the machine may be gone after it."""

    what: str
    deadline: float


def aws(base: str) -> Interruption | None:
    """A notice for this EC2 spot instance, given two minutes ahead; else None.

    Raises:
        OSError: the service did not answer.
        ValueError: it answered something else.
    """
    token = _ask(
        f"{base}/latest/api/token",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        method="PUT",
    )
    if token is None:
        raise ValueError(f"{base} knows no session tokens (IMDSv2): not an EC2 machine")
    answer = _ask(
        f"{base}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token},
    )
    if answer is None:
        return None
    notice = json.loads(answer)
    end = datetime.fromisoformat(notice["time"]).timestamp()
    return Interruption(f"AWS will {notice['action']} this spot instance", end)


def gcp(base: str) -> Interruption | None:
    """A notice for this Spot VM of Compute Engine, given 30 s ahead; else None.

    Raises:
        OSError: the service did not answer.
        ValueError: it answered something else.
    """
    answer = _ask(
        f"{base}/computeMetadata/v1/instance/preempted",
        headers={"Metadata-Flavor": "Google"},
    )
    if answer not in ("TRUE", "FALSE"):
        raise ValueError(f"{base} does not tell preemption: not a Compute Engine VM")
    if answer == "FALSE":
        return None
    deadline = time.time() + _GOOGLE_SECONDS
    return Interruption("Google preempts this Spot VM", deadline)


@dataclass(frozen=True)
class Cloud:
    """Where a cloud's metadata service is, and how to ask it for a notice."""

    base: str
    interruption: Callable[[str], Interruption | None]


CLOUDS = {
    "aws": Cloud("http://169.254.169.254", aws),
    "gcp": Cloud("http://metadata.google.internal", gcp),
}


def _ask(url: str, *, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text, None for 404."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Never through a proxy: the address is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
            return str(response.read(65536).decode()).strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
