"""MLIM: one stream of word and image tokens; MLM and RECON losses, ITM if asked for.

Owns the model and its losses. Does not own masks (`trainer.masking`), which image a
text is matched with (`trainer.matching`), the layout of the stream (`trainer.stream`)
or the training step (`trainer.loop`).

Arici et al., "MLIM: Vision-and-language model pre-training with masked language and
image modeling", 2021. The shallow CNN embedder downsamples by 2x2 kernels of stride 2,
so an image token sees exactly its own square of pixels and masking it hides them.

Shapes: B pairs, T stream rows, K text capacity, M masked words (capacity), R images
with a masked position (capacity), P image tokens, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.by_mode import sums_of_modes
from trainer.dropout import Dropout, beyond
from trainer.kernels.compact import compact
from trainer.kernels.cross_entropy import masked_cross_entropy
from trainer.kernels.dropout import dropped
from trainer.kernels.mam_embed import Embedding, mam_embed
from trainer.kernels.pixel_sse import masked_pixel_error, sums_of_squares
from trainer.kernels.pixels import nested, normalised
from trainer.kernels.take_rows import take_rows
from trainer.masking import Masks
from trainer.models.base import Inputs, Output
from trainer.models.convolutions import SquareConv, Stack, TransposedConv
from trainer.models.dense import GeluLinear, scores_of_words
from trainer.models.layers import Block
from trainer.models.mlim_config import MlimConfig
from trainer.models.scored_rows import Rows, first_rows, scored_rows
from trainer.replacement import random_words
from trainer.stream import Stream

CONFIG = MlimConfig


class WordScores(NamedTuple):
    """What the MLM head says of M masked words; M is a capacity."""

    text: Tensor
    """(M,) text row of each."""
    nll: Tensor
    """(M,) negative log likelihood, fp32, 0 beyond their number."""
    correct: Tensor
    """(M,) bool: the most likely token is the true one."""
    logits: Tensor
    """(M, V); on CUDA a backward pass leaves their gradient there."""


class MlimEncoder(nn.Module):
    """Embeddings and transformer. With `recompute`, layers keep only their inputs for
    the backward pass. Weights are drawn by `apply(initialise)`.

    Args:
        config: the model keys of a recipe.
        vocab_size: V, from the dataset's tokenizer.
        special_ids: ids by name; `mask` is needed. None of them is shown as a random
            word (`mask.random_share`).
        max_text: longest text in tokens.
        image_size: side of the input square in pixels.
    """

    def __init__(
        self,
        config: MlimConfig,
        *,
        vocab_size: int,
        special_ids: Mapping[str, int],
        max_text: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.mask_id = special_ids["mask"]
        self.ids_by_name = dict(special_ids)
        self.special_ids = tuple(special_ids.values())
        self.grid = image_size // config.patch_size
        width, eps = config.width, config.norm_eps
        self.words = nn.Embedding(vocab_size, width)
        self.text_positions = nn.Embedding(max_text, width)
        self.image_positions = nn.Embedding(self.grid**2, width)
        self.embedder = _embedder(config)
        self.embedding_norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(
            Block(
                width=width,
                heads=config.heads,
                ffn_width=config.ffn_width,
                norm=config.norm,
                eps=eps,
            )
            for _ in range(config.layers)
        )
        pre = config.norm == "pre"
        self.final_norm = nn.LayerNorm(width, eps=eps) if pre else nn.Identity()

    def encode(
        self,
        inputs: Inputs,
        masks: Masks | None,
        image_bpd: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Hidden states (T, D) of the stream, masked embeddings replaced.

        Args:
            masks: None hides nothing.
            image_bpd: image embeddings instead of those of `inputs.pixels`, which are
                not looked at then, nor where the stream has no image tokens.
            rows: give hidden states (N, D) of these rows alone, for which the last
                layer does less.
        """
        stream = inputs.stream
        if image_bpd is None and stream.n_image:
            image_bpd = self.embed_pixels(inputs.pixels)
        x_td = mam_embed(self._embedding(inputs, masks, image_bpd))
        drop = self._dropout(inputs, whole=masks is None)
        x_td, drop = dropped(x_td, drop), beyond(drop, 1)
        for block in self.blocks:
            of_last = rows if block is self.blocks[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x_td = checkpoint(
                    block,
                    *(x_td, stream, of_last, drop),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_td = block(x_td, stream, of_last, drop)
            drop = beyond(drop, Block.sites)
        return self.final_norm(x_td)

    def _dropout(self, inputs: Inputs, *, whole: bool) -> Dropout | None:
        """Of the stream's rows after the embeddings, whose pairs are whole or masked;
        None: nothing is dropped.
        """
        config, draws = self.config, inputs.draws
        if not (config.dropout and self.training) or draws is None:
            return None
        stack = config.dropout_stack
        return stack.rows(config.dropout, draws, inputs.stream, first=int(whole))

    def _embedding(
        self, inputs: Inputs, masks: Masks | None, image_bpd: Tensor | None
    ) -> Embedding:
        """What the embedding stage is given."""
        stream = inputs.stream
        shown_k, hidden_k = inputs.token_ids, None
        if masks is not None:
            shown_k, hidden_k = self.shown_words(inputs, masks)
        return Embedding(
            shown=shown_k,
            hidden_text=hidden_k,
            text_position=stream.text_position,
            hidden_image=None if masks is None else masks.image,
            source=stream.source,
            text_row=stream.text_row,
            image_row=stream.image_row,
            words=self.words.weight,
            text_positions=self.text_positions.weight,
            image=image_bpd if stream.n_image else None,
            image_positions=self.image_positions.weight,
            norm=self.embedding_norm.weight,
            bias=self.embedding_norm.bias,
            mask_id=self.mask_id,
            eps=self.embedding_norm.eps,
        )

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have each transformer layer and the embedder compiled when they are first
        used. Parameters keep their names.
        """
        for part in (*self.blocks, self.embedder):
            part.compile(backend=backend)

    def shown_words(self, inputs: Inputs, masks: Masks) -> tuple[Tensor, Tensor]:
        """Token id (K,) at each text row, and which of them (K,) the mask vector hides:
        all masked words but those that BERT's 80/10/10 leaves or swaps.
        """
        stream, replacement = inputs.stream, masks.replacement
        hidden_k = masked_words(stream, masks)
        if replacement is None:
            return inputs.token_ids, hidden_k
        kept_k, swapped_k, word_k = (at_words(stream, each) for each in replacement)
        swapped_k = swapped_k & hidden_k
        random_k = random_words(word_k, self.words.num_embeddings, self.special_ids)
        shown_k = torch.where(swapped_k, random_k, inputs.token_ids)
        return shown_k, hidden_k & ~kept_k & ~swapped_k

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3), or floats (B, 3, H, W) from -1 to 1, -> image embeddings
        (B, P, D).
        """
        dtype = self.words.weight.dtype
        if pixels.dtype == torch.uint8:
            if pixels.is_cuda:
                return self.embed_nested(pixels)
            pixels = normalised(pixels, dtype)
        return self.embedder(pixels.to(dtype)).flatten(2).transpose(1, 2)

    def embed_nested(self, pixels: Tensor) -> Tensor:
        """The same of uint8 (B, H, W, 3) in nested order, by matrix products alone."""
        given = nested(pixels, self.config.patch_size, self.words.weight.dtype)
        return self.embedder(given).unflatten(0, (len(pixels), -1))

    def initialise(self, module: nn.Module) -> None:
        """Draw the weights of a module: BERT's way; He et al. (2015) for convolutions,
        because the signal of eight layers with the framework's default fades before it
        reaches the pixels.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # What one output sums over: a stride of 2 spreads a transposed kernel.
            taps: float = math.prod(module.kernel_size)
            if isinstance(module, nn.ConvTranspose2d):
                taps /= math.prod(module.stride)
            nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            assert module.bias is not None
            nn.init.zeros_(module.bias)


class MlimForPreTraining(MlimEncoder):
    """The encoder with an MLM head, a RECON decoder and, where `itm_weight` is not 0,
    an ITM head; arguments as there.
    """

    def __init__(
        self,
        config: MlimConfig,
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
        width, eps = config.width, config.norm_eps
        self.mlm_dense = GeluLinear(width, width)
        self.mlm_norm = nn.LayerNorm(width, eps=eps)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder = _decoder(config)
        self.apply(self.initialise)
        self.itm_pooler, self.itm_head = None, None
        if config.itm_weight:
            # BERT's next-sentence head, drawn last: the rest is as without it.
            self.itm_pooler = nn.Linear(width, width)
            self.itm_head = nn.Linear(width, 2)
            self.initialise(self.itm_pooler)
            self.initialise(self.itm_head)

    def compile_layers(self, backend: str = "inductor") -> None:
        """As the encoder's, with the decoder."""
        super().compile_layers(backend)
        self.decoder.compile(backend=backend)

    def forward(self, inputs: Inputs, masks: Masks) -> Output:
        """Losses of a micro-batch under `masks`."""
        image_bpd = self.embed_pixels(inputs.pixels)
        rows = self._scored_rows(inputs, masks)
        hidden_nd = self.encode(inputs, masks, image_bpd, rows)
        kept = _of_rows(inputs, rows)
        words = self.score_words(hidden_nd, kept, masks)
        if self.config.recon_weight:
            image, recon_r = self.score_images(hidden_nd, kept, masks)
        else:
            image, recon_r = (
                torch.zeros_like(inputs.stream.text_pair[:0]),
                words.nll[:0],
            )
        counts = masks.counts
        positions = self.config.recon_pixels(counts.image, masks.image.shape[1])
        if not self.config.recon_weight:
            positions = torch.zeros_like(positions)
        pairs = torch.arange(len(masks.mode), device=masks.mode.device)
        by_mode = sums_of_modes(
            masks.mode,
            [
                (inputs.stream.text_pair[words.text], words.nll),
                (image, recon_r),
                (pairs, counts.text),
                (pairs, positions // self.config.patch_size**2),
            ],
        )
        losses = {"mlm": words.nll.sum(), "recon": recon_r.sum()}
        figures = {"mlm_accuracy": words.correct.sum()}
        if self.config.itm_weight:
            itm_sum, itm_correct = self.score_matching(inputs, image_bpd)
            losses["itm"], figures["itm_accuracy"] = itm_sum, itm_correct
        return Output(losses=losses, figures=figures, by_mode=by_mode)

    def _scored_rows(self, inputs: Inputs, masks: Masks) -> Rows | None:
        """The rows that MLM and RECON read; None: all."""
        images_b, n_images = masks.image.any(1), inputs.n_recon_images
        if not self.config.recon_weight:
            images_b, n_images = torch.zeros_like(images_b), 0
        return scored_rows(
            inputs.stream,
            words_k=masked_words(inputs.stream, masks),
            n_words=inputs.n_masked_words,
            images_b=images_b,
            n_images=n_images,
        )

    def word_logits(self, hidden_md: Tensor) -> Tensor:
        """(M, D) -> (M, V): BERT's two-layer head, its output tied to the words."""
        h = self.mlm_norm(self.mlm_dense(hidden_md))
        return scores_of_words(h, self.words.weight, self.mlm_bias)

    def score_words(
        self, hidden_td: Tensor, inputs: Inputs, masks: Masks
    ) -> WordScores:
        """Loss of every masked word, zero in rows beyond their number."""
        hidden_k = masked_words(inputs.stream, masks)
        text, valid = compact(hidden_k, inputs.n_masked_words)
        rows = inputs.stream.text_row[text]
        logits_mv = self.word_logits(hidden_td.index_select(0, rows))
        target = inputs.token_ids[text]
        nll_m, correct = masked_cross_entropy(logits_mv, target, valid)
        return WordScores(text, nll_m, correct, logits_mv)

    def score_images(
        self, hidden_td: Tensor, inputs: Inputs, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """Pair (R,) and squared error (R,) over the pixels that count of every image
        with a masked position, zero in rows beyond their number. The decoder mixes
        neighbouring tokens, so an image needs all its rows or none.
        """
        image, valid = compact(masks.image.any(1), inputs.n_recon_images)
        real = scored = valid[:, None].expand(-1, self.grid**2)
        if self.config.recon_region == "masked":
            scored = scored & masks.image[image]
        rows = inputs.stream.image_row[image].flatten()
        raw = self._decode(take_rows(hidden_td, rows, real.flatten()))
        side = self.config.patch_size
        return image, masked_pixel_error(raw, inputs.pixels, image, scored, side=side)

    def score_matching(
        self, inputs: Inputs, image_bpd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of saying of every pair whether it matches, and how often that is right.
        Nothing is masked: with most of a modality hidden there is little to match.
        """
        if inputs.matching is None:
            zero = image_bpd.new_zeros((), dtype=torch.float32)
            return zero, zero
        image_of, matched = inputs.matching
        rows = first_rows(inputs.stream)
        images = image_bpd.index_select(0, image_of)
        hidden_nd = self.encode(inputs, None, images, rows)
        stream = _of_rows(inputs, rows).stream
        logits_b2 = self.matching_logits(hidden_nd, stream).float()
        target = matched.to(torch.int64)
        loss = F.cross_entropy(logits_b2, target, reduction="sum")
        return loss, (logits_b2.argmax(1) == target).sum()

    def matching_logits(self, hidden_td: Tensor, stream: Stream) -> Tensor:
        """(B, 2): that text and image of each pair do not match, and that they do.

        Raises:
            ValueError: a model without an ITM head.
        """
        if self.itm_pooler is None or self.itm_head is None:
            raise ValueError(
                "this model has no ITM head: train one with --model.itm_weight 1"
            )
        # A pair's segment begins with [CLS].
        cls_bd = hidden_td.index_select(0, stream.cu_seqlens[: stream.pairs])
        return self.itm_head(torch.tanh(self.itm_pooler(cls_bd)))

    def decode_images(self, hidden_td: Tensor, inputs: Inputs, image: Tensor) -> Tensor:
        """Reconstructions (R, 3, H, W), 0..1, of the pairs numbered `image` (R,)."""
        rows = inputs.stream.image_row[image].flatten()
        return torch.sigmoid(self._decode(hidden_td.index_select(0, rows)).float())

    def _decode(self, hidden_nd: Tensor) -> Tensor:
        """The same before the sigmoid, in the decoder's dtype, of the hidden states of
        all image rows of R images, (R x P, D).
        """
        hidden_rpd = hidden_nd.unflatten(0, (-1, self.grid**2))
        grid = hidden_rpd.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(grid)

    def squares(self, pixels_rhw: Tensor) -> Tensor:
        """Sum of a map (R, H, W) over the square of each image token: (R, P)."""
        return sums_of_squares(pixels_rhw, self.config.patch_size)


def _of_rows(inputs: Inputs, rows: Rows | None) -> Inputs:
    """Inputs whose stream says where its rows are among `rows`; None: all."""
    return inputs if rows is None else inputs._replace(stream=rows.of(inputs.stream))


def masked_words(stream: Stream, masks: Masks) -> Tensor:
    """Which text rows (K,) of the stream are masked words."""
    return at_words(stream, masks.text) & stream.maskable


def at_words(stream: Stream, table: Tensor) -> Tensor:
    """What `table` (B, L) has for the word at each text row (K,); anything in rows that
    are none.
    """
    word = (stream.text_position - 1).clamp(0, table.shape[1] - 1)
    return table[stream.text_pair, word]


def _embedder(config: MlimConfig) -> Stack:
    """2x2/2 convolutions, then 1x1 to the width: no receptive fields overlap. GELU is
    part of a layer; that weights are numbered as if it were none is older.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width in config.embedder_widths:
        layers += [SquareConv(channels, width, 2, gelu=True), nn.Identity()]
        channels = width
    hidden = config.embedder_hidden
    layers += [SquareConv(channels, hidden, 1, gelu=True), nn.Identity()]
    return Stack(*layers, SquareConv(hidden, config.width, 1, gelu=False))


def _decoder(config: MlimConfig) -> Stack:
    """Transposed convolutions 3x3/1 and 4x4/2 in turn, from tokens to pixels; numbered
    as the embedder's.
    """
    widths = (config.width, *config.decoder_widths, 3)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        kernel, stride = (4, 2) if number % 2 else (3, 1)
        gelu = number + 2 < len(widths)
        layers.append(TransposedConv(before, after, kernel, stride, gelu=gelu))
        layers.append(nn.Identity())
    return Stack(*layers[:-1])
