"""A plan as lines for a terminal.

Owns the words and the tables. Does not own the numbers (`cluster.plan_run`).
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator, Mapping

from cluster.plan_options import PlanConfig
from cluster.plan_run import Plan, Preempted
from cluster.plan_stages import Preprocess, Pretrain
from cluster.plan_sweep import Expected, Mean
from pipeline.config import printable

_NAME = 24
_CELL = 12
_WIDTH = 88
# Fewer nodes that are no slower than this are as good.
_AS_FAST = 1.05


def text(found: Plan) -> str:
    """The whole plan."""
    blocks = [_preprocess(found)]
    if found.pretrain:
        blocks.append(_pretrain(found.config, found.pretrain))
    if found.pretrain and found.preempted:
        blocks.append(_preemptions(found, found.pretrain, found.preempted))
    blocks += [_total(found), _assumptions(found)]
    lines = ("\n".join(block) for block in blocks)
    return "\n\n".join(one for one in lines if one)


def duration(seconds: float) -> str:
    """In the largest fitting unit."""
    if not math.isfinite(seconds):
        return "no end"
    for unit, least in (("h", 3600), ("min", 60)):
        if seconds >= least:
            return f"{_figure(seconds / least)} {unit}"
    return f"{_figure(seconds)} s"


def size(count: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{_figure(count)} {unit}"
        count /= 1000
    return f"{_figure(count)} TB"


def _figure(value: float) -> str:
    """With three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _preprocess(found: Plan) -> Iterator[str]:
    made = found.preprocess
    if not found.config.preprocess:
        return
    yield "PREPROCESS"
    if made is None:
        yield _row("shards", f"complete already in {printable(found.config.shards)}")
        return
    yield from _shards(found, made)


def _shards(found: Plan, made: Preprocess) -> Iterator[str]:
    assume = found.config.assume
    yield _row("inputs", f"{made.inputs:,} ({made.sampled:,} of them looked at)")
    pairs = ", ".join(f"{count:,.0f} {name}" for name, count in made.pairs.items())
    yield _row("pairs, about", pairs or "none")
    yield _row("dataset, about", f"{size(made.bytes)} from {made.ranges:,} ranges")
    yield _row(
        "CPU time", f"{_figure(made.core_s / 3600)} core-hours of this machine's"
    )
    yield _row(
        "nodes",
        f"{made.nodes} of {assume.cpu_cores} cores (at most {assume.cpu_nodes}; a core "
        "takes a range at a time)",
    )
    start = 60 * assume.node_minutes
    yield _row(
        "wall time",
        f"{duration(made.wall_s)}, {duration(start)} of it until nodes are there",
    )
    yield _row(
        "node-hours",
        f"{_figure(made.node_s / 3600)}, with {assume.idle_minutes:g} idle minutes "
        "before a node is let go",
    )


def _pretrain(config: PlanConfig, found: Pretrain) -> Iterator[str]:
    most = found.largest
    yield "PRETRAIN, undisturbed"
    epochs = f", {_figure(found.epochs)} epochs" if found.epochs else ""
    yield _row("model", f"{found.parameters:,} parameters")
    yield _row("work", f"{found.steps:,} steps{epochs}")
    yield _row(
        f"on {most.nodes} nodes",
        f"{most.ranks} x {found.gpu}: {duration(found.step_s)} a step, "
        f"{found.pairs_per_s:,.0f} pairs/s",
    )
    yield _row(
        "checkpoint",
        f"{size(found.checkpoint_bytes)}: stops training for "
        f"{duration(found.stall_s)}, is there after {duration(most.write_s)}",
    )
    if most.read_mb_s is not None:
        yield _row("each node reads", f"{_figure(most.read_mb_s)} MB/s of shards")
    stage = config.pretrain
    assert stage is not None
    ranks = f"{stage.ranks} ranks" if stage.ranks > 1 else "one rank"
    yield _row(
        "valid world sizes",
        f"{len(found.sizes)} with {stage.min_nodes} to {stage.max_nodes} nodes of "
        f"{ranks}",
    )
    yield _cells("  nodes", "ranks", "micro-batch", "time", "slower")
    for one in reversed(found.sizes):
        batch = f"{one.accumulation} x {one.micro_batch}"
        times = duration(one.work_s), f"{one.slower:.3g} x"
        yield _cells(f"  {one.nodes}", str(one.ranks), batch, *times)
    enough = min(one.nodes for one in found.sizes if one.slower <= _AS_FAST)
    if enough < most.nodes:
        yield from _wrapped(
            f"It is as fast with pretrain.max_nodes {enough}, because a step is taken "
            "to last assume.least_step_ms at least."
        )
    if found.tight:
        yield from _wrapped(f"DOES NOT START: {found.tight}")


def _preemptions(found: Plan, calm: Pretrain, under: Preempted) -> Iterator[str]:
    spot, training, best = under.spot, under.training, under.sweep.best
    yield f"PRETRAIN on nodes that are preempted ({best.runs} simulated runs each)"
    if not spot.rate:
        yield "no preemptions (spot.rate is 0)"
        return
    each = 3600 / spot.rate / training.nodes
    yield _row("a preemption", f"every {duration(each)} with {training.nodes} nodes up")
    yield from _notice(under)
    yield _cells("checkpoint every", "time", "lost", "restarts", "saving", "waiting")
    yield _outcome("recipe's", under.sweep.given)
    yield _outcome("best", best)
    if best.unfinished:
        yield from _wrapped(
            f"{best.unfinished} of {best.runs} simulated runs had no end even so, and "
            "are in no figure: too many preemptions for these nodes"
        )
    low, high = under.sweep.alike_s
    yield from _wrapped(
        f"Any interval from {duration(low)} to {duration(high)} takes at most 1 % "
        f"longer than the best; {_formula(under)}."
    )
    yield from _advice(found, calm, under)


