"""Damaged tables and tars: every row is counted, or an error names the file.

The soak test reads 2,100; the others a few of the same kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.corpora import REPOSITORY
from tests.pipeline.mutations import CORPORA, ROWS, read, rows

# What a machine that does other things needs for a hundred small files, many times
# over: only a hang takes so long.
_HANG_SECONDS = 900


def check_damaged(folder: Path, kind: str, first: int, count: int) -> None:
    """Read damaged corpora in a process of their own."""
    command = [sys.executable, "-m", "tests.pipeline.mutations", str(folder), kind]
    done = subprocess.run(
        [*command, str(first), str(count)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_HANG_SECONDS,
        check=False,
    )
    *seeds, last = done.stdout.splitlines()
    assert done.returncode == 0, f"{kind}, seed {last}: {done.stderr}"
    outcomes = json.loads(last)
    assert seeds == [str(first + number) for number in range(count)]
    assert sum(outcomes.values()) == count
    assert len(outcomes) > 1, f"damage of {kind} makes no difference: {outcomes}"


@pytest.mark.parametrize("kind", sorted(CORPORA))
def test_a_sound_corpus_is_read(tmp_path: Path, kind: str) -> None:
    for number, make in enumerate(CORPORA[kind]):
        path = tmp_path / f"corpus{number}.{'json' if kind == 'coco' else kind}"
        path.write_bytes(make())
        assert len(rows()) == ROWS
        assert read(path, None, tmp_path, number) == "read"


@pytest.mark.parametrize("kind", sorted(CORPORA))
def test_a_damaged_corpus_is_read_or_named(tmp_path: Path, kind: str) -> None:
    check_damaged(tmp_path, kind, 0, 25)


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(CORPORA))
def test_damaged_corpora_in_numbers(tmp_path: Path, kind: str) -> None:
    check_damaged(tmp_path, kind, 1000, 300)
