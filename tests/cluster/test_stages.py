"""What a stage makes of its keys."""

from __future__ import annotations

import pytest

from cluster import nodes
from cluster.stages import placed
from tests.conftest import EMOJI

WORDS = [f"--input={EMOJI}", "--output=/nowhere/data"]
SHARE = '--task_resources={"cpu_node": 0.001}'


@pytest.mark.parametrize(
    ("resources", "given", "found"),
    [
        ({"cpu_node": 1, "CPU": 2}, [], [SHARE]),
        ({"CPU": 2}, [], []),
        ({"cpu_node": 1}, ["--task_resources={}"], []),
        ({"cpu_node": 1}, ["--task_resources.mine=0.5"], []),
    ],
)
def test_preprocessing_asks_for_nodes_of_its_own_where_there_are_some(
    resources: dict[str, float],
    given: list[str],
    found: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {"gpu": {"resources": {"gpu_node": 1}}, "other": {"resources": resources}}
    monkeypatch.setattr(nodes, "_configured", lambda: rows)
    assert placed([*WORDS, *given]) == [*WORDS, *given, *found]
