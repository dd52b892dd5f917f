"""Pairs that are drawn instead of read, in the loader's own form.

Owns what drawn pairs look like, and the forms of a batch that other designs would take.
Does not own micro-batches, masks or counts: the loader's code makes them
(`trainer.loader`).

Captions have about 24 tokens. An image is a grid of coloured squares and words are
frequent or rare by Zipf's law; both depend on a hidden class of the pair, so that there
is something to learn (`benchmarks.gpu.precision`).

Shapes: B pairs, K text capacity, L longest text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.manifest import INDEX_DTYPE, TokenizerInfo
from trainer.loader import Loader, MicroBatch, Samples, StepBatch, sum_counts
from trainer.masking import Masks
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES
from trainer.reading import reads_of
from trainer.rows import Rows
from trainer.stream import lay_out

BERT_VOCABULARY, TINY_VOCABULARY = 30522, 1500
SPECIAL_IDS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
MODELS = ("mlim-base", "mlim-large-384")
_FIRST_WORD = 1000
_CLASSES = 64
_SQUARES = 8
# Gamma: mean 24 tokens, standard deviation 10, as captions of web images have.
_LENGTH_SHAPE, _LENGTH_SCALE, _SHORTEST = 5.76, 4.17, 3
TINY_WORDS = (
    "--config=emoji",
    "--image.size=32",
    "--model.layers=2",
    "--model.width=64",
    "--model.heads=2",
    "--model.ffn_width=128",
    "--model.embedder_widths=[8,8,8]",
    "--model.embedder_hidden=8",
    "--model.decoder_widths=[8,8,8,8,8]",
)


def recipe(
    name: str, *, pairs: int, tiny: bool = False, words: tuple[str, ...] = ()
) -> PretrainConfig:
    """A recipe with steps of one micro-batch of `pairs`; with `tiny`, of a model that a
    CPU trains.
    """
    chosen = TINY_WORDS if tiny else (f"--config={name}",)
    batch = (f"--global_batch={pairs}", f"--micro_batch={pairs}", "--lanes=1")
    needed = ("--data=none", "--output=none", "--seed=0")
    return parse_run(
        PretrainConfig,
        [*chosen, *batch, *needed, *words],
        prog="benchmarks.gpu",
        description="",
        recipes=RECIPES,
    )


def tokenizer(vocab_size: int) -> TokenizerInfo:
    """What a model has to know of BERT's tokenizer."""
    return TokenizerInfo(
        path="", sha256="", vocab_size=vocab_size, special_ids=SPECIAL_IDS
    )


