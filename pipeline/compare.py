"""Comparisons across a whole corpus: repeated inputs, images and captions.

Owns the exchange through files on storage by which any number of tasks find all
repetitions in bounded memory. Does not own what is a repetition (`pipeline.criteria`),
the layout of those files (`pipeline.buckets`), hashes that are merely near
(`pipeline.hamming`), where signatures come from (`pipeline.ranges`), or what a verdict
does (`pipeline.run`).

An input that made a candidate sample has a signature, and its place in one order over
all: candidates of an earlier dataset first (committed), then by split (held out before
train), range and position. Verdicts speak of *earlier candidates, kept or not*, so
each depends on signatures alone, and no task waits for another's verdicts:

  identity            an earlier candidate has the same uid
  split               an earlier one of another split has the same source bytes
  exact               an earlier one has the same written pixels
  near                an earlier one's perceptual hash is within `near` bits
  caption_repetition  `caption_repeats` earlier ones have the same first caption

The first that holds counts, with the earliest candidate that it holds against.
Committed candidates get no verdict.

Steps, each a barrier, with their tasks; every task writes one file, whole or not at
all, and does nothing where the file is:

  store    one per range   its signatures (64 bytes each)
  scatter  one per group   a group of ranges, a section for every bucket (16 bytes per
                           signature and criterion; `near` is d + 1 criteria)
  match    one per bucket  its section of every group: all candidates of one criterion
                           with equal hashes meet here; a section for every group
  collect  one per group   its section of every bucket; a section for every range
  gather   one per range   its section

Memory: a task holds R = `memory` / 240 bytes records at a time, besides the idle
interpreter; a group is as many ranges as have R inputs (at least one), a bucket half as
many records on average. Buckets of hashes are even, and how often one hash repeats
costs no memory, because a bucket is read in windows and reduced to its first places.
Only near hashes crowd: where more of them meet than fit, window is compared with
window, in the same memory. That many `caption_repeats` of a caption have to fit.

Work of `near`: within a bucket as `pipeline.hamming` says; a distance above 8 is little
better than comparing everything with everything.

Reads: of N inputs by C criteria, `match` and `collect` make 4 C (N / R)^2 small ones
each: 200 million for a billion inputs by four criteria in 64 MB, 900,000 in 1 GB. Give
large corpora memory. Files take 64 + 16 C bytes an input, and verdicts.

Hashes are compared by 64 bits; those of sources and pixels meet in one of B buckets by
another 64, so that N inputs have about N^2 / (B 2^65) chances that two different ones
are taken for equal: 1e-5 for a billion and 5,000 buckets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.buckets import SectionReader, Window, read_section, write_sections
from pipeline.criteria import (
    KINDS,
    RECORD_DTYPE,
    SIGNATURE_DTYPE,
    STORED_DTYPE,
    Comparison,
    Criterion,
    new,
    positions,
    ranges,
    stored,
)
from pipeline.hamming import nearest
from pipeline.storage import Storage

__all__ = ["KINDS", "SIGNATURE_DTYPE", "VERDICT_DTYPE", "Comparison"]
__all__ += ["collect", "gather", "is_stored", "match", "scatter", "store"]

VERDICT_DTYPE = np.dtype(
    [("position", "<u4"), ("kind", "u1"), ("of_range", "<u4"), ("of_position", "<u4")]
)
"""An input that repeats another: its position, a place in `KINDS`, and that other."""

_MATCH_DTYPE = np.dtype([("order", "<u8"), ("of", "<u8")])
_FOUND_DTYPE = np.dtype([("order", "<u8"), ("of", "<u8"), ("kind", "u1")])


def store(
    storage: Storage,
    prefix: str,
    number: int,
    *,
    committed: bool,
    signatures: np.ndarray,
) -> None:
    """Keep the signatures of a range; a range without candidates has none.

    Args:
        storage: where to, and where all other steps find them.
        prefix: folder of these signatures and all that is compared of them.
        number: of the range.
        committed: the range is one of an earlier, complete dataset.
        signatures: `SIGNATURE_DTYPE` (N,), in any order.
    """
    data = stored(number, committed, signatures).tobytes()
    storage.write(_stored(prefix, number), data)


def is_stored(storage: Storage, prefix: str, number: int) -> bool:
    """Whether the signatures of a range are kept already."""
    return storage.size(_stored(prefix, number)) is not None


def scatter(storage: Storage, prefix: str, comparison: Comparison, group: int) -> None:
    """Deal the signatures of a group of ranges out to the buckets."""
    name = _scattered(prefix, comparison, group)
    if storage.size(name) is None:
        parts = _dealt(storage, prefix, comparison, group)
        write_sections(storage, name, parts, sections=comparison.buckets)


def match(storage: Storage, prefix: str, comparison: Comparison, bucket: int) -> None:
    """Compare the candidates of one bucket."""
    name = _matched(prefix, comparison, bucket)
    if storage.size(name) is None:
        names = [
            _scattered(prefix, comparison, group) for group in range(comparison.groups)
        ]
        sections = comparison.buckets
        reader = SectionReader(
            storage, names, bucket, sections=sections, dtype=RECORD_DTYPE
        )
        criterion = comparison.criteria[bucket // comparison.parts]
        parts = _matches(reader, comparison, criterion)
        write_sections(storage, name, parts, sections=comparison.groups)


def collect(storage: Storage, prefix: str, comparison: Comparison, group: int) -> None:
    """Bring the verdicts of a group of ranges together, one per input at most."""
    name = _collected(prefix, comparison, group)
    if storage.size(name) is None:
        names = [
            _matched(prefix, comparison, bucket) for bucket in range(comparison.buckets)
        ]
        reader = SectionReader(
            storage, names, group, sections=comparison.groups, dtype=_MATCH_DTYPE
        )
        inside = comparison.group_ranges(group)
        part = _verdicts(_decisive(reader, comparison), inside)
        write_sections(storage, name, [part], sections=len(inside))


def gather(
    storage: Storage, prefix: str, comparison: Comparison, number: int
) -> np.ndarray:
    """The verdicts of a range: `VERDICT_DTYPE` (N,), by position."""
    group, section = divmod(number, comparison.group)
    sections = len(comparison.group_ranges(group))
    name = _collected(prefix, comparison, group)
    return read_section(storage, name, section, sections=sections, dtype=VERDICT_DTYPE)


def _dealt(
    storage: Storage, prefix: str, comparison: Comparison, group: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each criterion the records of a group, by bucket, and how many each has."""
    # Joining a list of them would hold all twice.
    data = bytearray()
    for number in comparison.group_ranges(group):
        data += storage.read(_stored(prefix, number))
    given = np.frombuffer(data, dtype=STORED_DTYPE)
    for criterion in comparison.criteria:
        part, records = criterion.dealt(given, comparison.parts)
        sizes = np.bincount(part, minlength=comparison.parts)
        yield records[np.argsort(part, kind="stable")], sizes


