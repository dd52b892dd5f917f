"""The training loop, top to bottom.

Owns a run from its checks to its completion marker. Everything it uses has an owner of
its own: order and batches (`trainer.loader`), masks (`trainer.masking`), the model
(`trainer.models`), DeepSpeed (`trainer.engine`), updates (`trainer.update`), what
follows a step (`trainer.step_end`), files (`trainer.checkpoint`, `trainer.saving`,
`trainer.metrics`).
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import signal
import time
from typing import IO, Any

import torch
import yaml

from pipeline.config import to_yaml
from trainer import by_mode, checkpoint, environment, freezes
from trainer.build import build_model, initial_weights
from trainer.check import Checked
from trainer.contract import (
    COMPLETE,
    CONFIG,
    FROZEN,
    LOCK,
    LOCKED,
    read_validation,
)
from trainer.contrast import contrasts_of
from trainer.engine import (
    Attempt,
    World,
    build_engine,
    chosen_precision,
    start_world,
)
from trainer.feed import STEPS_BEYOND, Feed
from trainer.files import torn, write_text
from trainer.growth import agreed_state, fewer_than_there_are, freeze_until
from trainer.loader import Counts, Loader, MicroBatch, StepBatch
from trainer.masking import Masks
from trainer.metrics import Metrics
from trainer.models.base import Inputs, ModelConfig, Output
from trainer.options import PretrainConfig
from trainer.panels import drop_panels
from trainer.profiling import Profiler, span
from trainer.quarantine import from_plain, to_plain
from trainer.run_copy import RunCopy
from trainer.saving import Checkpoints
from trainer.step_end import Ends, Parts, due_after
from trainer.stop import StopFlag
from trainer.update import Updates
from trainer.validation import held_out
from trainer.watchdog import Fed, Watchdog


def train(config: PretrainConfig, checked: Checked) -> int:
    """Train until `max_steps` or the end of the schedule, resuming what is there. The
    exit status: 0, or 128 and the signal that asked to stop.

    Raises:
        ValueError: ranks that found different checkpoints, another trainer in the run
            directory, a damaged shard, a loss or gradient that is not finite.
    """
    run, first_step, copy = config.run, checked.first_step, checked.copy
    world = start_world()
    _require_agreement(checked, world)
    loader = agreed_loader(checked, config, world)
    torch.manual_seed(config.seed % (1 << 63))
    build = functools.partial(build_model, config, loader.dataset.tokenizer)
    model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bodies = config.model.bodies
    given = config.init or ", ".join(bodies.values())
    if given and not checked.checkpoint:
        model.load_state_dict(initial_weights(config, loader.dataset), strict=False)
    model.recompute = config.deepspeed.activation_checkpointing
    if config.compile == "layers":
        model.compile_layers()
    engine = build_engine(model, config, world=world, micro_batch=loader.micro_batch)
    lock = world.together(lambda: prepare_run(config, checked) if world.first else None)
    fetched = _brought(checked, world) if copy else ""
    if checked.checkpoint:
        checkpoint.load(engine, checked.checkpoint)
    metrics = _metrics(config, first_step) if world.first else None
    if metrics:
        if fetched:
            metrics.note(fetched)
        metrics.note(_opening(loader, world, first_step, parameters))
        if not first_step and (note := fewer_than_there_are(loader)):
            metrics.note(note)
        if note := freezes.not_taken(loader, checked.state, checked.frozen):
            metrics.note(note)
        environment.record(run, world, precision=chosen_precision(config))
        if given and checked.checkpoint:
            key = (
                "--init" if config.init else ", ".join(f"model.{key}" for key in bodies)
            )
            metrics.note(f"{key} {given} is not looked at: the run is resumed")
    parts = Parts(
        config=config,
        world=world,
        loader=loader,
        engine=engine,
        updates=Updates(
            config, world, checked.safety, remote=copy.points if copy else None
        ),
        metrics=metrics,
        held_out=held_out(loader, world, build, metrics),
        profiler=Profiler(config.profile, run, metrics.note) if metrics else None,
        copy=copy,
    )
    if metrics and copy:
        copy.push()
    _look_again(parts, first_step)
    step, stopped = take_steps(parts, first_step)
    if parts.profiler:
        parts.profiler.close()
    if metrics:
        early = stopped and step < config.last_step
        finish(metrics, config, copy, step, interrupted=early)
    if lock:
        lock.close()
    # The launcher ends all ranks when the first one exits with a signal's status.
    world.barrier()
    return 128 + signal.SIGTERM if stopped and step < config.last_step else 0


def take_steps(parts: Parts, step: int) -> tuple[int, bool]:
    """Take steps after the first `step`. How many are taken at the end, and whether
    that is because somebody asked to stop.
    """
    config, world, loader = parts.config, parts.world, parts.loader
    engine, updates, metrics = parts.engine, parts.updates, parts.metrics
    profiler, stop = parts.profiler, StopFlag()
    if step == 0:
        updates.save_point(engine, 0)
    keep = functools.partial(freezes.keep, loader, world, parts.copy)
    freeze = functools.partial(freeze_until, loader=loader, world=world, tell=metrics)
    # The feed asks for the first steps as soon as it is made.
    freeze(step + STEPS_BEYOND)
    # What the order begins with, too.
    keep()
    with (
        Watchdog(config, rank=world.rank, world_size=world.size) as watch,
        Checkpoints(
            config.run,
            config.checkpoint,
            world,
            parts.copy.checkpoints if parts.copy else None,
        ) as checkpoints,
        Feed(loader.steps(step, config.last_step), world.device) as feed,
    ):
        ends = Ends(parts, checkpoints, watch, stop)
        while step < config.last_step:
            watch.at("freeze of shards", step + 1)
            freeze(step + STEPS_BEYOND, keep=keep)
            if profiler:
                profiler.before_step(step)
            started = time.perf_counter()
            batches = next_batch(watch.feed(feed), world)
            # What this step stops over, or says, comes after the one before.
            if batches.failed and ends.conclude():
                break
            batch = batches.result()
            totals = global_counts(batch.counts, world)
            if totals.replaced:
                if ends.conclude():
                    break
                watch.at("damaged samples", step + 1)
                tell_replaced(loader, totals, step, world, metrics)
            watch.at("forward and backward", step + 1)
            result = run_micro_batches(engine, loader, batch, totals, world)
            # The device has work while the host learns what the step before came to.
            # These gradients are of the weights that it left, which are the ones to
            # save if that is asked for now.
            if ends.conclude():
                break
            with span("optimizer"):
                taken = updates.take(engine, result, totals, step=step, watch=watch)
            ends.begin(taken, batch, feed.ended(), started=started)
            step += 1
            at_once = not taken.can_wait or due_after(parts, step)
            if at_once and ends.conclude():
                break
    return step, ends.stopped


def _look_again(parts: Parts, step: int) -> None:
    """Measure held-out pairs after the first `step` steps, if that was due when the run
    was asked to stop.
    """
    if not step or parts.held_out is None:
        return
    rows = read_validation(parts.config.run) if parts.world.first else []
    if not parts.world.broadcast(any(row["step"] == step for row in rows)):
        parts.held_out.look(parts.engine, step, parts.metrics)


def agreed_loader(checked: Checked, config: PretrainConfig, world: World) -> Loader:
    """The loader of this rank, on the shards that rank 0 sees."""
    return Loader(
        checked.dataset,
        config,
        rank=world.rank,
        world_size=world.size,
        quarantined=checked.quarantined,
        state=agreed_state(checked.dataset, checked.state, world),
    )


def prepare_run(config: PretrainConfig, checked: Checked) -> IO[str]:
    """Make the run directory, save the resolved configuration, clear dead attempts.
    Returns the lock that keeps other trainers out until it is closed or we die.
    """
    run = config.run
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{LOCKED} to {run}: wait for it or stop it, or take another --output"
        ) from None
    if checked.copy:
        checked.copy.begin(checked.first_step)
    else:
        checkpoint.discard_unfinished(run)
        for path in (*torn(run, CONFIG), *torn(run, FROZEN)):
            path.unlink()
    if freezes.read(run, config, checked.copy) != checked.frozen:
        raise ValueError(
            f"{LOCKED} to {config.output}, or was while this one started: the same "
            "command continues"
        )
    (run / COMPLETE).unlink(missing_ok=True)
    write_text(run / CONFIG, to_yaml(config))
    return lock


def _brought(checked: Checked, world: World) -> str:
    """Bring the checkpoint of a run behind a URL to every node; what to tell of it."""
    assert checked.copy
    checkpoints, path = checked.copy.checkpoints, checked.checkpoint
    began = time.perf_counter()
    world.together(lambda: checkpoints.tidy(clear=False))
    fetched = world.together(lambda: checkpoints.bring(path) if path else 0)
    took = time.perf_counter() - began
    fetched = sum(world.gather(fetched))
    if not path:
        return ""
    return f"{path.name} is here: fetched {fetched / 1e6:,.1f} MB in {took:.1f} s"


def _require_agreement(checked: Checked, world: World) -> None:
    """Raise ValueError on every rank unless all resume from the same step."""
    steps = torch.zeros(world.size, dtype=torch.int64)
    steps[world.rank] = checked.first_step
    found = world.sum(steps).tolist()
    if len(set(found)) > 1:
        world.leave()
        raise ValueError(
            f"ranks found checkpoints of different steps ({found} by rank): --output "
            "must be a URL, or one directory that every node sees"
        )


@span("data")
def next_batch(feed: Fed, world: World) -> Attempt[StepBatch]:
    """The next batch, on the device, once every rank has its own or has failed."""
    return world.attempt(feed.next)


def global_counts(counts: Counts, world: World) -> Counts:
    """The step's counts over all ranks, before its first backward."""
    names = [field.name for field in dataclasses.fields(Counts)]
    names.remove("sources")
    local = [*(getattr(counts, name) for name in names), *counts.sources]
    summed = world.sum(torch.tensor(local)).tolist()
    alone = dict(zip(names, summed, strict=False))
    return Counts(**alone, sources=tuple(summed[len(names) :]))


