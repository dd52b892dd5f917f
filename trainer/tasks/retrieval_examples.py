"""Queries to look at: the best and the worst found, and those that nearly went wrong.

Owns which queries are shown, and what of them. Does not own the page
(`trainer.tasks.results`).

Queries are chosen by result, so they say nothing of how often it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.tasks.gallery import Gallery
from trainer.tasks.ranked_gallery import BothWays, Ranked
from trainer.tasks.results import Example, thumbnail
from trainer.tasks.texts import text_of

_LISTED = 5
_TITLES = {
    "best": "right by the widest margin",
    "near": "right and wrong almost as high",
    "worst": "the right one furthest down",
}
Words = Callable[[np.ndarray], str]


def chosen(ranked: Ranked, count: int) -> dict[str, list[int]]:
    """Numbers of `count` queries, or fewer, that went best (answered rightly), worst,
    near either way; none twice.
    """
    margins = ranked.margins
    surest = np.argsort(-margins, kind="stable")
    orders = {
        "best": surest[ranked.ranks[surest] == 0],
        "worst": np.lexsort((margins, -ranked.ranks)),
        "near": np.argsort(np.abs(margins), kind="stable"),
    }
    taken: set[int] = set()
    found = {}
    for name, order in orders.items():
        found[name] = [one for one in order.tolist() if one not in taken][:count]
        taken.update(found[name])
    return found


def words_of(tokenizer_file: Path) -> Words:
    """The text of token ids, [CLS] and [SEP] left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    return lambda ids: text_of(tokenizer, ids[1:-1])


def examples(
    both: BothWays, gallery: Gallery, *, words: Words, count: int
) -> dict[str, list[Example]]:
    """`count` queries of each kind and direction, by the title of their part.

    Args:
        words: the text of token ids.
    """
    parts = {}
    for way, ranked, shown in (
        ("Image to text", both.images, _of_image),
        ("Text to image", both.texts, _of_text),
    ):
        picked = chosen(ranked, count)
        for name, title in _TITLES.items():
            parts[f"{way}: {title}"] = [
                shown(query, ranked, gallery, words) for query in picked[name]
            ]
    return parts


def _of_image(query: int, ranked: Ranked, gallery: Gallery, words: Words) -> Example:
    """An image and the captions that were found for it."""
    target, right, scores = _first(query, ranked)
    lines = [
        f"{place}. {'(right) ' if own else ''}{words(gallery.texts[text])} "
        f"[{score:.2f}]"
        for place, (text, own, score) in enumerate(
            zip(target, right, scores, strict=True), 1
        )
    ]
    own = [words(gallery.texts[text]) for text in gallery.captions_of(query)]
    return Example(
        images=[thumbnail(gallery.pixels[query])],
        texts=lines,
        title=f"its best caption is at rank {ranked.ranks[query] + 1}",
        note=f"Its own: {' / '.join(own)}",
    )


def _of_text(query: int, ranked: Ranked, gallery: Gallery, words: Words) -> Example:
    """A caption and the images that were found for it; its own one is the last."""
    target, right, scores = _first(query, ranked)
    own = int(gallery.owner[query])
    shown = [*target, own]
    said = ", ".join(
        f"{score:.2f}{' (right)' if is_own else ''}"
        for score, is_own in zip(scores, right, strict=True)
    )
    return Example(
        images=[thumbnail(gallery.pixels[number]) for number in shown],
        texts=[words(gallery.texts[query])],
        title=f"its image is at rank {ranked.ranks[query] + 1}",
        note=f"Found, best first: {said}. The last picture is its own.",
    )


def _first(query: int, ranked: Ranked) -> tuple[list[int], list[bool], list[float]]:
    target = ranked.found.target[query, :_LISTED].tolist()
    right = ranked.found.right[query, :_LISTED].tolist()
    return target, right, ranked.scores[query, :_LISTED].tolist()
