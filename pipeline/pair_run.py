"""One run of `pipeline.pairs`: where every sample goes, and the files.

Owns the accounting (law 2) and what is written. Does not own tables
(`pipeline.pair_table`) or draws (`pipeline.pair_draws`).

Shapes: N samples, P pairs.
"""

from __future__ import annotations

import enum
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audit_files import read_manifest
from pipeline.manifest import PAIR_DTYPE, Manifest, Shard
from pipeline.pair_draws import Kind, Pairs, in_dev, matches, negatives, sided
from pipeline.pair_table import (
    NO_VALUE,
    Table,
    check_columns,
    read_table,
    written_rows,
)
from pipeline.pairs import PairsConfig
from pipeline.storage import Storage, open_storage

_TRAIN = "train"
_PLACES = ("dataset", "output")
_FACTS = ".json"
_ENDS = (".npy", ".parquet", _FACTS)


class Fate(enum.IntEnum):
    """Where a sample of the split went."""

    PAIRED = 0
    NOT_DRAWN = 1
    """It has a match, and `per_value` or `limit` left it out, or the same image."""
    OTHER_FILE = 2
    """Its value is of the other file of --dev."""
    NO_MATCH = 3
    """No other sample has its value."""
    IN_ANOTHER_SPLIT = 4
    """A held-out split has its value."""
    NO_SUCH_CAPTION = 5
    NO_VALUE = 6


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What one file of pairs holds."""

    output: str
    pairs: Pairs
    samples: dict[str, int]
    """Where every sample of the split went, by reason; they add up."""
    counts: dict[str, int]
    """Pairs by kind, and those that could not be made."""


def pair(config: PairsConfig) -> list[Paired]:
    """Make the pairs and write their files.

    Raises:
        ValueError: no finished dataset, no such split or column, or nothing that
            matches. The message has the cure.
    """
    storage = open_storage(config.dataset)
    manifest, damages = read_manifest(storage)
    for output in _outputs(config):
        if not manifest.indexed:
            _require_outside(output, storage)
        _require_own(output)
    _require_no_dev(config)
    if damages:
        raise ValueError(f"{damages[0]}: mend it with python -m pipeline.validate")
    shards = _shards(storage, manifest, config.split)
    columns = (config.column, *config.hard_columns)
    check_columns(storage, manifest, columns)
    table = read_table(storage, shards, config.column, config.hard_columns)
    fate = _fates(storage, manifest, table, config)
    dev = (fate == Fate.NOT_DRAWN) & in_dev(table.values, config.dev, seed=config.seed)
    found = []
    for output, mine in zip(_outputs(config), (~dev, dev), strict=False):
        found.append(_paired(table, fate, mine, output, config))
    # Nothing is written unless all of it can be.
    for one in found:
        _write(storage, manifest, shards, table, one, config)
    return found


def summary(found: Sequence[Paired]) -> str:
    """What was made, for a terminal."""
    lines = []
    for one in found:
        kinds = ", ".join(f"{count:,} {name}" for name, count in one.counts.items())
        lines.append(f"{one.output}: {len(one.pairs):,} pairs ({kinds})")
        went = ", ".join(f"{count:,} {name}" for name, count in one.samples.items())
        lines.append(f"  {sum(one.samples.values()):,} samples: {went}")
    return "\n".join(lines) + "\n"


def _outputs(config: PairsConfig) -> list[str]:
    return [config.output, *([_dev_of(config.output)] if config.dev else [])]


def _dev_of(output: str) -> str:
    return output.removesuffix(".npy") + "-dev.npy"


def _place(output: str) -> tuple[Storage, str]:
    """Where the files go, and their name without what it ends in."""
    folder, _, name = output.rpartition("/")
    target = open_storage(folder or ("/" if output.startswith("/") else "."))
    return target, name.removesuffix(".npy")


def _require_outside(output: str, dataset: Storage) -> None:
    """Raise ValueError where an output would lie in the dataset that it is of."""
    target, _ = _place(output)
    if target.path is not None and dataset.path is not None:
        inside = target.path.resolve().is_relative_to(dataset.path.resolve())
    else:
        inside = f"{target.url}/".startswith(f"{dataset.url}/")
    if inside:
        raise ValueError(
            f"--output {output} lies in the dataset, where pipeline.validate would "
            "find it to be damage: give a path outside"
        )


def _require_own(output: str) -> None:
    """Raise ValueError where a file would be replaced that this command did not
    write.
    """
    target, stem = _place(output)
    there = [f"{stem}{end}" for end in _ENDS if target.size(f"{stem}{end}") is not None]
    if there and _facts(target, stem) is None:
        raise ValueError(
            f"--output {output} would replace {' and '.join(there)}, and no {stem}"
            f"{_FACTS} of this command says that it wrote them: give another name, or "
            "delete them"
        )


def _require_no_dev(config: PairsConfig) -> None:
    """Raise ValueError where a call without --dev would leave the other file of an
    earlier one, whose pairs the new file has too.
    """
    target, stem = _place(_dev_of(config.output))
    earlier = None if config.dev else _facts(target, stem)
    if earlier and earlier["keys"].get("dev"):
        raise ValueError(
            f"{_dev_of(config.output)} is of an earlier call with --dev "
            f"{earlier['keys']['dev']}, and {config.output} without would have its "
            "pairs too: give --dev, delete it, or give another --output"
        )


def _facts(target: Storage, stem: str) -> dict[str, Any] | None:
    """What this command wrote beside an output; None where it did not."""
    try:
        found = json.loads(target.read(f"{stem}{_FACTS}"))
    except (FileNotFoundError, ValueError):
        return None
    own = isinstance(found, dict) and found.keys() >= {"keys", "pairs", "samples"}
    return found if own else None


def _shards(storage: Storage, manifest: Manifest, split: str) -> Sequence[Shard]:
    there = list(dict.fromkeys(shard.split for shard in manifest.shards))
    if split not in there:
        raise ValueError(
            f"{storage.url} has no split {split!r}; it has: {', '.join(there)}"
        )
    return [shard for shard in manifest.shards if shard.split == split]


def _fates(
    storage: Storage, manifest: Manifest, table: Table, config: PairsConfig
) -> np.ndarray:
    """Why each sample (N,) is not paired; `NOT_DRAWN` where it may be."""
    fate = np.full(len(table), Fate.NOT_DRAWN, dtype=np.uint8)
    numbers = [n for n in (config.left_caption, config.right_caption) if n is not None]
    elsewhere = [
        read_table(storage, _shards(storage, manifest, split), config.column, ()).values
        for split in _before(manifest, config.split)
    ]
    shared = np.isin(table.values, np.concatenate([*elsewhere, np.empty(0, np.uint64)]))
    fate[shared] = Fate.IN_ANOTHER_SPLIT
    fate[table.n_captions <= max(numbers, default=-1)] = Fate.NO_SUCH_CAPTION
    fate[table.values == NO_VALUE] = Fate.NO_VALUE
    return fate


def _before(manifest: Manifest, split: str) -> list[str]:
    """Splits whose values this one may not have: held-out ones keep theirs."""
    there = sorted({shard.split for shard in manifest.shards}, key=_rank)
    return there[: there.index(split)]


def _rank(split: str) -> tuple[bool, str]:
    return split == _TRAIN, split


def _paired(
    table: Table, fate: np.ndarray, mine: np.ndarray, output: str, config: PairsConfig
) -> Paired:
    rows = np.flatnonzero((fate == Fate.NOT_DRAWN) & mine)
    _, which, sizes = np.unique(
        table.values[rows], return_inverse=True, return_counts=True
    )
    rows = rows[sizes[which] > 1]
    positive, same_image = matches(
        table,
        rows,
        per_value=config.per_value,
        limit=config.limit,
        seed=config.seed,
    )
    if not len(positive):
        went = _went(fate, mine, rows, np.empty(0, np.int64))
        raise ValueError(_nothing_matches(went, output, config))
    negative, kinds = negatives(
        table,
        rows,
        positive,
        ratio=config.negatives,
        hard_share=config.hard_share if config.hard_columns else 0.0,
        seed=config.seed,
    )
    if config.negatives and not len(negative):
        values = len(np.unique(table.values[rows]))
        raise ValueError(
            f"{len(positive)} matching pairs and no others for {output}: of the "
            f"{values} values of {config.column} that have a match, no two could be "
            "paired. Take another --column or --split, or --negatives 0 for matches "
            "alone (which trainer.finetune does not take)"
        )
    whole = np.concatenate([positive, negative])
    kinds = np.concatenate([np.full(len(positive), Kind.MATCH), kinds])
    pairs = sided(table, whole, kinds, seed=config.seed)
    counts = {kind.name.lower(): int((kinds == kind).sum()) for kind in Kind}
    counts["negatives_missing"] = round(config.negatives * len(positive)) - len(
        negative
    )
    counts["same_image"] = same_image
    return Paired(
        output=output,
        pairs=pairs,
        samples=_accounting(table, fate, mine, rows, pairs),
        counts=counts,
    )


def _accounting(
    table: Table, fate: np.ndarray, mine: np.ndarray, rows: np.ndarray, pairs: Pairs
) -> dict[str, int]:
    """Where the samples went; fails where that does not add up."""
    found = _went(fate, mine, rows, np.concatenate([pairs.left, pairs.right]))
    if sum(found.values()) != len(table):
        raise ValueError(f"samples do not add up: {found} of {len(table)}")
    return found


def _went(
    fate: np.ndarray, mine: np.ndarray, rows: np.ndarray, paired: np.ndarray
) -> dict[str, int]:
    """Samples by their final fate.

    Args:
        mine: (N,) bool, of the file that is made.
        rows: that have a match.
        paired: rows that pairs are of.
    """
    final = fate.copy()
    final[fate == Fate.NOT_DRAWN] = Fate.OTHER_FILE
    final[(fate == Fate.NOT_DRAWN) & mine] = Fate.NO_MATCH
    final[rows] = Fate.NOT_DRAWN
    final[paired] = Fate.PAIRED
    return {one.name.lower(): int((final == one).sum()) for one in Fate}


def _nothing_matches(went: dict[str, int], output: str, config: PairsConfig) -> str:
    """Why there is no matching pair, and what to do, the most frequent cause first."""
    column = config.column
    said = {
        Fate.NOT_DRAWN: f"have the same {column} as others and the same image file as "
        "all of them",
        Fate.OTHER_FILE: "are for the other file: take another share for --dev",
        Fate.NO_MATCH: f"have a {column} that no other has: take another --column",
        Fate.IN_ANOTHER_SPLIT: f"have a {column} that a held-out split has, too: "
        f"preprocess with --split.group {column}, or pair that split",
        Fate.NO_SUCH_CAPTION: "lack the caption of --left_caption or --right_caption: "
        "lower it, or preprocess with more --columns.caption",
        Fate.NO_VALUE: f"have no {column}: take another --column",
    }
    causes = sorted(
        ((went[fate.name.lower()], text) for fate, text in said.items()), reverse=True
    )
    listed = "; ".join(f"{count:,} {text}" for count, text in causes if count)
    return (
        f"no two samples match for {output}. Of {sum(went.values()):,} samples of "
        f"split {config.split}, {listed}"
    )


def _write(
    storage: Storage,
    manifest: Manifest,
    shards: Sequence[Shard],
    table: Table,
    one: Paired,
    config: PairsConfig,
) -> None:
    target, stem = _place(one.output)
    facts = {
        "dataset": storage.url,
        "manifest_sha256": manifest.sha256,
        "keys": {k: v for k, v in asdict(config).items() if k not in _PLACES},
        "pairs": one.counts,
        "samples": one.samples,
    }
    text = json.dumps(facts, indent=1) + "\n"
    twin = _twin(storage, shards, table, one.pairs, config)
    # First: it says whose files the others are.
    target.write(f"{stem}{_FACTS}", text.encode())
    target.write(f"{stem}.parquet", twin)
    # Last: where it is, all three are.
    target.write(f"{stem}.npy", _array(table, one.pairs, config))


def _array(table: Table, pairs: Pairs, config: PairsConfig) -> bytes:
    array = np.empty(len(pairs), dtype=PAIR_DTYPE)
    array["left_uid"], array["right_uid"] = (
        table.uids[pairs.left],
        table.uids[pairs.right],
    )
    array["label"] = pairs.kind == Kind.MATCH
    array["left_caption"] = _or_drawn(config.left_caption)
    array["right_caption"] = _or_drawn(config.right_caption)
    array["group"] = table.values[pairs.anchor]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _or_drawn(number: int | None) -> int:
    return -1 if number is None else number


def _twin(
    storage: Storage,
    shards: Sequence[Shard],
    table: Table,
    pairs: Pairs,
    config: PairsConfig,
) -> bytes:
    """The same pairs for people, with what the samples say."""
    columns = (config.column, *config.hard_columns)
    names = ["key", "captions", "caption", *columns]
    used, rows = np.unique(
        np.concatenate([pairs.left, pairs.right]), return_inverse=True
    )
    said = _rows_at(storage, shards, names, used)
    sides = dict(zip(("left", "right"), np.split(rows, 2), strict=True))
    whole: dict[str, Any] = {
        "label": pa.array((pairs.kind == Kind.MATCH).astype(np.uint8)),
        "kind": pa.array([Kind(kind).name.lower() for kind in pairs.kind]),
    }
    numbers = {"left": config.left_caption, "right": config.right_caption}
    for side, place in sides.items():
        of_side = said.take(pa.array(place))
        uids = table.uids[pairs.left if side == "left" else pairs.right]
        whole[f"{side}_key"] = of_side["key"]
        whole[f"{side}_uid"] = pa.array([f"{int(uid):016x}" for uid in uids])
        whole[f"{side}_caption"] = _captions(of_side, numbers[side])
        for name in columns:
            whole[f"{side}_{name}"] = of_side[name]
    buffer = io.BytesIO()
    pq.write_table(pa.table(whole), buffer, compression="zstd")
    return buffer.getvalue()


def _captions(rows: pa.Table, number: int | None) -> pa.Array:
    """The caption that a side shows; all of them where it is drawn."""
    found = []
    for several, first in zip(
        rows["captions"].to_pylist(), rows["caption"].to_pylist(), strict=True
    ):
        captions = several or [first or ""]
        found.append(" | ".join(captions) if number is None else captions[number])
    return pa.array(found, pa.string())


def _rows_at(
    storage: Storage, shards: Sequence[Shard], names: Sequence[str], used: np.ndarray
) -> pa.Table:
    """Columns of the samples `used` (ascending), a shard at a time."""
    parts, before = [], 0
    for shard in shards:
        first, last = np.searchsorted(used, [before, before + shard.samples])
        if last > first:
            rows = written_rows(storage, shard, names)
            parts.append(rows.take(pa.array(used[first:last] - before)))
        before += shard.samples
    return pa.concat_tables(parts)
