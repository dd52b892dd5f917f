"""What a plan needs to know of a dataset, or has to assume without one.

Owns lengths, sizes and the work of a step, from the indexes of a part of the shards.
Does not own the checks of a run, which are the loader's (`trainer.loader`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.manifest import TokenizerInfo
from trainer.build import require_start
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.masking import mam_counts
from trainer.options import PretrainConfig
from trainer.philox import signed_uids
from trainer.plan_memory import Shapes
from trainer.stream import capacity

# Indexes of so many shards, spread over the dataset, are read.
_SHARDS = 64
_ASSUMED_PAIRS = 4096
_SPECIAL = ("pad", "unk", "cls", "sep", "mask")
# A run takes thousands of micro-batches, of which the largest decides.
_SIGMAS = 4


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A dataset as a plan sees it. None stands for what is not known without one."""

    tokenizer: TokenizerInfo
    pairs: int | None
    """In the split."""
    sources: tuple[tuple[str, int, float], ...]
    """Name, pairs and share of the draws of each source of a mixture."""
    steps_per_epoch: int | None
    """None in a mixture too, whose sources have epochs of their own."""
    sampled: int
    """Pairs that the figures below are means over."""
    uids: np.ndarray
    """(n,) int64, of the pairs that were looked at."""
    lengths: np.ndarray
    """(n,) tokens of each text, special tokens included, cut to `text.max_tokens`."""
    cut: float | None
    """Share of captions that are cut, taking those of an image to be of one length."""
    read_bytes: float | None
    """What is read of a pair: image and token ids, or a URL's whole tar."""
    decode_s: float | None
    """Thread seconds that reading and decoding a pair took here."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Mean work of a number of pairs (`trainer.flops.Work`)."""

    pairs: float
    tokens: float
    squared_lengths: float
    scored_lengths: float
    masked_words: float
    recon_images: float


def facts_without_data(
    config: PretrainConfig, *, vocab_size: int, text_tokens: int | None
) -> Facts:
    """What is assumed: every text has so many tokens, or as many as `text.max_tokens`
    allows.
    """
    longest = config.text.max_tokens
    names = {name: number for number, name in enumerate(_SPECIAL)}
    return Facts(
        tokenizer=TokenizerInfo(
            path="", sha256="", vocab_size=vocab_size, special_ids=names
        ),
        pairs=None,
        sources=(),
        steps_per_epoch=None,
        sampled=0,
        uids=np.arange(_ASSUMED_PAIRS, dtype=np.int64),
        lengths=np.full(_ASSUMED_PAIRS, min(text_tokens or longest, longest)),
        cut=None,
        read_bytes=None,
        decode_s=None,
    )


def facts_of(config: PretrainConfig, *, ranks: int, decode: int) -> Facts:
    """Read manifest and indexes, and decode some pairs to see how long that takes.

    Raises:
        ValueError, OSError: what `trainer.pretrain` would raise on such a dataset.
    """
    dataset = Dataset(
        config.data,
        config.split,
        tokenizer=config.tokenizer,
        growing=config.grow,
        storage=config.storage,
    )
    try:
        require_start(config, dataset)
        loader = Loader(dataset, config, rank=0, world_size=ranks)
        places = _places(dataset)
        records = dataset.records(places)
        words = records["n_tokens"] / np.maximum(records["n_captions"], 1)
        # [CLS] is added to words and separator.
        lengths = np.rint(words).astype(np.int64) + 1
        longest = config.text.max_tokens
        order = loader.order
        within = order.epoch_steps(0)
        return Facts(
            tokenizer=dataset.tokenizer,
            pairs=len(dataset),
            sources=tuple(
                (source.name, int(source.counts.sum()), order.share_of(number))
                for number, source in enumerate(order.sources)
                if order.mixture
            ),
            steps_per_epoch=within[1] if within else None,
            sampled=len(places),
            uids=signed_uids(records["uid"]),
            lengths=np.clip(lengths, 3, longest),
            cut=float((lengths > longest).mean()),
            read_bytes=_read_bytes(dataset, records),
            decode_s=_decode_seconds(loader, places, decode),
        )
    finally:
        dataset.close()


