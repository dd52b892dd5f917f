"""From places to pixels and tokens of a batch: reads, checks and decodes in threads.

Owns the fast way through a batch: one read a sample into memory that is used again,
JPEGs decoded straight into the batch, tokens of all samples in one array. Does not own
what the bytes are checked against or what is called damaged (`trainer.folder`: a sample
that fails here is read again there, which says why), crops (`trainer.geometry`), which
caption a pair shows (`trainer.loader`) or the stream (`trainer.stream`).

Fresh memory costs as much as decoding does, so nothing of an image's size is made for a
sample. Shapes: B pairs, S side of the images in pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import crc32c
import numpy as np

from pipeline.manifest import token_ids
from trainer.dataset import Dataset
from trainer.folder import read_into
from trainer.geometry import box_of, decode_into, decode_whole
from trainer.options import ImageConfig
from trainer.storage import StorageError

_CHUNK = 16
_GIVE_WAY_S = 1e-5
# Members of a sample lie side by side; with more between them two reads are cheaper.
_GAP = 1 << 16


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


class _Plan(NamedTuple):
    """How one read gets a sample; numbers, because there is one for each sample."""

    tar: int
    """Descriptor; -1 where one read does not do."""
    at: int
    size: int
    ids_size: int
    """Bytes of the read that are the ids' member, at its beginning."""
    jpg_start: int
    """Where the image begins in the read; it ends with it."""
    ids_crc32c: int
    jpg_crc32c: int
    put: int
    """Where in all ids this sample's go, in bytes."""
    put_end: int
    whole: bool
    """The image is shown as it is."""


