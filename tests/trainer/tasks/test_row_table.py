"""Rows that were finished are never lost, and never taken for others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.tasks import row_table
from trainer.tasks.row_table import RowTable

SCORES = np.linspace(-3, 3, 1000, dtype=np.float32)


def test_a_table_goes_on_behind_the_last_block_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = RowTable(tmp_path / "scores", fingerprint="a", total=1000)
    table.append(SCORES[:300])
    with monkeypatch.context() as patch:
        patch.setattr(row_table, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            # Killed between the scores and the count: they do not count.
            table.append(np.zeros(500, dtype=np.float32))
    again = RowTable(tmp_path / "scores", fingerprint="a", total=1000)
    assert again.done == 300
    again.append(SCORES[300:])
    assert np.array_equal(again.rows()[:, 0], SCORES)
    done = RowTable(tmp_path / "scores", fingerprint="a", total=1000)
    assert done.done == 1000
    assert np.array_equal(done.rows()[:, 0], SCORES)


def dies(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["fingerprint", "torn", "shorter", "no json"])
def test_what_is_not_whole_or_of_something_else_is_computed_anew(
    tmp_path: Path, damage: str
) -> None:
    RowTable(tmp_path / "scores", fingerprint="a", total=1000).append(SCORES)
    if damage == "torn":
        with open(next(tmp_path.glob("scores*.f32")), "r+b") as file:
            file.truncate(1001)
    if damage == "no json":
        next(tmp_path.glob("scores*.json")).write_text("{")
    total = 500 if damage == "shorter" else 1000
    other = "b" if damage == "fingerprint" else "a"
    table = RowTable(tmp_path / "scores", fingerprint=other, total=total)
    assert table.done == 0
    table.append(SCORES[:total])
    assert np.array_equal(table.rows()[:, 0], SCORES[:total])


def test_two_evaluations_at_once_do_not_spoil_each_others_rows(tmp_path: Path) -> None:
    def table(fingerprint: str) -> RowTable:
        return RowTable(tmp_path / "scores", fingerprint=fingerprint, total=1000)

    # Of two models: block by block in turn.
    one, other = table("a"), table("b")
    for first in range(0, 1000, 500):
        one.append(SCORES[first : first + 500])
        other.append(-SCORES[first : first + 500])
    assert np.array_equal(table("a").rows()[:, 0], SCORES)
    assert np.array_equal(table("b").rows()[:, 0], -SCORES)
    # The same one twice: the slower one takes what the faster one has.
    fast, slow = table("c"), table("c")
    fast.append(SCORES[:300])
    fast.append(SCORES[300:600])
    slow.append(SCORES[:300])
    assert slow.done == 600
    assert table("c").done == 600
    fast.append(SCORES[600:])
    slow.append(SCORES[600:900])
    for whole in (fast, slow, table("c")):
        assert np.array_equal(whole.rows()[:, 0], SCORES)


def test_rows_of_several_numbers_stay_whole(tmp_path: Path) -> None:
    rows = SCORES.reshape(-1, 5)
    table = RowTable(tmp_path / "rows", fingerprint="a", total=200, width=5)
    table.append(rows[:30])
    again = RowTable(tmp_path / "rows", fingerprint="a", total=200, width=5)
    again.append(rows[again.done :])
    assert np.array_equal(again.rows(), rows)
