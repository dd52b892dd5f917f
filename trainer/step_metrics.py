"""What a step is measured by: one all-reduce, and a line of `metrics.jsonl`.

Owns how the ranks' shares of a step become its metrics. Does not own what is measured
(`trainer.step_end`, `trainer.by_mode`, `trainer.flops`) or where it goes
(`trainer.metrics`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer import by_mode
from trainer.engine import World, chosen_precision
from trainer.feed import Delivery
from trainer.flops import step_flops, utilisation
from trainer.gpus import device_peak
from trainer.limits import Spent
from trainer.loader import Counts, Loader, StepBatch
from trainer.models.base import means_of


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What the ranks' shares of a step add up to."""

    losses: dict[str, float]
    """Mean of each of the model's terms."""
    figures: dict[str, float]
    by_mode: list[float]
    spent: Spent
    stop: bool
    """Some rank was asked to stop."""
    save_due: bool
    """The clock of rank 0 asks for a checkpoint."""
    write_failed: bool
    """Some rank could not write its part of the one before."""


def spent_on(batch: StepBatch, delivery: Delivery, elapsed: float) -> Spent:
    """Where a rank's seconds of a step went."""
    return Spent(
        elapsed=elapsed,
        waited=delivery.waited(),
        read=batch.read_s,
        decode=batch.decode_s,
        copy=delivery.copy_seconds(),
    )


def summed_over_ranks(
    result: Sequence[float],
    spent: Spent,
    asked: tuple[bool, bool, bool],
    loader: Loader,
    totals: Counts,
    world: World,
) -> Summed:
    """One all-reduce for all that is to be known of a step; `asked` as the last three
    fields of what it gives.
    """
    model = loader.config.model
    terms, figures = model.terms, model.figures
    local = [*result, *dataclasses.astuple(spent), *map(float, asked)]
    values = torch.tensor(local, dtype=torch.float64)
    rest = world.sum(values).tolist()
    losses, rest = rest[: len(terms)], rest[len(terms) :]
    found, rest = rest[: len(figures)], rest[len(figures) :]
    modes, rest = rest[: by_mode.SIZE], rest[by_mode.SIZE :]
    *seconds, stop, due, failed = rest
    names = [field.name for field in dataclasses.fields(Spent)]
    return Summed(
        losses=means_of(terms, losses, totals),
        figures=means_of(figures, found, totals),
        by_mode=modes,
        spent=Spent(**dict(zip(names, seconds, strict=True))),
        stop=stop > 0,
        save_due=due > 0,
        write_failed=failed > 0,
    )


def metrics_row(
    batch: StepBatch,
    totals: Counts,
    summed: Summed,
    loader: Loader,
    world: World,
    elapsed: float,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`, but for what only the optimizer knows."""
    config, order = loader.config, loader.order
    model = config.model
    loss = sum(term.weight * summed.losses[term.name] for term in model.terms)
    row: dict[str, Any] = {
        "step": 0,
        "epoch": batch.epoch,
        "loss": loss,
        **{f"{name}_loss": value for name, value in summed.losses.items()},
        **summed.figures,
        "lr": 0.0,
        "grad_norm": 0.0,
        "pairs_per_s": totals.pairs / elapsed,
        "tokens_per_s": totals.tokens / elapsed,
        "data_wait_frac": summed.spent.waited / summed.spent.elapsed,
        "read_s": summed.spent.read,
        "decode_s": summed.spent.decode,
        "padding_frac": 1 - totals.tokens / totals.rows,
        "cut_captions_frac": totals.cut_captions / totals.pairs,
        "replaced": totals.replaced,
        "step_s": elapsed,
        "sample_digest": totals.digest_text,
    }
    row |= by_mode.mode_metrics(
        summed.by_mode,
        patch_size=model.patch_size,
        names=(model.word_loss, model.image_loss),
    )
    decibels = by_mode.psnr(summed.losses.get("recon", 0.0))
    if decibels is not None:
        row["psnr"] = decibels
    row |= _utilisation(totals, loader, world, elapsed)
    if order.mixture:
        names = [source.name for source in order.sources]
        row["sources"] = dict(zip(names, totals.sources, strict=True))
    return row


def _utilisation(
    totals: Counts, loader: Loader, world: World, elapsed: float
) -> dict[str, float]:
    """What a step's model FLOPs say of the devices."""
    config = loader.config
    flops = step_flops(
        config.model,
        totals,
        vocab_size=loader.dataset.tokenizer.vocab_size,
        image_size=config.image.size,
    )
    peak = device_peak(
        world.device,
        precision=chosen_precision(config),
        tflops=config.log.peak_tflops,
    )
    return utilisation(flops, seconds=elapsed, devices=world.size, peak=peak)
