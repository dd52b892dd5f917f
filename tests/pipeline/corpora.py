"""What the tests of this folder generate and run: pictures, tables, the commands."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ("red", "blue", "small", "large", "bird", "kite", "house", "river", "quiet")
# One caption holds the texts of special tokens; they are words like any other.
SPECIAL_CAPTION = "a sign that reads [SEP] and [MASK] and [CLS]"
# Of one command, on a machine with much else to do.
LIMIT_S = 500
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
        timeout=LIMIT_S,
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
