"""MaskVLM without its heads: an image and a text encoder, and blocks across them.

Owns how pairs go through them: clean, masked, and shown to one another. Does not own
losses or heads (`trainer.models.maskvlm`), layers (`trainer.models.layers`) or layouts
(`trainer.models.segments`).

Kwon et al., "Masked vision and language modeling for multi-modal representation
learning", 2023. What is masked is replaced by a vector before its encoder: a word by
that of the mask token, a square of pixels by one of the model's own. A modality's
cross-modality encoder takes queries of that modality, and keys and values from the
clean pass of the other. Its blocks are pre-norm, which the paper does not say.

Shapes: B pairs, K text capacity, P image positions, n = P + 1 rows of an image, D
width, T text rows of all passes, N pairs that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.dropout import Draws, Dropout, beyond
from trainer.kernels.dropout import dropped
from trainer.kernels.pixels import normalised
from trainer.masking import Masks
from trainer.models.base import Inputs
from trainer.models.layers import Block, CrossBlock, Keys
from trainer.models.maskvlm_config import MaskVlmConfig
from trainer.models.mlim import at_words, masked_words
from trainer.models.scored_rows import Rows, keep
from trainer.models.segments import (
    Segments,
    laid_out,
    of_images,
    rows_of_images,
    taken,
)
from trainer.replacement import random_words
from trainer.stream import Stream, capacity


class Passes(NamedTuple):
    """Which passes through the encoders are wanted."""

    clean_images: bool = False
    masked_images: bool = False
    clean_texts: bool = False
    masked_texts: bool = False


class Encoded(NamedTuple):
    """B pairs after the encoders: clean ones, if wanted, before masked ones."""

    image_bnd: Tensor
    """(B or 2 B, n, D)."""
    text_td: Tensor
    """(T, D)."""
    text: Segments
    """Of the texts, B or 2 B."""
    stream: Stream
    passes: Passes
    draws: Draws | None = None
    """What their dropout follows from."""

    @property
    def masked_image(self) -> int:
        """Number of the first masked image."""
        return self.stream.pairs if self.passes.clean_images else 0

    @property
    def masked_text(self) -> int:
        """Number of the first masked text."""
        return self.stream.pairs if self.passes.clean_texts else 0

    @property
    def clean_text_td(self) -> Tensor:
        """Rows of clean texts, which begin all rows."""
        both = self.passes.masked_texts
        return self.text_td[: self.stream.text_used] if both else self.text_td


class Shown(NamedTuple):
    """N pairs for a cross-modality encoder."""

    query: Tensor
    """(N,) which of the encoded of its own modality."""
    key: Tensor
    """(N,) which clean one of the other."""
    drawn: int = 0
    """How many of the texts are drawn: the host does not know their lengths. The others
    are those of all B pairs, some times over."""


class Read(NamedTuple):
    """Rows of a layout that a loss reads."""

    first: Tensor
    """(m,) bool, of the first rows."""
    capacity: int
    """No more of these than so many are read."""
    whole: int
    """So many last texts or images are read at [CLS]."""

    def of(self, layout: Segments) -> Rows | None:
        """What a last block computes; None: all rows."""
        needed = F.pad(self.first, (0, len(layout.flat) - len(self.first)))
        if self.whole:
            needed = needed.index_fill(0, layout.starts[-self.whole :], True)
        return keep(needed, self.capacity + self.whole, layout)


class Across(NamedTuple):
    """Rows after a cross-modality encoder."""

    hidden_nd: Tensor
    layout: Segments
    rows: Rows | None

    def at(self, row: Tensor) -> Tensor:
        """Hidden states of rows of the layout that were read."""
        if self.rows is not None:
            row = self.rows.place[row]
        return self.hidden_nd.index_select(0, row)

    def cls(self, count: int) -> Tensor:
        """Hidden states (`count`, D) at [CLS] of the last texts or images."""
        return self.at(self.layout.starts[len(self.layout.starts) - count :])


class MaskVlmEncoder(nn.Module):
    """Both encoders, and the blocks across them that the config's losses need. With
    `recompute`, layers keep only their inputs for the backward pass. Weights are drawn
    by `apply(initialise)`.

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
        config: MaskVlmConfig,
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
        width, side = config.width, config.patch_size
        image_eps, text_eps = config.image_norm_eps, config.text_norm_eps
        self.patches = nn.Conv2d(3, width, side, stride=side)
        self.image_cls = nn.Parameter(torch.empty(width))
        self.image_positions = nn.Embedding(self.grid**2 + 1, width)
        self.image_blocks = _blocks(config, config.image_layers, "pre", image_eps)
        self.image_norm = nn.LayerNorm(width, eps=image_eps)
        self.words = nn.Embedding(vocab_size, width)
        self.text_positions = nn.Embedding(max_text, width)
        self.embedding_norm = nn.LayerNorm(width, eps=text_eps)
        kind = config.text_norm
        self.text_blocks = _blocks(config, config.text_layers, kind, text_eps)
        pre = config.text_norm == "pre"
        self.text_norm = nn.LayerNorm(width, eps=text_eps) if pre else nn.Identity()
        matches = bool(config.itm_weight)
        self.image_cross, self.image_cross_norm = None, None
        if config.mim_weight or matches:
            self.image_cross = _cross(config, config.cross_layers, image_eps)
            self.image_cross_norm = nn.LayerNorm(width, eps=image_eps)
        self.text_cross, self.text_cross_norm = None, None
        if config.mlm_weight or matches:
            self.text_cross = _cross(config, config.cross_layers, text_eps)
            self.text_cross_norm = nn.LayerNorm(width, eps=text_eps)
        self.mim_mask = None
        if config.mim_weight:
            self.mim_mask = nn.Parameter(torch.empty(width))

    @property
    def image_rows(self) -> int:
        """n."""
        return self.grid**2 + 1

    def encode_pairs(
        self, inputs: Inputs, masks: Masks | None, passes: Passes
    ) -> Encoded:
        """Pairs after their encoders; without `masks`, clean passes alone."""
        draws = inputs.draws
        hidden: list[Tensor | None] = [None] * passes.clean_images
        words: list[Tensor] = [inputs.token_ids] * passes.clean_texts
        if passes.masked_images:
            assert masks is not None
            hidden.append(masks.image)
        if passes.masked_texts:
            assert masks is not None
            words.append(self._shown_words(inputs, masks))
        image_bnd = inputs.pixels.new_zeros((), dtype=torch.float32)
        if hidden:
            image_bnd = self.encode_images(inputs.pixels, hidden, draws)
        text = self._layout(inputs.stream, max(len(words), 1))
        text_td = image_bnd
        if words:
            first = int(not passes.clean_texts)
            drop = self._dropout("text", draws, text, first=first)
            text_td = self.encode_texts(inputs.stream, words, text, drop)
        return Encoded(image_bnd, text_td, text, inputs.stream, passes, draws)

    def encode_images(
        self,
        pixels: Tensor,
        hidden: Sequence[Tensor | None] = (None,),
        draws: Draws | None = None,
    ) -> Tensor:
        """uint8 (B, H, W, 3), or floats (B, 3, H, W) from -1 to 1, -> rows (k B, n, D),
        [CLS] first, for k masks (B, P) or None, which comes first.
        """
        patch_bpd = self._embed(pixels)
        parts = []
        for mask_bp in hidden:
            shown = patch_bpd
            if mask_bp is not None:
                assert self.mim_mask is not None
                shown = torch.where(mask_bp[..., None], self.mim_mask, patch_bpd)
            parts.append(shown)
        x_bpd = torch.cat(parts)
        every = torch.arange(self.image_rows, device=pixels.device)
        position_nd = self.image_positions(every)
        cls = (self.image_cls + position_nd[0]).expand(len(x_bpd), 1, -1)
        x_bnd = torch.cat([cls, x_bpd + position_nd[1:]], 1)
        layout = of_images(len(x_bnd), self.image_rows, pixels.device)
        first = int(hidden[0] is not None)
        drop = self._dropout("image", draws, layout, first=first)
        x_td, drop = dropped(x_bnd.flatten(0, 1), drop), beyond(drop, 1)
        x_td = self._through(self.image_blocks, x_td, layout, drop=drop)
        return self.image_norm(x_td).unflatten(0, x_bnd.shape[:2])

    def encode_texts(
        self,
        stream: Stream,
        words: list[Tensor],
        layout: Segments,
        drop: Dropout | None = None,
    ) -> Tensor:
        """Token ids (K,) of k passes -> rows (T, D) in a `layout` of k B texts."""
        used, rows = stream.text_used, len(layout.flat)
        ids = F.pad(
            torch.cat([ids[:used] for ids in words]), (0, rows - used * len(words))
        )
        position = stream.text_position[:used].repeat(len(words))
        position = F.pad(position, (0, rows - len(position)))
        x_td = self.words(ids) + self.text_positions(position)
        x_td, drop = dropped(self.embedding_norm(x_td), drop), beyond(drop, 1)
        x_td = self._through(self.text_blocks, x_td, layout, drop=drop)
        return self.text_norm(x_td)

    def images_across(self, encoded: Encoded, shown: Shown, read: Read) -> Across:
        """Images that have looked at texts; of the last block what is `read` alone."""
        assert self.image_cross is not None
        assert self.image_cross_norm is not None
        rows = self.image_rows
        image_td = encoded.image_bnd.flatten(0, 1)
        x_td = F.embedding(rows_of_images(shown.query, rows), image_td)
        layout = of_images(len(shown.query), rows, x_td.device)
        keys = Keys(*self.texts_of(encoded, shown.key, shown.drawn))
        kept, rest = read.of(layout), (encoded.clean_text_td, layout, keys)
        drop = self._dropout("image_cross", encoded.draws, layout)
        x_nd = self._through(self.image_cross, x_td, *rest, rows=kept, drop=drop)
        return Across(self.image_cross_norm(x_nd), layout, kept)

    def texts_across(self, encoded: Encoded, shown: Shown, read: Read) -> Across:
        """Texts that have looked at images, as there."""
        assert self.text_cross is not None
        assert self.text_cross_norm is not None
        rows, pairs = self.image_rows, encoded.stream.pairs
        row, layout = self.texts_of(encoded, shown.query, shown.drawn)
        x_td = F.embedding(row, encoded.text_td)
        images = of_images(len(shown.key), rows, x_td.device)
        keys = Keys(rows_of_images(shown.key, rows), images)
        other = encoded.image_bnd[:pairs].flatten(0, 1)
        kept, rest = read.of(layout), (other, layout, keys)
        drop = self._dropout("text_cross", encoded.draws, layout)
        x_nd = self._through(self.text_cross, x_td, *rest, rows=kept, drop=drop)
        return Across(self.text_cross_norm(x_nd), layout, kept)

    def texts_of(
        self, encoded: Encoded, order: Tensor, drawn: int = 0
    ) -> tuple[Tensor, Segments]:
        """Rows and layout of encoded texts numbered `order` (N,); `drawn` as `Shown`
        has it.
        """
        stream = encoded.stream
        known = (len(order) - drawn) // stream.pairs * stream.text_used
        rows = capacity(known + drawn * encoded.text.longest)
        # A text has a token at least.
        spare = rows - known - drawn
        return taken(encoded.text, order, rows=rows, spare=spare)

    def look(self, encoded: Encoded) -> tuple[Tensor | None, Tensor | None]:
        """Clean images (B n, D) and texts (T, D) that have looked at one another; None
        where the model has no blocks for it.
        """
        own = torch.arange(encoded.stream.pairs, device=encoded.text_td.device)
        shown, images, texts = Shown(own, own), None, None
        if self.image_cross is not None:
            rows = len(own) * self.image_rows
            every = own.new_ones(rows, dtype=torch.bool)
            images = self.images_across(encoded, shown, Read(every, rows, 0)).hidden_nd
        if self.text_cross is not None:
            rows = len(encoded.text.flat)
            every = own.new_ones(rows, dtype=torch.bool)
            texts = self.texts_across(encoded, shown, Read(every, rows, 0)).hidden_nd
        return images, texts

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have each layer compiled when it is first used. Its parameters keep their
        names.
        """
        for module in self.modules():
            if isinstance(module, Block | CrossBlock):
                module.compile(backend=backend)

    def initialise(self, module: nn.Module) -> None:
        """Draw the weights of a module: BERT's way."""
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        if isinstance(module, MaskVlmEncoder):
            nn.init.normal_(module.image_cls, std=std)
            if module.mim_mask is not None:
                nn.init.normal_(module.mim_mask, std=std)

    def _embed(self, pixels: Tensor) -> Tensor:
        """(B, P, D)."""
        dtype = self.patches.weight.dtype
        if pixels.dtype == torch.uint8:
            pixels = normalised(pixels, dtype)
        return self.patches(pixels.to(dtype)).flatten(2).transpose(1, 2)

    def _shown_words(self, inputs: Inputs, masks: Masks) -> Tensor:
        """Token id (K,) at each text row: the mask's at all masked words but those that
        BERT's 80/10/10 leaves or swaps.
        """
        stream, replacement = inputs.stream, masks.replacement
        hidden_k, shown_k = masked_words(stream, masks), inputs.token_ids
        if replacement is not None:
            kept_k, swapped_k, word_k = (at_words(stream, each) for each in replacement)
            swapped_k = swapped_k & hidden_k
            random_k = random_words(word_k, self.words.num_embeddings, self.special_ids)
            shown_k = torch.where(swapped_k, random_k, shown_k)
            hidden_k = hidden_k & ~kept_k & ~swapped_k
        return torch.where(hidden_k, self.mask_id, shown_k)

    def _layout(self, stream: Stream, passes: int) -> Segments:
        """Of the texts of a stream, so many times over."""
        used = passes * stream.text_used
        rows = capacity(used)
        return laid_out(
            (stream.n_words + 2).repeat(passes),
            rows=rows,
            longest=stream.longest - stream.n_image,
            spare=rows - used,
        )

    def _dropout(
        self, stack: str, draws: Draws | None, layout: Segments, *, first: int = 0
    ) -> Dropout | None:
        """Of all rows of a layout at the first site of one of the config's
        `dropout_stacks`, whose first pass is numbered `first`; None: nothing is
        dropped.
        """
        share = self.config.dropout
        if not (share and self.training) or draws is None:
            return None
        found = self.config.dropout_stacks[stack]
        return found.rows(share, draws, layout, first=first)

    def _through(
        self,
        blocks: nn.ModuleList,
        x_td: Tensor,
        *rest: Any,
        rows: Rows | None = None,
        drop: Dropout | None = None,
    ) -> Tensor:
        """Through some blocks; of the last one the result at some rows."""
        for block in blocks:
            assert isinstance(block, Block | CrossBlock)
            of_last = rows if block is blocks[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x_td = checkpoint(
                    block,
                    *(x_td, *rest, of_last, drop),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x_td = block(x_td, *rest, of_last, drop)
            drop = beyond(drop, block.sites)
        return x_td


def _blocks(config: MaskVlmConfig, count: int, norm: Any, eps: float) -> nn.ModuleList:
    sizes = {"width": config.width, "heads": config.heads}
    return nn.ModuleList(
        Block(**sizes, ffn_width=config.ffn_width, norm=norm, eps=eps)
        for _ in range(count)
    )


def _cross(config: MaskVlmConfig, count: int, eps: float) -> nn.ModuleList:
    return cross_blocks(config, count, eps=eps, self_attention=True)


def cross_blocks(
    config: MaskVlmConfig, count: int, *, eps: float, self_attention: bool
) -> nn.ModuleList:
    """Blocks across modalities."""
    return nn.ModuleList(
        CrossBlock(
            width=config.width,
            heads=config.heads,
            ffn_width=config.ffn_width,
            eps=eps,
            self_attention=self_attention,
        )
        for _ in range(count)
    )