class Drawn(Loader):
    """The loader of a recipe whose pairs are drawn by a seed."""

    def __init__(
        self, config: PretrainConfig, *, seed: int = 0, tiny: bool = False
    ) -> None:
        # Not the loader's own: that takes a dataset apart, and there is none.
        words = tokenizer(TINY_VOCABULARY if tiny else BERT_VOCABULARY)
        self.dataset: Any = SimpleNamespace(tokenizer=words, name="drawn")
        self.config = config
        self.micro_batch = config.micro_batch
        self.n_image = config.n_image
        self._seed = seed

    def step(self, number: int) -> StepBatch:
        """The batch of a step: one micro-batch."""
        made = self.micro(self._rows(number), None, step=number)  # type: ignore[arg-type]
        return StepBatch(
            step=number,
            epoch=0,
            micro_batches=[made.batch],
            counts=sum_counts([made.counts]),
        )

    def read(self, rows: Rows, decoders: Any, pixels: Tensor | None = None) -> Samples:
        """Drawn images and texts instead of stored ones."""
        rng = np.random.default_rng([self._seed, int(rows.uids[0])])
        count = len(rows)
        classes = rng.integers(_CLASSES, size=count)
        ids, lengths = self._texts(rng, classes)
        return Samples(
            pixels=torch.from_numpy(self._images(rng, classes)),
            ids=ids,
            lengths=lengths,
            cut=0,
            read_s=0.0,
            decode_s=0.0,
        )

    def _rows(self, number: int) -> Rows:
        count = self.micro_batch
        uids = np.arange(number * count, (number + 1) * count, dtype=np.int64)
        records = np.zeros(count, dtype=INDEX_DTYPE)
        records["uid"], records["jpg_crc32c"] = uids, uids
        return Rows(
            places=np.zeros((count, 2), dtype=np.int64),
            epochs=np.zeros(count, dtype=np.int64),
            records=records,
            reads=reads_of(records, self.config.image, id_bytes=2),
            uids=uids,
            captions=np.zeros(count, dtype=np.int64),
            crops=np.zeros((count, 4), dtype=np.int64),
            flips=np.zeros(count, dtype=np.int64),
        )

    def _texts(
        self, rng: np.random.Generator, classes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        longest = self.config.text.max_tokens
        drawn = rng.gamma(_LENGTH_SHAPE, _LENGTH_SCALE, len(classes))
        lengths = np.clip(np.rint(drawn), _SHORTEST, longest).astype(np.int64)
        of_word = np.repeat(classes, lengths)
        rank = np.minimum(rng.zipf(1.5, len(of_word)), 1 << 20) - 1
        words = self.dataset.tokenizer.vocab_size - _FIRST_WORD
        ids = _FIRST_WORD + (rank + of_word * 251) % words
        ends = lengths.cumsum()
        ids[ends - lengths], ids[ends - 1] = SPECIAL_IDS["cls"], SPECIAL_IDS["sep"]
        return ids, lengths

    def _images(self, rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
        side = self.config.image.size
        palette = np.random.default_rng(self._seed).integers(
            256, size=(_CLASSES, _SQUARES, _SQUARES, 3)
        )
        noise = rng.integers(-40, 41, size=(len(classes), _SQUARES, _SQUARES, 3))
        squares = (palette[classes] + noise).clip(0, 255).astype(np.uint8)
        scale = -(-side // _SQUARES)
        large = squares.repeat(scale, axis=1).repeat(scale, axis=2)
        return np.ascontiguousarray(large[:, :side, :side])


def pinned(batch: StepBatch) -> StepBatch:
    """The same with images in pinned memory, where the loader reads them to."""
    micros = [
        replace(micro, pixels=micro.pixels.pin_memory())
        for micro in batch.micro_batches
    ]
    return replace(batch, micro_batches=micros)


def padded(loader: Loader, batch: StepBatch) -> StepBatch:
    """The same pairs and masks with every text padded to the longest allowed, and the
    padding computed like words.
    """
    longest = loader.config.text.max_tokens
    return _each(batch, lambda micro: _padded(micro, longest))


def heads_everywhere(loader: Loader, batch: StepBatch) -> StepBatch:
    """The same with the MLM head at every text row, and every image decoded."""
    return _each(
        batch,
        lambda micro: replace(
            micro,
            n_masked_words=len(micro.token_ids),
            n_recon_images=micro.stream.pairs,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class MaskedOnHost(MicroBatch):
    """A micro-batch that carries the masks that the host has drawn for it."""

    masks: Masks

    def to(self, device: torch.device) -> MaskedOnHost:
        """As that of a micro-batch."""
        moved = super().to(device)
        masks = replace(
            self.masks,
            mode=self.masks.mode.to(device, non_blocking=True),
            text=self.masks.text.to(device, non_blocking=True),
            image=self.masks.image.to(device, non_blocking=True),
        )
        assert isinstance(moved, MaskedOnHost)
        return replace(moved, masks=masks)


def masked_on_host(loader: Loader, batch: StepBatch) -> StepBatch:
    """The same with masks drawn here and now, on the host."""

    def drawn(micro: MicroBatch) -> MicroBatch:
        words = (micro.uids, micro.stream, micro.epochs, micro.text_capacity)
        masks = loader.masks(*words, step=micro.step)
        fields = {f.name: getattr(micro, f.name) for f in dataclasses.fields(micro)}
        return MaskedOnHost(**(fields | {"masks": masks}))

    return _each(batch, drawn)


def _each(batch: StepBatch, change: Any) -> StepBatch:
    return replace(batch, micro_batches=[change(each) for each in batch.micro_batches])


def _padded(micro: MicroBatch, longest: int) -> MicroBatch:
    stream, used = micro.stream, micro.stream.text_used
    wide = lay_out(np.full(stream.pairs, longest), stream.n_image)
    place = stream.text_pair[:used] * longest + stream.text_position[:used]
    ids = micro.token_ids.new_zeros(len(wide.text_pair))
    words = torch.zeros_like(wide.maskable)
    ids[place], words[place] = micro.token_ids[:used], stream.maskable[:used]
    return replace(
        micro,
        token_ids=ids,
        stream=replace(wide, maskable=words, n_words=stream.n_words),
    )
