"""The fast way through a batch gives what the careful way gives, byte for byte."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import crc32c
import numpy as np
import pytest
from PIL import Image

from tests.conftest import python
from tests.pipeline.foreign import img2dataset_shard, write_tar
from tests.trainer.tiny import config
from trainer.dataset import Dataset
from trainer.folder import DamagedError
from trainer.geometry import Box, box_of, decode_into, flipped
from trainer.loader import STEPS_AHEAD, Loader
from trainer.reading import Slots, Texts, chosen_texts, reads_of
from trainer.rows import Rows, crop_draws, flip_draws

GEOMETRIES = ("resize", "center_crop", "random_resized_crop")


def loader(shards: Path, *more: str) -> Loader:
    keys = config(shards, Path("unused"), "--threads=3", *more)
    return Loader(Dataset(shards, "train"), keys, rank=0, world_size=1)


def careful(reader: Loader, places: np.ndarray, epochs: np.ndarray) -> list[np.ndarray]:
    """Pixels and text of each sample, one by one, by the dataset's own reads."""
    dataset, keys = reader.dataset, reader.config
    records = dataset.records(places)
    uids = records["uid"].view(np.int64)
    crops, flips = crop_draws(keys, uids, epochs), flip_draws(keys, uids, epochs)
    found = []
    for row, record in enumerate(records):
        shard, size = int(places[row, 0]), (int(record["width"]), int(record["height"]))
        pixels = np.empty((keys.image.size, keys.image.size, 3), dtype=np.uint8)
        box = box_of(keys.image, *size, crops[row])
        flip = bool(flipped(flips)[row])
        decode_into(pixels, dataset.jpeg(shard, record), size, box, flip=flip)
        found.append(pixels)
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [32, 16, 40])
def test_a_batch_is_what_its_samples_are_one_by_one(
    mixed: Path, geometry: str, size: int
) -> None:
    keys = (f"--image.geometry={geometry}", f"--image.size={size}", "--image.flip=true")
    reader = loader(mixed, *keys, "--text.max_tokens=9")
    drawn, rows = reader.ahead.of(11)
    with ThreadPoolExecutor(3) as pool:
        read = reader.read(rows, pool)
    expected = careful(reader, drawn.places, drawn.epochs)
    assert np.array_equal(read.pixels.numpy(), np.stack(expected))
    records = reader.dataset.records(drawn.places)
    starts = np.cumsum(read.lengths) - read.lengths
    cut = 0
    for row, record in enumerate(records):
        text, was_cut = reader.dataset.text(
            int(drawn.places[row, 0]), record, int(rows.captions[row]), max_tokens=9
        )
        mine = read.ids[starts[row] : starts[row] + read.lengths[row]]
        assert mine.tolist() == text.tolist()
        cut += was_cut
    assert read.cut == cut > 0


def resident(path: Path) -> np.ndarray:
    """Which pages of a file the page cache has; asking does not bring them."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = np.zeros(pages, dtype=np.uint8)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        begin = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        told = libc.mincore(
            ctypes.byref(begin),
            ctypes.c_size_t(len(mapped)),
            found.ctypes.data_as(ctypes.c_void_p),
        )
        del begin
    assert told == 0, os.strerror(ctypes.get_errno())
    return found & 1


def evict(path: Path) -> None:
    """Have the page cache drop a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_for(path: Path, offset: int, size: int) -> None:
    """Until the page cache has a span of a file."""
    first, last = offset // mmap.PAGESIZE, (offset + size - 1) // mmap.PAGESIZE
    until = time.monotonic() + 30
    while not resident(path)[first : last + 1].all():
        assert time.monotonic() < until, f"nobody asked for {offset} of {path}"
        time.sleep(0.01)


@contextmanager
def held(reader: Loader, rows: Rows) -> Iterator[Future[Any]]:
    """The reading of a batch, whose threads begin when this ends."""
    begin = Event()
    with ThreadPoolExecutor(1) as decoders, ThreadPoolExecutor(1) as caller:
        decoders.submit(begin.wait)
        try:
            yield caller.submit(reader.read, rows, decoders)
        finally:
            begin.set()


@pytest.mark.parametrize("missing", [False, True])
def test_what_a_batch_needs_is_on_its_way_before_a_thread_reads_it(
    mixed: Path, tmp_path: Path, missing: bool
) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    reader = loader(copy)
    drawn, rows = reader.ahead.of(3)
    tars = [copy / f"train/shard-{shard:06d}.tar" for shard in drawn.places[:, 0]]
    for tar in tars:
        evict(tar)
    if any(resident(tar).any() for tar in tars):
        pytest.skip("this file system keeps all its files in memory")
    if missing:
        # Of a shard that is not there: the others' samples are asked for all the same.
        tars[0].unlink()
    with held(reader, rows) as reading:
        for tar, record in zip(tars, rows.records, strict=True):
            if tar.exists():
                wait_for(tar, int(record["span_offset"]), int(record["span_size"]))
        assert not reading.done()
    if missing:
        with pytest.raises(DamagedError, match="missing"):
            reading.result()
    else:
        assert len(reading.result().lengths) == len(rows)


