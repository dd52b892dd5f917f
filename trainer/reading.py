"""From places to pixels and tokens of a batch: reads, checks and decodes in threads.

Owns the fast way through a batch: one read a sample into memory that is used again,
JPEGs decoded straight into the batch, tokens of all samples in one array. Does not own
what the bytes are checked against or what is called damaged (`trainer.folder`: a sample
that fails here is read again there, which says why), crops (`trainer.geometry`), which
caption a pair shows (`trainer.loader`) or the stream (`trainer.stream`).

Fresh memory costs as much as decoding does, so nothing of an image's size is made for a
sample that is shown as it is; a crop that is resized is copied on its way, because the
resizer takes and gives bytes of its own. Shapes: B pairs, S side of the images in
pixels.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import crc32c
import numpy as np

from pipeline.manifest import token_ids
from trainer import descriptors
from trainer.dataset import Dataset
from trainer.folder import DamagedError, in_page_cache, read_ahead, read_into
from trainer.geometry import box_of, decode_into, decode_whole
from trainer.options import ImageConfig
from trainer.storage import StorageError

_GIVE_WAY_S = 1e-5
# Samples of a batch that tell whether the page cache has all of it.
_PROBED = 2
# Columns of `reads_of`.
_SIZE, _ID_BYTES, _CAPTIONS, _WHOLE = 1, 4, 7, 8


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids of all captions of B samples, end to end."""

    ids: np.ndarray
    """(N,) ids, each caption ended by the separator."""
    starts: np.ndarray
    """(B,) where each sample's begin."""
    ends: np.ndarray
    """(C,) place of every separator."""
    first_end: np.ndarray
    """(B,) which of `ends` is the first of each sample."""


def reads_of(records: np.ndarray, image: ImageConfig, *, id_bytes: int) -> np.ndarray:
    """How one read gets each of B samples whose tar holds its token ids too: (B, 9)
    int64, by row where all members begin; their bytes, 0 where one read does not do;
    their CRC32C; where the ids begin in them; bytes of ids; where the image begins and
    ends; captions; whether the image is shown as it is, but for a flip.

    Args:
        id_bytes: of one token id.
    """
    at, size, crc, ids_at, ids_size, jpg_at, jpg_size, n_tokens = (
        records[name].astype(np.int64)
        for name in (
            *("span_offset", "span_size", "span_crc32c", "ids_offset", "ids_size"),
            *("jpg_offset", "jpg_size", "n_tokens"),
        )
    )
    ids, ids_end = n_tokens * id_bytes, ids_at - at + ids_size
    jpg_at -= at
    inside = (at <= ids_at) & (ids <= ids_size) & (ids_end <= size)
    inside &= (jpg_at >= 0) & (jpg_at + jpg_size <= size)
    whole = (records["width"] == image.size) & (records["height"] == image.size)
    whole &= image.geometry != "random_resized_crop"
    found = np.empty((len(records), 9), dtype=np.int64)
    for column, values in enumerate(
        (
            at,
            np.where(inside, size, 0),
            crc,
            ids_end - ids,
            ids,
            jpg_at,
            jpg_at + jpg_size,
            records["n_captions"],
            whole,
        )
    ):
        found[:, column] = values
    return found


