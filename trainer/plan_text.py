"""A plan as lines for a terminal.

Owns the words and the table. Does not own the numbers (`trainer.plan_run`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# Its owner is `pipeline.terminal`, which does not cross packages.
from pipeline.config import printable
from trainer.plan_data import expected
from trainer.plan_options import NO_DATA
from trainer.plan_run import GIB, Plan, Stage

_NAME = 34
_CELL = 10


def text(found: Plan) -> str:
    """The whole plan."""
    blocks = (_opening, _parameters, _memory, _time, _data, _storage)
    return "\n\n".join("\n".join(block(found)) for block in blocks)


def _opening(found: Plan) -> Iterator[str]:
    config, gpu = found.config, found.gpu
    count = f"{config.gpus} x " if config.gpus > 1 else ""
    precision = "bf16" if found.bf16 else "fp32"
    yield f"{count}{gpu.name} ({gpu.memory_gib:g} GiB), training in {precision}"
    yield (
        f"{config.global_batch:,} pairs a step: micro-batches of "
        f"{found.micro_batch:,}, {found.accumulation:,} on each of {config.gpus}"
    )
    yield advice(found)
    yield (
        "An estimate: FLOPs and kept tensors are counted, utilisation is assumed; "
        "memory has been checked on one GPU with ZeRO 1 alone."
    )


def advice(found: Plan) -> str:
    """Which ZeRO stage to take, or what to do where none fits."""
    stage, planned = found.recommended, found.config.deepspeed.zero_stage
    if stage is None:
        sizes = [
            size
            for one in found.stages
            if not one.refused
            for size in (one.largest, one.largest_checkpointed)
            if size
        ]
        if sizes:
            return (
                f"DOES NOT FIT with micro-batches of {found.micro_batch:,}: take "
                f"--micro_batch {max(sizes)} or less"
            )
        return "DOES NOT FIT with any micro-batch: take larger GPUs, or more of them"
    more = "" if stage.fits else " with activation checkpointing"
    size = stage.largest if stage.fits else stage.largest_checkpointed
    line = f"fits with ZeRO {stage.stage}{more}, in micro-batches of up to {size:,}"
    if planned != stage.stage:
        line += f" (the recipe has deepspeed.zero_stage {planned})"
    return line


def _parameters(found: Plan) -> Iterator[str]:
    yield _row("parameters", f"{sum(found.parameters.values()):,}")
    for part, count in found.parameters.items():
        yield _row(f"  {part}", f"{count:,}")


def _memory(found: Plan) -> Iterator[str]:
    stages = found.stages
    yield _row("GiB of each GPU", *(f"ZeRO {one.stage}" for one in stages))
    held: dict[str, Callable[[Stage], int]] = {
        "weights": lambda one: one.states.weights,
        "gradients": lambda one: one.states.gradients,
        "buffers to reduce gradients": lambda one: one.states.buckets,
        "fp32 master weights": lambda one: one.states.master,
        "Adam's moments": lambda one: one.states.moments,
        "activations": lambda _: found.activations.embedder + found.activations.blocks,
        "logits and reconstructions": lambda _: found.activations.ends,
        "images, four steps of them": lambda one: one.inputs,
        "at the worst moment": lambda one: one.peak,
        "  with activation checkpointing": lambda one: one.peak_checkpointed,
    }
    for name, size in held.items():
        yield _row(f"  {name}", *(_gib(size(one)) for one in stages))
    yield _row(f"fits into {_gib(found.usable)} GiB", *map(_fits, stages))
    yield _row("largest micro-batch", *(_count(one.largest) for one in stages))
    largest = (_count(one.largest_checkpointed) for one in stages)
    yield _row("  with activation checkpointing", *largest)
    yield from sorted({f"no: {one.refused}" for one in stages if one.refused})


def _time(found: Plan) -> Iterator[str]:
    config = found.config
    yield _row("model TFLOPs a step", f"{found.step_flops / 1e12:,.3g}")
    whole = sum(found.forward_flops.values())
    for part, flops in found.forward_flops.items():
        yield _row(f"  {part.replace('_', ' ')}", f"{flops / whole:.1%}")
    yield _row("peak TFLOP/s of a GPU", f"{found.peak_tflops:g}")
    yield _row("MFU (an assumption, --mfu)", f"{config.mfu:.0%}")
    yield _row("seconds a step, if so", f"{found.step_s:.3g}")
    yield _row("pairs/s, if so", f"{found.pairs_per_s:,.0f}")
    yield _row("steps", f"{found.steps:,}")
    yield _row("hours, if so", f"{found.hours:,.2f}")
    if found.cost is not None:
        yield _row("cost, if so", f"{found.cost:,.2f}")


def _data(found: Plan) -> Iterator[str]:
    config, facts = found.config, found.facts
    each = expected(config, facts, 1)
    words = float(facts.lengths.mean())
    if facts.pairs is None:
        yield (
            "no --data: pairs, epochs, reading and decoding are not known; assumed: "
            f"texts of {facts.lengths[0]} tokens, {facts.tokenizer.vocab_size:,} "
            "words in the vocabulary"
        )
    else:
        yield _row("dataset", printable(_names(config.data)))
        yield _row("pairs", f"{facts.pairs:,}")
        yield _row("tokens an epoch", f"{facts.pairs * each.tokens:,.0f}")
    yield _row("tokens a pair", f"{each.tokens:.1f} ({words:.1f} of text)")
    yield _row("masked words a pair", f"{each.masked_words:.1f}")
    if facts.cut is not None:
        yield _row("captions cut", f"{facts.cut:.1%}")
    if facts.steps_per_epoch:
        yield _row("steps an epoch", f"{facts.steps_per_epoch:,}")
        yield _row("epochs", f"{found.epochs:,.1f}")
    for name, pairs, share in facts.sources:
        passes = found.steps * config.global_batch * share / pairs
        line = f"{share:.1%} of {pairs:,} pairs, {passes:,.1f} epochs"
        yield _row(f"  {printable(name)}", line)


def _storage(found: Plan) -> Iterator[str]:
    facts, ranks = found.facts, found.config.gpus
    if found.read_rate is not None:
        yield _row("to be read, if so", f"{found.read_rate / 1e6:,.1f} MB/s")
    yield _row("JPEGs to decode, if so", f"{found.pairs_per_s:,.0f} a second")
    if found.cores is not None and facts.decode_s is not None:
        line = (
            f"{found.cores:,.1f} like this machine's ({1e3 * facts.decode_s:.2f} ms a "
            f"pair): --threads {max(1, round(found.cores / ranks + 0.5))} or more"
        )
        yield _row("cores to decode, if so", line)
    elif found.config.data != NO_DATA:
        yield _row("cores to decode", "not measured")
    yield _row("host memory of a rank's images", f"{_gib(found.host_buffers)} GiB")
    keep = found.config.checkpoint.keep
    size = found.checkpoint / GIB
    line = f"{size:,.2f} GiB; {keep + 1} at once on disk {size * (keep + 1):,.2f} GiB"
    yield _row("checkpoint", line)


def _row(name: str, *cells: str) -> str:
    if len(cells) == 1:
        return f"{name:<{_NAME}}{cells[0]}"
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _count(size: int | None) -> str:
    return "none" if size is None else f"{size:,}"


def _fits(stage: Stage) -> str:
    if stage.refused:
        return "refused"
    if stage.fits:
        return "yes"
    return "ckpt. only" if stage.fits_checkpointed else "no"


def _names(data: list[str] | str) -> str:
    return data if isinstance(data, str) else ", ".join(data)
