from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from cluster.commands import Lanes
from cluster.trained import is_done, saved_step, taken_step


@pytest.fixture(params=["path", "url"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{'memory://' if request.param == 'url' else ''}{tmp_path}/pretrain"


def put(run: str, name: str, text: str) -> None:
    filesystem, root = fsspec.url_to_fs(run)
    path = f"{root}/{name}"
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(path, text.encode())


def lanes(*, steps: int, stops_early: bool = False) -> Lanes:
    return Lanes(
        lanes=12, global_batch=24, group=1, steps=steps, stops_early=stops_early
    )


def test_only_a_checkpoint_with_its_marker_counts(run: str) -> None:
    assert (saved_step(run), taken_step(run)) == (0, 0)
    for step in (5, 10):
        put(run, f"checkpoints/step-{step:08d}/complete.json", "{}")
    put(run, "checkpoints/step-00000015/rank-00000.safetensors", "half")
    put(run, "checkpoints/tmp-1234/complete.json", "{}")
    put(run, "metrics.jsonl", '{"step": 16}\n{"step": 17}\n{"ste')
    assert (saved_step(run), taken_step(run)) == (10, 17)


def test_a_run_is_done_when_its_last_step_is_saved_and_marked(run: str) -> None:
    put(run, "checkpoints/step-00000010/complete.json", "{}")
    assert not is_done(run, lanes(steps=10))
    assert is_done(run, lanes(steps=10, stops_early=True))
    put(run, "complete.json", "{}")
    assert is_done(run, lanes(steps=10))
    assert not is_done(run, lanes(steps=11)), "the schedule became longer"
