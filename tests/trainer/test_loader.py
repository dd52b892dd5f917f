from __future__ import annotations

import dataclasses
import resource
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.manifest import load_manifest
from tests.trainer.tiny import config, steps_per_epoch
from trainer.dataset import Dataset
from trainer.folder import _Kept
from trainer.geometry import Box, box_of, decode_into
from trainer.loader import Loader, StepBatch, sum_counts
from trainer.loop import model_inputs
from trainer.masking import Mode
from trainer.options import ImageConfig


def loader(shards: Path, *more: str, rank: int = 0, world: int = 1) -> Loader:
    keys = config(shards, Path("unused"), *more)
    return Loader(Dataset(shards, "train"), keys, rank=rank, world_size=world)


def load(shards: Path, step: int, *more: str, world: int = 1) -> list[StepBatch]:
    with ThreadPoolExecutor(2) as pool:
        return [
            loader(shards, *more, rank=rank, world=world).load(step, pool)
            for rank in range(world)
        ]


def rows(batches: list[StepBatch]) -> list[tuple[int, bytes, bytes]]:
    """(uid, pixels, text) of every pair of a step, in rank order."""
    found = []
    for batch in batches:
        for micro in batch.micro_batches:
            used = micro.stream.text_used
            for pair, uid in enumerate(micro.uids.tolist()):
                mine = micro.token_ids[:used][micro.stream.text_pair[:used] == pair]
                pixels = micro.pixels[pair].numpy().tobytes()
                found.append((uid, pixels, mine.numpy().tobytes()))
    return found


def test_ranks_and_micro_batches_share_one_global_step(shards: Path) -> None:
    whole = load(shards, 9)
    for world, more in (
        (2, ()),
        (4, ("--micro_batch=2",)),
        (12, ("--micro_batch=1", "--threads=3")),
    ):
        parts = load(shards, 9, *more, world=world)
        assert rows(parts) == rows(whole)
        assert sum_counts([part.counts for part in parts]) == dataclasses.replace(
            whole[0].counts, rows=sum(part.counts.rows for part in parts)
        )


@pytest.mark.parametrize(
    "more", ["--seed=1", "--image.min_scale=0.9", "--mask.heavy_rate=0.5"]
)
def test_digest_changes_with_what_it_covers(shards: Path, more: str) -> None:
    base, other = (load(shards, 3, *words)[0].counts for words in ((), (more,)))
    covered = more != "--image.min_scale=0.9"
    # The draw is digested, not the box made of it.
    assert (base.digest != other.digest) == covered


def test_digest_without_masks_ignores_masks(shards: Path) -> None:
    plain = "--digest=samples"
    first, second = (
        load(shards, 3, plain, *more)[0].counts.digest
        for more in ((), ("--mask.heavy_rate=0.5",))
    )
    assert first == second
    assert first != load(shards, 3)[0].counts.digest


def test_digest_tells_steps_apart(shards: Path) -> None:
    digests = {load(shards, step)[0].counts.digest for step in range(14)}
    assert len(digests) == 14


def test_prefetched_steps_are_those_asked_for_alone(shards: Path) -> None:
    batches = list(loader(shards).steps(2, 8))
    assert [batch.step for batch in batches] == list(range(2, 8))
    assert rows(batches[4:5]) == rows(load(shards, 6))


def test_text_is_cls_words_separator_and_cut_captions_keep_it(shards: Path) -> None:
    special = load_manifest(shards).tokenizer.special_ids
    (batch,) = load(shards, 0, "--text.max_tokens=6")
    assert 0 < batch.counts.cut_captions <= batch.counts.pairs
    for _, _, text in rows([batch]):
        ids = np.frombuffer(text, dtype=np.int64)
        assert ids[0] == special["cls"]
        assert ids[-1] == special["sep"]
        assert len(ids) <= 6
        assert not set(ids[1:-1].tolist()) & {special["cls"], special["sep"]}


