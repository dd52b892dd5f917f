"""A replayed step as one page that opens offline.

Owns what is shown and in which order. Elements are in `trainer.report.elements`, the
chart in `trainer.report.charts`, words in `trainer.replay_text`, looks in `report.css`
and `replay.css`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.figures import GREY
from trainer.replay_data import ReplayedStep
from trainer.replay_pairs import Pair, mode_name
from trainer.replay_text import (
    MASK,
    before,
    composition,
    crop,
    guess,
    instead,
    match,
    mixture,
    part,
    place,
    share,
    verdict,
    where,
)
from trainer.report.charts import Series, curves
from trainer.report.elements import card, document, grid, header, image, section

# Steps on either side of the one that is shown.
_AROUND = 100
# Up to this side images are drawn larger than they are: pixel by pixel, not blurred.
_SMALL = 96


def page(found: ReplayedStep) -> str:
    """The whole HTML document. It refers to nothing outside itself."""
    style = Path(__file__).with_name("replay.css").read_text()
    shown = f"{len(found.pairs):,} of {found.counts.pairs:,} pairs of the step"
    if part(found):
        shown += f", from {part(found)}"
    lead = (
        f"{shown}. Left, the image as the model gets it; right, what masking leaves of "
        f"it. Inverted words are replaced by {MASK}."
    )
    return document(
        f"step {found.step} of {found.run.name}",
        header(
            f"Step {found.step:,} of {found.run.name}",
            _tiles(found),
            kicker="Palimpsest replay",
            lead=f"{composition(found)}. {mixture(found)}".rstrip(". "),
        ),
        _warning(found),
        _loss(found),
        section(
            "Pairs",
            grid(*(_pair(found, pair) for pair in found.pairs), classes="three"),
            lead=lead,
        ),
        style=style,
    )


def _tiles(found: ReplayedStep) -> Iterator[tuple[str, str, str]]:
    """(name, value, note) of the step as a whole."""
    yield "step", f"{found.step:,}", f"schedule of {found.config.schedule.steps:,}"
    epoch, _, rest = where(found).partition(", ")
    yield "epoch", epoch.removeprefix("epoch "), rest
    row = found.row or {}
    for name, title, note in (
        ("loss", "loss", before(found.metrics, found.step)),
        ("mlm_loss", "MLM", "nats a masked word"),
        ("recon_loss", "RECON", "squared error a masked pixel"),
    ):
        if name in row:
            yield title, f"{row[name]:.4f}", note
    matches = found.digest.matches
    note = verdict(found.digest) if matches is not False else "DIFFERS, see below"
    yield "sample_digest", found.digest.computed, note


def _warning(found: ReplayedStep) -> str:
    if found.provisional:
        return f'<p class="missing">{escape(guess(found).capitalize())}.</p>'
    if found.digest.matches is not False:
        return ""
    words = f"sample_digest {verdict(found.digest)}"
    return f'<p class="missing differs">{escape(words)}</p>'


def _loss(found: ReplayedStep) -> str:
    """The loss of the steps around, with this one marked, once it is known."""
    near = [
        (float(row["step"]), float(row["loss"]))
        for row in found.metrics
        if abs(row.get("step", math.inf) - found.step) <= _AROUND
        and math.isfinite(row.get("loss", math.nan))
    ]
    here = [point for point in near if point[0] == found.step]
    if not here:
        return ""
    series = [
        Series(
            name=name,
            colour=colour,
            steps=[step for step, _ in points],
            values=[value for _, value in points],
        )
        for colour, (name, points) in enumerate((("loss", near), ("this step", here)))
    ]
    title = f"Loss around step {found.step:,}, the dot"
    return card(
        curves(series, label=title, height=150, raw=False),
        title=title,
        classes="around",
    )


def _pair(found: ReplayedStep, pair: Pair) -> str:
    key = f"key {pair.key}, " if pair.key else ""
    stood = (
        f"; stands in for {pair.stands_in_for}, which is damaged"
        if pair.stands_in_for
        else ""
    )
    return card(
        _pictures(pair),
        _captions(pair),
        _tokens(pair),
        f'<p class="note">{escape(crop(found, pair))}</p>',
        f'<p class="note">ITM: {match(pair)}</p>' if pair.image_of else "",
        title=mode_name(pair.mode),
        note=f"{place(found, pair)}, {key}uid {pair.uid}{stood}",
        classes="replayed",
    )


def _pictures(pair: Pair) -> str:
    """The image as the model gets it, and what masking leaves of it."""
    assert pair.pixels is not None
    left = np.where(pair.hidden, np.uint8(GREY), pair.pixels)
    masked = share(sum(pair.squares), len(pair.squares))
    figures = "".join(
        f"<figure>{image(_png(pixels), name, suffix='.png')}"
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for pixels, name in (
            (pair.pixels, "the image"),
            (left, f"{masked} squares masked"),
        )
    )
    small = " small" if len(left) <= _SMALL else ""
    return f'<div class="views{small}">{figures}</div>'


def _captions(pair: Pair) -> str:
    lines = "".join(
        f'<li dir="auto"{" class=chosen" if number == pair.chosen else ""}>'
        f"{escape(caption)}</li>"
        for number, caption in enumerate(pair.captions)
    )
    return f'<ol class="captions">{lines}</ol>'


def _tokens(pair: Pair) -> str:
    words = "".join(
        f'<b class="masked" title="{escape(instead(pair, number))}">{escape(token)}</b>'
        if pair.masked[number]
        else f"<b>{escape(token)}</b>"
        for number, token in enumerate(pair.tokens)
    )
    note = f"{share(sum(pair.masked), pair.words)} words masked"
    note += f", {pair.cut} more cut by text.max_tokens" if pair.cut else ""
    return f'<p class="tokens">{words}</p><p class="unit">{escape(note)}</p>'


def _png(pixels: np.ndarray) -> bytes:
    """Exact pixels: a JPEG would show squares that are not there."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
