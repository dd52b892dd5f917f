"""What an inspection promises: true figures, safe text, a page that needs no other."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.inspect_charts import histogram, ticks
from pipeline.inspect_data import View, read_view
from pipeline.inspect_page import page
from pipeline.inspect_text import summary
from pipeline.inspect_tokens import Tokens
from pipeline.manifest import load_manifest
from pipeline.storage import open_storage
from pipeline.tokenizer import CaptionEncoder, train_tokenizer
from tests.pipeline.corpora import run_module
from tests.pipeline.damage import copied, reseal

# What a hostile caption may try in a page and in a terminal.
HOSTILE = '<script>alert(1)</script> <img src=x onerror=alert(2)> " \x1b[31m red \u202e'


class Page(HTMLParser):
    """Every tag of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def view(dataset: Path) -> View:
    return read_view(open_storage(dataset), rows=1_000, samples=6)


def hostile(dataset: Path, place: Path) -> Path:
    """A copy of which every caption, path and detail is an attack."""
    root = copied(dataset, place)
    for shard in load_manifest(root).shards:
        path = root / shard.sidecar(".parquet")
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            row |= {"url": HOSTILE, "detail": HOSTILE, "mood": HOSTILE}
            if row["captions"]:
                row |= {"caption": HOSTILE, "captions": [HOSTILE] * 2}
        pq.write_table(type(table).from_pylist(rows, table.schema), path)
    reseal(root)
    return root


def test_the_summary_accounts_for_every_input(view: View) -> None:
    text = summary(view)
    assert "34 inputs = 24 written + 1 filtered + 6 failed + 3 duplicates" in text
    counts = dict(re.findall(r"^  (\w+: \w+) .*? (\d+) +[\d.]+ %$", text, re.M))
    accounting = load_manifest(view.url).accounting
    assert counts == {
        **{f"filtered: {k}": str(v) for k, v in accounting.filtered.items()},
        **{f"failed: {k}": str(v) for k, v in accounting.failed.items()},
    }