def test_a_batch_is_asked_for_though_the_samples_beside_it_have_been_read(
    mixed: Path, tmp_path: Path
) -> None:
    """Their pages are the first and the last of its samples. Ids lie in a sidecar."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 160, 160, 3), dtype=np.uint8)
    files = {}
    for number, pixels in enumerate(noise):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        files[f"{number:09d}.jpg"] = file.getvalue()
        files[f"{number:09d}.txt"] = f"noise {number}".encode()
    tar = write_tar(tmp_path / "00000.tar", files)
    words = mixed / "tokenizer"
    done = python("-m", "pipeline.index", tmp_path, f"--tokenizer={words}")
    assert done.returncode == 0, done.stdout
    reader = loader(tmp_path, "--image.size=32", "--global_batch=6", "--lanes=1")
    places = reader.dataset.places()[::2]
    rows = reader.rows(places, np.zeros(len(places), dtype=np.int64))
    sidecar = tmp_path / str(reader.dataset.shard(int(places[0, 0])).ids)
    for path in (tar, sidecar):
        evict(path)
    if resident(tar).any():
        pytest.skip("this file system keeps all its files in memory")
    with tar.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for record in rows.records:
            offset, size = int(record["span_offset"]), int(record["span_size"])
            for edge in (offset, offset + size - 1):
                os.preadv(file.fileno(), [bytearray(1)], edge)
    assert 0 < resident(tar).sum() < len(resident(tar)) / 2
    with held(reader, rows):
        for record in rows.records:
            wait_for(tar, int(record["span_offset"]), int(record["span_size"]))
            wait_for(sidecar, int(record["ids_offset"]), int(record["ids_size"]))


def test_every_caption_of_every_sample_can_be_chosen() -> None:
    """Against a plain loop, on captions of all lengths, empty ones too."""
    draw = random.Random(0)
    sep, cls = 3, 2
    samples = [
        [
            [draw.randrange(4, 99) for _ in range(draw.randrange(12))]
            for _ in range(draw.randrange(1, 5))
        ]
        for _ in range(40)
    ]
    flat = [[*words, sep] for captions in samples for words in captions]
    ids = np.array([token for words in flat for token in words], dtype=np.uint16)
    counts = np.array([sum(len(words) + 1 for words in one) for one in samples])
    starts = np.cumsum(counts) - counts
    ends = np.flatnonzero(ids == sep)
    texts = Texts(
        ids=ids, starts=starts, ends=ends, first_end=np.searchsorted(ends, starts)
    )
    choice = np.array([draw.randrange(len(captions)) for captions in samples])
    found, lengths, cut = chosen_texts(texts, choice, cls=cls, sep=sep, max_tokens=8)
    expected = [
        [cls, *captions[which][:6], sep]
        for captions, which in zip(samples, choice.tolist(), strict=True)
    ]
    assert found.tolist() == [token for text in expected for token in text]
    assert lengths.tolist() == list(map(len, expected))
    longer = [len(c[w]) > 6 for c, w in zip(samples, choice.tolist(), strict=True)]
    assert cut == sum(longer) > 0


def test_half_of_the_images_are_mirrored_and_only_when_asked_for(mixed: Path) -> None:
    plain, mirrored = (
        loader(
            mixed, "--image.geometry=resize", "--image.size=32", f"--image.flip={on}"
        )
        for on in ("false", "true")
    )
    same = turned = 0
    with ThreadPoolExecutor(2) as pool:
        for step in range(6):
            for ours, theirs in zip(
                plain.read(plain.ahead.of(step)[1], pool).pixels.numpy(),
                mirrored.read(mirrored.ahead.of(step)[1], pool).pixels.numpy(),
                strict=True,
            ):
                same += np.array_equal(ours, theirs)
                turned += np.array_equal(ours[:, ::-1], theirs)
        counts = [one.load(3, pool).counts.digest for one in (plain, mirrored)]
    assert same + turned >= 6 * 24
    assert 40 < turned < 104
    assert counts[0] != counts[1]


def test_an_indexed_folder_with_ids_in_a_sidecar_reads_the_same(
    mixed: Path, tmp_path: Path
) -> None:
    """Foreign tars: the same images and captions without our ids in the tar."""
    for number in range(2):
        img2dataset_shard(tmp_path, number, range(20 * number, 20 * number + 20))
    done = python(
        "-m", "pipeline.index", tmp_path, f"--tokenizer={mixed / 'tokenizer'}"
    )
    assert done.returncode == 0, done.stdout
    reader = loader(tmp_path, "--image.size=32", "--image.geometry=resize")
    places = reader.dataset.places()
    epochs = np.zeros(len(places), dtype=np.int64)
    rows = reader.rows(places, epochs)
    with ThreadPoolExecutor(2) as pool:
        read = reader.read(rows, pool)
    expected = np.stack(careful(reader, places, epochs))
    assert np.array_equal(read.pixels.numpy(), expected)
    shard = int(places[0, 0])
    assert reader.dataset.files(shard)[1] is not None
    record = reader.dataset.records(places[:1])[0]
    text, _ = reader.dataset.text(
        shard, record, int(rows.captions[0]), max_tokens=reader.config.text.max_tokens
    )
    assert read.ids[: read.lengths[0]].tolist() == text.tolist()


def test_a_deleted_or_replaced_shard_is_noticed_though_it_is_open(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.folder._LOOK_AGAIN_SECONDS", 0.0)
    copy = shutil.copytree(mixed, tmp_path / "copy")
    reader = loader(copy)
    places = reader.dataset.places()[:16]
    epochs = np.zeros(16, dtype=np.int64)
    tar, other = (copy / f"train/shard-{n:06d}.tar" for n in (0, 1))
    with ThreadPoolExecutor(2) as pool:
        reader.read(reader.rows(places, epochs), pool)
        kept = tar.read_bytes()
        os.replace(shutil.copy(other, tmp_path / "x"), tar)
        with pytest.raises(DamagedError) as caught:
            reader.read(reader.rows(places, epochs), pool)
        assert caught.value.reason in ("crc", "truncated")
        tar.unlink()
        with pytest.raises(DamagedError) as caught:
            reader.read(reader.rows(places, epochs), pool)
        assert caught.value.reason == "missing"
        tar.write_bytes(kept)
        reader.read(reader.rows(places, epochs), pool)


@pytest.mark.parametrize("what", ["json", "txt", "header", "padding"])
def test_damage_to_members_that_training_does_not_use_is_found(
    mixed: Path, tmp_path: Path, what: str
) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    reader = loader(copy)
    places = reader.dataset.places()[:8]
    rows = reader.rows(places, np.zeros(8, dtype=np.int64))
    record = rows.records[5]
    start, end = (int(record["span_offset"]), int(record["span_size"]))
    path = copy / f"train/shard-{int(places[5, 0]):06d}.tar"
    span = bytearray(path.read_bytes()[start : start + end])
    at = {
        "json": span.index(b'"key"'),
        "txt": span.rindex(b".txt\0") // 512 * 512 + 512,
        "header": 0,
        "padding": len(span) - 1,
    }[what]
    with open(path, "r+b") as file:
        file.seek(start + at)
        file.write(bytes([span[at] ^ 4]))
    with ThreadPoolExecutor(2) as pool, pytest.raises(DamagedError) as caught:
        reader.read(rows, pool)
    assert (caught.value.uid, caught.value.reason) == (int(record["uid"]), "crc")
    assert f"offset {start}: sample of uid" in str(caught.value)


def test_of_several_damaged_samples_all_are_named_in_order_whoever_meets_them(
    mixed: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    reader = loader(copy)
    places = reader.dataset.places()[:24]
    rows = reader.rows(places, np.zeros(24, dtype=np.int64))
    for row in (20, 9, 10, 14):
        tar = copy / f"train/shard-{int(places[row, 0]):06d}.tar"
        with open(tar, "r+b") as file:
            file.seek(int(rows.records[row]["jpg_offset"]) + 30)
            file.write(b"damaged")
    for threads in (1, 2, 3, 3, 3):
        reader.config = replace(reader.config, threads=threads)
        with ThreadPoolExecutor(threads) as pool:
            with pytest.raises(DamagedError) as caught:
                reader.read(rows, pool)
            damaged = [caught.value, *caught.value.also]
            uids = rows.records["uid"][[9, 10, 14, 20]].tolist()
            assert [one.uid for one in damaged] == uids


@pytest.mark.parametrize("careful", [False, True])
def test_ids_after_the_last_separator_belong_to_no_caption(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careful: bool
) -> None:
    """A member of another hand: as many captions as the index says, and more ids."""
    if careful:
        monkeypatch.setattr("trainer.reading._opened", lambda *_: None)
    reader = loader(shutil.copytree(mixed, tmp_path / "copy"))
    rows = reader.rows(reader.dataset.places()[:24], np.zeros(24, dtype=np.int64))
    row = int(np.flatnonzero(rows.records["n_tokens"] > 4)[3])
    # The last separator one id earlier.
    rewrite(reader, rows, row, lambda ids: [*ids[:-2], ids[-1], ids[-2]])
    with ThreadPoolExecutor(2) as pool:
        read = reader.read(rows, pool)
    starts = np.cumsum(read.lengths) - read.lengths
    for number, record in enumerate(rows.records):
        text, _ = reader.dataset.text(
            int(rows.places[number, 0]),
            record,
            int(rows.captions[number]),
            max_tokens=reader.config.text.max_tokens,
        )
        mine = read.ids[starts[number] : starts[number] + read.lengths[number]]
        assert mine.tolist() == text.tolist()


def test_a_separator_too_many_does_not_make_up_for_one_too_few(
    mixed: Path, tmp_path: Path
) -> None:
    """Together the samples have as many captions as the index says, and each between
    them would show another's.
    """
    reader = loader(shutil.copytree(mixed, tmp_path / "copy"))
    sep = reader.dataset.tokenizer.special_ids["sep"]
    rows = reader.rows(reader.dataset.places()[:24], np.zeros(24, dtype=np.int64))
    long = np.flatnonzero(rows.records["n_tokens"] > 4)
    rewrite(reader, rows, int(long[2]), lambda ids: [sep, *ids[1:]])
    rewrite(reader, rows, int(long[-2]), lambda ids: [*ids[:-1], ids[0]])
    with ThreadPoolExecutor(2) as pool, pytest.raises(DamagedError) as caught:
        reader.read(rows, pool)
    assert caught.value.reason == "captions"
    assert caught.value.uid == int(rows.records[long[2]]["uid"])


def rewrite(
    reader: Loader, rows: Rows, row: int, change: Callable[[list[int]], list[int]]
) -> None:
    """Put other ids in a sample's place, with a CRC that is right."""
    record, dtype = rows.records[row], reader.dataset.tokenizer.dtype
    tar = Path(reader.dataset.name) / f"train/shard-{int(rows.places[row, 0]):06d}.tar"
    member = bytearray(record["ids_size"])
    size = int(record["n_tokens"]) * dtype.itemsize
    with open(tar, "r+b") as file:
        file.seek(int(record["ids_offset"]))
        file.readinto(member)
        ids = np.frombuffer(member[-size:], dtype=dtype).tolist()
        member[-size:] = np.array(change(ids), dtype=dtype).tobytes()
        file.seek(int(record["ids_offset"]))
        file.write(member)
        file.seek(int(record["span_offset"]))
        span = file.read(int(record["span_size"]))
    rows.records[row]["ids_crc32c"] = crc32c.crc32c(bytes(member))
    rows.records[row]["span_crc32c"] = crc32c.crc32c(span)
    rows.reads[:] = reads_of(rows.records, reader.config.image, id_bytes=dtype.itemsize)


