"""The embedding stage in one launch: gather, `[MASK]`, positions, LayerNorm, stream.

Owns the stage, its kernels and their reference. Does not own which words and squares
are hidden (`trainer.kernels.mam_masks`), the layout (`trainer.stream`) or the embedder
of pixels (`trainer.models.mlim`).

The backward pass has no float atomics. Its kernel sums what LayerNorm's weights, image
positions and the mask's vector are due over a fixed number of rows, whatever the
device, and torch sums those; words and text positions are gathered by
`embedding_dense_backward`, which sums sorted rows.

Shapes: B pairs, T stream rows, K text capacity, P image tokens, D width, V vocabulary,
L longest text; T = K + B x P. A row before the stream is one of cat([text, image]).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs
from trainer.stream import lay_out

_ROWS = 4
"""Rows that a program has at a time."""
_GROUP = 16
"""Rows that a program of the backward pass sums over: text rows in order, or as many
images at one position."""


class Embedding(NamedTuple):
    """What the stage is given; its ops take the same, one by one."""

    shown: Tensor
    """(K,) token id at each text row."""
    hidden_text: Tensor | None
    """(K,) bool: the mask's vector stands there; None: nothing is hidden."""
    text_position: Tensor
    """(K,) of the stream, as the next three."""
    hidden_image: Tensor | None
    """(B, P) bool, as `hidden_text`."""
    source: Tensor
    """(T,)."""
    text_row: Tensor
    """(K,)."""
    image_row: Tensor
    """(B, P)."""
    words: Tensor
    """(V, D)."""
    text_positions: Tensor
    """(L, D)."""
    image: Tensor | None
    """(B, P, D) embeddings of squares; None where the stream has no image tokens, which
    only the reference takes."""
    image_positions: Tensor
    """(P, D)."""
    norm: Tensor
    """(D,) LayerNorm's weight."""
    bias: Tensor
    """(D,)."""
    mask_id: int
    """Row of `words` that stands for what is hidden, in either modality."""
    eps: float
    """Of LayerNorm."""


def mam_embed(given: Embedding) -> Tensor:
    """Normalised embeddings (T, D) of the stream (MLIM, section 3): by the kernel on a
    CUDA device, elsewhere by the reference.
    """
    fused = given.shown.is_cuda and given.image is not None
    embedded: Tensor = (embed_fused if fused else embed_ref)(*given)
    return embedded


def embed_ref(*arguments: Any) -> Tensor:
    """The stage in plain torch, of the fields of `Embedding`."""
    given = Embedding(*arguments)
    mask_vector = given.words[given.mask_id]
    text_kd, image_bpd = F.embedding(given.shown, given.words), given.image
    if given.hidden_text is not None:
        text_kd = torch.where(given.hidden_text[:, None], mask_vector, text_kd)
    text_kd = text_kd + F.embedding(given.text_position, given.text_positions)
    both = text_kd
    if image_bpd is not None:
        if given.hidden_image is not None:
            hidden = given.hidden_image[..., None]
            image_bpd = torch.where(hidden, mask_vector, image_bpd)
        image_bpd = image_bpd + given.image_positions
        both = torch.cat([text_kd, image_bpd.flatten(0, 1)])
    x_td = both.index_select(0, given.source)
    return F.layer_norm(x_td, given.norm.shape, given.norm, given.bias, given.eps)


@triton.jit
def _gather(
    row: tl.tensor,
    inside: tl.tensor,
    column: tl.tensor,
    shown: tl.tensor,
    hidden_k: tl.tensor,
    position_k: tl.tensor,
    hidden_bp: tl.tensor,
    words: tl.tensor,
    text_positions: tl.tensor,
    image: tl.tensor,
    image_positions: tl.tensor,
    n_text: tl.tensor,
    n_image: tl.tensor,
    mask_id: tl.tensor,
    D: tl.constexpr,
    HIDES: tl.constexpr,
) -> tl.tensor:
    """Embeddings (ROWS, columns) of rows before the stream, fp32, and which of them
    (ROWS,) show an image, and the mask's vector.
    """
    is_text = inside & (row < n_text)
    is_image = inside & (row >= n_text)
    square = row - n_text
    word = tl.load(shown + row, mask=is_text, other=0)
    place = tl.load(position_k + row, mask=is_text, other=0)
    if HIDES:
        hidden = tl.load(hidden_k + row, mask=is_text, other=0)
        hidden += tl.load(hidden_bp + square, mask=is_image, other=0)
        word = tl.where(hidden != 0, mask_id, word)
        is_word = is_text | (hidden != 0)
    else:
        is_word = is_text
    shows_mask = is_word & (word == mask_id)
    shows_image = inside & (is_word == 0)
    wide = (column < D)[None, :]
    cell = column[None, :]
    x = tl.load(
        words + word[:, None] * D + cell, mask=is_word[:, None] & wide, other=0.0
    ).to(tl.float32)
    x += tl.load(
        image + square[:, None] * D + cell, mask=shows_image[:, None] & wide, other=0.0
    ).to(tl.float32)
    x += tl.load(
        text_positions + place[:, None] * D + cell,
        mask=is_text[:, None] & wide,
        other=0.0,
    ).to(tl.float32)
    x += tl.load(
        image_positions + (square % n_image)[:, None] * D + cell,
        mask=is_image[:, None] & wide,
        other=0.0,
    ).to(tl.float32)
    # Rows past the end must not divide by an epsilon of 0.
    x = tl.where(inside[:, None], x, cell.to(tl.float32))
    return x, shows_image, shows_mask


