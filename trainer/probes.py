"""Two probes of information crossing between modalities, on held-out pairs.

Owns the measurement: the loss of words with the true, another pair's and a blank image;
the loss of pixels with the true, another pair's and an empty caption, under the same
masks. Does not own the losses (each model's) or the pictures (`trainer.figures`).

Arici et al. 2021 (MLIM), section 5: a model that uses one modality to restore the other
loses when the partner is wrong. Words are masked as in text-heavy mode, pixels as in
image-heavy mode, the modes in which the partner is clean. It is the same protocol for
every model: partners, masks and pairs depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.dataset import Dataset
from trainer.folder import DamagedError
from trainer.geometry import box_of, decode_into
from trainer.masking import Masks, Mode, mam
from trainer.models.base import Inputs, Restoring
from trainer.models.mlim import masked_words
from trainer.options import ImageConfig, PretrainConfig
from trainer.philox import Use, permutation, signed_uids
from trainer.rows import caption_choice
from trainer.stream import pack

_BLANK = 255
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Held-out pairs in memory: N pairs, images of S pixels a side."""

    uids: np.ndarray
    """(N,) int64."""
    pixels: np.ndarray
    """(N, S, S, 3) uint8, without augmentation."""
    texts: list[np.ndarray]
    """[CLS] words [SEP] of each pair."""
    groups: np.ndarray
    """(N,) what the bootstrap resamples together."""
    numbers: np.ndarray
    """(N,) which of the pairs that were drawn each is, ascending: damaged ones may be
    left out."""
    drawn: int
    """How many were drawn."""

    def __len__(self) -> int:
        return len(self.uids)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Loss of every pair under one condition, summed over mask draws."""

    sums: np.ndarray
    """(N,) summed loss."""
    counts: np.ndarray
    """(N,) words or pixels that the sum runs over."""

    @property
    def means(self) -> np.ndarray:
        """(N,) of each pair; nan where nothing is masked."""
        found = np.full(len(self.sums), np.nan)
        return np.divide(self.sums, self.counts, out=found, where=self.counts > 0)


def load_pairs(
    dataset: Dataset,
    config: PretrainConfig,
    *,
    seed: int,
    limit: int | None,
    group: str | None,
) -> Pairs:
    """The first `limit` pairs of a split in an order drawn by `seed`, one caption each.

    Args:
        group: json key whose equal values are resampled together; None: each alone.

    Raises:
        ValueError: the samples have no json key `group`.
    """
    places = drawn_places(dataset, seed=seed, limit=limit)
    return read_pairs(dataset, config, places, seed=seed, group=group)


def drawn_places(dataset: Dataset, *, seed: int, limit: int | None) -> np.ndarray:
    """Places (N, 2) of the first `limit` pairs of a split in an order drawn by
    `seed`.
    """
    places = dataset.places()
    order = permutation(len(places), seed=seed, use=Use.EVALUATION, epoch=0, place=0)
    return places[order[:limit]]


def read_pairs(
    dataset: Dataset,
    config: PretrainConfig,
    places: np.ndarray,
    *,
    seed: int,
    group: str | None = None,
    left_out: Collection[int] = (),
    damage: list[DamagedError] | None = None,
) -> Pairs:
    """The pairs at `places` (N, 2), the caption of each drawn by `seed`. All members of
    their samples are checked, those that no pair is made of included.

    Args:
        group: as in `load_pairs`.
        left_out: uids of pairs that are not read.
        damage: told of every damaged pair, whose row then means nothing; None: the
            first is raised.

    Raises:
        ValueError: a damaged pair, or no json key `group`.
    """
    # They are read one after the other, in this order.
    dataset.indexes_ahead(np.unique(places[:, 0]).tolist())
    drawn, records = len(places), dataset.records(places)
    numbers = np.flatnonzero(~uids_among(records, left_out))
    places, records = places[numbers], records[numbers]
    was_read = dataset.ahead_in_order(places[:, 0])
    uids = signed_uids(records["uid"])
    choice = caption_choice(records, uids, seed=seed, epoch=0)
    side = config.image.size
    pixels = np.empty((len(places), side, side, 3), dtype=np.uint8)
    plain = config.image.geometry == "resize"
    geometry = ImageConfig(size=side, geometry="resize" if plain else "center_crop")

    def read(row: int) -> np.ndarray:
        record, shard = records[row], int(places[row, 0])
        size = int(record["width"]), int(record["height"])
        box = box_of(geometry, *size, np.zeros(4))
        jpeg = dataset.jpeg(shard, record)
        try:
            decode_into(pixels[row], jpeg, size, box)
        except ValueError as error:
            raise dataset.undecodable(shard, record, error) from error
        text, _ = dataset.text(
            shard, record, int(choice[row]), max_tokens=config.text.max_tokens
        )
        # Last: of what is damaged in them, image and text say more.
        dataset.check_members(shard, record)
        return text

    def read_or_tell(row: int) -> np.ndarray:
        try:
            return read(row)
        except DamagedError as error:
            if damage is None:
                raise
            damage.append(error)
            return np.empty(0, dtype=np.int64)
        finally:
            was_read(row)

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(read_or_tell, range(len(places))))
    return Pairs(
        uids=uids,
        pixels=pixels,
        texts=texts,
        groups=_groups(dataset, places, records, group),
        numbers=numbers,
        drawn=drawn,
    )


def uids_among(records: np.ndarray, uids: Collection[int]) -> np.ndarray:
    """Whether the uid of each index record (N,) is one of `uids`."""
    return np.isin(records["uid"], np.array(sorted(uids), dtype=np.uint64))


def probes_in(result: Mapping[str, Any]) -> dict[str, Any]:
    """The probes by name of what `probes.json` holds beside other facts."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, dict) and "conditions" in value
    }


