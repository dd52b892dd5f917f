"""One input range to one staged shard per split: what a Ray task runs.

Owns turning an input into a sample or into a counted reason why not. Does not own
files (`pipeline.shards`), the plan (`pipeline.plan`) or making results visible
(`pipeline.dataset`). Imports no Ray, so that a range can be processed anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.captions import BadText, clean_captions
from pipeline.columns import Columns
from pipeline.images import ImageError, encode_image
from pipeline.manifest import Accounting, sample_key, sample_uid
from pipeline.options import ImageOptions
from pipeline.plan import RangeInputs
from pipeline.shards import ROW_SCHEMA, Sample, ShardWriter, StagedShard
from pipeline.sources import read_image
from pipeline.tokenizer import CaptionEncoder, StoredTokenizer

DIGEST_BYTES = 16
_DETAIL = 200


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is the same for every range of a run."""

    staging: Path
    folder: Path
    columns: Columns
    source_name: str
    image: ImageOptions
    tokenizer: StoredTokenizer


@dataclass(frozen=True, kw_only=True)
class StagedRange:
    """A finished range: files in a directory of its own, not yet in the dataset."""

    number: int
    directory: Path
    rows: int
    accounting: Accounting
    shards: tuple[StagedShard, ...]
    rejected: tuple[str, ...]
    """Splits of which the range kept nothing, but rejected inputs."""