def run_micro_batches(
    engine: Any, loader: Loader, batch: StepBatch, totals: Counts, world: World
) -> torch.Tensor:
    """Forward and backward of a rank's micro-batches; its sums of the model's losses
    and figures, and `by_mode.SIZE` more by masking mode, on the device.

    DeepSpeed divides gradients by ranks and by accumulation, so a local sum times both,
    over the global count, gives the gradient of the global mean however it was split.
    """
    model = loader.config.model
    split = world.size * len(batch.micro_batches)
    scales = {
        term.name: term.weight * split / max(getattr(totals, term.count), 1)
        for term in model.terms
    }
    size = len(model.terms) + len(model.figures) + by_mode.SIZE
    sums = torch.zeros(size, device=world.device)
    contrasts = contrasts_of(engine, loader, batch, world)
    for number, micro in enumerate(batch.micro_batches):
        inputs, masks = model_inputs(loader, micro)
        with span("forward"):
            output = engine(inputs._replace(contrast=contrasts[number]), masks)
        loss = sum(output.losses[name] * scale for name, scale in scales.items())
        with span("backward"):
            engine.backward(loss)
        sums += summed_of(output, model)
        if number + 1 < len(batch.micro_batches):
            engine.step()
    return sums


def summed_of(output: Output, model: ModelConfig) -> torch.Tensor:
    """What a micro-batch adds to a step's sums: losses, figures, and both by mode."""
    parts = [output.losses[term.name] for term in model.terms]
    parts += [output.figures[figure.name] for figure in model.figures]
    return torch.cat(
        [part.detach().float().flatten() for part in (*parts, output.by_mode)]
    )


