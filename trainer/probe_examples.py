"""Pairs to look at after the probes: where the right partner helps, and where not.

Owns which pairs are shown, and what of them. Does not own losses (`trainer.probes`),
what a model restores (`trainer.figures`) or the page (`trainer.tasks.results`).

Pairs are chosen by result, so they say nothing of how often it happens.

Shapes: N pairs, S side of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from trainer.figures import GREY, Artist, pixel_mask
from trainer.probes import Losses
from trainer.tasks.results import Example, extremes, thumbnail

_UNITS = {
    "mlm": "nats a word",
    "recon": "squared error a pixel",
    "mim": "absolute error a pixel",
}
_NOTHING = "Nothing is hidden in the first draw."
_TITLES = {
    "Best": "the right {} helps most",
    "Worst": "a wrong {} is better than the right one",
    "Near the threshold": "right and wrong {} are nearest in worth",
}


def unit_of(probe: str) -> str:
    """Of the loss that a probe measures, for people."""
    return _UNITS.get(probe, "of the loss")


def gaps(losses: Mapping[str, Losses]) -> np.ndarray:
    """By how much each pair (N,) is worse with another pair's partner than with its
    own; nan where nothing is masked.
    """
    return losses["shuffled"].means - losses["true"].means


def examples(
    artist: Artist,
    losses: Mapping[str, Mapping[str, Losses]],
    *,
    count: int,
    batch: int,
) -> dict[str, list[Example]]:
    """`count` pairs of each kind and probe, or fewer, by the title of their part.

    Args:
        losses: of all pairs of the artist, by probe and condition.
        batch: pairs that go through the model at once.
    """
    keys, parts = artist.config.model, {}
    other = artist.partners
    for probe, conditions in losses.items():
        gap = gaps(conditions)
        measured = np.flatnonzero(np.isfinite(gap))
        score = gap[measured]
        kinds = extremes(score.tolist(), (score > 0).tolist(), count)
        # Equal partners, such as two copies of an image, are neither.
        kinds["Worst"] = [one for one in kinds["Worst"] if score[one] < 0]
        words = probe == keys.word_loss
        partner = "image" if words else "caption"
        for kind, chosen in kinds.items():
            rows = measured[chosen]
            shown = (
                _words_shown(artist, rows, other[rows])
                if words
                else _images_shown(artist, rows, other[rows], batch)
            )
            parts[f"{probe}: {_TITLES[kind].format(partner)}"] = [
                Example(
                    images=images,
                    texts=texts,
                    title=f"{gap[row]:+.3g} {unit_of(probe)} with another's {partner}",
                    note=_note(row, conditions),
                )
                for row, (images, texts) in zip(rows.tolist(), shown, strict=True)
            ]
    return parts


Shown = tuple[list[bytes], list[str]]


def _words_shown(
    artist: Artist, rows: np.ndarray, other: np.ndarray
) -> Iterator[Shown]:
    """Of pairs whose words are restored: both images, and the caption as it was filled
    with either.
    """
    pixels = artist.pairs.pixels
    for row, wrong in zip(rows.tolist(), other.tolist(), strict=True):
        own, another = artist.filled(row, image=row), artist.filled(row, image=wrong)
        texts = [artist.words(row)]
        if own is None or another is None:
            texts.append(_NOTHING)
        else:
            texts += [
                f"Hidden: {own[0]}",
                f"With its own image (left): {own[1]}",
                f"With another's (right): {another[1]}",
            ]
        yield [thumbnail(pixels[row]), thumbnail(pixels[wrong])], texts


def _images_shown(
    artist: Artist, rows: np.ndarray, other: np.ndarray, batch: int
) -> Iterator[Shown]:
    """Of pairs whose pixels are restored: the original, what was seen of it, and what
    was put where it is hidden with either caption.
    """
    for first in range(0, len(rows), batch):
        part = slice(first, first + batch)
        with_own, masks = artist.restore(rows[part], rows[part])
        with_other, _ = artist.restore(rows[part], other[part])
        for place, (row, wrong) in enumerate(zip(rows[part], other[part], strict=True)):
            original = artist.pairs.pixels[row]
            hidden = pixel_mask(masks, place, artist.config)
            unseen = np.full_like(original, GREY)
            fillings = (original, unseen, with_own[place], with_other[place])
            texts = [
                "The original, and what was seen of it."
                if hidden.any()
                else f"The original. {_NOTHING}",
                f"With its own caption (third): {artist.words(int(row))}",
                f"With another's (fourth): {artist.words(int(wrong))}",
            ]
            pictures = [np.where(hidden, one, original) for one in fillings]
            yield list(map(thumbnail, pictures)), texts


def _note(row: int, losses: Mapping[str, Losses]) -> str:
    means = ", ".join(f"{name} {one.means[row]:.4g}" for name, one in losses.items())
    return f"Loss by partner, mean of all draws: {means}. Shown is the first draw."
