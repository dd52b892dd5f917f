"""MAM's draws in one launch: mode, text and image masks, and what masked words show.

Owns the kernel. Its reference is `trainer.masking.mam`, which owns the definition, what
an edge and a rate are as integers included; the kernel gives the same integers for any
setting. Does not own the lists of what is masked (`trainer.kernels.compact`).

A program has a tile of one pair's positions of one modality. To mask the k smallest
keys it ranks each of its places by counting the smaller ones, whose words it draws
again: Philox is cheaper than a sort, and nothing is kept between programs.

Shapes: B pairs, L text positions (capacity), P image positions.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from trainer.kernels.case import Case, Inputs
from trainer.mask_config import MaskConfig, Mode
from trainer.masking import UNIT, Blocks, Masks, edges, mam, millionths
from trainer.philox import Use, check_epoch, check_seed
from trainer.replacement import Replacement, share_edges

_UNIT = tl.constexpr(UNIT)
_MODE = tl.constexpr(int(Use.MODE))
_TEXT = tl.constexpr(int(Use.TEXT_MASK))
_IMAGE = tl.constexpr(int(Use.IMAGE_MASK))
_REPLACEMENT = tl.constexpr(int(Use.REPLACEMENT))

_TILE = 128
"""Positions of a program."""
_KEYS = 32
"""Keys that it ranks them against at a time."""


def mam_masks(
    config: MaskConfig,
    *,
    seed: int,
    epoch: int | Tensor,
    uids: Tensor,
    n_text: Tensor,
    text_capacity: int,
    n_image: int,
    mode: Mode | None = None,
) -> Masks:
    """`trainer.masking.mam`, in one launch where the pairs are on a CUDA device."""
    draws: Callable[..., Masks] = mam_fused if uids.is_cuda else mam
    return draws(
        config,
        seed=seed,
        epoch=epoch,
        uids=uids,
        n_text=n_text,
        text_capacity=text_capacity,
        n_image=n_image,
        mode=mode,
    )


def mam_fused(
    config: MaskConfig,
    *,
    seed: int,
    epoch: int | Tensor,
    uids: Tensor,
    n_text: Tensor,
    text_capacity: int,
    n_image: int,
    mode: Mode | None = None,
) -> Masks:
    """The same by the kernel, wherever the pairs are; arguments of `mam`.

    Raises:
        ValueError: a seed or epoch that the counter does not hold, or image positions
            that form no square.
    """
    check_seed(seed)
    check_epoch(epoch)
    blocks = Blocks.of(n_image, config.image_block)
    replaces = config.keep_share + config.random_share > 0
    modes, text, image, kept, swapped, word = _draw_masks(
        uids,
        epoch if isinstance(epoch, Tensor) else torch.full_like(uids, epoch),
        n_text,
        # The same bits, in what an operator's integer holds.
        seed - (seed >> 63 << 64),
        _mode_edges(config, mode),
        millionths(config.text_rates),
        millionths(config.image_rates),
        list(share_edges(config)) if replaces else [],
        config.count == "exact",
        text_capacity,
        blocks.grid,
        blocks.side,
    )
    return Masks(
        mode=modes,
        text=text,
        image=image,
        replacement=Replacement(kept, swapped, word) if replaces else None,
    )


def _mode_edges(config: MaskConfig, mode: Mode | None) -> list[int]:
    """Edges between modes: all words on one side where the mode is not drawn."""
    if mode is None and config.policy == "mam":
        return edges(config.mode_probabilities)
    fixed = Mode.LIGHT if mode is None else mode
    return [0 if fixed > number else 1 << 32 for number in range(len(Mode) - 1)]


@triton.jit
def _draw(
    index: tl.tensor,
    use: tl.tensor,
    epoch: tl.tensor,
    uid: tl.tensor,
    seed: tl.tensor,
) -> tl.tensor:
    """Words 0 and 1 of the draws at `index`, by `trainer.philox`'s layout."""
    c0 = index.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + (epoch | (use << 24)).to(tl.uint32)
    c2 = zero + (uid & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((uid >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _w2, _w3 = tl.philox(seed, c0, c1, c2, c3)
    return w0, w1


@triton.jit
def _of_mode(
    mode: tl.tensor, of_0: tl.tensor, of_1: tl.tensor, of_2: tl.tensor
) -> tl.tensor:
    rate = tl.where(mode == 0, of_0, tl.where(mode == 1, of_1, of_2))
    return rate.to(tl.int64)


_PER_STEP = [
    *("seed", "edge_0", "edge_1", "kept_edge", "either_edge"),
    *("text_0", "text_1", "text_2", "image_0", "image_1", "image_2"),
    *("L", "n_text_tiles"),
]


# Compiled once for all rates of a schedule.
@triton.jit(do_not_specialize=_PER_STEP)
def _masks_kernel(
    uids: tl.tensor,
    epochs: tl.tensor,
    n_text: tl.tensor,
    modes: tl.tensor,
    text: tl.tensor,
    image: tl.tensor,
    kept: tl.tensor,
    swapped: tl.tensor,
    word: tl.tensor,
    seed: tl.int64,
    edge_0: tl.int64,
    edge_1: tl.int64,
    text_0: tl.int64,
    text_1: tl.int64,
    text_2: tl.int64,
    image_0: tl.int64,
    image_1: tl.int64,
    image_2: tl.int64,
    kept_edge: tl.int64,
    either_edge: tl.int64,
    L: tl.int64,
    n_text_tiles: tl.int64,
    GRID: tl.constexpr,
    SIDE: tl.constexpr,
    EXACT: tl.constexpr,
    REPLACES: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    pair = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    uid = tl.load(uids + pair)
    epoch = tl.load(epochs + pair)
    first, _first = _draw(epoch * 0, _MODE, epoch, uid, seed)
    drawn = first.to(tl.int64)
    mode = (drawn >= edge_0).to(tl.int64) + (drawn >= edge_1).to(tl.int64)
    if tile == 0:
        tl.store(modes + pair, mode)

    is_text = tile < n_text_tiles
    lane = tl.arange(0, TILE)
    position = tl.where(is_text, tile, tile - n_text_tiles) * TILE + lane
    across: tl.constexpr = (GRID + SIDE - 1) // SIDE
    block = position // GRID // SIDE * across + position % GRID // SIDE
    place = tl.where(is_text, position, block).to(tl.int32)
    count = tl.where(is_text, tl.load(n_text + pair), across * across)
    use = tl.where(is_text, _TEXT, _IMAGE)
    rate = tl.where(
        is_text,
        _of_mode(mode, text_0, text_1, text_2),
        _of_mode(mode, image_0, image_1, image_2),
    )
    key, _key = _draw(place, use, epoch, uid, seed)
    masked = place < count
    if EXACT:
        wanted = (2 * count * rate + _UNIT) // (2 * _UNIT)
        some = (rate > 0) & (count > 0)
        wanted = tl.where(some & (wanted < 1), 1, wanted)
        rank = tl.zeros((TILE,), tl.int32)
        # Not range(): the interpreter takes no drawn or loaded number there.
        start, end = count * 0, tl.where(wanted > 0, count, 0)
        while start < end:
            other = start.to(tl.int32) + tl.arange(0, KEYS)
            other_key, _other = _draw(other, use, epoch, uid, seed)
            # The position breaks ties.
            smaller = other_key[None, :] < key[:, None]
            smaller |= (other_key[None, :] == key[:, None]) & (
                other[None, :] < place[:, None]
            )
            smaller &= (other < count)[None, :]
            rank += tl.sum(smaller.to(tl.int32), 1)
            start += KEYS
        masked &= rank < wanted
    else:
        masked &= key.to(tl.int64) * _UNIT < (rate << 32)

    in_text = is_text & (position < L)
    in_image = (tile >= n_text_tiles) & (position < GRID * GRID)
    tl.store(text + pair * L + position, masked.to(tl.uint8), mask=in_text)
    tl.store(image + pair * GRID * GRID + position, masked.to(tl.uint8), mask=in_image)
    if REPLACES:
        coin, shown = _draw(position, _REPLACEMENT, epoch, uid, seed)
        keeps = coin.to(tl.int64) < kept_edge
        swaps = (coin.to(tl.int64) < either_edge) & (keeps == 0)
        at = pair * L + position
        tl.store(kept + at, (masked & keeps).to(tl.uint8), mask=in_text)
        tl.store(swapped + at, (masked & swaps).to(tl.uint8), mask=in_text)
        tl.store(word + at, shown.to(tl.int64), mask=in_text)


@library.custom_op(
    "palimpsest::mam_masks",
    mutates_args=(),
    schema="(Tensor uids, Tensor epochs, Tensor n_text, int seed, int[] mode_edges, "
    "int[] text_rates, int[] image_rates, int[] share_edges, bool exact, "
    "int text_capacity, int grid, int side) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _draw_masks(
    uids: Tensor,
    epochs: Tensor,
    n_text: Tensor,
    seed: int,
    mode_edges: list[int],
    text_rates: list[int],
    image_rates: list[int],
    share_edges: list[int],
    exact: bool,
    text_capacity: int,
    grid: int,
    side: int,
) -> tuple[Tensor, ...]:
    """Mode (B,), text (B, L), image (B, P), and kept, swapped and word (B, L), which
    are (B, 0) without `share_edges`.
    """
    found = _empty_masks(uids, text_capacity, grid, bool(share_edges))
    modes, *masks, word = found
    n_text_tiles = max(triton.cdiv(text_capacity, _TILE), 1)
    tiles = n_text_tiles + triton.cdiv(grid**2, _TILE)
    _masks_kernel[(len(uids), tiles)](
        uids.contiguous(),
        epochs.contiguous(),
        n_text.contiguous(),
        modes,
        *(mask.view(torch.uint8) for mask in masks),
        word,
        seed,
        *mode_edges,
        *text_rates,
        *image_rates,
        *(share_edges or (0, 0)),
        text_capacity,
        n_text_tiles,
        GRID=max(grid, 1),
        SIDE=side,
        EXACT=exact,
        REPLACES=bool(share_edges),
        TILE=_TILE,
        KEYS=_KEYS,
    )
    return found


@_draw_masks.register_fake
def _draw_masks_fake(
    uids: Tensor,
    epochs: Tensor,
    n_text: Tensor,
    seed: int,
    mode_edges: list[int],
    text_rates: list[int],
    image_rates: list[int],
    share_edges: list[int],
    exact: bool,
    text_capacity: int,
    grid: int,
    side: int,
) -> tuple[Tensor, ...]:
    return _empty_masks(uids, text_capacity, grid, bool(share_edges))


def _empty_masks(
    uids: Tensor, text_capacity: int, grid: int, replaces: bool
) -> tuple[Tensor, ...]:
    pairs, shown = len(uids), text_capacity if replaces else 0
    return (
        torch.empty_like(uids, memory_format=torch.contiguous_format),
        uids.new_empty((pairs, text_capacity), dtype=torch.bool),
        uids.new_empty((pairs, grid**2), dtype=torch.bool),
        uids.new_empty((pairs, shown), dtype=torch.bool),
        uids.new_empty((pairs, shown), dtype=torch.bool),
        uids.new_empty((pairs, shown)),
    )


def _case(*, pairs: int, words: int, n_image: int, count: str, small: bool) -> Case:
    config = MaskConfig(
        count=count,  # type: ignore[arg-type]
        keep_share=0.1,
        random_share=0.1,
    )
    n_outputs = pairs * (8 + words * 11 + n_image)

    def inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def below(high: int) -> Tensor:
            return torch.randint(high, (pairs,), generator=generator).to(device)

        return below(1 << 24), below(1 << 62) * 3, below(words + 1), seed

    def by(draws: Callable[..., Masks]) -> Callable[..., tuple[Tensor, ...]]:
        def call(
            epochs: Tensor, uids: Tensor, n_text: Tensor, seed: int
        ) -> tuple[Tensor, ...]:
            masks = draws(
                config,
                seed=seed,
                epoch=epochs,
                uids=uids,
                n_text=n_text,
                text_capacity=words,
                n_image=n_image,
            )
            return masks.mode, masks.text, masks.image, *(masks.replacement or ())

        return call

    return Case(
        kernel="MAM masks",
        shape=f"B={pairs} L={words} P={n_image} {count}",
        inputs=inputs,
        fused=by(mam_fused),
        reference=by(mam),
        tolerances={},
        reason="integers, equal bit for bit",
        forward_bytes=lambda dtype: 24 * pairs + n_outputs,
        small=small,
    )


CASES = (
    _case(pairs=5, words=9, n_image=16, count="exact", small=True),
    _case(pairs=3, words=130, n_image=25, count="bernoulli", small=True),
    _case(pairs=96, words=64, n_image=49, count="exact", small=False),
    _case(pairs=96, words=64, n_image=144, count="exact", small=False),
    _case(pairs=96, words=64, n_image=144, count="bernoulli", small=False),
)