def partners(pairs: Pairs, *, seed: int) -> np.ndarray:
    """Another pair for each pair (N,), never itself: the next one on a drawn ring, past
    those of the same group while there is another group. Pairs that are left out change
    the partners of those alone that had them.
    """
    ring = permutation(pairs.drawn, seed=seed, use=Use.EVALUATION, epoch=1, place=0)
    row_of = np.full(pairs.drawn, -1)
    row_of[pairs.numbers] = np.arange(len(pairs))
    ring = row_of[ring]
    ring = ring[ring >= 0]
    partner = np.empty(len(pairs), dtype=np.int64)
    for place, pair in enumerate(ring):
        ahead = np.roll(ring, -place - 1)[:-1]
        other = pairs.groups[ahead] != pairs.groups[pair]
        partner[pair] = ahead[int(np.argmax(other))]
    return partner


def with_rates(
    config: PretrainConfig, *, text: float | None, image: float | None
) -> PretrainConfig:
    """The same run with other shares of words and of image positions masked; None: as
    it has them.
    """
    mask = config.mask
    mask = replace(
        mask,
        heavy_text_rate=mask.heavy_text_rate if text is None else text,
        heavy_image_rate=mask.heavy_image_rate if image is None else image,
    )
    return replace(config, mask=mask)


def measure(
    model: Restoring,
    config: PretrainConfig,
    pairs: Pairs,
    *,
    seed: int,
    draws: int,
    batch: int,
    device: torch.device,
    progress: tqdm[Any],
) -> dict[str, dict[str, Losses]]:
    """Losses of every pair under each condition, by the name of the loss: those of
    words and pixels that the model `restores`.
    """
    partner = partners(pairs, seed=seed)
    own, nobody = np.arange(len(pairs)), None
    empty = [text[[0, -1]] for text in pairs.texts]
    other_texts = [pairs.texts[int(other)] for other in partner]
    conditions: dict[str, dict[str, tuple[np.ndarray | None, list[np.ndarray]]]] = {
        config.model.word_loss: {
            "true": (own, pairs.texts),
            "shuffled": (partner, pairs.texts),
            "blank": (nobody, pairs.texts),
        },
        config.model.image_loss: {
            "true": (own, pairs.texts),
            "shuffled": (own, other_texts),
            "empty": (own, empty),
        },
    }
    results: dict[str, dict[str, Losses]] = {}
    for probe in config.model.restores:
        shown, words = conditions[probe], probe == config.model.word_loss
        mode = Mode.TEXT_HEAVY if words else Mode.IMAGE_HEAVY
        results[probe] = {}
        for name, (whose, texts) in shown.items():
            sums, counts = np.zeros(len(pairs)), np.zeros(len(pairs))
            for number in range(draws):
                for rows in _batches(len(pairs), batch):
                    inputs, masks = make_inputs(
                        config,
                        uids=pairs.uids[rows],
                        pixels=_pixels(pairs, whose, rows),
                        texts=[texts[row] for row in rows],
                        seed=seed,
                        draw_number=number,
                        mode=mode,
                        device=device,
                    )
                    loss, count = _pair_losses(model, inputs, masks, words=words)
                    sums[rows] += loss
                    counts[rows] += count
                    progress.update(len(rows))
            results[probe][name] = Losses(sums=sums, counts=counts)
    return results


