"""The bundled corpus: its size, captions, images, groups, and how groups are found."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.build_emoji import (
    ALIKE_RMS,
    SIZE,
    base_of,
    code_points,
    hexcode,
    useful_tags,
)

CORPUS = Path(__file__).resolve().parents[2] / "examples" / "emoji.parquet"
TONE = re.compile(r"(?:(?:medium-)?(?:light|dark)|medium) skin tone")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(CORPUS).to_pylist()


def test_corpus_is_small_and_whole(rows: list[dict[str, Any]]) -> None:
    assert CORPUS.stat().st_size <= 15_000_000
    assert len(rows) > 3_300
    assert len({row["hexcode"] for row in rows}) == len(rows)
    assert all(row["label"] and row["base"] and row["group"] for row in rows)


def test_images_decode_on_white(rows: list[dict[str, Any]]) -> None:
    for row in rows[::50]:
        image = Image.open(io.BytesIO(row["image"]))
        assert image.size == (SIZE, SIZE)
        assert image.mode == "RGB"
        # A white corner, save for the few drawings that fill the square.
        corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.max() > 240


def test_caption_names_the_skin_tone_once_and_only_where_it_is_drawn(
    rows: list[dict[str, Any]],
) -> None:
    tones = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
    toned = 0
    for row in rows:
        drawn = {*row["hexcode"].split("-")} & tones
        # A couple has two tones, named apart where they differ.
        assert len(TONE.findall(row["caption"])) == len(drawn), row["caption"]
        toned += bool(drawn)
    assert toned > 1_000


def test_variants_share_a_group_whatever_their_label(
    rows: list[dict[str, Any]],
) -> None:
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        stem = TONE.sub("", row["label"]).rstrip(":, ")
        stem = re.sub(r"^(man|woman|men|women|person|people) ", "", stem)
        groups[stem].add(row["base"])
    apart = {stem: bases for stem, bases in groups.items() if len(bases) > 1}
    assert len(groups) > 1_000
    assert apart == {}


def test_near_identical_images_share_a_group(rows: list[dict[str, Any]]) -> None:
    pixels = np.stack([thumbnail(row["image"]) for row in rows])
    bases = np.array([row["base"] for row in rows])
    squares = (pixels**2).sum(axis=1)
    pairs = 0
    for start in range(0, len(rows), 512):
        part = slice(start, start + 512)
        products = pixels[part] @ pixels.T
        distance = squares[part, None] + squares[None] - 2 * products
        # Decoded again, an image differs a little from what the script compared.
        first, second = np.nonzero(distance < (ALIKE_RMS - 1) ** 2 * pixels.shape[1])
        assert (bases[part][first] == bases[second]).all()
        pairs += int((first + start != second).sum())
    assert pairs > 0


def thumbnail(encoded: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded)).resize((32, 32), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32).ravel()


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("1F44B-1F3FE", "1f44b"),
        ("1F6B6-1F3FD-200D-2640-FE0F-200D-27A1-FE0F", "1f6b6"),
        ("1F469-1F3FD-200D-1F52C", "1f9d1-1f52c"),
        ("1F468-1F3FF-200D-1F9B0", "1f9d1"),
        ("1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1f48f"),
        ("1F468-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF", "1f491"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "1f46a"),
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF", "1f46b"),
        ("1F91C", "1f91b"),
        ("1F467-1F3FB", "1f9d2"),
        ("2640-FE0F", "2640"),
        ("27A1-FE0F", "2b06"),
        ("1F3F3-FE0F-200D-1F308", "1f3f3-1f308"),
    ],
)
def test_base_of_a_variant(variant: str, base: str) -> None:
    assert base_of(code_points(variant)) == base


def test_file_names_and_hexcodes_meet() -> None:
    assert code_points("0023-fe0f-20e3") == code_points("23-20E3")
    england = "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F"
    assert code_points("1f3f4-e0067_e0062_e0065_e006e_e0067") == code_points(england)
    assert hexcode(code_points("00A9-FE0F")) == "a9"


def test_tags_add_to_the_label() -> None:
    tags = ("bye", "hand", "man", "say bye", "wave", "waving hand")
    assert useful_tags("woman waving hand", tags) == ("bye", "say bye", "wave")
    assert useful_tags("waving hand", ("man",)) == ("man",)