@triton.jit
def _standardise(
    x: tl.tensor, wide: tl.tensor, eps: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """(x - mean) / std over columns, and 1 / std (ROWS, 1)."""
    mean = tl.sum(x, 1)[:, None] / D
    centred = tl.where(wide, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / D
    scale = 1.0 / tl.sqrt(variance + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["n_rows", "n_text", "mask_id"])
def _mam_embed_forward_kernel(
    out: tl.tensor,
    shown: tl.tensor,
    hidden_k: tl.tensor,
    position_k: tl.tensor,
    hidden_bp: tl.tensor,
    source: tl.tensor,
    words: tl.tensor,
    text_positions: tl.tensor,
    image: tl.tensor,
    image_positions: tl.tensor,
    norm: tl.tensor,
    bias: tl.tensor,
    n_rows: tl.int32,
    n_text: tl.int32,
    n_image: tl.int32,
    mask_id: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    wide = (column < D)[None, :]
    inside = t < n_rows
    x, _image, _mask = _gather(
        tl.load(source + t, mask=inside, other=0),
        inside,
        column,
        shown,
        hidden_k,
        position_k,
        hidden_bp,
        words,
        text_positions,
        image,
        image_positions,
        n_text,
        n_image,
        mask_id,
        D,
        HIDES,
    )
    standard, _scale = _standardise(x, wide, eps, D)
    weight = tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    y = standard * weight[None, :] + shift[None, :]
    tl.store(
        out + t[:, None] * D + column[None, :],
        y.to(out.dtype.element_ty),
        mask=inside[:, None] & wide,
    )


@triton.jit(do_not_specialize=["n_text", "mask_id", "n_pairs", "n_image_programs"])
def _mam_embed_backward_kernel(
    grad: tl.tensor,
    d_text: tl.tensor,
    d_image: tl.tensor,
    d_position: tl.tensor,
    d_mask: tl.tensor,
    d_norm: tl.tensor,
    d_bias: tl.tensor,
    shown: tl.tensor,
    hidden_k: tl.tensor,
    position_k: tl.tensor,
    hidden_bp: tl.tensor,
    text_row: tl.tensor,
    image_row: tl.tensor,
    words: tl.tensor,
    text_positions: tl.tensor,
    image: tl.tensor,
    image_positions: tl.tensor,
    norm: tl.tensor,
    n_text: tl.int32,
    n_image: tl.int32,
    n_pairs: tl.int32,
    n_image_programs: tl.int32,
    mask_id: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    cell = column[None, :]
    wide = (column < D)[None, :]
    weight = tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    # One position of GROUP images, or GROUP rows of text.
    is_image = program < n_image_programs
    of_image = n_text + program // n_image * GROUP * n_image + program % n_image
    of_text = (program - n_image_programs) * GROUP
    first = tl.where(is_image, of_image, of_text)
    stride = tl.where(is_image, n_image, 1)
    end = tl.where(is_image, n_text + n_pairs * n_image, n_text)
    of_position = tl.zeros((COLUMNS,), tl.float32)
    of_mask = tl.zeros((COLUMNS,), tl.float32)
    of_norm = tl.zeros((COLUMNS,), tl.float32)
    of_bias = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, GROUP, ROWS):
        row = first + (start + tl.arange(0, ROWS)) * stride
        inside = row < end
        in_text = inside & (row < n_text)
        in_image = inside & (row >= n_text)
        t = tl.load(text_row + row, mask=in_text, other=0)
        t += tl.load(image_row + row - n_text, mask=in_image, other=0)
        x, shows_image, shows_mask = _gather(
            row,
            inside,
            column,
            shown,
            hidden_k,
            position_k,
            hidden_bp,
            words,
            text_positions,
            image,
            image_positions,
            n_text,
            n_image,
            mask_id,
            D,
            HIDES,
        )
        standard, scale = _standardise(x, wide, eps, D)
        there = inside[:, None] & wide
        dy = tl.load(grad + t[:, None] * D + cell, mask=there, other=0.0)
        dy = dy.to(tl.float32)
        scaled = dy * weight
        mean = tl.sum(scaled, 1)[:, None] / D
        along = tl.sum(scaled * standard, 1)[:, None] / D
        dx = tl.where(there, (scaled - mean - standard * along) * scale, 0.0)
        of_norm += tl.sum(dy * standard, 0)
        of_bias += tl.sum(dy, 0)
        of_position += tl.sum(dx, 0)
        of_mask += tl.sum(tl.where(shows_mask[:, None], dx, 0.0), 0)
        tl.store(
            d_text + row[:, None] * D + cell,
            dx.to(d_text.dtype.element_ty),
            mask=in_text[:, None] & wide,
        )
        tl.store(
            d_image + (row - n_text)[:, None] * D + cell,
            tl.where(shows_image[:, None], dx, 0.0).to(d_image.dtype.element_ty),
            mask=in_image[:, None] & wide,
        )
    part = program * D + column
    tl.store(d_norm + part, of_norm, mask=column < D)
    tl.store(d_bias + part, of_bias, mask=column < D)
    tl.store(d_mask + part, of_mask, mask=column < D)
    tl.store(d_position + part, of_position, mask=(column < D) & is_image)


_WORDS, _MASK_ID = 7, 13
"""Where the arguments with a gradient begin, and end."""
_SCHEMA = (
    "Tensor shown, Tensor? hidden_text, Tensor text_position, Tensor? hidden_image, "
    "Tensor source, Tensor text_row, Tensor image_row, Tensor words, "
    "Tensor text_positions, Tensor image, Tensor image_positions, Tensor norm, "
    "Tensor bias, int mask_id, float eps"
)


@library.custom_op(
    "palimpsest::mam_embed", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor"
)
def embed_fused(*arguments: Any) -> Tensor:
    """The stage by the kernel, wherever its arguments are: those of `embed_ref`."""
    given = _contiguous(arguments)
    out_td = _embed_fake(*arguments)
    n_rows, width = out_td.shape
    _mam_embed_forward_kernel[(triton.cdiv(n_rows, _ROWS),)](
        out_td,
        *given[:5],
        *given[_WORDS:_MASK_ID],
        n_rows,
        len(given.shown),
        given.image_row.shape[1],
        given.mask_id,
        given.eps,
        D=width,
        COLUMNS=triton.next_power_of_2(width),
        HIDES=arguments[1] is not None,
        ROWS=_ROWS,
    )
    return out_td


@library.custom_op(
    "palimpsest::mam_embed_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def embed_backward(grad_td: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of words, text positions, image, image positions, norm and bias."""
    given = _contiguous(arguments)
    (pairs, n_image), n_text = given.image_row.shape, len(given.shown)
    width = grad_td.shape[1]
    groups = triton.cdiv(pairs, _GROUP)
    n_programs = groups * n_image + triton.cdiv(n_text, _GROUP)
    sums = grad_td.new_empty((3, n_programs, width), dtype=torch.float32)
    d_position = sums.new_empty((groups, n_image, width))
    d_text_kd = given.words.new_empty((n_text, width))
    d_image_bpd = torch.empty_like(given.image)
    _mam_embed_backward_kernel[(n_programs,)](
        grad_td.contiguous(),
        d_text_kd,
        d_image_bpd,
        d_position,
        *sums,
        *given[:4],
        *given[5 : _MASK_ID - 1],
        n_text,
        n_image,
        pairs,
        groups * n_image,
        given.mask_id,
        given.eps,
        D=width,
        COLUMNS=triton.next_power_of_2(width),
        HIDES=arguments[1] is not None,
        ROWS=_ROWS,
        GROUP=_GROUP,
    )
    d_mask, d_norm, d_bias = (each.sum(0) for each in sums)
    seen_k = given.shown
    if arguments[1] is not None:
        seen_k = torch.where(arguments[1], given.mask_id, seen_k)
    # The mask's vector, by far the most frequent, has its sum already, in fp32.
    d_words = _by_index(d_text_kd, seen_k, len(given.words), given.mask_id, False)
    d_words[given.mask_id] = d_mask.to(d_words.dtype)
    longest = len(given.text_positions)
    d_text_positions = _by_index(d_text_kd, given.text_position, longest, -1, False)
    return (
        d_words,
        d_text_positions.to(given.text_positions.dtype),
        d_image_bpd,
        d_position.sum(0).to(given.image_positions.dtype),
        d_norm.to(given.norm.dtype),
        d_bias.to(given.bias.dtype),
    )


_by_index = torch.ops.aten.embedding_dense_backward


def _contiguous(arguments: tuple[Any, ...]) -> Any:
    """The fields of `Embedding` as kernels take them: flags as bytes and, where nothing
    is hidden, something in their place that is never read.
    """
    given = Embedding(*arguments)
    text, image = (
        given.shown if flags is None else flags.contiguous().view(torch.uint8)
        for flags in (given.hidden_text, given.hidden_image)
    )
    given = given._replace(hidden_text=text, hidden_image=image)
    packed: list[Any] = [
        each.contiguous() if isinstance(each, Tensor) else each for each in given
    ]
    return Embedding(*packed)


@embed_fused.register_fake
def _embed_fake(*arguments: Any) -> Tensor:
    given = Embedding(*arguments)
    return given.words.new_empty((len(given.source), given.words.shape[1]))


@embed_backward.register_fake
def _backward_fake(grad_td: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in arguments[_WORDS:_MASK_ID]
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_MASK_ID])
    ctx.rest = inputs[_MASK_ID:]


def _backward(ctx: Any, grad_td: Tensor) -> tuple[Tensor | None, ...]:
    found = embed_backward(grad_td, *ctx.saved_tensors, *ctx.rest)
    return (*(None for _ in range(_WORDS)), *found, None, None)


embed_fused.register_autograd(_backward, setup_context=_save)


def _case(
    *,
    lengths: tuple[int, ...],
    n_image: int,
    width: int,
    vocabulary: int,
    rate: float,
    small: bool = False,
) -> Case:
    """Texts of these lengths with images, a share of both hidden."""
    stream = lay_out(np.array(lengths), n_image)
    n_text, pairs = len(stream.text_pair), stream.pairs
    rows = len(stream.source)
    longest = max(lengths)

    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, mean: float = 0.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator) * 0.5 + mean
            return drawn.to(device, dtype).requires_grad_()

        def hidden(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) < rate).to(device)

        shown = torch.randint(vocabulary, (n_text,), generator=generator)
        return (
            shown.to(device),
            hidden(n_text) if rate else None,
            stream.text_position.to(device),
            hidden(pairs, n_image) if rate else None,
            stream.source.to(device),
            stream.text_row.to(device),
            stream.image_row.to(device),
            normal(vocabulary, width),
            normal(longest, width),
            normal(pairs, n_image, width),
            normal(n_image, width),
            normal(width, mean=1.0),
            normal(width),
            4,
            1e-12,
        )

    cells = pairs * n_image * width
    tables = (vocabulary + longest + n_image + 2) * width
    return Case(
        kernel="MAM embed",
        shape=f"T={rows} D={width} P={n_image} V={vocabulary}, {rate:.0%} hidden",
        inputs=inputs,
        fused=embed_fused,
        reference=embed_ref,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 1.5e-2},
        reason="fp32 sums in another order; bf16 outputs and gradients are rounded "
        "(2^-9), and text gradients once more before they are summed by word",
        # Words: at most the rows that are shown.
        forward_bytes=lambda dtype: (
            dtype.itemsize
            * (cells + (n_text + longest + n_image) * width + rows * width)
            + 26 * rows
        ),
        backward_bytes=lambda dtype: (
            dtype.itemsize
            * (2 * cells + (n_text + rows + longest + n_image) * width + tables)
            + 26 * rows
        ),
        small=small,
    )


def _captions(pairs: int) -> tuple[int, ...]:
    """Lengths with the real data's mean, 24."""
    return tuple(12 + 7 * pair % 25 for pair in range(pairs))


CASES = (
    _case(
        lengths=(7, 2, 12, 9, 3),
        n_image=9,
        width=24,
        vocabulary=50,
        rate=0.4,
        small=True,
    ),
    _case(lengths=(2,), n_image=1, width=16, vocabulary=7, rate=1.0, small=True),
    _case(lengths=(3,) * 17, n_image=1, width=33, vocabulary=11, rate=0.2, small=True),
    _case(lengths=(9, 6), n_image=4, width=48, vocabulary=30, rate=0.0, small=True),
    _case(lengths=_captions(96), n_image=49, width=768, vocabulary=30_522, rate=0.35),
    _case(lengths=_captions(96), n_image=144, width=1024, vocabulary=30_522, rate=0.35),
)