def expected(config: PretrainConfig, facts: Facts, pairs: int) -> Expected:
    """Mean work of so many pairs, under the masks of epoch 0."""
    means = {name: values.mean() for name, values in _each(config, facts).items()}
    return Expected(pairs=pairs, **{name: pairs * mean for name, mean in means.items()})


def shapes(config: PretrainConfig, facts: Facts, pairs: int) -> Shapes:
    """The largest micro-batch of so many pairs that is to be reckoned with."""
    each, n_image = _each(config, facts), config.n_image
    text = facts.lengths
    used, longest = _largest(text, pairs), int(text.max()) + n_image
    # Rows that a capacity leaves over are segments of the table too.
    spare = -(-(capacity(used) - used) // longest)
    images = min(capacity(_largest(each["recon_images"], pairs)), pairs)
    return Shapes(
        pairs=pairs,
        rows=capacity(used) + pairs * n_image,
        table=(pairs + spare) * longest,
        masked_words=capacity(_largest(each["masked_words"], pairs)),
        recon_images=images if config.model.scores_images else 0,
    )


def _each(config: PretrainConfig, facts: Facts) -> dict[str, np.ndarray]:
    """What each pair that was looked at adds to a step's work."""
    n_image = config.n_image
    tokens = facts.lengths + n_image
    masked = mam_counts(
        config.mask,
        seed=config.seed,
        epoch=0,
        uids=torch.from_numpy(facts.uids),
        n_text=torch.from_numpy(facts.lengths - 2),
        text_capacity=int(facts.lengths.max()),
        n_image=n_image,
    )
    scored = config.model.scored_positions(masked, n_image)
    return {
        "tokens": tokens,
        "squared_lengths": tokens.astype(np.float64) ** 2,
        "scored_lengths": tokens * scored.numpy(),
        "masked_words": masked.text.numpy(),
        "recon_images": (masked.image > 0).numpy(),
    }


def _largest(values: np.ndarray, pairs: int) -> int:
    """What the sum over so many drawn pairs hardly ever exceeds."""
    spread = _SIGMAS * values.std() * pairs**0.5
    most = pairs * float(values.max())
    return int(np.ceil(min(pairs * values.mean() + spread, most)))


def _places(dataset: Dataset) -> np.ndarray:
    """Places (n, 2) of all pairs of some shards, spread over the dataset."""
    numbered = list(dataset.numbered())
    chosen = np.linspace(0, len(numbered) - 1, min(_SHARDS, len(numbered)))
    parts = [
        np.stack([np.full(entry.samples, number), np.arange(entry.samples)], axis=1)
        for number, entry in (numbered[int(one)] for one in np.rint(chosen))
    ]
    return np.concatenate(parts)


def _read_bytes(dataset: Dataset, records: np.ndarray) -> float:
    if dataset.remote:
        shards = [entry for _, entry in dataset.numbered()]
        return sum(entry.bytes for entry in shards) / len(dataset)
    return float(records["jpg_size"].mean() + records["ids_size"].mean())


def _decode_seconds(loader: Loader, places: np.ndarray, count: int) -> float | None:
    """Thread seconds a pair, of some pairs; None where they are to be fetched first."""
    if not count or loader.dataset.remote:
        return None
    chosen = places[
        np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)
    ]
    rows = loader.rows(chosen, np.zeros(len(chosen), dtype=np.int64))
    with ThreadPoolExecutor(1) as decoders:
        # Libraries are loaded by the first ones.
        loader.read(rows.part(slice(8)), decoders)
        samples = loader.read(rows, decoders)
    return float(samples.read_s + samples.decode_s) / len(chosen)
