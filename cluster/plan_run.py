"""A plan: everything that `cluster.plan` says, as numbers.

Owns how its parts are put together, and costs. Does not own the parts
(`cluster.plan_stages`, `cluster.plan_sweep`, `cluster.plan_types`) or the words
(`cluster.plan_text`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cluster.options import PretrainStage
from cluster.plan_options import PlanConfig
from cluster.plan_stages import (
    Preprocess,
    Pretrain,
    made_already,
    preprocess,
    pretrain,
)
from cluster.plan_sweep import Mean, Sweep, sweep, traces
from cluster.plan_types import with_types
from cluster.preemption import Spot, Timeline, Trace, Training, simulate

# Events of all runs of an interval: about half a minute for a whole sweep.
_EVENTS = 300_000
_FEWEST_RUNS = 20
_SHORTEST_S = 30.0
_LONGEST_S = 8 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Preempted:
    """Training on nodes that are preempted."""

    training: Training
    """With the best interval."""
    spot: Spot
    sweep: Sweep
    """The interval that it was given is the recipe's."""
    calm_s: float
    """Wall time without preemptions, with the same interval."""
    example: Timeline
    """A run with the best interval that takes as long as half of them do."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """In the currency of the prices; None where a price is missing."""

    preprocess: float | None = None
    spot: Mean | None = None
    ondemand: float | None = None
    head: float | None = None
    missing: tuple[str, ...] = ()
    """Node types without a price."""

    def total(self) -> float | None:
        """Everything on spot nodes. The head is left out where it has no price."""
        if self.preprocess is None or self.spot is None:
            return None
        return self.preprocess + self.spot.mean + (self.head or 0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says."""

    config: PlanConfig
    preprocess: Preprocess | None
    """None where the shards are complete, or none are made."""
    pretrain: Pretrain | None
    preempted: Preempted | None
    costs: Costs

    @property
    def start_s(self) -> float:
        """Until nodes for training are there."""
        return 60 * self.config.assume.node_minutes

    @property
    def spot_s(self) -> float:
        """Of training on spot nodes, to be expected, with starting them."""
        if self.preempted is None:
            return 0.0
        return self.start_s + self.preempted.sweep.best.wall_s.mean

    @property
    def ondemand_s(self) -> float:
        """Of training without preemptions, with starting the nodes."""
        return self.start_s + self.preempted.calm_s if self.preempted else 0.0

    @property
    def total_s(self) -> float:
        """Of everything, one after another, on spot nodes."""
        return (self.preprocess.wall_s if self.preprocess else 0.0) + self.spot_s


def plan(config: PlanConfig) -> Plan:
    """Make the plan of a run.

    Raises:
        ValueError: whatever the run would be refused for, or an unknown node type.
    """
    config = with_types(config)
    shards = training = preempted = None
    if not made_already(config) and config.preprocess:
        shards = preprocess(config.preprocess, config.assume)
    if config.pretrain:
        training = pretrain(config, config.pretrain, made=shards)
        preempted = _preempted(config, config.pretrain, training)
    found = Plan(
        config=config,
        preprocess=shards,
        pretrain=training,
        preempted=preempted,
        costs=Costs(),
    )
    return dataclasses.replace(found, costs=_costs(found))


def as_json(found: Plan) -> dict[str, Any]:
    """The plan for programs: seconds, bytes, counts and shares; null for what has no
    end.
    """
    values = dataclasses.asdict(found)
    if found.preempted:
        spans = found.preempted.example.spans
        values["preempted"]["example"]["spans"] = [one._asdict() for one in spans]
    values["costs"]["total"] = found.costs.total()
    for name in ("spot_s", "ondemand_s", "total_s"):
        values[name] = getattr(found, name)
    finite: dict[str, Any] = _finite(values)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _preempted(config: PlanConfig, stage: PretrainStage, found: Pretrain) -> Preempted:
    options, assume, most = config.spot, config.assume, found.largest
    spot = Spot(
        rate=options.rate,
        notice_s=options.notice_seconds,
        sudden=options.sudden,
        return_s=60 * options.return_minutes,
        fixed_return=options.fixed_return,
    )
    detect = assume.detect_seconds
    training = Training(
        work_s=most.work_s,
        speeds={size.nodes: 1 / size.slower for size in found.sizes},
        interval_s=min(found.interval_s, most.work_s),
        stall_s=found.stall_s,
        write_s=most.write_s,
        restart_s=assume.restart_seconds,
        detect_s=stage.silent_seconds if detect is None else detect,
        wait_s=assume.wait_seconds,
        settle_s=stage.settle_seconds,
    )
    seen = traces(
        spot,
        nodes=training.nodes,
        runs=_runs(config, training),
        seed=options.seed,
    )
    longest = min(_LONGEST_S, training.work_s)
    shortest = min(_SHORTEST_S, longest / 20)
    tried = sweep(training, seen, shortest_s=shortest, longest_s=longest)
    best = dataclasses.replace(training, interval_s=tried.best.interval_s)
    example = Timeline()
    simulate(best, _typical(best, seen), timeline=example)
    return Preempted(
        training=best,
        spot=spot,
        sweep=tried,
        calm_s=best.undisturbed_s(),
        example=example,
    )


def _runs(config: PlanConfig, training: Training) -> int:
    """Fewer for a run in which much happens: it varies less."""
    events = 1 + 3 * config.spot.rate * training.nodes * training.work_s / 3600
    return min(config.spot.runs, max(_FEWEST_RUNS, int(_EVENTS / events)))


def _typical(training: Training, seen: list[Trace]) -> Trace:
    """The trace whose run takes as long as half of them do."""
    walls = sorted((simulate(training, one).wall_s, n) for n, one in enumerate(seen))
    return seen[walls[len(walls) // 2][1]]


def _costs(found: Plan) -> Costs:
    types, prices = found.config.types, found.config.prices

    def cost(name: str, node_s: float) -> float | None:
        return prices[name] * node_s / 3600 if name in prices else None

    wanted = [types.head]
    made: float | None = 0.0
    spot: Mean | None = Mean(mean=0, low=0, high=0)
    ondemand: float | None = 0.0
    if found.preprocess:
        wanted.append(types.cpu)
        made = cost(types.cpu, found.preprocess.node_s)
    if found.pretrain and found.preempted:
        wanted += [types.gpu, types.ondemand]
        nodes, used = found.pretrain.largest.nodes, found.preempted.sweep.best.node_s
        ends = {
            name: cost(types.gpu, value + nodes * found.start_s)
            for name, value in dataclasses.asdict(used).items()
        }
        spot = None if None in ends.values() else Mean(**ends)  # type: ignore[arg-type]
        ondemand = cost(types.ondemand, nodes * found.ondemand_s)
    return Costs(
        preprocess=made,
        spot=spot,
        ondemand=ondemand,
        head=cost(types.head, found.total_s),
        missing=tuple(name for name in wanted if name not in prices),
    )