class Reading:
    """A batch that threads are reading.

    Args:
        crops: (B, 4) crop draws.
        flips: (B,) bool, images to mirror.
        pixels: (B, S, S, 3) uint8, to be filled.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: np.ndarray,
        records: np.ndarray,
        *,
        image: ImageConfig,
        crops: np.ndarray,
        flips: np.ndarray,
        pixels: np.ndarray,
        decoders: ThreadPoolExecutor,
    ) -> None:
        self._dataset, self._places, self._records = dataset, places, records
        self._image, self._pixels = image, pixels
        self._crops, self._flips = crops, flips.tolist()
        self._shards = places[:, 0].tolist()
        self._files = {shard: _opened(dataset, shard) for shard in set(self._shards)}
        self._n_tokens = records["n_tokens"].astype(np.int64)
        self._starts = np.cumsum(self._n_tokens) - self._n_tokens
        dtype = dataset.tokenizer.dtype
        self._ids = np.zeros(int(self._n_tokens.sum()), dtype=dtype)
        give_way()
        self._plans = self._planned(flips)
        self._chunks: Sequence[Future[tuple[float, float]]] = [
            decoders.submit(self._fill, first)
            for first in range(0, len(places), _CHUNK)
        ]

    def finish(self) -> tuple[Texts, float, float]:
        """The texts, once pixels and texts are there; thread seconds spent on reading
        and on decoding.

        Raises:
            DamagedError: a sample is damaged.
            OSError: storage failed.
        """
        # The batch's memory must be at rest before anybody fills it again.
        wait(self._chunks)
        spent = [chunk.result() for chunk in self._chunks]
        texts = self._texts()
        return texts, sum(read for read, _ in spent), sum(done for _, done in spent)

    def _planned(self, flips: np.ndarray) -> list[_Plan]:
        """The fast way of each sample."""
        records, of_shard = self._records, self._places[:, 0]
        at, ids_size, jpg_at, jpg_size = (
            records[name].astype(np.int64)
            for name in ("ids_offset", "ids_size", "jpg_offset", "jpg_size")
        )
        tar = np.empty(len(records), dtype=np.int64)
        side = self._pixels.shape[1]
        whole = (records["width"] == side) & (records["height"] == side) & ~flips
        whole &= self._image.geometry != "random_resized_crop"
        for shard, files in self._files.items():
            mine = of_shard == shard
            alone = files is not None and files[1] is None
            tar[mine] = files[0].fileno() if files and alone else -1
            if self._dataset.indexed(shard):
                whole[mine] = False
        id_bytes, start = self._n_tokens * self._ids.itemsize, jpg_at - at
        gap = start - ids_size
        tar[(gap < 0) | (gap > _GAP) | (id_bytes > ids_size)] = -1
        size = np.where(tar < 0, 0, start + jpg_size)
        put = self._starts * self._ids.itemsize
        columns = (
            tar,
            at,
            size,
            ids_size,
            start,
            records["ids_crc32c"],
            records["jpg_crc32c"],
            put,
            put + id_bytes,
            whole,
        )
        return list(
            map(_Plan._make, zip(*(column.tolist() for column in columns), strict=True))
        )

    def _fill(self, first: int) -> tuple[float, float]:
        """Fill the rows of one chunk; seconds of reading and of decoding."""
        plans = self._plans[first : first + _CHUNK]
        memory = _memory(max(plan.size for plan in plans))
        all_ids = self._ids.view(np.uint8).data
        reading = decoding = 0.0
        # Flat, because calls and look-ups for a sample add up to a part of decoding it.
        for row, plan in enumerate(plans, first):
            tar, at, size, ids_size, start, ids_crc, jpg_crc, put, end, whole = plan
            begun = time.perf_counter()
            try:
                span = memory[:size]
                got = tar >= 0 and len(read_into(span, tar, at)) == size
            except OSError:
                got = False
            have = time.perf_counter()
            ids, jpeg = span[:ids_size], span[start:]
            got = got and crc32c.crc32c(jpeg) == jpg_crc
            if got and crc32c.crc32c(ids) == ids_crc:
                all_ids[put:end] = ids[ids_size - (end - put) :]
            else:
                jpeg = self._read(row)
                have = time.perf_counter()
            if not (whole and decode_whole(self._pixels[row], jpeg)):
                self._decode(row, jpeg)
            reading += have - begun
            decoding += time.perf_counter() - have
        return reading, decoding

    def _read(self, row: int) -> memoryview:
        """The image's checked bytes, until this thread reads again; its sample's ids
        are put in their place.
        """
        shard, record = self._shards[row], self._records[row]
        files = self._files[shard]
        if files is not None:
            try:
                ids, jpeg = _members(files, record)
            except OSError:
                ids = jpeg = memoryview(b"")
            sound = len(ids) == record["ids_size"] and len(jpeg) == record["jpg_size"]
            sound = sound and crc32c.crc32c(jpeg) == record["jpg_crc32c"]
            if sound and crc32c.crc32c(ids) == record["ids_crc32c"]:
                n_tokens = int(self._n_tokens[row])
                self._put_ids(row, token_ids(ids, n_tokens, self._ids.dtype))
                return jpeg
        # Once more, with the care and the words of whom it is the business of.
        self._put_ids(row, np.concatenate(self._dataset.captions(shard, record)))
        return self._dataset.jpeg(shard, record)

    def _put_ids(self, row: int, ids: np.ndarray) -> None:
        start = int(self._starts[row])
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
        ends = np.flatnonzero(self._ids == sep)
        first_end = np.searchsorted(ends, self._starts)
        found = np.diff(np.append(first_end, len(ends)))
        for row in np.flatnonzero(found != self._records["n_captions"]).tolist():
            # Says what is wrong with them.
            self._dataset.captions(self._shards[row], self._records[row])
        return Texts(ids=self._ids, starts=self._starts, ends=ends, first_end=first_end)


_Files = tuple[BinaryIO, BinaryIO | None]


def _opened(dataset: Dataset, shard: int) -> _Files | None:
    """A shard's files; None for one that is to be read with more care."""
    try:
        return dataset.files(shard)
    except StorageError:
        raise
    except OSError:
        return None


def _members(files: _Files, record: np.void) -> tuple[memoryview, memoryview]:
    """Bytes of both members, in this thread's memory; short where a file ends."""
    tar, ids_file = files
    ids_size, jpg_size = int(record["ids_size"]), int(record["jpg_size"])
    memory = _memory(ids_size + jpg_size)
    ids = read_into(
        memory[:ids_size], (ids_file or tar).fileno(), int(record["ids_offset"])
    )
    jpeg = read_into(memory[ids_size:], tar.fileno(), int(record["jpg_offset"]))
    return ids, jpeg


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
    end = texts.ends[texts.first_end + choice]
    before = texts.ends[np.maximum(texts.first_end + choice - 1, 0)] + 1
    start = np.where(choice == 0, texts.starts, before)
    words = end - start
    kept = np.minimum(words, max_tokens - 2)
    lengths = kept + 2
    begins = np.cumsum(lengths) - lengths
    source = np.arange(int(lengths.sum())) + np.repeat(start - begins - 1, lengths)
    ids = texts.ids[np.clip(source, 0, len(texts.ids) - 1)].astype(np.int64)
    ids[begins], ids[begins + lengths - 1] = cls, sep
    return ids, lengths, int((words > kept).sum())


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
