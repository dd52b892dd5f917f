"""MaskVLM: MLM and MIM with the other modality whole, image-text contrast and matching.

Owns the heads and the losses. Does not own the encoders
(`trainer.models.maskvlm_encoder`), masks (`trainer.masking`), contrast and hard
negatives (`trainer.models.alignment`) or the training step (`trainer.loop`).

Kwon et al., "Masked vision and language modeling for multi-modal representation
learning", 2023. Our reading of what it leaves open: blocks of the image decoder have no
self-attention; pixels are the sigmoid of a linear layer; matching is said by a linear
layer of both [CLS] side by side. Clean passes are made once for all losses, and what
goes through a cross-modality encoder does so at once. A loss whose weight is 0 has no
head and no pass.

Shapes: B pairs, K text capacity, M masked words (capacity), R images with a masked
position (capacity), P image positions, n = P + 1 rows of an image, D width, V
vocabulary, F columns of a table of features, N pairs that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.by_mode import KINDS, sums_of_modes
from trainer.kernels.compact import compact
from trainer.kernels.cross_entropy import masked_cross_entropy
from trainer.kernels.pixel_sse import masked_pixel_error, sums_of_squares
from trainer.mask_config import Mode
from trainer.masking import Masks
from trainer.matching import Matching, caption_table
from trainer.models import alignment
from trainer.models.alignment import Candidates, Temperature
from trainer.models.base import Inputs, Output
from trainer.models.dense import GeluLinear, scores_of_words
from trainer.models.layers import Keys
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.maskvlm_encoder import (
    Across,
    Encoded,
    MaskVlmEncoder,
    Passes,
    Read,
    Shown,
    cross_blocks,
)
from trainer.models.mlim import WordScores, masked_words
from trainer.models.segments import of_images

CONFIG = MaskVlmConfig


class Wanted(NamedTuple):
    """Losses that a micro-batch is asked for."""

    mlm: bool
    mim: bool
    itc: bool
    itm: bool
    drawn: bool
    """ITM with negatives that are drawn, not of the pairs of the micro-batch alone."""

    @property
    def passes(self) -> Passes:
        """What they need of the encoders."""
        whole = self.itc or self.itm
        return Passes(
            clean_images=whole or self.mlm,
            masked_images=self.mim,
            clean_texts=whole or self.mim,
            masked_texts=self.mlm,
        )


class Whole(NamedTuple):
    """N clean pairs that ITM is asked about: those of the batch, k times over."""

    image_of: Tensor
    """(N,) image of each."""
    text_of: Tensor
    """(N,) text of each."""
    drawn: int
    """How many of the texts are drawn."""
    target: Tensor | None = None
    """(B, k) int64, 1: they match."""
    counts: Tensor | None = None
    """(B, k) 0 where there is none to be shown with, 1 elsewhere."""


class Joint(NamedTuple):
    """B pairs whose masked text or image has looked at the clean other, and after them
    pairs that are whole; None where nothing was asked for."""

    image: Across | None
    text: Across | None
    n_whole: int
    """N, pairs that are whole."""
    encoded: Encoded

    @property
    def both(self) -> Tensor:
        """(N, 2 D) [CLS] of image and of text of the pairs that are whole."""
        assert self.image is not None
        assert self.text is not None
        parts = [each.cls(self.n_whole) for each in (self.image, self.text)]
        return torch.cat(parts, 1)


class MaskVlmForPreTraining(MaskVlmEncoder):
    """The encoders with the heads of the losses that have a weight; arguments as
    there.
    """

    def __init__(
        self,
        config: MaskVlmConfig,
        *,
        vocab_size: int,
        special_ids: Mapping[str, int],
        max_text: int,
        image_size: int,
    ) -> None:
        super().__init__(
            config,
            vocab_size=vocab_size,
            special_ids=special_ids,
            max_text=max_text,
            image_size=image_size,
        )
        width, image_eps = config.width, config.image_norm_eps
        if config.mlm_weight:
            self.mlm_dense = GeluLinear(width, width)
            self.mlm_norm = nn.LayerNorm(width, eps=config.text_norm_eps)
            self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))
        if config.mim_weight:
            self.mim_decoder = cross_blocks(
                config, config.decoder_layers, eps=image_eps, self_attention=False
            )
            self.mim_norm = nn.LayerNorm(width, eps=image_eps)
            self.mim_pixels = nn.Linear(width, 3 * config.patch_size**2)
        if config.itc_weight:
            self.itc_image = nn.Linear(width, config.projection_width)
            self.itc_text = nn.Linear(width, config.projection_width)
            self.itc_temperature = Temperature(config.itc_temperature)
        if config.itm_weight:
            self.itm_head = nn.Linear(2 * width, 2)
        self.apply(self.initialise)

    def forward(self, inputs: Inputs, masks: Masks | None) -> Output:
        """Losses of a micro-batch under `masks`; without them its features alone. On
        held-out pairs that are given a `Matching`, ITM of these alone.
        """
        if masks is None:
            encoded = self.encode_pairs(inputs, None, Passes(True, False, True, False))
            zeros = torch.zeros(KINDS, len(Mode), device=inputs.pixels.device)
            features = self.table(encoded, inputs)
            return Output(losses={}, figures={}, by_mode=zeros, features=features)
        wanted = self._wanted(inputs)
        encoded = self.encode_pairs(inputs, masks, wanted.passes)
        zero = torch.zeros((), device=inputs.pixels.device)
        losses = dict.fromkeys((term.name for term in self.config.terms), zero)
        figures = dict.fromkeys((one.name for one in self.config.figures), zero)
        table = None
        if wanted.itc or (wanted.drawn and self.config.itc_weight):
            table = self.table(encoded, inputs)
        if wanted.itc and table is not None:
            losses["itc"] = self._contrast(table, inputs, figures)
        whole = self._whole_pairs(inputs, table) if wanted.itm else None
        words = None
        if wanted.mlm:
            words = masked_words(inputs.stream, masks), inputs.n_masked_words
        joint = self._join(encoded, wanted, words=words, whole=whole)
        if whole is not None:
            losses["itm"], figures["itm_accuracy"] = self._match(joint, whole)
        by_mode = self._reconstruct(joint, inputs, masks, wanted, losses, figures)
        return Output(losses=losses, figures=figures, by_mode=by_mode)

    def encode(self, inputs: Inputs, masks: Masks) -> Joint:
        """Masked pairs that have looked at the clean ones of the other modality."""
        config = self.config
        mlm, mim = bool(config.mlm_weight), bool(config.mim_weight)
        wanted = Wanted(mlm=mlm, mim=mim, itc=False, itm=False, drawn=False)
        encoded = self.encode_pairs(inputs, masks, wanted.passes)
        words = None
        if mlm:
            every = torch.ones_like(inputs.stream.maskable)
            words = every, len(every)
        return self._join(encoded, wanted, words=words, whole=None)

    def table(self, encoded: Encoded, inputs: Inputs) -> Tensor:
        """Features (B, F) of clean pairs, and who is alike (`alignment.table_of`)."""
        stream = inputs.stream
        image_be, text_be = self.project(encoded)
        words = caption_table(stream, inputs.token_ids, encoded.text.longest)
        if isinstance(inputs.matching, Candidates):
            images = inputs.matching.images
        else:
            # Held-out images are not cropped at random: equal files, equal pixels.
            images = alignment.identities(inputs.pixels.flatten(1))
        texts = alignment.identities(words)
        return alignment.table_of(image_be, text_be, images, texts)

    def project(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Projections (B, E) of clean images and texts, before they are normalised."""
        starts = encoded.text.starts[: encoded.stream.pairs]
        image_bd = encoded.image_bnd[: encoded.stream.pairs, 0]
        text_bd = encoded.text_td.index_select(0, starts)
        return self.itc_image(image_bd), self.itc_text(text_bd)

    def matching_logits(
        self, encoded: Encoded, image_of: Tensor, text_of: Tensor
    ) -> Tensor:
        """(N, 2): that clean images and texts of these numbers (N,) do not match, and
        that they do.

        Raises:
            ValueError: a model without an ITM head.
        """
        if not self.config.itm_weight:
            raise ValueError(
                "this model has no ITM head: train one with --model.itm_weight 1"
            )
        none = Wanted(mlm=False, mim=False, itc=False, itm=True, drawn=False)
        whole = Whole(image_of, text_of, len(text_of), None, None)
        joint = self._join(encoded, none, words=None, whole=whole)
        return self.itm_head(joint.both)

    def word_logits(self, hidden_md: Tensor) -> Tensor:
        """(M, D) -> (M, V): RoBERTa's two-layer head, its output tied to the words."""
        h = self.mlm_norm(self.mlm_dense(hidden_md))
        return scores_of_words(h, self.words.weight, self.mlm_bias)

    def score_words(self, joint: Joint, inputs: Inputs, masks: Masks) -> WordScores:
        """Loss of every masked word, zero in rows beyond their number."""
        hidden_k = masked_words(inputs.stream, masks)
        text, valid = compact(hidden_k, inputs.n_masked_words)
        assert joint.text is not None
        logits_mv = self.word_logits(joint.text.at(text))
        target = inputs.token_ids[text]
        nll_m, correct = masked_cross_entropy(logits_mv, target, valid)
        return WordScores(text, nll_m, correct, logits_mv)

    def score_images(
        self, joint: Joint, inputs: Inputs, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """Pair (R,) and absolute error (R,) over the masked pixels of every image with
        a masked position, the mean of their channels, zero in rows beyond their number.
        """
        image, valid = compact(masks.image.any(1), inputs.n_recon_images)
        scored = valid[:, None] & masks.image[image]
        error = masked_pixel_error(
            self._decode(joint, image),
            inputs.pixels,
            image,
            scored,
            side=self.config.patch_size,
            error="absolute",
        )
        return image, error / 3

    def decode_images(self, joint: Joint, inputs: Inputs, image: Tensor) -> Tensor:
        """Reconstructions (R, 3, H, W), 0..1, of the pairs numbered `image` (R,)."""
        return torch.sigmoid(self._decode(joint, image).float())

    def held_out_contrast(self, table: Tensor) -> dict[str, float]:
        """ITC of a table (G, F) of held-out pairs, for metrics."""
        return alignment.held_out_contrast(table, self.itc_temperature)

    def squares(self, pixels_rhw: Tensor) -> Tensor:
        """Sum of a map (R, H, W) over the square of each image position: (R, P)."""
        return sums_of_squares(pixels_rhw, self.config.patch_size)

    def _wanted(self, inputs: Inputs) -> Wanted:
        config, alone = self.config, isinstance(inputs.matching, Matching)
        itm = bool(config.itm_weight) and inputs.matching is not None
        return Wanted(
            mlm=bool(config.mlm_weight) and not alone,
            mim=bool(config.mim_weight) and not alone,
            itc=bool(config.itc_weight) and inputs.contrast is not None and not alone,
            itm=itm,
            drawn=itm and not alone,
        )

    def _contrast(
        self, table: Tensor, inputs: Inputs, figures: dict[str, Tensor]
    ) -> Tensor:
        assert inputs.contrast is not None
        found = alignment.contrast(table, inputs.contrast, self.itc_temperature)
        figures["itc_image_to_text_r1"] = found.image_to_text
        figures["itc_text_to_image_r1"] = found.text_to_image
        figures["itc_temperature"] = found.temperature * len(table)
        return found.loss

    def _whole_pairs(self, inputs: Inputs, table: Tensor | None) -> Whole:
        """What ITM is asked about."""
        drawn, pairs = inputs.matching, inputs.stream.pairs
        own = torch.arange(pairs, device=inputs.pixels.device)
        if isinstance(drawn, Matching):
            counts = torch.ones(pairs, 1, device=own.device)
            return Whole(own, own, 0, drawn.matched[:, None].long(), counts)
        group = self.config.itm_group
        similarity = torch.zeros(pairs // group, group, group, device=own.device)
        if table is not None:
            image_be, text_be = alignment.projections(table.detach())
            with torch.no_grad():
                factor = self.itc_temperature()
            image_gne, text_gne = (
                x.unflatten(0, (-1, group)) for x in (image_be, text_be)
            )
            similarity = factor * image_gne @ text_gne.transpose(1, 2)
        other = alignment.hard_negatives(drawn, similarity)
        every = torch.ones_like(own)
        return Whole(
            image_of=torch.cat([own, own, other.image_of]),
            text_of=torch.cat([own, other.text_of, own]),
            drawn=pairs,
            target=torch.stack([every, 0 * every, 0 * every], 1),
            counts=torch.stack([every, other.found, other.found], 1).float(),
        )

    def _join(
        self,
        encoded: Encoded,
        wanted: Wanted,
        *,
        words: tuple[Tensor, int] | None,
        whole: Whole | None,
    ) -> Joint:
        """Masked and whole pairs through the cross-modality encoders.

        Args:
            words: the text rows (K,) that MLM reads, and how many at most.
        """
        stream, rows = encoded.stream, self.image_rows
        device = stream.source.device
        own = torch.arange(stream.pairs, device=device)
        image_of, text_of, drawn = (own[:0], own[:0], 0) if whole is None else whole[:3]
        n_whole, image, text = len(image_of), None, None
        none = torch.zeros(0, dtype=torch.bool, device=device)
        if wanted.mim or n_whole:
            masked = own[: len(own) * wanted.mim]
            query = torch.cat([masked + encoded.masked_image, image_of])
            every = none.new_ones(len(masked) * rows)
            image = self.images_across(
                encoded,
                Shown(query, torch.cat([masked, text_of]), drawn),
                Read(every, len(every), n_whole),
            )
        if words or n_whole:
            masked = own[: len(own) * wanted.mlm]
            query = torch.cat([masked + encoded.masked_text, text_of])
            first, count = words or (none, 0)
            text = self.texts_across(
                encoded,
                Shown(query, torch.cat([masked, image_of]), drawn),
                Read(first[: stream.text_used], count, n_whole),
            )
        return Joint(image, text, n_whole, encoded)

    def _match(self, joint: Joint, whole: Whole) -> tuple[Tensor, Tensor]:
        """ITM loss, for each pair the mean over what it is shown with, and how much of
        that is right.
        """
        assert whole.target is not None
        assert whole.counts is not None
        # What a pair is shown with stands pairs apart.
        logits = self.itm_head(joint.both).float().unflatten(0, (-1, len(whole.target)))
        target, counts = whole.target.T, whole.counts.T
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        right = (logits.argmax(2) == target).float()
        share = counts / counts.sum(0)
        return (nll.view_as(share) * share).sum(), (right * share).sum()

    def _reconstruct(
        self,
        joint: Joint,
        inputs: Inputs,
        masks: Masks,
        wanted: Wanted,
        losses: dict[str, Tensor],
        figures: dict[str, Tensor],
    ) -> Tensor:
        """Put MLM and MIM among losses and figures; both by mode."""
        pairs = torch.arange(len(masks.mode), device=masks.mode.device)
        nothing = (pairs, torch.zeros_like(pairs))
        words, n_words, images, n_images = nothing, nothing, nothing, nothing
        if wanted.mlm:
            scores = self.score_words(joint, inputs, masks)
            losses["mlm"] = scores.nll.sum()
            figures["mlm_accuracy"] = scores.correct.sum()
            words = inputs.stream.text_pair[scores.text], scores.nll
            n_words = pairs, masks.counts.text
        if wanted.mim:
            images = self.score_images(joint, inputs, masks)
            losses["mim"] = images[1].sum()
            n_images = pairs, masks.counts.image
        return sums_of_modes(masks.mode, [words, images, n_words, n_images])

    def _decode(self, joint: Joint, image: Tensor) -> Tensor:
        """(R, 3, H, W) before the sigmoid, of the pairs numbered `image` (R,)."""
        assert joint.image is not None
        encoded, n_image = joint.encoded, self.grid**2
        pairs = encoded.stream.pairs
        every = torch.arange(pairs * self.image_rows, device=image.device)
        # Without [CLS].
        row = every.view(pairs, -1)[:, 1:]
        x_td = joint.image.at(row.flatten())
        layout = of_images(pairs, n_image, image.device)
        own = torch.arange(pairs, device=image.device)
        keys = Keys(*self.texts_of(encoded, own))
        rest = (encoded.clean_text_td, layout, keys)
        drop = self._dropout("mim_decoder", encoded.draws, layout)
        x_td = self.mim_norm(self._through(self.mim_decoder, x_td, *rest, drop=drop))
        x_rpd = x_td.unflatten(0, (pairs, n_image)).index_select(0, image)
        side, grid = self.config.patch_size, self.grid
        shape = (grid, grid, 3, side, side)
        square = self.mim_pixels(x_rpd).flatten(1).unflatten(1, shape)
        tiled = square.permute(0, 3, 1, 4, 2, 5)
        return tiled.reshape(len(image), 3, grid * side, grid * side)
