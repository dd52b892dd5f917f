"""Pairs on the page of the probes: the right ones, with what was made of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from tests.trainer.tiny import config
from trainer.build import build_model
from trainer.dataset import Dataset
from trainer.figures import GREY, Artist
from trainer.probe_examples import examples
from trainer.probes import Losses, Pairs, load_pairs, partners
from trainer.tasks.results import Example
from trainer.tasks.texts import text_of

N, SIDE = 9, 16
NAN = 2
"""A pair in which nothing is masked."""
UNMASKED = 4
"""A pair in whose first draw nothing is masked."""
TIE = 5
"""A pair whose partner is the same to the model."""
GAPS = np.array([0.5, -0.2, 9.0, 0.01, -0.4, 0.0, 0.3, -0.001, 0.2])


@dataclass
class Recorded:
    """Answers with what it was asked: grey levels and words that name pairs."""

    pairs: Pairs
    config: Any
    seed: int = 0
    asked: list[int] = field(default_factory=list)

    def words(self, row: int) -> str:
        return f"caption-{row}"

    @property
    def partners(self) -> np.ndarray:
        return partners(self.pairs, seed=self.seed)

    def filled(self, row: int, *, image: int) -> tuple[str, str] | None:
        if row == UNMASKED:
            return None
        return f"[hidden-{row}]", f"words-{row}-image-{image}"

    def restore(self, images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, Any]:
        self.asked.append(len(images))
        levels = 100 + 10 * images + texts
        pixels = np.broadcast_to(
            levels[:, None, None, None], (len(images), SIDE, SIDE, 3)
        )
        image = torch.zeros(len(images), 4, dtype=torch.bool)
        # The upper left quarter.
        image[:, 0] = True
        return pixels.astype(np.uint8), SimpleNamespace(image=image)


@pytest.fixture
def recorded() -> Recorded:
    levels = np.arange(N, dtype=np.uint8)[:, None, None, None]
    pairs = Pairs(
        uids=np.arange(N),
        pixels=np.broadcast_to(levels, (N, SIDE, SIDE, 3)).copy(),
        texts=[np.array([1, 2])] * N,
        groups=np.arange(N),
        numbers=np.arange(N),
        drawn=N,
    )
    model = SimpleNamespace(word_loss="mlm", image_loss="recon", patch_size=8)
    keys = SimpleNamespace(model=model, image=SimpleNamespace(size=SIDE))
    return Recorded(pairs=pairs, config=keys)


def losses() -> dict[str, Losses]:
    counts = np.full(N, 2.0)
    counts[NAN] = 0
    true = Losses(sums=np.full(N, 2.0), counts=counts)
    shuffled = Losses(sums=2 * (1 + GAPS), counts=counts)
    return {"true": true, "shuffled": shuffled, "blank": true}


def shown(parts: dict[str, list[Example]], title: str) -> list[float]:
    return [float(one.title.split()[0]) for one in parts[title]]


@pytest.mark.parametrize("probe", ["mlm", "recon"])
def test_the_best_the_worst_and_the_nearest_are_shown_and_no_tie_is_called_worse(
    recorded: Recorded, probe: str
) -> None:
    partner = "image" if probe == "mlm" else "caption"
    parts = examples(recorded, {probe: losses()}, count=3, batch=2)  # type: ignore[arg-type]
    best, worst, nearest = parts
    assert shown(parts, best) == [0.5, 0.3, 0.2]
    assert shown(parts, worst) == [-0.4, -0.2, -0.001]
    assert shown(parts, nearest) == [0.0, -0.001, 0.01]
    assert best == f"{probe}: the right {partner} helps most"
    assert all(f"with another's {partner}" in one.title for one in parts[best])
    (first, *_) = parts[best]
    assert first.note.startswith(
        "Loss by partner, mean of all draws: true 1, shuffled 1.5, blank 1."
    )


def test_words_stand_with_the_image_that_they_were_filled_by(
    recorded: Recorded,
) -> None:
    other = partners(recorded.pairs, seed=0)
    parts = examples(recorded, {"mlm": losses()}, count=1, batch=2)  # type: ignore[arg-type]
    for (example,), row in zip(parts.values(), (0, 4, TIE), strict=True):
        wrong = int(other[row])
        hidden = [
            f"Hidden: [hidden-{row}]",
            f"With its own image (left): words-{row}-image-{row}",
            f"With another's (right): words-{row}-image-{wrong}",
        ]
        nothing = ["Nothing is hidden in the first draw."]
        assert example.texts == [
            f"caption-{row}",
            *(nothing if row == UNMASKED else hidden),
        ]
        greys = [np.asarray(Image.open(BytesIO(one))).mean() for one in example.images]
        assert greys == pytest.approx([row, wrong], abs=1)


def test_pictures_are_filled_where_they_are_hidden_by_the_caption_that_is_named(
    recorded: Recorded,
) -> None:
    other = partners(recorded.pairs, seed=0)
    parts = examples(recorded, {"recon": losses()}, count=3, batch=2)  # type: ignore[arg-type]
    assert max(recorded.asked) <= 2
    for found, row in zip(parts.values(), (0, 4, TIE), strict=True):
        example, wrong = found[0], int(other[row])
        hidden = [row, GREY, 100 + 10 * row + row, 100 + 10 * row + wrong]
        for image, expected in zip(example.images, hidden, strict=True):
            pixels = np.asarray(Image.open(BytesIO(image))).astype(float)
            assert pixels[1:7, 1:7].mean() == pytest.approx(expected, abs=3)
            assert pixels[9:15, 9:15].mean() == pytest.approx(row, abs=3)
        assert example.texts[1:] == [
            f"With its own caption (third): caption-{row}",
            f"With another's (fourth): caption-{wrong}",
        ]


def test_words_are_filled_by_the_image_that_is_given(shards: Path) -> None:
    dataset = Dataset(shards, "val")
    keys = config(shards, shards)
    torch.manual_seed(0)
    pairs = load_pairs(dataset, keys, seed=0, limit=6, group=None)
    model: Any = build_model(keys, dataset.tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    artist = Artist(
        model=model,
        config=keys,
        pairs=pairs,
        tokenizer=Tokenizer.from_file(str(dataset.tokenizer_file)),
        seed=0,
        device=torch.device("cpu"),
        examples=1,
    )
    pixels = pairs.pixels.copy()
    pixels[:3] = pairs.pixels[3:]
    swapped = replace(artist, pairs=replace(pairs, pixels=pixels))
    differ = 0
    for row in range(3):
        found = artist.filled(row, image=row)
        other = artist.filled(row, image=row + 3)
        assert found is not None
        assert other is not None
        assert swapped.filled(row, image=row) == other
        # Word by word, as the table of likely ones has it.
        tokens = artist._tokens(row)
        for said, of in ((found[0], own_of), (found[1], first_of)):
            assert pieces(said) == [
                (
                    masked,
                    text_of(artist.tokenizer, [number(artist, of(one)) for one in run]),
                )
                for masked, run in runs(tokens)
            ]
        differ += found[1] != other[1]
    assert differ


def own_of(token: dict[str, Any]) -> str:
    return str(token["text"])


def first_of(token: dict[str, Any]) -> str:
    return str(token["top5"][0][0] if token["masked"] else token["text"])


def number(artist: Artist, word: str) -> int:
    return int(artist.tokenizer.token_to_id(word))


def runs(tokens: list[dict[str, Any]]) -> list[tuple[bool, list[dict[str, Any]]]]:
    """Neighbours that are all masked, or all not."""
    grouped = groupby(tokens, key=lambda token: bool(token["masked"]))
    return [(masked, list(some)) for masked, some in grouped]


def pieces(said: str) -> list[tuple[bool, str]]:
    """What stands in brackets and what between them."""
    found = re.split(r" ?\[(.*?)\](?= |$) ?", said)
    return [(bool(place % 2), one) for place, one in enumerate(found) if one]