def test_figures_are_those_of_the_tables(view: View, dataset: Path) -> None:
    rows = [
        row
        for path in dataset.glob("*/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["status"] == "success"
    ]
    assert len(rows) == 24
    for name in ("original_width", "jpg_bytes", "n_captions", "n_tokens"):
        assert sorted(view.numbers[name]) == sorted(row[name] for row in rows), name
    assert view.vocabulary is not None
    captions = [caption for row in rows for caption in row["captions"]]
    assert sorted(view.captions) == sorted(captions)
    # A separator ends each caption, and is no token of it.
    tokens = sum(row["n_tokens"] for row in rows)
    assert view.vocabulary.tokens == tokens - len(captions)


def test_every_reason_has_an_example_that_can_be_found(view: View) -> None:
    accounting = view.manifest.accounting
    text, shown = summary(view), Page(page(view)).text
    for status in ("filtered", "failed"):
        for reason in getattr(accounting, status):
            (example, *_) = view.examples[status, reason]
            for place in (text, shown):
                assert example["key"] in place, (status, reason)
                assert example["url"] in place


def test_an_input_that_was_tried_again_is_shown_once(
    dataset: Path, tmp_path: Path
) -> None:
    root = copied(dataset, tmp_path / "copy")
    shard = load_manifest(root).shards[-1]
    path = root / shard.sidecar(".parquet")
    table = pq.read_table(path)
    storage = open_storage(root)
    before = read_view(storage, rows=1_000, samples=1).examples["failed", "truncated"]
    again = before[0] | {"key": "000099000000", "retry_of": before[0]["key"]}
    rows = [*table.to_pylist(), {n: again.get(n) for n in table.schema.names}]
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    reseal(root)
    view = read_view(storage, rows=1_000, samples=1)
    (shown,) = view.examples["failed", "truncated"]
    assert shown["key"] == "000099000000"
    assert view.rows == 34


def test_samples_show_their_stored_tokens(view: View) -> None:
    assert len(view.pairs) == 6
    assert view.tokens is not None
    for pair in view.pairs:
        assert pair.image.startswith(b"\xff\xd8")
        assert len(pair.ids) == len(pair.captions)
        for caption, ids in zip(pair.captions, pair.ids, strict=True):
            pieces = [
                t.text.removeprefix("##") for t in view.tokens.shown(caption, ids)
            ]
            assert "".join(pieces) == re.sub(r"\s", "", caption.lower())


def test_unknown_words_are_named() -> None:
    stored = train_tokenizer(["a bird", "a kite"] * 9, 64)
    tokens = Tokens(stored)
    _, ids = CaptionEncoder(stored).encode(["a \u6f22 bird"])
    shown = tokens.shown("a \u6f22 bird", ids)
    assert [token.unknown for token in shown] == [None, "\u6f22", None]
    vocabulary = tokens.count(["a \u6f22 bird", "a kite"])
    assert (vocabulary.unknown, vocabulary.tokens) == (1, 5)
    assert vocabulary.unknown_words == [("\u6f22", 1)]


def test_hostile_text_is_harmless_in_page_and_terminal(
    dataset: Path, tmp_path: Path
) -> None:
    root = hostile(dataset, tmp_path / "copy")
    view = read_view(open_storage(root), rows=1_000, samples=6)
    text = page(view)
    parsed = Page(text)
    assert HOSTILE.partition("\x1b")[0] in parsed.text
    names = {tag for tag, _ in parsed.tags}
    assert "script" not in names
    assert not any(key.startswith("on") for _, attrs in parsed.tags for key in attrs)
    assert {"\x1b", "\u202e"}.isdisjoint(summary(view))
    where = [
        part.partition("</")[0]
        for start in ("<td>", "<dd>", '<p class="where">')
        for part in text.split(start)[1:]
    ]
    assert any(r"\x1b[31m red \u202e" in part for part in where)
    assert not any({"\x1b", "\u202e"} & set(part) for part in where)


def test_the_page_needs_nothing_beside_itself(view: View) -> None:
    parsed = Page(page(view))
    policy = [
        attrs["content"]
        for tag, attrs in parsed.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    sources = [attrs["src"] for tag, attrs in parsed.tags if "src" in attrs]
    assert len(sources) >= 6
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not any("href" in attrs for _, attrs in parsed.tags)
    assert "url(" not in page(view)


def test_two_inspections_are_equal(view: View, dataset: Path) -> None:
    again = read_view(open_storage(dataset), rows=1_000, samples=6)
    assert page(again) == page(view)
    assert summary(again) == summary(view)


def test_a_sampled_inspection_says_so(dataset: Path) -> None:
    view = read_view(open_storage(dataset), rows=10, samples=3)
    assert not view.whole
    assert view.rows < 34
    for text in (summary(view), Page(page(view)).text):
        assert f"in {view.tables} of {view.all_tables} tables" in text
        # Sums come from the manifest, whatever was read.
        assert "34 inputs" in text


def test_dropped_duplicates_stand_beside_what_they_repeat(view: View) -> None:
    assert view.manifest.accounting.duplicates == 3
    keys = {one.rows[1]["key"]: one.rows[0]["key"] for one in view.duplicates}
    named = {
        row["key"]: row["duplicate_of"]
        for (status, _), rows in view.examples.items()
        for row in rows
        if status == "duplicate"
    }
    assert len(named) == 3
    assert keys == named


def test_dropped_images_are_shown_from_the_corpus(dataset: Path, corpus: Path) -> None:
    storage, folder = open_storage(dataset), corpus.parent
    view = read_view(storage, rows=1_000, samples=1, images=str(folder))
    assert len(view.duplicates) == 3
    for one in view.duplicates:
        assert one.images[1] == (folder / one.rows[1]["url"]).read_bytes()
    # Without the corpus, and for paths that leave it, there is nothing to show.
    away = read_view(storage, rows=1_000, samples=1, images=str(folder / "images"))
    assert [one.images[1] for one in away.duplicates] == [None] * 3


def test_the_command_writes_the_page_beside_the_dataset(
    dataset: Path, tmp_path: Path
) -> None:
    root = copied(dataset, tmp_path / "copy")
    before = sorted(root.rglob("*"))
    result = run_module("pipeline.inspect", root, "--html", "--samples=2")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "copy.inspect.html").read_text()
    assert text.startswith("<!doctype html>")
    assert sorted(root.rglob("*")) == before


def test_a_damaged_table_is_named_with_its_cure(dataset: Path, tmp_path: Path) -> None:
    root = copied(dataset, tmp_path / "copy")
    shard = load_manifest(root).shards[0]
    (root / shard.sidecar(".parquet")).write_bytes(b"no table")
    result = run_module("pipeline.inspect", root)
    assert result.returncode == 1
    assert shard.sidecar(".parquet") in result.stderr
    assert "pipeline.validate" in result.stderr
    assert result.stderr.count("\n") == 1


def test_histograms_count_every_value() -> None:
    values = np.random.default_rng(0).lognormal(3, 1, 5_000)
    for drawn in (
        histogram(values, label="x"),
        histogram(values, label="x", log=True),
        histogram(values.round(), label="x"),
    ):
        counts = re.findall(r"<title>[^<]*: ([\d,]+)</title>", drawn)
        assert sum(int(count.replace(",", "")) for count in counts) == 5_000
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert histogram(np.array([]), label="x") == ""