def _matches(
    reader: SectionReader, comparison: Comparison, criterion: Criterion
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What repeats what in a bucket, by group, and how many each group has."""
    limit = comparison.records // 2
    for number, (files, deciding) in enumerate(_decided(reader, criterion, limit)):
        decided = deciding
        if criterion.kind == "near":
            # Where everything fits, as it mostly does, there are no others to read.
            alone = len(files) == comparison.groups
            others = iter(()) if alone else _decided(reader, criterion, limit)
            decided = _near(deciding, number, others, criterion)
        for window in reader.windows(limit, files):
            yield _repeats(window, decided, criterion)


def _decided(
    reader: SectionReader, criterion: Criterion, limit: int
) -> Iterator[tuple[range, np.ndarray]]:
    """What decides in a bucket: at once, however many windows it comes in, but for
    near hashes at most about `limit` records at a time, with the groups they are of.
    """
    first, deciding = 0, np.empty(0, dtype=RECORD_DTYPE)
    files = range(0)
    for window in reader.windows(limit):
        deciding = criterion.reduced(np.concatenate([deciding, window.records]))
        files = range(first, window.files.stop)
        if criterion.kind == "near" and len(deciding) >= limit:
            yield files, deciding
            first, deciding = files.stop, deciding[:0]
    if first < files.stop:
        yield range(first, files.stop), deciding


def _near(
    deciding: np.ndarray,
    number: int,
    others: Iterator[tuple[range, np.ndarray]],
    criterion: Criterion,
) -> np.ndarray:
    """`deciding` with the earliest order near each hash in place of its own first."""
    distance, block = criterion.distance, criterion.block
    keys, orders = deciding["key"], deciding["order"]
    best = nearest(keys, orders, distance=distance, block=block)
    for other, (_, more) in enumerate(others):
        if other == number:
            continue
        both = np.concatenate([deciding, more])
        keys, orders = both["key"], both["order"]
        found = nearest(keys, orders, distance=distance, block=block)
        best = np.minimum(best, found[: len(best)])
    result = deciding.copy()
    result["order"] = best
    return result


def _repeats(
    window: Window, deciding: np.ndarray, criterion: Criterion
) -> tuple[np.ndarray, np.ndarray]:
    order = window.records["order"]
    of = criterion.earliest(deciding, window.records)
    repeated = (of < order) & new(order)
    matches = np.empty(int(repeated.sum()), dtype=_MATCH_DTYPE)
    matches["order"], matches["of"] = order[repeated], of[repeated]
    file = np.repeat(np.arange(len(window.files)), window.sizes)
    return matches, np.bincount(file[repeated], minlength=len(window.files))


def _decisive(reader: SectionReader, comparison: Comparison) -> np.ndarray:
    """The match of each input that counts: the first kind, then the earliest."""
    result = np.empty(0, dtype=_FOUND_DTYPE)
    for window in reader.windows(comparison.records // 2):
        numbers = [
            comparison.criteria[bucket // comparison.parts].number
            for bucket in window.files
        ]
        found = np.empty(len(window.records), dtype=_FOUND_DTYPE)
        found["order"], found["of"] = window.records["order"], window.records["of"]
        found["kind"] = np.repeat(np.array(numbers, dtype=np.uint8), window.sizes)
        result = np.concatenate([result, found])
        result = result[np.lexsort((result["of"], result["kind"], result["order"]))]
        first = np.ones(len(result), dtype=bool)
        first[1:] = result["order"][1:] != result["order"][:-1]
        result = result[first]
    return result


def _verdicts(found: np.ndarray, inside: range) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts by range and position, and how many each range has."""
    number = ranges(found["order"])
    result = np.empty(len(found), dtype=VERDICT_DTYPE)
    result["position"] = positions(found["order"])
    result["kind"] = found["kind"]
    result["of_range"] = ranges(found["of"])
    result["of_position"] = positions(found["of"])
    sizes = np.bincount(number - np.uint32(inside.start), minlength=len(inside))
    return result[np.lexsort((result["position"], number))], sizes


def _stored(prefix: str, number: int) -> str:
    return f"{prefix}/stored/{number:06d}"


def _scattered(prefix: str, comparison: Comparison, group: int) -> str:
    return f"{prefix}/{comparison.folder}/scattered/{group:06d}"


def _matched(prefix: str, comparison: Comparison, bucket: int) -> str:
    return f"{prefix}/{comparison.folder}/matched/{bucket:06d}"


def _collected(prefix: str, comparison: Comparison, group: int) -> str:
    return f"{prefix}/{comparison.folder}/collected/{group:06d}"
