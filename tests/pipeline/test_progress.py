"""The progress file informs, and never costs the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.progress import Progress


def test_the_file_tells_how_far_it_is_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.progress.json"
    (tmp_path / "out.progress.json.0123.tmp").write_text("torn by a kill")
    with Progress(name="p", total=4, done=0, path=path) as bar:
        bar.commit(3, 1)
    state = json.loads(path.read_text())
    assert (state["inputs"], state["committed"], state["failed"]) == (4, 3, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A directory in the file's place is in the way of any user.
    path = tmp_path / "out.progress.json"
    path.mkdir()
    for _ in range(2):
        with Progress(name="p", total=4, done=0, path=path) as bar:
            bar._last_file = 0.0
            bar.commit(2, 0)
            bar._last_file = 0.0
            bar.commit(2, 0)
        assert capsys.readouterr().err.count("cannot be written") == 1
    assert list(tmp_path.iterdir()) == [path]
