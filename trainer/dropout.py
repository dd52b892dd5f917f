"""Dropout by law 1: what is dropped follows from (seed, epoch, sample, site, place).

Owns the numbering of sites, what each row of a layer is counted by, and the checks of
a model's key. Does not own the draws at a site (`trainer.kernels.dropout`), the
generator (`trainer.philox`) or where a model drops (`trainer.models`).

A site is a layer's result in one of the passes that a pair makes through that layer:
each has a number of the generator's registry, from `Use.DROPOUT` on. A row of a stream
is counted by its pair's sample and epoch and by its place in the pair's segment.
Nothing else goes in, so ranks, micro-batches, order, padding and recomputation change
no draw.

Shapes: B pairs, T stream rows, N rows of a result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from trainer.philox import Use, check_seed

if TYPE_CHECKING:
    from trainer.models.scored_rows import Rows
    from trainer.models.segments import Segmented

SITES = (1 << 8) - Use.DROPOUT
"""How many there may be."""
_USE_SHIFT = 24


class Draws(NamedTuple):
    """What dropout of a micro-batch follows from besides sites and places."""

    seed: int
    epochs: Tensor
    """(B,) int64."""
    uids: Tensor
    """(B,) int64, the bits of the uint64 uids."""


class Dropout(NamedTuple):
    """Dropout of N rows at a site."""

    share: float
    """Of the channels that become 0, from 0 to below 1; the others grow by
    1 / (1 - share)."""
    seed: int
    """The bits of the uint64 seed, as an int64 has them."""
    use: Tensor
    """(N,) int64, counter word 1: the site's number << 24 | epoch."""
    uid: Tensor
    """(N,) int64, counter words 2 and 3."""
    place: Tensor
    """(N,) int64, which counter word 0 is made of."""

    def of(self, rows: Rows | None) -> Dropout:
        """Of some rows alone, what is dropped in each as it was; None: all."""
        if rows is None:
            return self
        of_rows = (each.index_select(0, rows.row) for each in self[2:])
        return Dropout(self.share, self.seed, *of_rows)


def beyond(drop: Dropout | None, sites: int) -> Dropout | None:
    """The same rows so many sites further on."""
    return drop and drop._replace(use=drop.use + (sites << _USE_SHIFT))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Sites of layers that pairs pass through together; those of a pass have
    consecutive numbers, and those of the next pass come after them.
    """

    first: int
    """Number of its first site, counted from `Use.DROPOUT`."""
    sites: int
    """In one pass."""
    passes: int
    """Of a pair."""

    def rows(
        self, share: float, draws: Draws, layout: Segmented, *, first: int = 0
    ) -> Dropout:
        """Dropout of all rows of a layout at the first site.

        Args:
            layout: has B segments for each pass, in the order of passes; rows that are
                left over after them get what some other row may have.
            first: number of the first of these passes.

        Raises:
            ValueError: a seed that the generator's key does not hold.
        """
        check_seed(draws.seed)
        pairs = len(draws.uids)
        segment = layout.flat // layout.longest
        pair = segment % pairs
        number = (segment // pairs + first).clamp(max=self.passes - 1)
        site = number * self.sites + (int(Use.DROPOUT) + self.first)
        return Dropout(
            share=share,
            seed=draws.seed - (draws.seed >> 63 << 64),
            use=site << _USE_SHIFT | draws.epochs[pair],
            uid=draws.uids[pair],
            place=layout.flat - segment * layout.longest,
        )


def stacks(sizes: Iterable[tuple[int, int]]) -> list[Stack]:
    """Stacks of (sites in a pass, passes), numbered one after the other."""
    found, first = [], 0
    for sites, passes in sizes:
        found.append(Stack(first=first, sites=sites, passes=passes))
        first += sites * passes
    return found


def require_dropout(share: float, found: Iterable[Stack], *, cure: str) -> None:
    """Raise ValueError unless `model.dropout` is a share that leaves something, and the
    generator has a number for each of its sites.

    Args:
        cure: keys that make sites fewer.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"model.dropout {share} leaves nothing, or is no share: give a number from "
            "0 (none) to below 1, such as 0.1"
        )
    sites = sum(stack.sites * stack.passes for stack in found)
    if share and sites > SITES:
        raise ValueError(
            f"model.dropout has {sites} sites in this model, and the generator numbers "
            f"for {SITES}: give --model.dropout 0, or make {cure} smaller"
        )
