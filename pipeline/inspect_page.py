"""An inspection as one page that opens offline.

Owns what stands on it and in which order. Does not own its elements
(`pipeline.inspect_html`), its charts (`pipeline.inspect_charts`) or what is counted
(`pipeline.inspect_data`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from pipeline.config import flat
from pipeline.inspect_charts import histogram, number, ranks, size_map
from pipeline.inspect_data import Alike, Pair, View, aspects, percentiles, word_counts
from pipeline.inspect_html import (
    bars,
    card,
    document,
    folded,
    grid,
    picture,
    quoted,
    section,
    table,
)
from pipeline.inspect_text import parts_of, scope, share, size, split_table
from pipeline.inspect_tokens import Token, Tokens

# Colours of the style sheet by what became of an input.
_COLOURS = {"written": "s0", "filtered": "s3", "failed": "s7", "duplicate": "quiet"}
_WORDS = 18
_CAPTIONS = 5
_VALUE = 160


def page(view: View) -> str:
    """The page of a dataset."""
    parts = [_head(view), _inputs(view), _sheet(view), _spread(view), _language(view)]
    parts += [_reasons(view), _duplicates(view), _provenance(view)]
    return document(f"{view.name}: dataset", *parts)


def _head(view: View) -> str:
    manifest = view.manifest
    totals = list(manifest.totals().values())
    sums = {key: sum(row[key] for row in totals) for key in totals[0]}
    counts = manifest.accounting
    tiles = [
        ("samples", f"{sums['samples']:,}", f"of {counts.inputs:,} inputs"),
        ("captions", f"{sums['captions']:,}", _each(sums, "captions", "samples")),
        ("tokens", f"{sums['tokens']:,}", _each(sums, "tokens", "captions")),
        ("tars", size(sums["bytes"]), f"in {sums['shards']:,} shards"),
        (
            "not kept",
            share(1 - counts.written / max(counts.inputs, 1)),
            f"{counts.inputs - counts.written:,} inputs, each with a reason",
        ),
    ]
    return (
        f'<header><p class="kicker">Dataset</p><h1>{quoted(view.name)}</h1>'
        f'<p class="place">{quoted(view.url)}</p>{_tiles(tiles)}'
        f'<p class="note">{quoted(scope(view))}.</p></header>'
    )


def _tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Figures side by side: name, value, note."""
    drawn = "".join(
        f'<div class="tile"><span>{quoted(name)}</span><b>{quoted(value)}</b>'
        f"<small>{quoted(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{drawn}</div>'


def _each(sums: Mapping[str, int], what: str, of: str) -> str:
    one = {"samples": "a sample", "captions": "a caption"}[of]
    return f"{number(round(sums[what] / max(sums[of], 1), 1))} {one}"


def _inputs(view: View) -> str:
    counts = view.manifest.accounting
    parts = [part for part in parts_of(counts) if part[2]]
    drawn = "".join(
        f'<i class="{_COLOURS[kind]}" style="flex-grow:{count}" '
        f'title="{quoted(name)}: {count:,}"></i>'
        for kind, name, count in parts
    )
    rows = "".join(
        f'<tr><td><i class="key {_COLOURS[kind]}"></i>{quoted(name)}</td>'
        f'<td class="n">{count:,}</td>'
        f'<td class="n">{share(count / max(counts.inputs, 1))}</td></tr>'
        for kind, name, count in parts
    )
    identity = (
        f'<div class="stack">{drawn}</div><div class="scroll"><table><tbody>{rows}'
        f'<tr class="sum"><td>inputs</td><td class="n">{counts.inputs:,}</td>'
        '<td class="n">100 %</td></tr></tbody></table></div>'
    )
    head, lines = split_table(view.manifest)
    weights = view.manifest.sources
    mixture = "; ".join(f"{name} {number(weight)}" for name, weight in weights.items())
    return section(
        "Where every input went",
        grid(
            card(
                identity,
                note=f"{view.manifest.rows:,} rows of the corpus; rows of one image "
                "are one input.",
            ),
            card(
                table(head, lines, texts=2),
                note=f"Sampling weights: {mixture}." if len(weights) > 1 else "",
            ),
        ),
    )


def _sheet(view: View) -> str:
    assert view.tokens is not None
    cards = [_pair(pair, view.tokens) for pair in view.pairs]
    lead = (
        f"{len(cards)} of {view.manifest.accounting.written:,}, evenly spaced, as "
        "stored. Each box is a token; boxes in red stand for words that the tokenizer "
        "does not know."
    )
    return section("Samples", grid(*cards, classes="sheet"), lead=lead)


def _pair(pair: Pair, tokens: Tokens) -> str:
    drawn = [
        _caption(caption, tokens.shown(caption, ids))
        for caption, ids in zip(pair.captions, pair.ids, strict=False)
    ]
    shown = drawn[:1] + ([folded(f"{len(drawn) - 1} more", *drawn[1:_CAPTIONS])] * 1)
    body = "".join(shown if len(drawn) > 1 else drawn)
    columns = "".join(
        f"<dt>{quoted(name)}</dt><dd>{quoted(value[:_VALUE])}</dd>"
        for name, value in pair.columns.items()
    )
    more = folded("columns", f"<dl>{columns}</dl>") if columns else ""
    return (
        f'<figure class="pair">{picture(pair.image, "sample " + pair.key)}<figcaption>'
        f'<p class="where"><b>{quoted(pair.split)}</b>{quoted(pair.key)}</p>'
        f"{body}{more}</figcaption></figure>"
    )


def _caption(caption: str, tokens: Sequence[Token]) -> str:
    boxes = "".join(
        f"<b>{escape(token.text)}</b>"
        if token.unknown is None
        else f'<b class="unknown">{escape(token.text)}'
        f"<small>{escape(token.unknown)}</small></b>"
        for token in tokens
    )
    return (
        f'<p class="caption" dir="auto">{escape(caption)}</p>'
        f'<p class="tokens">{boxes}</p>'
    )


def _spread(view: View) -> str:
    numbers, vocabulary = view.numbers, view.vocabulary
    assert vocabulary is not None
    letters = np.array([len(caption) for caption in view.captions], np.float64)
    width, height = numbers["original_width"], numbers["original_height"]
    constants, cards = [], []
    if len(width) and np.ptp(width) == 0 and np.ptp(height) == 0:
        constants.append(("all sources", f"{number(width[0])} x {number(height[0])}"))
    elif len(width):
        cards.append(_sizes(width, height))
    for title, values, log in (
        ("Width per height of the sources", aspects(view), True),
        ("Bytes of a written image", numbers["jpg_bytes"], True),
        ("Captions of an image", numbers["n_captions"], False),
        ("Characters of a caption", letters, False),
        ("Tokens of a caption", vocabulary.lengths, False),
    ):
        if len(values) and np.ptp(values) == 0:
            constants.append((title.lower(), number(values[0])))
        elif len(values):
            cards.append(_distribution(title, values, log=log))
    tiles = [(name, value, "every one of them") for name, value in constants]
    body = (_tiles(tiles) if tiles else "") + grid(*cards, classes="three")
    return section("Distributions", body, lead="Dashed lines are medians.")


def _sizes(width: np.ndarray, height: np.ndarray) -> str:
    title = "Sizes of the sources"
    drawn = size_map(width, height, label=title)
    note = f"Width and height in pixels, {len(width):,} images; squares on the line."
    return card(drawn, title=title, note=note)


def _distribution(title: str, values: np.ndarray, *, log: bool) -> str:
    found = percentiles(values)
    note = (
        f"Median {number(found[3])}; 5 % lie below {number(found[1])}, 5 % above "
        f"{number(found[5])}; {number(found[0])} to {number(found[6])}."
    )
    return card(histogram(values, label=title, log=log), title=title, note=note)


def _language(view: View) -> str:
    vocabulary = view.vocabulary
    assert vocabulary is not None
    entries = view.manifest.tokenizer.vocab_size
    words = word_counts(view.captions).most_common(_WORDS)
    unknown = vocabulary.unknown_words[:_WORDS]
    rank = ranks(vocabulary.counts, label="occurrences by rank")
    cards = [
        card(bars(words), title="Words, by captions that have them"),
        card(bars(list(vocabulary.common)[:_WORDS]), title="Tokens"),
        card(
            rank,
            title="Occurrences of a token, by its rank",
            note=f"{vocabulary.used:,} of {entries:,} entries of the vocabulary occur "
            f"in {vocabulary.captions:,} captions.",
        ),
        card(
            bars(unknown, classes="s7")
            if unknown
            else '<p class="none">Every word has tokens of its own.</p>',
            title="Words that became the unknown token",
            note=f"{vocabulary.unknown:,} of {vocabulary.tokens:,} tokens "
            f"({share(vocabulary.unknown_share)}) are unknown.",
        ),
    ]
    return section("Words and tokens", grid(*cards))


def _reasons(view: View) -> str:
    accounting = view.manifest.accounting
    cards = []
    for (status, reason), rows in sorted(view.examples.items()):
        counts = getattr(accounting, status, {})
        if status == "duplicate" or not isinstance(counts, Mapping):
            continue
        lines = [
            [row["key"], (row["url"] or "")[:_VALUE], (row["detail"] or "")[:_VALUE]]
            for row in rows
        ]
        count = counts.get(reason, len(rows))
        cards.append(
            card(
                table(["key", "input", "detail"], lines, texts=3),
                title=f"{status}: {reason} ({count:,})",
                classes="reason " + _COLOURS[status],
            )
        )
    left = {**accounting.filtered, **accounting.failed}
    body = grid(*cards) if cards else ""
    if not left:
        body = '<p class="none">Nothing failed and nothing was filtered.</p>'
    lead = "A few examples of each reason; the parquet files have every one."
    return section("Failed and filtered", body, lead=lead if cards else "")


def _duplicates(view: View) -> str:
    dropped = [_side_by_side(one) for one in view.duplicates]
    alike = [_side_by_side(one) for one in view.alike]
    parts = []
    if dropped:
        parts.append("<h3>Dropped, with what they repeat</h3>")
        parts.append(grid(*dropped, classes="three"))
    elif view.manifest.accounting.duplicates:
        rows = [
            [row["key"], (row["url"] or "")[:_VALUE], row["reason"] or "identity"]
            for (status, _), found in sorted(view.examples.items())
            for row in found
            if status == "duplicate"
        ]
        head = ["key", "input", "kind"]
        parts.append(card(table(head, rows, texts=3), classes="facts"))
    if alike:
        parts.append("<h3>Kept, though they look alike</h3>")
        parts.append(grid(*alike, classes="three"))
    dropped_count = view.manifest.accounting.duplicates
    inputs = "input was" if dropped_count == 1 else "inputs were"
    lead = (
        f"{dropped_count:,} {inputs} dropped as duplicates. "
        f"Among {view.compared:,} samples that were kept, "
        + (
            "no two have perceptual hashes within 2 bits."
            if not alike
            else "these have perceptual hashes within 2 bits (see --dedup.near)."
        )
    )
    return section("Duplicates", *parts, lead=lead)


def _side_by_side(alike: Alike) -> str:
    sides = "".join(
        _side(image, row) for image, row in zip(alike.images, alike.rows, strict=True)
    )
    reason = alike.rows[1]["reason"] or ""
    apart = "" if alike.bits is None else f"{alike.bits} bits apart"
    note = ", ".join(word for word in (reason, apart) if word)
    return card(f'<div class="sides">{sides}</div>', note=note)


def _side(data: bytes | None, row: Mapping[str, Any]) -> str:
    if data is None:
        image = '<p class="noimage">not kept</p>'
    else:
        image = picture(data, "input " + row["key"])
    caption = (row["caption"] or "")[:_VALUE]
    return (
        f'<figure>{image}<figcaption><p class="where">{quoted(row["key"])}</p>'
        f'<p class="caption" dir="auto">{escape(caption)}</p></figcaption></figure>'
    )


def _provenance(view: View) -> str:
    manifest = view.manifest
    facts = [
        ["manifest sha256", manifest.sha256],
        ["transform sha256", manifest.transform_sha256],
        ["tokenizer sha256", manifest.tokenizer.sha256],
        ["schema version", str(manifest.schema_version)],
        *_versions(manifest.transform),
    ]
    keys = [[key, _value(value)] for key, value in flat(manifest.transform).items()]
    shards = [
        [shard.name, shard.source, f"{shard.samples:,}", size(shard.bytes)]
        for shard in manifest.shards[:200]
    ]
    hidden = len(manifest.shards) - len(shards)
    return section(
        "Provenance",
        card(table(["", ""], facts, texts=2), classes="facts"),
        folded(
            "Everything that decided the bytes",
            card(table(["", ""], keys, texts=2), classes="facts"),
        ),
        folded(
            f"{len(manifest.shards):,} shards",
            card(
                table(["tar", "source", "samples", "size"], shards, texts=2),
                note=f"{hidden:,} more are not listed." if hidden else "",
            ),
        ),
        lead="What this dataset was made of and with: equal hashes, equal bytes.",
    )


def _versions(transform: Mapping[str, Any]) -> Iterator[list[str]]:
    versions = transform.get("versions")
    if isinstance(versions, Mapping):
        yield ["made with", ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))]


def _value(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 4 * _VALUE else text[: 4 * _VALUE] + "…"
