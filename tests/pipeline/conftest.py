"""Corpora and datasets that the tests of this folder share.

Everything is generated here, small, and preprocessed once for each number of workers
by the real command.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import made_once
from tests.pipeline.corpora import (
    FLAGS,
    SPECIAL_CAPTION,
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)

_TABLE = Path("corpus", "birds.tsv")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV with every kind of input: 34 of them, 24 of which become samples."""
    return made_once(tmp_path_factory, "corpus", _make_corpus) / _TABLE


def _make_corpus(folder: Path) -> None:
    images = (folder / _TABLE).with_name("images")
    images.mkdir(parents=True)
    rows = []

    def add(name: str, *captions: str, split: str = "train") -> None:
        path = f"images/{name}" if "/" not in name else name
        for text in captions:
            rows.append(
                {"image": path, "split": split, "caption": text, "mood": "calm"}
            )

    for seed in range(18):
        (images / f"plain{seed}.jpg").write_bytes(encoded(picture(seed)))
        split = "dev" if seed % 4 == 0 else "train"
        add(f"plain{seed}.jpg", caption(seed), split=split)
    five = [caption(100 + number) for number in range(4)]
    (images / "five.jpg").write_bytes(encoded(picture(20)))
    add("five.jpg", *five, SPECIAL_CAPTION)
    exif = Image.Exif()
    exif[0x0112] = 6
    (images / "turned.jpg").write_bytes(encoded(picture(21), exif=exif.tobytes()))
    add("turned.jpg", caption(21))
    (images / "clear.png").write_bytes(encoded(picture(22).convert("RGBA"), "PNG"))
    add("clear.png", caption(22))
    (images / "few.gif").write_bytes(encoded(picture(23).convert("P"), "GIF"))
    add("few.gif", caption(23))
    (images / "ink.jpg").write_bytes(encoded(picture(24).convert("CMYK")))
    add("ink.jpg", caption(24))
    # Failures, one for each reason that a table of paths can meet.
    (images / "cut.jpg").write_bytes(encoded(picture(25, (200, 150)))[:1500])
    add("cut.jpg", caption(25))
    (images / "words.jpg").write_text("this is no image")
    add("words.jpg", caption(26))
    add("missing.jpg", caption(27))
    (folder / "outside.jpg").write_bytes(encoded(picture(28)))
    add("../outside.jpg", caption(28))
    (images / "silent.jpg").write_bytes(encoded(picture(29)))
    add("silent.jpg", " \u0007 ", "")
    # The same image in two splits: the held-out copy stays.
    for name, split in (("train_copy.jpg", "train"), ("held_copy.jpg", "dev")):
        (images / name).write_bytes(encoded(picture(30)))
        add(name, caption(30), split=split)
    # Rows of an input that was there before, but not adjacent.
    add("plain1.jpg", caption(31))
    add("plain2.jpg", caption(32), caption(33))
    # A range without any sample for its split.
    for number in range(2):
        add(f"gone{number}.jpg", caption(34), split="test")
    write_table(folder / _TABLE, rows)


@pytest.fixture(scope="session")
def preprocess() -> Run:
    """Runs `python -m pipeline.preprocess`."""
    return lambda *arguments, **options: run_module(
        "pipeline.preprocess", *arguments, **options
    )


def _dataset(factory: pytest.TempPathFactory, corpus: Path, workers: int) -> Path:
    def make(folder: Path) -> None:
        where = (f"--input={corpus}", f"--output={folder / 'birds'}")
        more = (f"--workers={workers}", "--columns.keep=mood")
        result = run_module("pipeline.preprocess", *where, *FLAGS, *more)
        assert result.returncode == 0, result.stderr

    return made_once(factory, f"birds-{workers}", make) / "birds"


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus preprocessed by one worker."""
    return _dataset(tmp_path_factory, corpus, 1)


@pytest.fixture(scope="session")
def dataset_of_two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two workers."""
    return _dataset(tmp_path_factory, corpus, 2)