def model_inputs(loader: Loader, micro: MicroBatch) -> tuple[Inputs, Masks]:
    """What the model is given of a micro-batch, and its masks, drawn where it lies."""
    drawn = (micro.uids, micro.stream, micro.epochs, micro.text_capacity)
    return loader.inputs(micro), loader.masks(*drawn, step=micro.step)


def tell_replaced(
    loader: Loader, totals: Counts, step: int, world: World, metrics: Metrics | None
) -> None:
    """Give every rank what any rank has quarantined up to a step, and say so.

    Raises:
        ValueError: that is more than the run bears.
    """
    quarantine = loader.quarantine
    for entries in world.gather(to_plain(quarantine.until(step + 1))):
        quarantine.add(from_plain(entries))
    try:
        quarantine.check(step)
    except ValueError as error:
        # All ranks count alike.
        world.stop(error)
    if metrics is None:
        return
    line = f"step {step + 1}: {totals.replaced} damaged samples replaced"
    new = [entry for entry in quarantine.until(step + 1) if entry.step == step]
    if new:
        named = ", ".join(f"{one.uid} in {one.shard} ({one.reason})" for one in new)
        line += f"; new: {named}; `python -m pipeline.validate {loader.dataset.name}`"
    metrics.note(line)


def finish(
    metrics: Metrics,
    config: PretrainConfig,
    copy: RunCopy | None,
    step: int,
    *,
    interrupted: bool,
) -> None:
    """Say where the run stands, and mark it complete at the end of its schedule."""
    metrics.close()
    if copy:
        copy.push()
    if mark_complete(config, copy, step):
        metrics.note(f"finished {step} steps: {config.output}")
        return
    how = "the same command"
    if not interrupted:
        how += " with a higher --max_steps, or without it,"
    metrics.note(
        f"stopped after step {step} of {config.schedule.steps}, checkpoint saved; "
        f"{how} continues"
    )


def mark_complete(config: PretrainConfig, copy: RunCopy | None, step: int) -> bool:
    """Write the completion marker if the schedule has ended; whether it has."""
    if step < config.schedule.steps:
        return False
    if copy:
        copy.mark_complete({"step": step})
    elif not (config.run / COMPLETE).exists():
        checkpoint.write_json(config.run / COMPLETE, {"step": step})
    return True


def _metrics(config: PretrainConfig, first_step: int) -> Metrics:
    run = config.run
    drop_panels(run, first_step)
    return Metrics(
        run,
        first_step=first_step,
        last_step=config.last_step,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=yaml.safe_load(to_yaml(config)),
    )


def _opening(loader: Loader, world: World, first_step: int, parameters: int) -> str:
    config, order = loader.config, loader.order
    begin = f"resuming after step {first_step}" if first_step else "starting"
    if order.mixture:
        steps = "a mixture of " + ", ".join(
            f"{source.name} {order.share_of(number):.1%}"
            for number, source in enumerate(order.sources)
        )
    else:
        _, per_epoch = order.epoch_steps(first_step) or (0, 0)
        steps = f"{per_epoch} steps an epoch"
    return (
        f"{begin}: {parameters:,} parameters, {len(loader.dataset):,} pairs, "
        f"{steps}, {world.size} "
        f"{'rank' if world.size == 1 else 'ranks'} on {world.device.type} in "
        f"{chosen_precision(config)}, ZeRO {config.deepspeed.zero_stage}"
    )
