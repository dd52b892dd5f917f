"""Pairs to look at after the probes: where the right partner helps, and where not.

Owns which pairs are shown, and what of them. Does not own losses (`trainer.probes`),
what a model restores (`trainer.figures`) or the page (`trainer.tasks.results`).

Pairs are chosen by result, so they say nothing of how often it happens. Losses are
means over all draws of masks; what is restored is that of the first draw.

Shapes: N pairs, S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.figures import GREY, Artist, pixel_mask
from trainer.probes import Losses, partners
from trainer.tasks.results import Example, extremes, thumbnail

UNITS = {
    "mlm": "nats a word",
    "recon": "squared error a pixel",
    "mim": "absolute error a pixel",
}
_TITLES = {
    "Best": "the right {} helps most",
    "Worst": "a wrong {} is better than the right one",
    "Near the threshold": "right and wrong {} are worth the same",
}


def gaps(losses: Mapping[str, Losses]) -> np.ndarray:
    """By how much each pair (N,) is worse with another pair's partner than with its
    own; nan where nothing is masked.
    """
    return losses["shuffled"].means - losses["true"].means


def examples(
    artist: Artist, losses: Mapping[str, Mapping[str, Losses]], *, count: int
) -> dict[str, list[Example]]:
    """`count` pairs of each kind and probe, or fewer, by the title of their part.

    Args:
        losses: of all pairs of the artist, by probe and condition.
    """
    keys, parts = artist.config.model, {}
    for probe, conditions in losses.items():
        gap = gaps(conditions)
        measured = np.flatnonzero(np.isfinite(gap))
        score = gap[measured]
        kinds = extremes(score.tolist(), (score > 0).tolist(), count)
        words = probe == keys.word_loss
        shown = _word_examples if words else _image_examples
        partner = "image" if words else "caption"
        for kind, rows in kinds.items():
            title = f"{probe}: {_TITLES[kind].format(partner)}"
            parts[title] = shown(artist, measured[rows], conditions, UNITS[probe])
    return parts


def _word_examples(
    artist: Artist, rows: np.ndarray, losses: Mapping[str, Losses], unit: str
) -> list[Example]:
    """Pairs whose words were restored: both images, and the caption as it was filled
    with either.
    """
    pairs, other = artist.pairs, partners(artist.pairs, seed=artist.seed)
    found = []
    for row in rows.tolist():
        with_own = artist.tokens(row, image=row)
        with_other = artist.tokens(row, image=int(other[row]))
        hidden = [token["text"] for token in with_own if token["masked"]]
        found.append(
            Example(
                images=[
                    thumbnail(pairs.pixels[row]),
                    thumbnail(pairs.pixels[other[row]]),
                ],
                texts=[
                    artist.words(row),
                    f"Hidden: {' '.join(hidden) or 'no word in the first draw'}",
                    f"With its own image (left): {_filled(with_own)}",
                    f"With the other: {_filled(with_other)}",
                ],
                title=_title(row, losses, f"{unit} with another's image"),
                note=_note(row, losses),
            )
        )
    return found


def _image_examples(
    artist: Artist, rows: np.ndarray, losses: Mapping[str, Losses], unit: str
) -> list[Example]:
    """Pairs whose pixels were restored: original, what was seen, and what was made of
    it with either caption.
    """
    if not len(rows):
        return []
    other = partners(artist.pairs, seed=artist.seed)[rows]
    with_own, masks = artist.restore(rows, rows)
    with_other, _ = artist.restore(rows, other)
    return [
        Example(
            images=_pictures(
                artist.pairs.pixels[row],
                pixel_mask(masks, place, artist.config),
                (with_own[place], with_other[place]),
            ),
            texts=[
                f"Its own caption (third): {artist.words(int(row))}",
                f"The other (fourth): {artist.words(int(other[place]))}",
            ],
            title=_title(int(row), losses, f"{unit} with another's caption"),
            note=_note(int(row), losses),
        )
        for place, row in enumerate(rows)
    ]


def _pictures(
    original: np.ndarray, hidden: np.ndarray, restored: Sequence[np.ndarray]
) -> list[bytes]:
    """An image (S, S, 3), what was seen of it, and what was put where it is hidden."""
    fillings = (original, np.full_like(original, GREY), *restored)
    return [thumbnail(np.where(hidden, one, original)) for one in fillings]


def _filled(tokens: Sequence[Mapping[str, Any]]) -> str:
    """A caption whose masked words are the likeliest ones, in brackets."""
    return " ".join(
        f"[{token['top5'][0][0]}]" if token["masked"] else token["text"]
        for token in tokens
    )


def _title(row: int, losses: Mapping[str, Losses], what: str) -> str:
    return f"{gaps(losses)[row]:+.4f} {what}"


def _note(row: int, losses: Mapping[str, Losses]) -> str:
    means = ", ".join(f"{name} {one.means[row]:.4f}" for name, one in losses.items())
    return f"Loss by partner: {means}."