def test_capacities_hold_what_the_model_will_mask(shards: Path) -> None:
    reader = loader(shards, "--mask.count=bernoulli")
    with ThreadPoolExecutor(1) as pool:
        for step in range(6):
            batch = reader.load(step, pool)
            for micro in batch.micro_batches:
                masks = reader.masks(
                    micro.uids,
                    micro.stream,
                    micro.epochs,
                    micro.text_capacity,
                    step=micro.step,
                )
                assert int(masks.text.sum()) <= micro.n_masked_words
                assert int(masks.image.any(1).sum()) <= micro.n_recon_images
                assert set(masks.mode.tolist()) <= set(Mode)


@pytest.mark.parametrize(
    "more",
    [
        ("--mask.policy=uniform", "--model.recon_region=whole"),
        ("--mask.count=bernoulli", "--mask.image_block=3"),
        ("--mask.image_block=3", "--digest=samples"),
        ("--mask.schedule.steps=9", "--mask.schedule.heavy_start=0.3"),
    ],
)
def test_what_the_loader_counts_is_what_the_model_masks(
    shards: Path, more: tuple[str, ...]
) -> None:
    reader = loader(shards, *more)
    with ThreadPoolExecutor(1) as pool:
        for step in (0, 4):
            batch = reader.load(step, pool)
            words = pixels = 0
            for micro in batch.micro_batches:
                _, masks = model_inputs(reader, micro)
                words += int(masks.text.sum())
                counts = masks.counts.image
                pixels += int(
                    reader.config.model.recon_pixels(counts, reader.n_image).sum()
                )
            assert (words, pixels) == (
                batch.counts.masked_words,
                batch.counts.recon_pixels,
            )


def test_a_schedule_of_rates_masks_more_from_step_to_step(shards: Path) -> None:
    words = ("--mask.schedule.steps=6", "--mask.schedule.heavy_start=0.2")
    early, late = (load(shards, step, *words)[0].counts for step in (0, 6))
    plain = [load(shards, step)[0].counts for step in (0, 6)]
    assert early.masked_words < plain[0].masked_words
    assert early.recon_pixels < plain[0].recon_pixels
    assert early.digest != plain[0].digest
    assert late == plain[1]


def test_the_full_digest_covers_which_words_are_shown(shards: Path) -> None:
    keys = ((), ("--mask.keep_share=0.5",), ("--mask.random_share=0.5",))
    digests = {load(shards, 3, *more)[0].counts.digest for more in keys}
    assert len(digests) == 3


def test_a_damaged_member_stops_with_shard_and_offset(
    shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    index = np.load(copy / "train/shard-000000.index.npy")
    tar = bytearray((copy / "train/shard-000000.tar").read_bytes())
    for record in index:
        tar[int(record["jpg_offset"]) + 40] ^= 1
    (copy / "train/shard-000000.tar").write_bytes(tar)
    with pytest.raises(ValueError, match=r"shard-000000.tar, offset \d+: jpg of uid"):
        list(loader(copy).steps(0, 8))


def test_threads_share_more_shards_than_are_kept_open() -> None:
    made = []

    def make(key: int) -> np.ndarray:
        made.append(key)
        return np.full(3, key)

    kept = _Kept(make, 4)

    def read(first: int) -> None:
        for key in range(first, first + 400):
            assert kept(key % 23)[0] == key % 23

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(0, 60, 10)))
    before = len(made)
    kept(0), kept(0)
    assert len(made) <= before + 1
    assert len(kept._items) <= 4