class Reading:
    """A batch that threads are reading.

    Args:
        reads: (B, 9), `reads_of` the records.
        crops: (B, 4) crop draws.
        flips: (B,) bool, images to mirror.
        pixels: (B, S, S, 3) uint8, to be filled.
        threads: of `decoders`.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: np.ndarray,
        records: np.ndarray,
        reads: np.ndarray,
        *,
        image: ImageConfig,
        crops: np.ndarray,
        flips: np.ndarray,
        pixels: np.ndarray,
        decoders: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self._dataset, self._places, self._records = dataset, places, records
        self._image, self._pixels = image, pixels
        self._crops, self._flips = crops, flips.tolist()
        self._shards = places[:, 0].tolist()
        begun = time.perf_counter()
        # Where descriptors are few, the rest are opened for one sample at a time.
        shards = Counter(self._shards).most_common(descriptors.of_a_batch())
        self._files = {shard: _opened(dataset, shard) for shard, _ in shards}
        self._read_ahead()
        # Where they have to be fetched first, no thread can read.
        self._opening_s = threads * (time.perf_counter() - begun)
        dtype = dataset.tokenizer.dtype
        ends = reads[:, _ID_BYTES].cumsum()
        self._ends = ends // dtype.itemsize
        self._counts = reads[:, _ID_BYTES] // dtype.itemsize
        self._captions = reads[:, _CAPTIONS]
        self._ids = np.zeros(int(self._ends[-1]), dtype=dtype)
        self._longest = int(reads[:, _SIZE].max())
        give_way()
        self._failed: list[tuple[int, Exception]] = []
        # Threads take one row after another: none waits for another's last ones.
        self._plans = self._planned(reads, ends, flips)
        self._tasks: Sequence[Future[tuple[float, float]]] = [
            decoders.submit(self._fill) for _ in range(min(threads, len(places)))
        ]

    def finish(self) -> tuple[Texts, float, float]:
        """The texts, once pixels and texts are there; thread seconds spent on reading
        and on decoding.

        Raises:
            DamagedError: a sample is damaged; of several the first, which has the
                others as `also`.
            OSError: storage failed.
        """
        # The batch's memory must be at rest before anybody fills it again.
        for task in self._tasks:
            task.exception()
        spent = [task.result() for task in self._tasks]
        self._raise_failed()
        texts = self._texts()
        read_s = self._opening_s + sum(read for read, _ in spent)
        return texts, read_s, sum(done for _, done in spent)

    def _raise_failed(self) -> None:
        """Raise what the first row that failed did, if one has; damage with that of the
        others.
        """
        if not self._failed:
            return
        failed, self._failed = sorted(self._failed, key=lambda one: one[0]), []
        first, *others = (error for _, error in failed)
        if isinstance(first, DamagedError):
            first.also = [
                one.with_traceback(None)
                for one in others
                if isinstance(one, DamagedError)
            ]
        try:
            raise first
        finally:
            # Or its traceback, which has this batch, would hold files open.
            del failed, first, others

    def _read_ahead(self) -> None:
        """Have the kernel read all samples at once, instead of each when a thread waits
        for it, where the page cache lacks them.
        """
        probed = slice(0, None, -(-len(self._shards) // _PROBED))
        some = self._records[probed]
        # Its first page is the sample's before it too, its last the next one's.
        middles = some["span_offset"] + some["span_size"] // 2
        for shard, middle in zip(self._shards[probed], middles.tolist(), strict=True):
            files = self._files.get(shard)
            if files and not in_page_cache(files[0].fileno(), middle):
                break
        else:
            return
        records = self._records[["span_offset", "span_size", "ids_offset", "ids_size"]]
        for shard, (at, size, ids_at, ids_size) in zip(
            self._shards, records.tolist(), strict=True
        ):
            tar, sidecar = self._files.get(shard) or (None, None)
            if tar:
                read_ahead(tar.fileno(), at, size)
            if sidecar:
                read_ahead(sidecar.fileno(), ids_at, ids_size)

    def _planned(
        self, reads: np.ndarray, ends: np.ndarray, flips: np.ndarray
    ) -> Iterator[tuple[int, int, list[int], int, bool]]:
        """Of each sample its row, the descriptor that one read gets it from, or -1, its
        row of `reads`, where its ids end among all, in bytes, and whether its image
        needs no more than decoding. For several threads at once.
        """
        tars = {
            shard: files[0].fileno()
            for shard, files in self._files.items()
            if files and not files[1]
        }
        whole = (reads[:, _WHOLE] > 0) & ~flips
        # Of anybody's tars: an image may be turned, or no JPEG.
        foreign = [one for one in set(self._shards) if self._dataset.indexed(one)]
        if foreign:
            whole &= ~np.isin(self._places[:, 0], foreign)
        return zip(
            range(len(reads)),
            [tars.get(shard, -1) for shard in self._shards],
            reads.tolist(),
            ends.tolist(),
            whole.tolist(),
            strict=True,
        )

    def _fill(self) -> tuple[float, float]:
        """Fill rows until none is left; seconds of reading and of decoding."""
        # Flat, with names for what is called: calls and look-ups for a sample add up to
        # a part of decoding it.
        memory, pixels = _memory(self._longest), self._pixels
        all_ids = self._ids.view(np.uint8).data
        clock, preadv, crc_of = time.perf_counter, os.preadv, crc32c.crc32c
        reading = decoding = 0.0
        for row, tar, plan, end, whole in self._plans:
            at, size, crc, ids_at, id_bytes, jpg_at, jpg_end, *_ = plan
            begun = clock()
            span = memory[:size]
            try:
                # Rarely a part of it: that is for the careful way.
                got = tar >= 0 < size == preadv(tar, (span,), at)
            except OSError:
                got = False
            try:
                have = clock()
                if got and crc_of(span) == crc:
                    all_ids[end - id_bytes : end] = span[ids_at : ids_at + id_bytes]
                    jpeg = span[jpg_at:jpg_end]
                else:
                    jpeg = self._read(row)
                    have = clock()
                if not (whole and decode_whole(pixels[row], jpeg)):
                    self._decode(row, jpeg)
            except DamagedError as error:
                # The others are looked at too: all that is damaged is known at once.
                self._failed.append((row, error))
            except Exception as error:
                self._failed.append((row, error))
                break
            reading += have - begun
            decoding += clock() - have
        return reading, decoding

    def _read(self, row: int) -> memoryview:
        """The image's checked bytes, until this thread reads again; its sample's ids
        are put in their place.
        """
        shard, record = self._shards[row], self._records[row]
        if shard in self._files:
            files = self._files[shard]
        else:
            files = _opened(self._dataset, shard)
        if files is not None:
            try:
                found = _members(files, record)
            except OSError:
                found = None
            if found:
                ids, jpeg = found
                n_tokens = int(record["n_tokens"])
                self._put_ids(row, token_ids(ids, n_tokens, self._ids.dtype))
                return jpeg
        # Once more, with the care and the words of whom it is the business of: first
        # the members that are needed, then all.
        self._put_ids(row, np.concatenate(self._dataset.captions(shard, record)))
        jpeg = self._dataset.jpeg(shard, record)
        self._dataset.check_members(shard, record)
        return jpeg

    def _put_ids(self, row: int, ids: np.ndarray) -> None:
        start = int(self._ends[row]) - int(self._records[row]["n_tokens"])
        self._ids[start : start + len(ids)] = ids

    def _decode(self, row: int, jpeg: memoryview) -> None:
        shard, record = self._shards[row], self._records[row]
        size = int(record["width"]), int(record["height"])
        box = box_of(self._image, *size, self._crops[row])
        try:
            decode_into(
                self._pixels[row],
                jpeg,
                size,
                box,
                flip=self._flips[row],
                upright=not self._dataset.indexed(shard),
            )
        except ValueError as error:
            raise self._dataset.undecodable(shard, record, error) from error

    def _texts(self) -> Texts:
        sep = self._dataset.tokenizer.special_ids["sep"]
        (ends,) = (self._ids == sep).nonzero()
        starts, last = self._ends - self._counts, self._captions.cumsum()
        first_end = last - self._captions
        if len(ends) != last[-1] or (ends[last - 1] != self._ends - 1).any():
            first_end = np.searchsorted(ends, starts)
            found = np.diff(np.append(first_end, len(ends)))
            for row in np.flatnonzero(found != self._captions).tolist():
                try:
                    # Says what is wrong with them.
                    self._dataset.captions(self._shards[row], self._records[row])
                except DamagedError as error:
                    self._failed.append((row, error))
            self._raise_failed()
        return Texts(ids=self._ids, starts=starts, ends=ends, first_end=first_end)


_Files = tuple[BinaryIO, BinaryIO | None]


def _opened(dataset: Dataset, shard: int) -> _Files | None:
    """A shard's files; None for one that is to be read with more care."""
    try:
        return dataset.files(shard)
    except StorageError:
        raise
    except OSError:
        return None


