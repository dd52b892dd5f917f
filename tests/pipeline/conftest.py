"""Corpora and datasets that the tests of this folder share.

Everything is generated here, small, and preprocessed once for each number of workers
by the real command.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = "red blue small large bird kite house river quiet running over under".split()
# One caption holds the texts of special tokens; they are words like any other.
SPECIAL_CAPTION = "a sign that reads [SEP] and [MASK] and [CLS]"
FLAGS = ("--split.column=split", "--shard.samples=8", "--image.size=32")

Run = Callable[..., subprocess.CompletedProcess[str]]


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth random picture: no two seeds alike, and JPEG keeps it."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """`image` as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def caption(seed: int) -> str:
    """Four words of a small vocabulary."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, 4))


def run_module(
    module: str, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` from the repository, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """A TSV or CSV table of `rows`."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV with every kind of input: 34 of them, 24 of which become samples."""
    folder = tmp_path_factory.mktemp("corpus")
    images = folder / "images"
    images.mkdir()
    rows = []

    def add(name: str, *captions: str, split: str = "train") -> None:
        path = f"images/{name}" if "/" not in name else name
        for text in captions:
            rows.append({"image": path, "split": split, "caption": text, "mood": "calm"})

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
    (folder.parent / "outside.jpg").write_bytes(encoded(picture(28)))
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
    return write_table(folder / "birds.tsv", rows)


@pytest.fixture(scope="session")
def preprocess() -> Run:
    """Runs `python -m pipeline.preprocess`."""
    return lambda *arguments, **options: run_module(
        "pipeline.preprocess", *arguments, **options
    )


def _made(corpus: Path, output: Path, *flags: str) -> Path:
    result = run_module(
        "pipeline.preprocess", f"--input={corpus}", f"--output={output}", *FLAGS, *flags
    )
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus preprocessed by one worker."""
    output = tmp_path_factory.mktemp("one") / "birds"
    return _made(corpus, output, "--workers=1", "--columns.keep=mood")


@pytest.fixture(scope="session")
def dataset_of_two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two workers."""
    output = tmp_path_factory.mktemp("two") / "birds"
    return _made(corpus, output, "--workers=2", "--columns.keep=mood")
