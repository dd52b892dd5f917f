"""Losses that align images with texts: contrast over the global batch, hard negatives.

Owns the table of features, the contrastive loss (ITC) with its temperature, and the
draw of negatives for matching (ITM). Does not own encoders or the matching head
(`trainer.models.maskvlm`), or how features reach all ranks (`trainer.contrast`).

Pairs of one image file, or of one caption, are no negatives of each other. In ITC they
are left out of each other's denominators: neither called a match, which would pull
together captions that say different things of a picture, nor called none, which would
push apart what belongs together. So a table carries, beside features, what tells images
and captions apart.

Shapes: B pairs of a micro-batch, G of the table, E width of a projection, F = 2 E + 8
columns of the table, N pairs in a group, L text positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.matching import same_in_group
from trainer.models.base import Contrast
from trainer.philox import Use, draw

_PARTS, _BITS = 4, 16
"""An identity of 64 bits is so many columns of so many bits, which fp32 holds."""
_COOLEST, _WARMEST = 0.01, 1.0
"""Bounds of the temperature; CLIP's is the lower one (Radford et al. 2021, 2.5)."""
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xC2B2AE3D27D4EB4F - (1 << 64))


class Candidates(NamedTuple):
    """What the losses of B pairs need that is drawn by law 1."""

    images: Tensor
    """(B,) int64, equal where image files are."""
    eligible: Tensor | None = None
    """(B, N) bool: the pair of the group may be a negative; None without ITM."""
    words: Tensor | None = None
    """(B, 2) int64: 32 random bits for the text and for the image that a pair is shown
    with."""


class Negatives(NamedTuple):
    """What each of B pairs is shown with that does not match; itself, where it has
    nothing."""

    text_of: Tensor
    """(B,) int64, the pair whose text its image is shown with."""
    image_of: Tensor
    """(B,) int64, the pair whose image its text is shown with."""
    found: Tensor
    """(B,) bool: there are such pairs."""


class Contrasted(NamedTuple):
    """ITC of some pairs of a table."""

    loss: Tensor
    """Sum over these pairs."""
    image_to_text: Tensor
    """How many of their images are most similar to their own text."""
    text_to_image: Tensor
    """The same the other way."""
    temperature: Tensor
    """The temperature."""


def drawn_candidates(
    *,
    group: int,
    seed: int,
    epochs: Tensor,
    uids: Tensor,
    images: Tensor,
    captions: Tensor,
) -> Candidates:
    """Candidates among the pairs of a group: never the pair itself, one of the same
    sample, of the same image file or of the same caption. Arguments as
    `trainer.matching.drawn_matching` has them.
    """
    zero = torch.zeros_like(uids)
    text, image, *_ = draw(seed=seed, use=Use.ITM, epoch=epochs, uid=uids, index=zero)
    alike = same_in_group(uids[:, None], group) | same_in_group(images[:, None], group)
    eligible = ~(alike | same_in_group(captions, group))
    return Candidates(images, eligible, torch.stack([text, image], 1))


