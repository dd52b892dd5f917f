"""Losses over the global batch: what each micro-batch sees of all the others.

Owns how features of pairs reach all ranks and micro-batches. Does not own the features
or the loss (`trainer.models`).

A rank that takes a step in one micro-batch shares its features in the middle of the
forward pass. One that takes several must know the features of all of them before the
first backward pass, so it makes them twice: first without a gradient, and then, one
micro-batch at a time, with one (Gao et al. 2021, "Scaling deep contrastive learning
batch size under memory limited setup"). Both give the gradient of the whole batch.

Shapes: B pairs of a micro-batch, G of the global batch, F features of a pair.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from trainer.engine import World
from trainer.loader import Loader, StepBatch
from trainer.models.base import Contrast
from trainer.profiling import span


@span("contrast")
def contrasts_of(
    engine: Any, loader: Loader, batch: StepBatch, world: World
) -> list[Contrast | None]:
    """What each of a rank's micro-batches of a step sees of the step; None for a model
    without such a loss. Every rank calls this.
    """
    micros = batch.micro_batches
    if not loader.config.model.contrastive:
        return [None] * len(micros)
    own = sum(len(micro.uids) for micro in micros)
    first = world.rank * own
    if len(micros) == 1:
        return [Contrast(functools.partial(of_all_ranks, world=world), first)]
    features = []
    with torch.no_grad():
        for micro in micros:
            features.append(engine(loader.inputs(micro), None).features)
    table = of_all_ranks(torch.cat(features), world=world)
    found: list[Contrast | None] = []
    for micro in micros:
        found.append(Contrast(lambda _: table, first))
        first += len(micro.uids)
    return found


def of_all_ranks(features: Tensor, *, world: World) -> Tensor:
    """Features (B, F) of every rank, end to end (W x B, F), without a gradient."""
    own = features.detach().contiguous()
    if world.size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(world.size)]
    torch.distributed.all_gather(parts, own)
    return torch.cat(parts)