def test_a_truncated_or_missing_tar_stops(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar = copy / "train/shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2048])
    with pytest.raises(ValueError, match=r"is damaged.*pipeline\.validate"):
        list(loader(copy).steps(0, 8))
    tar.unlink()
    with pytest.raises(ValueError, match="is missing"):
        list(loader(copy).steps(0, 8))


def test_tokenizer_mismatch_names_both_hashes(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(shards / "tokenizer", other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    expected = load_manifest(shards).tokenizer.sha256
    with pytest.raises(ValueError, match=expected) as caught:
        Dataset(shards, "train", tokenizer=str(other))
    assert len([word for word in str(caught.value).split() if len(word) > 60]) >= 2
    assert len(Dataset(shards, "train", tokenizer=str(shards / "tokenizer"))) > 0


def test_boxes_lie_inside_and_cover_what_they_promise() -> None:
    crop = ImageConfig(size=16, geometry="random_resized_crop", min_scale=0.5)
    generator = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(side) for side in generator.integers(8, 500, 2))
        words = generator.integers(0, 1 << 32, 4)
        box = box_of(crop, width, height, words)
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height
    square = box_of(ImageConfig(), 30, 20, words)
    assert square == Box(5, 0, 25, 20)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 900), (3, 2)])
def test_the_smallest_image_has_a_pixel_in_every_box(size: tuple[int, int]) -> None:
    crop = ImageConfig(size=16, geometry="random_resized_crop", min_scale=0.01)
    generator = np.random.default_rng(0)
    buffer = BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(buffer, "PNG")
    out = np.empty((16, 16, 3), dtype=np.uint8)
    for _ in range(200):
        box = box_of(crop, *size, generator.integers(0, 1 << 32, 4))
        assert 0 <= box.left < box.right <= size[0]
        assert 0 <= box.top < box.bottom <= size[1]
        decode_into(out, memoryview(buffer.getvalue()), size, box)
        assert (out == (9, 99, 199)).all()


@pytest.mark.parametrize("size", [(160, 96), (33, 47)])
def test_decoding_scaled_in_the_dct_domain_stays_close(size: tuple[int, int]) -> None:
    width, height = size
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 200 / width, y * 200 / height, (x + y) * 0.5], axis=2)
    image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    box = box_of(ImageConfig(), width, height, np.zeros(4))
    out = np.empty((16, 16, 3), dtype=np.uint8)
    decode_into(out, memoryview(buffer.getvalue()), size, box)
    exact = image.crop(tuple(map(int, box))).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.abs(out.astype(int) - np.asarray(exact).astype(int)).mean() < 3


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    buffer = BytesIO()
    Image.new("RGB", (48, 32), "green").save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(width: int, height: int) -> bytes:
    buffer = BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("make", [jpeg_claiming, png_of])
def test_an_image_of_another_size_than_the_index_says_is_not_decoded(
    make: Callable[[int, int], bytes],
) -> None:
    out = np.zeros((16, 16, 3), dtype=np.uint8)
    box = Box(0, 0, 48, 32)
    decode_into(out, memoryview(make(48, 32)), (48, 32), box)
    # Only the header can have said so: the JPEG does not decode, and what decodes is
    # complained about in other words.
    with pytest.raises(ValueError, match=r"claims \(9000, 9000\), not \(48, 32\)"):
        decode_into(out, memoryview(make(9000, 9000)), (48, 32), box)


def test_a_tiny_jpeg_that_claims_to_be_huge_takes_no_memory() -> None:
    out = np.zeros((16, 16, 3), dtype=np.uint8)
    data = memoryview(jpeg_claiming(16_000, 16_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"claims|exceeds limit"):
        decode_into(out, data, (48, 32), Box(0, 0, 48, 32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_uids_of_batches_are_those_of_the_index(shards: Path) -> None:
    dataset = Dataset(shards, "train")
    stored = set(dataset.records(dataset.places())["uid"].view(np.int64).tolist())
    seen = torch.cat(
        [
            m.uids
            for step in range(steps_per_epoch(loader(shards).order))
            for b in load(shards, step)
            for m in b.micro_batches
        ]
    )
    assert set(seen.tolist()) <= stored
    steps = steps_per_epoch(loader(shards).order)
    assert len(set(seen.tolist())) == len(seen) == steps * 24
