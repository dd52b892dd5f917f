"""An inspection for the terminal.

Owns its wording and layout. Much of it is anybody's text: every line passes through
`printable`. Does not own what is counted (`pipeline.inspect_data`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.inspect_charts import number
from pipeline.inspect_data import View, aspects, percentiles, word_counts
from pipeline.manifest import Accounting, Manifest
from pipeline.terminal import printable

_BAR = 32
_WORDS = 24
_COLUMNS = 96
_PERCENTILES = ("least", "5 %", "25 %", "median", "75 %", "95 %", "most")


def summary(view: View) -> str:
    """The whole text, a final newline included."""
    manifest = view.manifest
    lines = [f"{view.name}  {view.url}", ""]
    lines += _section("inputs", accounting_lines(manifest.accounting))
    lines += _section("splits", _table(*split_table(manifest)))
    lines += _section("sizes", _table(*figure_table(view)))
    lines += _section("words", _words(view))
    lines += _section("failed and filtered", list(_reasons(view)))
    lines += _section("duplicates", list(_duplicates(view)))
    lines.append(scope(view))
    return "\n".join(map(printable, lines)) + "\n"


def parts_of(accounting: Accounting) -> list[tuple[str, str, int]]:
    """Where every input went: kind, name, inputs."""
    return [
        ("written", "written", accounting.written),
        *(("filtered", f"filtered: {r}", n) for r, n in accounting.filtered.items()),
        *(("failed", f"failed: {r}", n) for r, n in accounting.failed.items()),
        ("duplicate", "duplicates", accounting.duplicates),
    ]


def accounting_lines(accounting: Accounting) -> list[str]:
    """The identity of law 2, and a bar for each of its parts."""
    filtered, failed = accounting.filtered.values(), accounting.failed.values()
    parts = parts_of(accounting)
    wide = max(len(name) for _, name, _ in parts)
    lines = [
        f"{accounting.inputs:,} inputs = {accounting.written:,} written + "
        f"{sum(filtered):,} filtered + {sum(failed):,} failed + "
        f"{accounting.duplicates:,} duplicates"
    ]
    for _, name, count in parts:
        portion = count / max(accounting.inputs, 1)
        bar = "█" * round(_BAR * portion) or ("▏" if count else "")
        lines.append(
            f"{name:<{wide}}  {bar:<{_BAR}}  {count:>12,}  {share(portion):>8}"
        )
    return lines


def split_table(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each split has of each source."""
    totals: dict[tuple[str, str], list[int]] = {}
    for shard in manifest.shards:
        row = totals.setdefault((shard.split, shard.source), [0] * 5)
        counts = (1, shard.samples, shard.captions, shard.tokens, shard.bytes)
        row[:] = [a + b for a, b in zip(row, counts, strict=True)]
    head = ["split", "source", "shards", "samples", "captions", "tokens", "tar bytes"]
    rows = [
        [split, source, *(f"{n:,}" for n in counts[:4]), size(counts[4])]
        for (split, source), counts in sorted(totals.items())
    ]
    return head, rows


def figure_table(view: View) -> tuple[list[str], list[list[str]]]:
    """Head and rows: how sizes and lengths are spread over the samples."""
    numbers = view.numbers
    figures: list[tuple[str, Any]] = [
        ("source width, px", numbers["original_width"]),
        ("source height, px", numbers["original_height"]),
        ("source width per height", aspects(view)),
        ("written width, px", numbers["width"]),
        ("written height, px", numbers["height"]),
        ("image bytes", numbers["jpg_bytes"]),
        ("captions per image", numbers["n_captions"]),
        ("tokens per image", numbers["n_tokens"]),
    ]
    if view.vocabulary is not None:
        figures.append(("tokens per caption", view.vocabulary.lengths))
    rows = [
        [name, *(number(value) for value in percentiles(values))]
        for name, values in figures
        if len(values)
    ]
    return ["per sample", *_PERCENTILES], rows


def scope(view: View) -> str:
    """What the figures rest on, in a sentence."""
    counted = len(view.captions)
    words = f"words and tokens: {counted:,} captions"
    if view.whole:
        return f"sizes: all {view.rows:,} inputs; {words}; sums: the manifest"
    return (
        f"sizes: {view.rows:,} inputs in {view.tables:,} of {view.all_tables:,} "
        f"tables, evenly spaced, the same ones every time; {words}; sums: the manifest"
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} TB"


def share(portion: float) -> str:
    """A share for people: never 0 % or 100 % where it is not."""
    if 0 < portion < 0.001:
        return "< 0.1 %"
    if 0.999 < portion < 1:
        return "> 99.9 %"
    return f"{100 * portion:.1f} %"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [title, *(f"  {line}".rstrip() for line in lines), ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns that line up: text to the left, numbers to the right."""
    texts = 2 if head[1] == "source" else 1
    cells = [head, *rows]
    wide = [max(len(row[place]) for row in cells) for place in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, wide, strict=True))
        )
        for row in cells
    ]


def _words(view: View) -> list[str]:
    vocabulary = view.vocabulary
    if vocabulary is None or not vocabulary.captions:
        return []
    words = word_counts(view.captions).most_common(_WORDS)
    info = view.manifest.tokenizer
    unknown = _counted(vocabulary.unknown_words[:8])
    mostly = f"; mostly {unknown}" if unknown else ""
    parts = [
        ("vocabulary", f"{vocabulary.used:,} of {info.vocab_size:,} entries are used"),
        ("unknown", f"{share(vocabulary.unknown_share)} of tokens{mostly}"),
        ("words", _counted(words)),
        ("tokens", _counted(vocabulary.common[:_WORDS])),
    ]
    return [line for title, text in parts for line in _wrapped(title, text)]


def _wrapped(title: str, text: str) -> list[str]:
    first, rest = f"{title:<11} ", " " * 12
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=rest
    ) or [first]


def _counted(words: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in words)


def _reasons(view: View) -> Iterator[str]:
    for (status, reason), rows in sorted(view.examples.items()):
        if status == "duplicate":
            continue
        counts = getattr(view.manifest.accounting, status, {})
        yield f"{status}: {reason}  {counts.get(reason, len(rows)):,}"
        for row in rows:
            yield f"  {row['key']}  {_clipped(row)}"


def _clipped(row: Mapping[str, Any]) -> str:
    words = [row["url"] or "", row["detail"] or ""]
    text = "  ".join(word for word in words if word)
    return text if len(text) <= 120 else text[:119] + "…"


def _duplicates(view: View) -> Iterator[str]:
    if view.manifest.accounting.duplicates:
        for (status, reason), rows in sorted(view.examples.items()):
            if status == "duplicate":
                title = f"{reason}: " if reason else ""
                keys = (
                    f"{row['key']} of {row['duplicate_of']}"
                    if row.get("duplicate_of")
                    else row["key"]
                    for row in rows
                )
                yield f"{title}for example {', '.join(keys)}"
    if view.compared:
        found = len(view.alike)
        shown = "no two look" if not found else f"{found} or more pairs look"
        yield f"{shown} alike among {view.compared:,} samples that were kept"
