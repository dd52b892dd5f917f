"""The figures of a run as Ray metrics, which a cluster's Prometheus collects.

Owns their names. Does not own the figures (`pipeline.progress`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name below `palimpsest_preprocess_`, key in progress.json, and what it says.
_GAUGES = (
    ("total", "total", "Work of the phase, in its unit"),
    ("done", "done", "Work done, ranges under way included"),
    ("rate", "per_s", "Work done per second"),
    ("eta_seconds", "eta_s", "Seconds left in the phase"),
    ("read_bytes", "read_bytes", "Bytes of images read"),
    ("written_bytes", "written_bytes", "Bytes of samples written"),
)
_BY_REASON = (
    ("failed", "failed", "Inputs that failed, by reason"),
    ("filtered", "filtered", "Inputs left out, by reason"),
    ("retried", "retried", "Requests tried again, by reason"),
)


class Metrics:
    """Gauges of this driver; Ray must be running."""

    def __init__(self, dataset: str) -> None:
        from ray.util.metrics import Gauge

        # Ray takes nothing else for a tag.
        self._dataset = dataset.encode("ascii", "backslashreplace").decode()
        keys = ("dataset", "phase")
        self._gauges = {
            key: Gauge(f"palimpsest_preprocess_{name}", text, keys)
            for name, key, text in _GAUGES
        }
        self._by_reason = {
            key: Gauge(f"palimpsest_preprocess_{name}", text, (*keys, "reason"))
            for name, key, text in _BY_REASON
        }

    def update(self, state: Mapping[str, Any]) -> None:
        """Set the gauges from what goes into progress.json."""
        tags = {"dataset": self._dataset, "phase": state["phase"]}
        for key, gauge in self._gauges.items():
            if state[key] is not None:
                gauge.set(state[key], tags)
        for key, gauge in self._by_reason.items():
            for reason, count in state[key].items():
                gauge.set(count, {**tags, "reason": reason})