def hard_negatives(drawn: Candidates, similarity: Tensor) -> Negatives:
    """Negatives of B pairs, each as likely as the softmax of its similarity over those
    that are eligible (Li et al. 2021, ALBEF, section 3.2).

    Args:
        similarity: (B / N, N, N) of images, rows, and texts of a group, over the
            temperature.
    """
    assert drawn.eligible is not None
    assert drawn.words is not None
    group = similarity.shape[1]
    found = drawn.eligible.any(1)
    own = torch.arange(len(found), device=found.device)
    chosen = []
    for way, table in enumerate((similarity, similarity.transpose(1, 2))):
        number = _drawn(table.flatten(0, 1), drawn.eligible, drawn.words[:, way])
        chosen.append(torch.where(found, own // group * group + number, own))
    text_of, image_of = chosen
    return Negatives(text_of, image_of, found)


def _drawn(scores_bn: Tensor, eligible: Tensor, word: Tensor) -> Tensor:
    """Number (B,) of an eligible column, drawn by its softmax; any where none is."""
    # In fp64 no eligible one rounds to nothing, and no draw to the whole.
    scores = scores_bn.detach().double().masked_fill(~eligible, -math.inf)
    weight = torch.exp(scores - scores.amax(1, keepdim=True)).nan_to_num(0.0)
    below = weight.cumsum(1)
    share = (word.double() + 0.5) / (1 << 32)
    passed = below <= share[:, None] * below[:, -1:]
    return passed.sum(1).clamp(max=scores.shape[1] - 1)


class Temperature(nn.Module):
    """A learnable temperature, kept as its logarithm within bounds: past one of them a
    gradient counts only if it leads back.

    Its forward pass gives the factor of similarities. It is a module of its own because
    ZeRO 3 gathers a parameter for the module that has it.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.tensor([-math.log(start)]))

    def forward(self, share: float = 1.0) -> Tensor:
        """(1,) fp32; its gradient times `share`."""
        log = self.log_factor.float()
        log = log * share + log.detach() * (1 - share)
        return _Bounded.apply(log, -math.log(_WARMEST), -math.log(_COOLEST)).exp()


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        out = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return torch.where(out, 0.0, grad), None, None


def table_of(
    image_be: Tensor, text_be: Tensor, images: Tensor, texts: Tensor
) -> Tensor:
    """Features (B, F) in fp32: both, normalised, and who is alike.

    Args:
        images: (B,) int64, equal where images are.
        texts: (B,) int64, equal where captions are.
    """
    parts = [F.normalize(x.float(), dim=1) for x in (image_be, text_be)]
    shifts = torch.arange(0, _PARTS * _BITS, _BITS, device=images.device)
    for identity in (images, texts):
        words = (identity[:, None] >> shifts) & ((1 << _BITS) - 1)
        parts.append(words.float())
    return torch.cat(parts, 1)


def projections(table: Tensor) -> tuple[Tensor, Tensor]:
    """Features (G, E) of images and of texts in a table (G, F)."""
    width = (table.shape[1] - 2 * _PARTS) // 2
    return table[:, :width], table[:, width : 2 * width]


def _alike(table: Tensor) -> Tensor:
    """(G, G) bool: two different pairs have the same image or the same caption."""
    both = table[:, -2 * _PARTS :].long().unflatten(1, (2, _PARTS))
    shifts = torch.arange(0, _PARTS * _BITS, _BITS, device=table.device)
    identity = (both << shifts).sum(2)
    same = (identity[:, None] == identity).any(2)
    return same.fill_diagonal_(False)


def contrast(own: Tensor, seen: Contrast, temperature: Temperature) -> Contrasted:
    """ITC of a micro-batch of features (B, F): the mean of the negative log softmax of
    an image's own text over the texts of the global batch, and of a text's own image.

    The value is that of these pairs, the gradient that of all pairs with respect to
    these features: added over the micro-batches of a step, both are those of the batch.
    It takes some (G, G) of fp32 for each micro-batch.
    """
    first, after = seen.first, seen.first + len(own)
    gathered = seen.gathered(own.detach())
    table = torch.cat([gathered[:first], own, gathered[after:]])
    factor = temperature(len(own) / len(table))
    each, *right = _of_each(table, factor)
    mine = slice(first, after)
    # The gradient of all, the value of some.
    loss = each.sum() - each.detach().sum() + each[mine].detach().sum()
    image, text = (way[mine].sum() for way in right)
    return Contrasted(loss, image, text, 1 / factor.detach().squeeze())


def _of_each(table: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (G,) of each pair, and whether its image (G,) and its text (G,) are most
    similar to what is theirs.
    """
    image_ge, text_ge = projections(table)
    similarity = (factor * image_ge @ text_ge.T).masked_fill(_alike(table), -math.inf)
    target = torch.arange(len(table), device=table.device)
    ways = (similarity, similarity.T)
    losses = [F.cross_entropy(way, target, reduction="none") for way in ways]
    image, text = (way.argmax(1) == target for way in ways)
    return (losses[0] + losses[1]) / 2, image, text


def held_out_contrast(table: Tensor, temperature: Temperature) -> dict[str, float]:
    """ITC of a whole table (G, F) as one batch, and how often a pair finds its own."""
    factor = temperature()
    each, image, text = (x.double().mean() for x in _of_each(table.float(), factor))
    return {
        "itc_loss": float(each),
        "itc_image_to_text_r1": float(image),
        "itc_text_to_image_r1": float(text),
        "itc_temperature": float(1 / factor),
    }


def identities(values: Tensor) -> Tensor:
    """One int64 (B,) for each row of integers (B, L), past whose end stands -1: alike
    for equal rows, and for others but once in 2^64.
    """
    place = torch.arange(1, values.shape[1] + 1, device=values.device)
    mixed = values.long() * _ODD[0] + place * _ODD[1]
    for shift, factor in ((31, _ODD[1]), (29, _ODD[0])):
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed ^ (mixed >> 32)
    return mixed.masked_fill(values < 0, 0).sum(1)