def _notice(under: Preempted) -> Iterator[str]:
    spot, write_s = under.spot, under.training.write_s
    told = duration(spot.notice_s)
    fits = write_s <= spot.notice_s
    line = f"{told}; {spot.sudden:.0%} of preemptions come without"
    yield _row("notice", line)
    known = "a checkpoint fits into it, so that only those lose work"
    if not fits:
        known = (
            f"a checkpoint ({duration(write_s)}) does not fit into it, so that all of "
            "them lose work"
        )
    yield _row("", known)


def _formula(under: Preempted) -> str:
    formula = under.sweep.young_daly_s
    if formula is None:
        return "no preemption loses work, so that checkpoints on the way are not needed"
    return f"the formula of Young and Daly says {duration(formula)}"


def _advice(found: Plan, calm: Pretrain, under: Preempted) -> Iterator[str]:
    best, low, high = under.sweep.best, *under.sweep.alike_s
    if best.preemptions.mean < 1:
        yield "Too short a run for preemptions to matter: leave the interval as it is."
        return
    if not low <= calm.interval_s <= high:
        steps = max(1, round(best.interval_s / calm.step_s))
        yield from _wrapped(
            "Put into run.yaml, under pretrain.arguments: checkpoint.every_minutes: "
            f"{best.interval_s / 60:.3g} and checkpoint.every_steps: {steps} or more"
        )


def _outcome(name: str, one: Expected) -> str:
    shares = (
        *(one.lost_share, one.restart_share),
        *(one.checkpoint_share, one.waiting_share),
    )
    cells = [f"{share.mean:.1%}" if share.mean < math.inf else "-" for share in shares]
    return _cells(f"  {name}: {duration(one.interval_s)}", _time(one.wall_s), *cells)


def _total(found: Plan) -> Iterator[str]:
    costs, preempted = found.costs, found.preempted
    currency = found.config.currency
    yield "TOTAL"
    if found.preprocess:
        cost = _money(costs.preprocess, currency)
        yield _row("preprocess", f"{duration(found.preprocess.wall_s)}{cost}")
    if preempted:
        best = preempted.sweep.best
        low, high, most = (
            duration(found.start_s + one)
            for one in (best.wall_s.low, best.wall_s.high, best.wall_90_s)
        )
        cost = _money(costs.spot.mean if costs.spot else None, currency)
        yield _row(
            "pretrain on spot",
            f"{duration(found.spot_s)}{cost} (the mean: with 95 % confidence from "
            f"{low} to {high}; nine of ten runs take less than {most})",
        )
        cost = _money(costs.ondemand, currency)
        yield _row("pretrain on demand", f"{duration(found.ondemand_s)}{cost}")
    if costs.head is not None:
        yield _row("head", f"all the time{_money(costs.head, currency)}")
    cost = _money(costs.total(), currency)
    yield _row(
        "in all, on spot" if preempted else "in all", f"{duration(found.total_s)}{cost}"
    )
    if found.config.overlap:
        yield _row("", "less with overlap, which is not counted")
    if costs.missing:
        names = ", ".join(f"{name}: ..." for name in costs.missing)
        yield from _wrapped(
            "Costs need prices: give those of a node for an hour, by node type, with "
            f"the key prices: {{{names}}}"
        )


def _assumptions(found: Plan) -> Iterator[str]:
    config = found.config
    yield "ASSUMED (every one is a key; --help explains them)"
    groups = ("assume", "spot") if config.pretrain else ("assume",)
    values = {
        f"{group}.{key}": value
        for group in groups
        for key, value in dataclasses.asdict(getattr(config, group)).items()
        if value is not None
    }
    values |= _settled(found)
    if config.pretrain:
        values["pretrain.settle_seconds"] = config.pretrain.settle_seconds
    yield from _wrapped(
        ", ".join(f"{key} {_plain(value)}" for key, value in values.items())
    )
    if config.pretrain:
        yield from _wrapped(
            "Speed grows with the number of nodes (the same MFU on all). Nodes come "
            "back at the same price, and are the only ones: no on-demand nodes in "
            "their place. Not counted: processes that fail, evaluation."
        )
    if found.preprocess:
        yield from _wrapped(
            "Not counted: comparisons across the corpus, preemptions of nodes for "
            "preprocessing (each costs the ranges in work), storage and traffic."
        )


def _settled(found: Plan) -> Mapping[str, float]:
    """Assumptions that follow from others where nobody gave them."""
    if not found.preempted:
        return {}
    training = found.preempted.training
    return {
        "assume.stall_seconds": training.stall_s,
        "assume.detect_seconds": training.detect_s,
    }


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _money(cost: float | None, currency: str) -> str:
    return "" if cost is None else f", {cost:,.2f} {printable(currency)}"


def _time(wall: Mean) -> str:
    return duration(wall.mean)


def _row(name: str, value: str) -> str:
    lines = textwrap.wrap(value, _WIDTH - _NAME)
    return f"{name:<{_NAME}}" + f"\n{'':<{_NAME}}".join(lines or [""])


def _cells(name: str, *cells: str) -> str:
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _wrapped(line: str) -> Iterator[str]:
    yield from textwrap.wrap(line, _WIDTH)
