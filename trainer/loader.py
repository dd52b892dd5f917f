"""Batches: from the places of a step to tensors on the host, ahead of time.

Owns micro-batches, the counts that normalise the losses, and which sample takes the
place of a damaged one. Does not own sample order (`trainer.order`), what is drawn for a
sample (`trainer.rows`), sources (`trainer.sources`), bytes (`trainer.dataset`), the
list of damaged samples (`trainer.quarantine`), masks (`trainer.masking`) or the digest
(`trainer.digest`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.contract import micro_batch_size
from trainer.data_state import DataState
from trainer.dataset import Dataset
from trainer.digest import digest_of, wrap
from trainer.dropout import Draws
from trainer.folder import DamagedError
from trainer.geometry import flipped
from trainer.kernels.mam_masks import mam_masks
from trainer.masking import Masks, mam_counts
from trainer.matching import caption_table
from trainer.models.base import Inputs
from trainer.options import PretrainConfig
from trainer.order import Drawn, SampleOrder
from trainer.quarantine import Quarantine, Quarantined
from trainer.reading import Reading, Slots, chosen_texts, give_way
from trainer.rows import Rows, RowsAhead, rows_of
from trainer.sources import sources_of
from trainer.stream import Stream, capacity, pack

Item = TypeVar("Item")

STEPS_AHEAD = 2
STEPS_HELD = STEPS_AHEAD + 2
"""Steps whose images are in memory at once: the one in use is valid a while longer."""
# Of each lane: the one that it is in and the next.
_WINDOWS_AHEAD = 2
_WORDS_GRAIN = 16


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch on the host."""

    stream: Stream
    token_ids: Tensor
    """(K,) int64."""
    pixels: Tensor
    """(B, S, S, 3) uint8."""
    uids: Tensor
    """(B,) int64, the bits of the uint64 uids."""
    epochs: Tensor
    """(B,) int64, the epoch of each pair's source."""
    images: Tensor
    """(B,) int64, CRC32C of each image file."""
    captions: np.ndarray
    """(B,) which caption of its sample each pair shows."""
    text_capacity: int
    """Text positions that masks are drawn for."""
    n_masked_words: int
    """Capacity for masked words."""
    n_recon_images: int
    """Capacity for images with a masked position."""
    step: int
    """Step that it belongs to, from 0: mask rates may depend on it."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`, copied without blocking the host from pinned memory."""
        return replace(
            self,
            stream=self.stream.to(device),
            token_ids=self.token_ids.to(device, non_blocking=True),
            pixels=self.pixels.to(device, non_blocking=True),
            uids=self.uids.to(device, non_blocking=True),
            epochs=self.epochs.to(device, non_blocking=True),
            images=self.images.to(device, non_blocking=True),
        )

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of it."""
        yield from self.stream.tensors().values()
        yield from (self.token_ids, self.pixels, self.uids, self.epochs, self.images)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one rank's share of a step adds up to; sums over ranks are the step's."""

    pairs: int
    masked_words: int
    recon_pixels: int
    tokens: int
    """Real tokens, text and image."""
    squared_lengths: int
    """Sum over pairs of the square of their tokens."""
    scored_lengths: int
    """Sum over pairs of their tokens times the positions that a loss reads."""
    recon_images: int
    """Images with a masked position."""
    rows: int
    """Stream rows, padding included."""
    cut_captions: int
    """Captions longer than `text.max_tokens`."""
    replaced: int
    """Pairs that stand where a damaged sample would."""
    sources: tuple[int, ...]
    """Pairs of each source."""
    digest: int
    """Order-free digest, a sum of int64 that wraps."""

    @property
    def digest_text(self) -> str:
        """`digest` as `metrics.jsonl` has it: 16 hex digits."""
        return f"{self.digest % (1 << 64):016x}"


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's share of a global step."""

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    counts: Counts
    read_s: float = 0.0
    """Thread seconds that its bytes took."""
    decode_s: float = 0.0
    """Thread seconds that decoding and resizing took."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """B samples as they are read: an image and a text each."""

    pixels: Tensor
    """(B, S, S, 3) uint8."""
    ids: np.ndarray
    """(K,) int64, [CLS] words [SEP] of every sample, end to end."""
    lengths: np.ndarray
    """(B,) ids of each."""
    cut: int
    """Captions that were cut."""
    read_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Made:
    """A micro-batch, and what it was made of."""

    places: np.ndarray
    """(B, 2) of its samples, stand-ins of damaged ones included."""
    batch: MicroBatch
    counts: Counts
    read_s: float
    """Thread seconds of reading."""
    decode_s: float
    """Thread seconds of decoding and resizing."""


class Loader:
    """Batches of one rank for any range of steps.

    Args:
        dataset: the split to read.
        config: the run's keys.
        rank, world_size: which lanes are this rank's.
        quarantined: damaged samples that an earlier part of the run found.
        state: where the order stands; by default that of a run that begins.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: PretrainConfig,
        *,
        rank: int,
        world_size: int,
        quarantined: Sequence[Quarantined] = (),
        state: DataState | None = None,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.quarantine = Quarantine(
            len(dataset), max_share=config.damage.max_share, entries=quarantined
        )
        sources = sources_of(dataset, config.mixture)
        state = state or DataState.fresh(dataset, sources, seed=config.seed)
        self.order = SampleOrder(
            sources,
            seed=config.seed,
            lanes=config.lanes,
            global_batch=config.global_batch,
            shuffle_shards=config.shuffle_shards,
            frozen=state.frozen,
            began=state.began,
        )
        self.order.decided_before(max(state.step, state.decided))
        share = config.lanes // world_size
        self.lanes = range(rank * share, (rank + 1) * share)
        dataset.expect(share * config.shuffle_shards, [one.shards for one in sources])
        self.micro_batch = micro_batch_size(
            global_batch=config.global_batch,
            world_size=world_size,
            ceiling=config.micro_batch,
            group=config.model.group,
        )
        self.ahead = RowsAhead(dataset, config, self.order, self.lanes)
        self.n_image = config.n_image

    def steps(self, start: int, stop: int) -> Iterator[StepBatch]:
        """Batches of steps [start, stop), the next ones made while one is used. Images
        of a batch are valid until the one after the next is asked for.
        """
        side = self.config.image.size
        share = len(self.lanes) * self.order.per_lane
        slots = Slots(STEPS_HELD, (share, side, side, 3))
        with ThreadPoolExecutor(self.config.threads, "decode") as decoders:

            def load(step: int) -> tuple[int, StepBatch]:
                known = len(self.quarantine)
                return known, self.load(step, decoders, slots.of(step))

            with closing(in_advance(load, range(start, stop))) as made:
                for known, batch in made:
                    if known == len(self.quarantine):
                        yield batch
                    else:
                        # Made before damage was known that an earlier step has found.
                        yield self.load(batch.step, decoders, slots.of(batch.step))

    def load(
        self, step: int, decoders: ThreadPoolExecutor, pixels: Tensor | None = None
    ) -> StepBatch:
        """This rank's share of one step; its images in `pixels`, if given."""
        self.hint(step)
        drawn, rows = self.ahead.of(step)
        # No thread can read before the indexes are there. Working out the order is not
        # reading, and one thread waits while another does it.
        indexes_s = self.dataset.spent_on_indexes() * self.config.threads
        parts = list(self._micros(step, drawn, rows, decoders, pixels))
        return StepBatch(
            step=step,
            epoch=self.order.epoch_of(step),
            micro_batches=[part.batch for part in parts],
            counts=sum_counts([part.counts for part in parts]),
            read_s=indexes_s + sum(part.read_s for part in parts),
            decode_s=sum(part.decode_s for part in parts),
        )

    def hint(self, step: int) -> None:
        """Have the shards fetched that are needed from a step on, where they are not on
        a disk here.
        """
        if self.dataset.remote:
            ahead = self.order.shards_ahead(step, self.lanes, windows=_WINDOWS_AHEAD)
            self.dataset.ahead(ahead)

    def micros(self, step: int, decoders: ThreadPoolExecutor) -> Iterator[Made]:
        """This rank's share of one step, a micro-batch at a time."""
        yield from self._micros(step, *self.ahead.of(step), decoders, None)

    def _micros(
        self,
        step: int,
        drawn: Drawn,
        rows: Rows,
        decoders: ThreadPoolExecutor,
        pixels: Tensor | None,
    ) -> Iterator[Made]:
        for first in range(0, len(drawn), self.micro_batch):
            part = slice(first, first + self.micro_batch)
            mine = None if pixels is None else pixels[part]
            yield self._sound(step, drawn.rows(part), rows.part(part), decoders, mine)

    def _sound(
        self,
        step: int,
        drawn: Drawn,
        rows: Rows,
        decoders: ThreadPoolExecutor,
        pixels: Tensor | None,
    ) -> Made:
        """The micro-batch of some samples of a step, none of them damaged."""
        while True:
            sound, replaced = self._replaced(step, drawn, rows)
            try:
                made = self.micro(sound, decoders, pixels, step=step)
            except DamagedError as damage:
                self._quarantine([damage, *damage.also], step)
                continue
            by_source = np.bincount(drawn.sources, minlength=len(self.order.sources))
            sources = tuple(by_source.tolist())
            counts = replace(made.counts, replaced=replaced, sources=sources)
            return replace(made, counts=counts)

    def _quarantine(self, damages: Sequence[DamagedError], step: int) -> None:
        epoch = self.order.epoch_of(step)
        self.quarantine.add(
            Quarantined(
                uid=f"{damage.uid:016x}",
                epoch=epoch,
                step=step,
                reason=damage.reason,
                shard=damage.shard,
            )
            for damage in damages
        )
        try:
            self.quarantine.check(step)
        except ValueError as error:
            raise ValueError(f"{error}; the last: {damages[-1]}") from damages[-1]

    def _replaced(self, step: int, drawn: Drawn, rows: Rows) -> tuple[Rows, int]:
        """Some samples of a step, quarantined ones replaced, and how many."""
        if not len(self.quarantine):
            return rows, 0
        places, replaced = rows.places.copy(), 0
        for row, uid in enumerate(rows.records["uid"].tolist()):
            if self.quarantine.holds(uid, step):
                places[row] = self._stand_in(step, drawn, row)
                replaced += 1
        return self.rows(places, rows.epochs) if replaced else rows, replaced

    def rows(self, places: np.ndarray, epochs: np.ndarray) -> Rows:
        """Samples at `places` (B, 2), each in its epoch (B,)."""
        return rows_of(self.dataset, self.config, places, epochs)

    def _stand_in(self, step: int, drawn: Drawn, row: int) -> np.ndarray:
        """Place of the next sample of a row's lane that is not quarantined, cyclically,
        or of the next lane that has one: the same whichever rank reads the lane, and
        whenever the damage was found.

        Raises:
            ValueError: the source has none.
        """
        found: list[DamagedError] = []
        for places in self.order.following(drawn, row):
            records = self.dataset.records(places)
            for place, record in zip(places, records, strict=True):
                if self.quarantine.holds(int(record["uid"]), step):
                    continue
                # Tried here: of a lost lane, each would cost a reading of the batch.
                damage = self._damage(int(place[0]), record)
                if damage is None:
                    if found:
                        self._quarantine(found, step)
                    return place
                found.append(damage)
        if found:
            self._quarantine(found, step)
        name = self.order.sources[int(drawn.sources[row])].name
        raise ValueError(
            f"all samples of {name or 'the dataset'} are damaged "
            f"({self.quarantine.where()}): "
            f"`python -m pipeline.validate {self.dataset.name}` names every damage"
        )

    def _damage(self, shard: int, record: np.void) -> DamagedError | None:
        """What is wrong with the bytes of a sample."""
        try:
            self.dataset.captions(shard, record)
            self.dataset.check_members(shard, record)
        except DamagedError as damage:
            return damage.with_traceback(None)
        return None

    def micro(
        self,
        rows: Rows,
        decoders: ThreadPoolExecutor,
        pixels: Tensor | None = None,
        *,
        step: int,
    ) -> Made:
        """The micro-batch of some samples, masked as in `step`; its images in `pixels`
        (B, S, S, 3), if given.

        Raises:
            DamagedError: a sample is damaged.
            OSError: storage failed.
        """
        config = self.config
        read = self.read(rows, decoders, pixels)
        stream, token_ids = pack(read.lengths, read.ids, self.n_image)
        give_way()
        text_capacity = -(-int(stream.n_words.max()) // _WORDS_GRAIN) * _WORDS_GRAIN
        text_capacity = max(text_capacity, _WORDS_GRAIN)
        uids, epoch_of = torch.from_numpy(rows.uids), torch.from_numpy(rows.epochs)
        drawn = (uids, stream, epoch_of, text_capacity)
        masks = self.masks(*drawn, step=step) if config.digest == "full" else None
        masked = masks.counts if masks else self._masked(mam_counts, *drawn, step=step)
        give_way()
        n_words = int(masked.text.sum())
        n_images = int((masked.image > 0).sum())
        batch = MicroBatch(
            stream=stream,
            token_ids=token_ids,
            pixels=read.pixels,
            uids=uids,
            epochs=epoch_of,
            images=torch.from_numpy(rows.records["jpg_crc32c"].astype(np.int64)),
            captions=rows.captions,
            text_capacity=text_capacity,
            n_masked_words=capacity(n_words),
            n_recon_images=capacity(n_images),
            step=step,
        )
        matching = self.matching(batch) if config.digest == "full" else None
        lengths = torch.from_numpy(read.lengths + self.n_image)
        scored = config.model.scored_positions(masked, self.n_image)
        counts = Counts(
            pairs=len(rows),
            masked_words=n_words,
            recon_pixels=int(
                config.model.recon_pixels(masked.image, self.n_image).sum()
            ),
            tokens=stream.text_used + len(rows) * self.n_image,
            squared_lengths=int(lengths.square().sum()),
            scored_lengths=int((lengths * scored).sum()),
            recon_images=n_images,
            rows=len(stream.source),
            cut_captions=read.cut,
            replaced=0,
            sources=(),
            digest=digest_of(
                rows, flips=config.image.flip, masks=masks, matching=matching
            ),
        )
        return Made(
            places=rows.places,
            batch=batch,
            counts=counts,
            read_s=read.read_s,
            decode_s=read.decode_s,
        )

    def read(
        self,
        rows: Rows,
        decoders: ThreadPoolExecutor,
        pixels: Tensor | None = None,
    ) -> Samples:
        """Images and texts of some samples, as `micro`, without masks."""
        config = self.config
        give_way()
        side = config.image.size
        if pixels is None:
            pixels = torch.empty((len(rows), side, side, 3), dtype=torch.uint8)
        reading = Reading(
            self.dataset,
            rows.places,
            rows.records,
            rows.reads,
            image=config.image,
            crops=rows.crops,
            flips=flipped(rows.flips),
            pixels=pixels.numpy(),
            decoders=decoders,
            threads=config.threads,
        )
        texts, read_s, decode_s = reading.finish()
        special = self.dataset.tokenizer.special_ids
        ids, lengths, cut = chosen_texts(
            texts,
            rows.captions,
            cls=special["cls"],
            sep=special["sep"],
            max_tokens=config.text.max_tokens,
        )
        give_way()
        return Samples(
            pixels=pixels,
            ids=ids,
            lengths=lengths,
            cut=cut,
            read_s=read_s,
            decode_s=decode_s,
        )

    def masks(
        self,
        uids: Tensor,
        stream: Stream,
        epochs: Tensor,
        text_capacity: int,
        *,
        step: int,
    ) -> Masks:
        """Masks of a micro-batch of a step, on the device that its tensors are on."""
        return self._masked(mam_masks, uids, stream, epochs, text_capacity, step=step)

    def inputs(self, batch: MicroBatch) -> Inputs:
        """What the model is given of a micro-batch, where it lies."""
        return Inputs(
            stream=batch.stream,
            token_ids=batch.token_ids,
            pixels=batch.pixels,
            n_masked_words=batch.n_masked_words,
            n_recon_images=batch.n_recon_images,
            matching=self.matching(batch),
            draws=self.draws(batch),
        )

    def draws(self, batch: MicroBatch) -> Draws | None:
        """What dropout of a micro-batch follows from; None without any."""
        if not self.config.model.drops:
            return None
        return Draws(self.config.seed, batch.epochs, batch.uids)

    def matching(self, batch: MicroBatch) -> Any:
        """What an ITM loss of a micro-batch needs, on the device that its tensors are
        on; None without one.
        """
        return self.config.model.matching(
            seed=self.config.seed,
            epochs=batch.epochs,
            uids=batch.uids,
            images=batch.images,
            captions=lambda: caption_table(
                batch.stream, batch.token_ids, self.config.text.max_tokens
            ),
        )

    def _masked(
        self,
        draws: Callable[..., Item],
        uids: Tensor,
        stream: Stream,
        epochs: Tensor,
        text_capacity: int,
        *,
        step: int,
    ) -> Item:
        """What `mam_masks` or `mam_counts` says of a micro-batch."""
        return draws(
            self.config.mask.at(step),
            seed=self.config.seed,
            epoch=epochs,
            uids=uids,
            n_text=stream.n_words,
            text_capacity=text_capacity,
            n_image=self.n_image,
        )


def in_advance(make: Callable[[int], Item], steps: range) -> Generator[Item]:
    """What `make` gives for each step, in order; it is called in threads, for
    `STEPS_AHEAD` steps beyond the one that is asked for.
    """
    # Two: decoders have work of the next step while one is finished.
    with ThreadPoolExecutor(2, "assemble") as assemblers:
        ahead: deque[Future[Item]] = deque()
        try:
            for step in steps:
                ahead.append(assemblers.submit(make, step))
                if len(ahead) > STEPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def sum_counts(parts: list[Counts]) -> Counts:
    """Counts of several micro-batches together."""
    total: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts)
        for name in Counts.__dataclass_fields__
        if name != "sources"
    }
    sources = tuple(map(sum, zip(*(part.sources for part in parts), strict=True)))
    return Counts(**{**total, "sources": sources, "digest": wrap(total["digest"])})