def summarise(
    losses: Mapping[str, Losses], groups: np.ndarray, seed: int
) -> dict[str, Any]:
    """Means and 95 % bootstrap intervals of each condition, and of how much worse each
    wrong partner is than the true one. Groups are resampled whole, conditions together.
    """
    _, group = np.unique(groups, return_inverse=True)
    n_groups = int(group.max()) + 1
    generator = np.random.Generator(np.random.Philox(key=seed))
    # How often each resample takes each group: (resamples, groups).
    even = np.full(n_groups, 1 / n_groups)
    taken = generator.multinomial(n_groups, even, size=_RESAMPLES).astype(np.float64)

    def means(loss: Losses) -> tuple[float, np.ndarray]:
        sums = np.bincount(group, loss.sums)
        counts = np.bincount(group, loss.counts)
        resampled = (taken @ sums) / np.maximum(taken @ counts, 1)
        return float(sums.sum() / max(counts.sum(), 1)), resampled

    values = {name: means(loss) for name, loss in losses.items()}
    true_mean, true_resampled = values["true"]
    return {
        "conditions": {
            name: {"mean": mean, "ci95": _interval(resampled)}
            for name, (mean, resampled) in values.items()
        },
        "gaps": {
            name: {
                "mean": mean - true_mean,
                "ci95": _interval(resampled - true_resampled),
            }
            for name, (mean, resampled) in values.items()
            if name != "true"
        },
    }


def make_inputs(
    config: PretrainConfig,
    *,
    uids: np.ndarray,
    pixels: np.ndarray,
    texts: list[np.ndarray],
    seed: int,
    draw_number: int,
    mode: Mode,
    device: torch.device,
) -> tuple[Inputs, Masks]:
    """A micro-batch of given pixels and texts with evaluation masks of one mode."""
    n_image = config.n_image
    lengths = np.array([len(text) for text in texts])
    stream, token_ids = pack(lengths, np.concatenate(texts), n_image)
    masks = mam(
        config.mask,
        seed=seed,
        epoch=draw_number,
        uids=torch.from_numpy(uids),
        n_text=stream.n_words,
        text_capacity=max(int(stream.n_words.max()), 1),
        n_image=n_image,
        mode=mode,
    )
    inputs = Inputs(
        stream=stream.to(device),
        token_ids=token_ids.to(device),
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)).to(device),
        n_masked_words=max(int(masked_words(stream, masks).sum()), 1),
        n_recon_images=max(int(masks.image.any(1).sum()), 1),
    )
    # Every masked word is hidden, also where training shows some (`mask.keep_share`).
    moved = Masks(
        mode=masks.mode.to(device),
        text=masks.text.to(device),
        image=masks.image.to(device),
    )
    return inputs, moved


def _pixels(pairs: Pairs, whose: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Images shown to pairs `rows`: those of the pairs `whose` says, or blank ones."""
    if whose is None:
        return np.full_like(pairs.pixels[rows], _BLANK)
    return pairs.pixels[whose[rows]]


def _pair_losses(
    model: Restoring, inputs: Inputs, masks: Masks, *, words: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and count (B,) of each pair of a micro-batch."""
    loss = torch.zeros(inputs.stream.pairs, device=inputs.pixels.device)
    with torch.inference_mode():
        hidden_td = model.encode(inputs, masks)
        if words:
            scores = model.score_words(hidden_td, inputs, masks)
            loss.index_add_(0, inputs.stream.text_pair[scores.text], scores.nll)
            count: Tensor = masks.text.sum(1)
        else:
            image, error = model.score_images(hidden_td, inputs, masks)
            loss.index_add_(0, image, error)
            masked = masks.counts.image
            count = model.config.recon_pixels(masked, masks.image.shape[1])
    return loss.cpu().numpy().astype(np.float64), count.cpu().numpy()


def _groups(
    dataset: Dataset, places: np.ndarray, records: np.ndarray, key: str | None
) -> np.ndarray:
    if key is None:
        return np.arange(len(places))
    values = []
    was_read = dataset.ahead_in_order(places[:, 0])
    for row, ((shard, _), record) in enumerate(zip(places, records, strict=True)):
        sample = dataset.json(int(shard), record)
        was_read(row)
        if key not in sample:
            raise ValueError(
                f"--group {key!r} is not in the samples' json, which has "
                f"{', '.join(sample)}: preprocess with --columns.keep {key}"
            )
        values.append(str(sample[key]))
    return np.array(values)


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _interval(resampled: np.ndarray) -> list[float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return [float(low), float(high)]