def test_buffers_are_used_again_but_not_while_they_are_valid(mixed: Path) -> None:
    reader = loader(mixed)
    fresh = loader(mixed)
    seen: list[tuple[int, int]] = []
    previous = None
    with ThreadPoolExecutor(1) as pool:
        for batch in reader.steps(0, 12):
            (first, *_) = batch.micro_batches
            seen.append((batch.step, first.pixels.data_ptr()))
            own = fresh.load(batch.step, pool).micro_batches[0].pixels
            assert np.array_equal(first.pixels.numpy(), own.numpy())
            if previous is not None:
                step, pixels = previous
                again = fresh.load(step, pool).micro_batches[0].pixels
                assert np.array_equal(pixels.numpy(), again.numpy())
            previous = batch.step, first.pixels
    assert len({pointer for _, pointer in seen}) == STEPS_AHEAD + 2


def test_the_loader_keeps_nothing_of_a_sample(mixed: Path) -> None:
    """Python's own memory does not grow from epoch to epoch."""
    reader = loader(mixed, "--mixture=none")
    sizes = []
    tracemalloc.start()
    for batch in reader.steps(0, 360):
        if batch.step % 60 == 59:
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(sizes[2:]) - min(sizes[2:]) < 200_000, sizes


def test_slots_are_pixels_of_a_whole_step() -> None:
    slots = Slots(3, (5, 4, 4, 3))
    assert slots.of(1).shape == (5, 4, 4, 3)
    assert slots.of(1).data_ptr() == slots.of(4).data_ptr()
    assert slots.of(1).data_ptr() != slots.of(2).data_ptr()


def test_a_box_that_is_the_whole_image_is_copied_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    out = np.empty_like(pixels)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = memoryview(buffer.getvalue())
    decode_into(out, data, (24, 24), Box(0, 0, 24, 24))
    assert np.array_equal(out, pixels)
    decode_into(out, data, (24, 24), Box(0, 0, 24, 24), flip=True)
    assert np.array_equal(out, pixels[:, ::-1])