class Rejected(Exception):
    """An input that makes no sample: `status` is failed or filtered."""

    def __init__(self, status: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{status}: {reason} {detail}")
        self.status, self.reason, self.detail = status, reason, detail


def write_range(
    work: Work, inputs: RangeInputs, report: Callable[[int, int], None]
) -> StagedRange:
    """Process a range into a new staging directory.

    `report(done, failed)` is called after every input. The result depends on `work` and
    `inputs` alone, up to the name of the directory, which no other attempt shares.
    """
    directory = work.staging / f"{inputs.number:06d}-{uuid.uuid4().hex}"
    # No parents: once the run is over and its staging gone, a late attempt must fail.
    directory.mkdir()
    encoder = CaptionEncoder(work.tokenizer)
    keep = work.columns.keep
    writers: dict[str, ShardWriter] = {}
    accounting, failed = Accounting(), 0
    for position, rows in enumerate(_grouped(work, inputs)):
        split = inputs.splits[position]
        if split not in writers:
            writers[split] = ShardWriter(directory, split, keep)
        with _named(inputs, position):
            writer = writers[split]
            accounting += _process(work, inputs, position, rows, writer, encoder)
        failed = sum(accounting.failed.values())
        report(position + 1, failed)
    staged = {split: writers[split].close() for split in sorted(writers)}
    return StagedRange(
        number=inputs.number,
        directory=directory,
        rows=int(inputs.row_counts.sum()),
        accounting=accounting,
        shards=tuple(shard for shard in staged.values() if shard is not None),
        rejected=tuple(split for split, shard in staged.items() if shard is None),
    )


def range_digests(
    work: Work, inputs: RangeInputs, report: Callable[[int, int], None]
) -> np.ndarray:
    """First 16 bytes of the sha256 of each input's source image (inputs,); empty where
    the input makes no sample whatever its image shows. 128 bits tell all images ever
    taken apart.

    Images are not decoded: equal bytes decode alike, so where a held-out copy turns out
    broken, every other copy does too, and is counted as broken when it is written.
    """
    encoder = CaptionEncoder(work.tokenizer)
    digests = np.zeros(len(inputs.locators), dtype=f"S{DIGEST_BYTES}")
    for position, rows in enumerate(_grouped(work, inputs)):
        # A repeated identity makes no sample, so it keeps no image from other splits.
        if not inputs.duplicate[position]:
            with _named(inputs, position), contextlib.suppress(Rejected, ImageError):
                _captions(work, rows, encoder)
                data = read_image(rows[0][work.columns.image], work.folder)
                digests[position] = hashlib.sha256(data).digest()[:DIGEST_BYTES]
        report(position + 1, 0)
    return digests


@contextlib.contextmanager
def _named(inputs: RangeInputs, position: int) -> Iterator[None]:
    """Says which input it was, in the message of an exception that nobody foresaw."""
    try:
        yield
    except (Rejected, ImageError):
        raise
    except Exception as error:
        key = sample_key(inputs.number, position)
        cause = str(error) if isinstance(error, OSError) else repr(error)
        kind = OSError if isinstance(error, OSError) else RuntimeError
        raise kind(f"input {key} ({inputs.locators[position]}): {cause}") from error


def _grouped(work: Work, inputs: RangeInputs) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of each input."""
    rows = iter(inputs.rows.rows(work.columns.sample))
    for count in inputs.row_counts:
        yield list(islice(rows, int(count)))


def _process(
    work: Work,
    inputs: RangeInputs,
    position: int,
    rows: list[Mapping[str, Any]],
    writer: ShardWriter,
    encoder: CaptionEncoder,
) -> Accounting:
    """Write one input's sample or rejection, and say what it counts as."""
    locator = inputs.locators[position]
    uid = sample_uid(work.source_name, locator)
    row: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
    row |= {
        "key": sample_key(inputs.number, position),
        "uid": f"{uid:016x}",
        "url": locator,
        "source": work.source_name,
        "split": writer.split,
        **{name: _text(rows[0][name]) for name in work.columns.keep},
    }
    if inputs.duplicate[position]:
        writer.reject(row | {"status": "duplicate"})
        return Accounting(inputs=1, duplicates=1)
    plain = dict(row)
    try:
        sample = _sample(work, rows, row, uid, encoder)
    except Rejected as cause:
        detail = cause.detail[:_DETAIL] or None
        writer.reject(
            row | {"status": cause.status, "reason": cause.reason, "detail": detail}
        )
        counts = {cause.reason: 1}
        if cause.status == "filtered":
            return Accounting(inputs=1, filtered=counts)
        return Accounting(inputs=1, failed=counts)
    if inputs.copied[position]:
        writer.reject(plain | {"status": "duplicate"})
        return Accounting(inputs=1, duplicates=1)
    writer.add(sample, row)
    return Accounting(inputs=1, written=1)


def _sample(
    work: Work,
    rows: list[Mapping[str, Any]],
    row: dict[str, Any],
    uid: int,
    encoder: CaptionEncoder,
) -> Sample:
    """The input's sample; fills in `row` as far as it gets.

    Raises:
        Rejected: with the reason that is counted.
    """
    captions, ids = _captions(work, rows, encoder)
    row |= {"caption": captions[0], "captions": captions, "n_captions": len(captions)}
    row["n_tokens"] = len(ids)
    try:
        data = read_image(rows[0][work.columns.image], work.folder)
        row["sha256"] = hashlib.sha256(data).hexdigest()
        image = encode_image(data, work.image)
    except ImageError as error:
        raise Rejected("failed", error.reason, error.detail) from error
    row |= {
        "status": "success",
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "jpg_bytes": len(image.jpeg),
        "dhash": image.dhash,
        "exif": image.exif,
    }
    names = (*_JSON_KEYS, *work.columns.keep)
    return Sample(
        key=row["key"],
        uid=uid,
        ids=ids,
        jpeg=image.jpeg,
        width=image.width,
        height=image.height,
        captions=captions,
        json={name: row[name] for name in names},
    )


def _captions(
    work: Work, rows: list[Mapping[str, Any]], encoder: CaptionEncoder
) -> tuple[list[str], np.ndarray]:
    """Captions and ids of an input: every check that needs no image.

    Raises:
        Rejected: with the reason that is counted.
    """
    images = [cells[work.columns.image] for cells in rows]
    if any(cell != images[0] for cell in images):
        raise Rejected("failed", "images_differ", "rows of one id have several images")
    for name in work.columns.sample:
        if any(isinstance(cells[name], BadText) for cells in rows):
            raise Rejected("failed", "bad_text", f"column {name!r} is not UTF-8")
    cells = [cells[name] for cells in rows for name in work.columns.captions]
    captions, ids = encoder.encode(clean_captions(cells))
    if not captions:
        raise Rejected("filtered", "empty_caption")
    return captions, ids


# img2dataset's names where it has them, in its order, then ours.
_JSON_KEYS = (
    *("key", "url", "caption", "status", "width", "height"),
    *("original_width", "original_height", "exif", "sha256"),
    *("captions", "source", "uid"),
)


def _text(value: Any) -> str:
    """A passthrough cell as text: readers need one type per key, never null."""
    if value is None or isinstance(value, BadText):
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
