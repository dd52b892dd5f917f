"""A replayed step as lines for a terminal.

Captions are other people's text: everything that a terminal could obey is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from statistics import median
from typing import Any

# Its owner is `pipeline.terminal`, which does not cross packages; what it is to
# `pipeline.config`, which does, it is here.
from pipeline.config import printable
from trainer.masking import Mode
from trainer.replay_data import Digest, ReplayedStep
from trainer.replay_pairs import Pair, mode_name

MASK = "[MASK]"
_BEFORE = 50


def text(found: ReplayedStep) -> str:
    """The whole step."""
    blocks = ["\n".join(_opening(found))]
    blocks += ["\n".join(_pair(found, pair)) for pair in found.pairs]
    hidden = found.part_pairs - len(found.pairs)
    if hidden:
        blocks.append(f"{hidden:,} more: --pairs {found.part_pairs} shows them")
    return "\n\n".join(blocks)


def where(found: ReplayedStep) -> str:
    """Where the step stands in the run."""
    steps = found.config.schedule.steps
    beyond = f", beyond the schedule's {steps:,}" if found.step > steps else ""
    if found.step_in_epoch is None:
        return f"epoch {found.epoch}, of the source that has had the fewest{beyond}"
    return (
        f"epoch {found.epoch}, step {found.step_in_epoch:,} of "
        f"{found.steps_per_epoch:,} in it{beyond}"
    )


def guess(found: ReplayedStep) -> str:
    """What to say of a step that may still come to have other pairs."""
    if not found.provisional:
        return ""
    return (
        "not certain: its epoch is not frozen yet and may take in more shards; the "
        "step then has other pairs than these"
    )


def verdict(digest: Digest) -> str:
    """What the comparison with the recorded digest says."""
    if digest.matches is None:
        return "not recorded: metrics.jsonl has no such step"
    if digest.matches:
        return "matches metrics.jsonl"
    return f"DIFFERS: metrics.jsonl has {digest.recorded}. {digest.cure}"


def composition(found: ReplayedStep) -> str:
    """Modes and masks of the whole step."""
    modes = ", ".join(f"{found.modes.get(mode, 0)} {mode_name(mode)}" for mode in Mode)
    count = found.counts.replaced
    replaced = f"; {count:,} in the place of damaged samples" if count else ""
    return (
        f"{found.counts.pairs:,} pairs: {modes}; masked "
        f"{share(found.counts.masked_words, found.words)} words and "
        f"{share(found.masked_squares, found.squares)} squares; "
        f"{found.counts.cut_captions:,} captions cut{replaced}"
    )


def share(part: int, whole: int) -> str:
    """`3 of 4 (75 %)`."""
    return f"{part:,} of {whole:,} ({part / whole if whole else 0:.0%})"


def before(metrics: Sequence[Mapping[str, Any]], step: int) -> str:
    """The usual loss of the steps before, to hold one step's against."""
    earlier = list(takewhile(lambda row: row.get("step", step) < step, metrics))
    losses = [row["loss"] for row in earlier[-_BEFORE:] if "loss" in row]
    if not losses:
        return ""
    return f"median of the {len(losses)} before {median(losses):.4f}"


def part(found: ReplayedStep) -> str:
    """Which part of the step is shown, if not all."""
    if len(found.lanes) == found.config.lanes:
        return ""
    first, last = found.lanes[0], found.lanes[-1]
    return f"lane {first}" if first == last else f"lanes {first} to {last}"


def place(found: ReplayedStep, pair: Pair) -> str:
    """Where a pair comes from, in a mixture with its source."""
    mixed = f"{pair.source}, its epoch {pair.epoch}, " if found.sources else ""
    return f"lane {pair.lane}, {mixed}{pair.shard} sample {pair.sample}"


def mixture(found: ReplayedStep) -> str:
    """Pairs of each source, if there are several."""
    return ", ".join(f"{count} {name}" for name, count in found.sources.items())


def crop(found: ReplayedStep, pair: Pair) -> str:
    """What of the stored image the model is shown."""
    image, box = found.config.image, pair.box
    width, height = pair.size
    return (
        f"{image.geometry} of {width}x{height}: {box.left:g},{box.top:g} to "
        f"{box.right:g},{box.bottom:g} ({box.right - box.left:g}x"
        f"{box.bottom - box.top:g}) -> {image.size}x{image.size}"
        f"{', mirrored' if pair.flip else ''}"
    )


def _opening(found: ReplayedStep) -> Iterator[str]:
    yield f"{found.run} step {found.step:,}: {where(found)}"
    if found.provisional:
        yield guess(found)
    if found.row:
        names = ("loss", "mlm_loss", "recon_loss", "grad_norm", "lr")
        values = [f"{n} {found.row[n]:.5g}" for n in names if n in found.row]
        usual = before(found.metrics, found.step)
        yield ", ".join(values) + (f"; loss: {usual}" if usual else "")
    yield (
        f"sample_digest {found.digest.computed} ({found.digest.covers}) "
        f"{verdict(found.digest)}"
    )
    yield composition(found)
    if found.sources:
        yield f"sources: {printable(mixture(found))}"
    if part(found):
        yield f"shown: {part(found)}"


def _pair(found: ReplayedStep, pair: Pair) -> Iterator[str]:
    key = f"  key {printable(pair.key)}" if pair.key else ""
    yield (f"{printable(place(found, pair))}  uid {pair.uid}{key}")
    if pair.stands_in_for:
        yield f"    stands in for {printable(pair.stands_in_for)}, which is damaged"
    count = len(pair.captions)
    for number, caption in enumerate(pair.captions):
        mark = ">" if number == pair.chosen else " "
        yield f"  {mark} caption {number + 1} of {count}  {printable(caption)}"
    tokens = [
        instead(pair, number) if masked else pair.tokens[number]
        for number, masked in enumerate(pair.masked)
    ]
    cut = f"  ({pair.cut} more cut by text.max_tokens)" if pair.cut else ""
    yield f"    tokens  {printable(' '.join(tokens))}{cut}"
    yield f"    image   {crop(found, pair)}"
    yield f"    masks   {masks(pair)}"
    if pair.image_of:
        yield f"    ITM     {match(pair)}"


def instead(pair: Pair, number: int) -> str:
    """What the model is shown in the place of a masked token."""
    shown = pair.shown.get(number)
    return MASK if shown is None else f"[MASK: shows {shown}]"


def match(pair: Pair) -> str:
    """What the text is matched with, if with anything."""
    if pair.image_of is None:
        return ""
    if pair.image_of == pair.uid:
        return "matched with its own image"
    return f"mismatched: with the image of uid {pair.image_of}"


def masks(pair: Pair) -> str:
    """Mode, and what it came to."""
    return (
        f"{mode_name(pair.mode)}: {share(sum(pair.masked), pair.words)} words, "
        f"{share(sum(pair.squares), len(pair.squares))} squares"
    )
