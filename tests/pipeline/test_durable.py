"""Folders are made while others make and remove them."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path

import pytest

from pipeline.durable import make_folder

_TIMES = 4000


def _make_and_remove(folder: Path) -> None:
    for _ in range(_TIMES):
        make_folder(folder)
        for made in (folder, folder.parent):
            with contextlib.suppress(OSError):
                made.rmdir()


def test_a_folder_that_others_remove_meanwhile_is_no_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "state" / "staging"
    others = [
        context.Process(target=_make_and_remove, args=(folder,)) for _ in range(3)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_folder_is_refused(tmp_path, kind):
    path = tmp_path / "taken"
    if kind == "file":
        path.write_text("")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        make_folder(path / "below")


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_folder(tmp_path / "link" / "below")
    assert (tmp_path / "real" / "below").is_dir()
