"""A real drain shows to a driver: which node, why, by when."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

import pytest

from tests.cluster.drained_cluster import NOTICE
from tests.cluster.fake_metadata import ACTION_MS
from tests.conftest import python


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Ray writes the address of the last cluster there, for others to find.
    own = tmp_path_factory.mktemp("ray")
    (own / "ray").mkdir()
    done = python(
        "-m",
        "tests.cluster.drained_cluster",
        timeout=570,
        env={
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(own),
            # A killed raylet is given up after 5 s rather than a minute, a slow one
            # not at all.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "20000",
            "RAY_health_check_failure_threshold": "3",
        },
    )
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_driver_sees_who_got_notice_why_and_by_when(seen: dict[str, Any]) -> None:
    assert seen["before"] == 0
    assert list(seen["told"]) == [seen["noticed"]]
    reason, deadline_ms = seen["told"][seen["noticed"]]
    assert reason == "preemption"
    assert seen["earliest_ms"] <= deadline_ms <= seen["latest_ms"]


def test_what_runs_on_a_draining_node_goes_on(seen: dict[str, Any]) -> None:
    assert seen["still_answers"]


def test_a_dead_node_tells_whether_it_was_preempted(seen: dict[str, Any]) -> None:
    assert seen["noticed_end"] == ["preemption", NOTICE]
    assert seen["killed_end"][0] == "failure"


def test_a_spot_notice_of_the_cloud_drains_the_node_that_got_it(
    seen: dict[str, Any],
) -> None:
    assert seen["watcher"] == 0
    assert seen["spot"] == ["preemption", ACTION_MS]


def test_a_pod_that_is_deleted_drains_and_ends_when_nothing_runs_on_it(
    seen: dict[str, Any],
) -> None:
    pod = seen["pod"]
    assert pod["reason"] == "preemption"
    # With the deadline that cluster/kuberay sets, not Ray's own of 30 s.
    assert pod["late_seconds"] > -1
    assert pod["answers"]
    assert pod["end"] in ("preemption", "idle")
