"""A dataset on the page: where every input went, what came out, a few pairs."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pipeline.config import flat
from pipeline.manifest import Manifest
from trainer.report.charts import number
from trainer.report.data import DatasetView, SamplePair
from trainer.report.elements import card, folded, grid, image, missing, section, table

_PREPROCESS = "python -m pipeline.preprocess --input CORPUS --output "


def dataset_sections(view: DatasetView) -> list[str]:
    """What went in and came out, and sample pairs with their tokens."""
    cure = f"{_PREPROCESS}{view.path}"
    if view.manifest is None:
        return [section("Data", missing(f"No dataset to show: {view.problem}.", cure))]
    data = section(
        "Data",
        grid(
            card(*_accounting(view.manifest), title="Where every input went"),
            card(*_outcome(view.manifest), title="What came out"),
        ),
        lead=f"{view.path}: what went in, and what the trainer reads.",
    )
    lead = (
        f"Evenly spaced over {view.split}, as stored: the trainer adds [CLS] and "
        "masks. Each word piece is a token; ## continues a word."
    )
    pairs = [_pair(one) for one in view.samples]
    body = grid(*pairs, classes="three") if pairs else missing(view.problem, cure)
    return [data, section("Sample pairs", body, lead=lead)]


def _accounting(manifest: Manifest) -> Iterator[str]:
    """A bar of all inputs, and the same in numbers."""
    parts = [
        (f"written to {split}", count, "s0" if split == "train" else "s2")
        for split, count in _written(manifest).items()
    ]
    account = manifest.accounting
    parts += [(f"filtered: {why}", n, "s3") for why, n in account.filtered.items()]
    parts += [(f"failed: {why}", n, "s7") for why, n in account.failed.items()]
    parts.append(("duplicates", account.duplicates, "quiet"))
    drawn = "".join(
        f'<i class="{colour}" style="flex-grow:{count}" '
        f'title="{escape(name)}: {count:,}"></i>'
        for name, count, colour in parts
        if count
    )
    yield f'<div class="bar">{drawn}</div>'
    rows = "".join(
        f'<tr><td><i class="key {colour}"></i>{escape(name)}</td>'
        f'<td class="n">{count:,}</td>'
        f'<td class="n">{_share(count, account.inputs)}</td></tr>'
        for name, count, colour in parts
    )
    yield (
        f'<div class="scroll"><table><tbody>{rows}<tr class="sum"><td>inputs</td>'
        f'<td class="n">{account.inputs:,}</td><td class="n">100 %</td></tr>'
        "</tbody></table></div>"
    )
    yield (
        f'<p class="note">{manifest.rows:,} rows of the corpus; rows of one image are '
        "one input. The parts add up to the inputs, which is checked.</p>"
    )


def _outcome(manifest: Manifest) -> Iterator[str]:
    """Splits and the tokenizer in numbers."""
    rows = [
        [
            split,
            f"{row['shards']:,}",
            f"{row['samples']:,}",
            f"{row['captions']:,}",
            f"{row['tokens']:,}",
            number(row["tokens"] / max(row["captions"], 1)),
            size(row["bytes"]),
        ]
        for split, row in sorted(manifest.totals().items())
    ]
    head = ["split", "shards", "pairs", "captions", "tokens", "a caption", "size"]
    yield table(head, rows)
    tokenizer = manifest.tokenizer
    specials = ", ".join(f"{name} {n}" for name, n in tokenizer.special_ids.items())
    facts = [
        ["tokenizer", f"{tokenizer.vocab_size:,} entries ({specials})"],
        ["its sha256", tokenizer.sha256[:16]],
        ["manifest sha256", manifest.sha256[:16]],
    ]
    weights = manifest.sources
    if len(weights) > 1:
        named = ", ".join(f"{name} {number(w)}" for name, w in weights.items())
        facts.append(["sources", named])
    yield table(["", ""], facts, texts=2)
    keys = [[key, str(value)] for key, value in flat(manifest.transform).items()]
    yield folded("Everything that decided the bytes", table(["", ""], keys, texts=2))


def _pair(pair: SamplePair) -> str:
    lines = "".join(
        f'<p class="tokens">{"".join(f"<b>{escape(t)}</b>" for t in caption)}</p>'
        for caption in pair.captions
    )
    text = f"sample {pair.uid}"
    return card(f'<div class="pair">{image(pair.jpeg, text)}<div>{lines}</div></div>')


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{number(amount)} {unit}"
        amount /= 1000
    return f"{number(amount)} TB"


def _written(manifest: Manifest) -> dict[str, int]:
    totals = manifest.totals()
    order = sorted(totals, key=lambda split: (split != "train", split))
    return {split: totals[split]["samples"] for split in order}


def _share(count: int, whole: int) -> str:
    share = 100 * count / max(whole, 1)
    return "< 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"