def _members(files: _Files, record: np.void) -> tuple[memoryview, memoryview] | None:
    """The ids' member and the image, in this thread's memory, where all members are
    what the index says.
    """
    tar, sidecar = files
    at, size = int(record["span_offset"]), int(record["span_size"])
    ids_at, ids_size = int(record["ids_offset"]), int(record["ids_size"])
    memory = _memory(size + ids_size)
    span = read_into(memory[:size], tar.fileno(), at)
    if len(span) != size or crc32c.crc32c(span) != record["span_crc32c"]:
        return None
    if sidecar:
        ids = read_into(memory[size:], sidecar.fileno(), ids_at)
    else:
        ids = span[ids_at - at :][:ids_size]
    if len(ids) != ids_size or crc32c.crc32c(ids) != record["ids_crc32c"]:
        return None
    return ids, span[int(record["jpg_offset"]) - at :][: int(record["jpg_size"])]


_local = threading.local()


def _memory(size: int) -> memoryview:
    """`size` bytes that belong to this thread until it asks again."""
    buffer: Any = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _local.buffer = bytearray(2 * size)
    return memoryview(buffer)[:size]


def chosen_texts(
    texts: Texts, choice: np.ndarray, *, cls: int, sep: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """[CLS] words [SEP] of one caption of each sample, cut to `max_tokens`.

    Args:
        choice: (B,) which caption.

    Returns:
        ids (K,) int64 of all pairs end to end, their lengths (B,), captions cut.
    """
    which = texts.first_end + choice
    # Of a sample's first caption, the one before is another sample's.
    start = np.where(choice == 0, texts.starts, texts.ends[which - 1] + 1)
    words = texts.ends[which] - start
    lengths = np.minimum(words, max_tokens - 2) + 2
    last = lengths.cumsum() - 1
    begins = last - lengths + 1
    source = (start - begins - 1).repeat(lengths)
    source += np.arange(len(source))
    # The first and the last place of a text may lie outside all ids.
    ids = texts.ids.take(source, mode="clip").astype(np.int64)
    ids[begins], ids[last] = cls, sep
    return ids, lengths, int(np.count_nonzero(words + 2 > lengths))


class Slots:
    """Pixel buffers that are used again: one for each step that is under way.

    Args:
        count: steps under way at once.
        shape: (B, S, S, 3) of a rank's share of a step.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._slots = [_pixels(shape) for _ in range(count)]

    def of(self, step: int) -> Any:
        """The buffer of a step, a tensor: that of `count` steps before."""
        return self._slots[step % len(self._slots)]


def _pixels(shape: tuple[int, ...]) -> Any:
    """A uint8 tensor, in memory that a GPU copies from by itself where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    # numpy asks for huge pages, torch does not: without them decoding a photo of 224
    # pixels into the tensor takes 6 % longer.
    return torch.from_numpy(np.empty(shape, dtype=np.uint8))


def give_way() -> None:
    """Let decoding threads go on. A thread that makes one small array after the other
    keeps the interpreter for up to 5 ms, in which no other can start on its next image.
    """
    time.sleep(_GIVE_WAY_S)
