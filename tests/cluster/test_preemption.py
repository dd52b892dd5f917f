"""Simulated runs, held to what is known of them without simulating."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cluster.plan_sweep import Mean, expected, sweep, traces, young_daly_s
from cluster.preemption import (
    DEATH,
    NOTICE,
    RETURN,
    Event,
    Outcome,
    Spot,
    Timeline,
    Trace,
    Training,
    simulate,
)

HOUR = 3600.0
CALM = Spot(rate=0, notice_s=0, return_s=0)
# One node that is back at once, no notice, training stands still for each checkpoint:
# what Daly's formula is about.
CLASSIC = Spot(rate=0.5, notice_s=0, return_s=0, fixed_return=True)
BUSY = Spot(rate=0.2, notice_s=30, return_s=1200)


def training(**keys: Any) -> Training:
    usual: dict[str, Any] = {
        "work_s": 10 * HOUR,
        "speeds": {1: 1.0},
        "interval_s": 600,
        "stall_s": 30,
        "write_s": 30,
        "restart_s": 120,
    }
    return Training(**usual | keys)


def elastic(**keys: Any) -> Training:
    """On two to eight nodes."""
    usual: dict[str, Any] = {
        "speeds": {2: 0.25, 4: 0.5, 6: 0.75, 8: 1.0},
        "stall_s": 5,
        "write_s": 60,
        "detect_s": 20,
        "wait_s": 300,
        "settle_s": 600,
    }
    return training(**usual | keys)


def outcomes(one: Training, spot: Spot, runs: int = 20) -> list[Outcome]:
    seen = traces(spot, nodes=one.nodes, runs=runs, seed=1)
    return [simulate(one, trace) for trace in seen]


def happening(*events: tuple[float, int, int], spot: Spot = CALM) -> Trace:
    """Nodes to which only that happens: (time, kind, place)."""
    trace = Trace(spot, nodes=8, seed=0)
    trace._drawn.extend(Event(*event) for event in events)
    return trace


def gone(time: float, place: int) -> list[tuple[float, int, int]]:
    """A node is gone at once."""
    return [(time, NOTICE, place), (time, DEATH, place)]


def holds(found: Mean, value: float) -> bool:
    """Whether a value lies within twice the 95 % interval: all but 1 in 10,000 do."""
    return abs(found.mean - value) <= 2 * (found.high - found.mean)


@pytest.mark.parametrize("nodes", [1, 8])
def test_without_preemptions_a_run_takes_its_work_and_its_checkpoints(
    nodes: int,
) -> None:
    one = training(speeds={nodes: 1.0})
    run = simulate(one, Trace(CALM, nodes=nodes, seed=0))
    # 59 on the way and one at the end.
    assert run.checkpoint_s == pytest.approx(60 * 30)
    assert run.wall_s == pytest.approx(120 + 10 * HOUR + 60 * 30)
    assert run.wall_s == pytest.approx(one.undisturbed_s())
    assert run.node_s == pytest.approx(nodes * run.wall_s)
    assert (run.useful_s, run.lost_s, run.starts) == (pytest.approx(10 * HOUR), 0, 1)


def test_a_checkpoint_that_is_written_beside_training_costs_its_stall() -> None:
    one = training(stall_s=2, write_s=200, restart_s=0)
    run = simulate(one, Trace(CALM, nodes=1, seed=0))
    assert run.wall_s == pytest.approx(10 * HOUR + 59 * 2 + 200)


def test_a_checkpoint_is_not_begun_before_the_last_one_exists() -> None:
    one = training(interval_s=60, stall_s=10, write_s=600, restart_s=0)
    run = simulate(one, Trace(CALM, nodes=1, seed=0))
    # Every 600 s, of which 590 are trained.
    count = math.ceil(10 * HOUR / 590) - 1
    assert run.wall_s == pytest.approx(10 * HOUR + count * 10 + 600)


@pytest.mark.parametrize(("write_s", "lossless"), [(30, True), (31, False)])
def test_notice_that_a_checkpoint_fits_into_loses_nothing(
    write_s: float, lossless: bool
) -> None:
    found = outcomes(elastic(write_s=write_s), BUSY)
    assert all(run.finished and run.preemptions > 5 for run in found)
    assert all((run.lost_s == 0) == lossless for run in found)
    assert all((run.losses == 0) == lossless for run in found)


@pytest.mark.parametrize(
    ("died", "trained", "kept"),
    [
        # The first checkpoint is begun at 720 and there at 820.
        (120 + 650, 640, 0),
        (120 + 699, 689, 0),
        (120 + 701, 691, 600),
        # It stands still for the second, begun at 1330.
        (120 + 1215, 1200, 600),
    ],
)
def test_what_no_complete_checkpoint_holds_is_lost(
    died: float, trained: float, kept: float
) -> None:
    one = training(stall_s=10, write_s=100, detect_s=20, work_s=3000)
    run = simulate(one, happening(*gone(died, 0), (died + 7, RETURN, 0)))
    assert run.lost_s == pytest.approx(trained - kept)
    assert run.useful_s == pytest.approx(3000)
    # Its return is within the time until its death is noticed.
    assert run.restart_s == pytest.approx(120 + 20 + 120)
    stalls = died - 120 - trained + 10 * (math.ceil((3000 - kept) / 600) - 1)
    assert run.checkpoint_s == pytest.approx(stalls + 100)
    assert run.node_s == pytest.approx(run.wall_s - 7)


def test_with_notice_a_run_goes_on_where_it_was_on_fewer_nodes_and_then_on_more() -> (
    None
):
    told = Spot(rate=0, notice_s=90, return_s=0)
    one = elastic(wait_s=0, interval_s=1e9)
    trace = happening(
        *((4120, NOTICE, 3), (4210, DEATH, 3), (6000, RETURN, 3)), spot=told
    )
    run = simulate(one, trace)
    # Stopped at 4120, it trains on six nodes from 4300 until there are eight again.
    left = 10 * HOUR - 4000 - 0.75 * 1700
    assert run.wall_s == pytest.approx(6000 + 60 + 120 + left + 60)
    assert (run.lost_s, run.starts, run.waiting_s) == (0, 3, 0)


def test_a_checkpoint_that_a_death_interrupts_does_not_count() -> None:
    one = training(
        speeds={1: 0.5, 2: 1.0}, write_s=100, stall_s=0, interval_s=1e9, settle_s=500
    )
    # Place 1 goes and comes back; while the run stops for it, place 0 goes.
    growth = 1120 + 120 + 500
    trace = happening(
        *gone(1120, 1), (1200, RETURN, 1), *gone(growth + 50, 0), (9e9, RETURN, 0)
    )
    run = simulate(one, trace)
    assert run.lost_s == pytest.approx(1000 + 500)
    assert run.losses == 2
    # A checkpoint that was not finished, and the last.
    assert run.checkpoint_s == pytest.approx(50 + 100)
    assert run.useful_s == pytest.approx(20 * HOUR)


def test_a_preemption_without_notice_loses_work_all_the_same() -> None:
    sudden = dataclasses.replace(BUSY, sudden=0.5)
    found = outcomes(elastic(write_s=30), sudden)
    losses = sum(run.losses for run in found)
    # Half of those of nodes in use; a few happen while nothing is trained.
    assert 0.3 < losses / sum(run.preemptions for run in found) < 0.5


@pytest.mark.parametrize("interval_s", [300, 900, 3600])
def test_failures_without_notice_cost_what_the_exact_formula_says(
    interval_s: float,
) -> None:
    """Daly 2006, equation 13: failures also in checkpoints and restarts."""
    one = training(work_s=36 * interval_s, interval_s=interval_s)
    found = expected(one, traces(CLASSIC, nodes=1, runs=400, seed=3))
    mtbf, restart, write = HOUR / CLASSIC.rate, 120, 30
    piece = math.exp(restart / mtbf) * math.expm1((interval_s + write) / mtbf)
    first = math.expm1(restart / mtbf)
    assert found.unfinished == 0
    assert holds(found.wall_s, mtbf * (36 * piece + first))


def test_the_best_interval_is_that_of_young_and_daly_where_it_holds() -> None:
    # Checkpoints and restarts short beside the time between failures.
    one = training(work_s=100 * HOUR, stall_s=5, write_s=5, restart_s=5)
    seen = traces(CLASSIC, nodes=1, runs=60, seed=5)
    formula = young_daly_s(one, CLASSIC)
    assert formula == pytest.approx(math.sqrt(2 * 5 * 2 * HOUR))
    found = sweep(one, seen, shortest_s=30, longest_s=2 * HOUR)
    assert found.young_daly_s == formula
    assert found.best.interval_s == pytest.approx(formula, rel=0.35)
    assert found.alike_s[0] <= formula <= found.alike_s[1]
    at_formula = expected(dataclasses.replace(one, interval_s=formula), seen)
    assert at_formula.wall_s.mean == pytest.approx(found.best.wall_s.mean, rel=0.002)
    # The optimum is one: four times as often and as seldom both take longer.
    for factor in (1 / 4, 4):
        other = dataclasses.replace(one, interval_s=factor * formula)
        assert expected(other, seen).wall_s.mean > found.best.wall_s.mean * 1.005


def test_the_formula_counts_only_preemptions_that_lose_work() -> None:
    one = elastic(write_s=20)
    assert young_daly_s(one, BUSY) is None
    tenth = dataclasses.replace(BUSY, sudden=0.1)
    found = young_daly_s(one, tenth)
    assert found == pytest.approx(math.sqrt(2 * 5 * HOUR / (0.2 * 8 * 0.1)))
    unready = young_daly_s(elastic(write_s=31), tenth)
    assert unready == pytest.approx(math.sqrt(2 * 5 * HOUR / (0.2 * 8)))


def test_with_notice_for_a_checkpoint_the_longest_interval_is_best() -> None:
    seen = traces(BUSY, nodes=8, runs=10, seed=1)
    one = elastic(write_s=20)
    found = sweep(one, seen, shortest_s=60, longest_s=16 * HOUR)
    assert found.best.interval_s > 2 * HOUR
    assert found.best.lost_share.mean == 0


@pytest.mark.parametrize("wait_s", [0, 300, 1e9])
def test_parts_of_a_run_add_up_and_its_timeline_shows_them(wait_s: float) -> None:
    one = elastic(wait_s=wait_s)
    sizes = set()
    for seed in range(10):
        shown = Timeline()
        run = simulate(one, Trace(BUSY, nodes=8, seed=seed), timeline=shown)
        parts = (
            *(run.useful_s, run.lost_s, run.checkpoint_s),
            *(run.restart_s, run.waiting_s),
        )
        assert sum(parts) == pytest.approx(run.wall_s)
        assert run.finished
        # Nothing of the work is missing.
        assert 10 * HOUR <= run.useful_s * (1 + 1e-9) <= 10 * HOUR / one.speeds[2]
        ends = [0.0, *(span.end_s for span in shown.spans)]
        assert [span.start_s for span in shown.spans] == pytest.approx(ends[:-1])
        assert ends[-1] == pytest.approx(run.wall_s)
        # With the checkpoints between them.
        assert sum(end - start for start, end in shown.lost) >= run.lost_s * (1 - 1e-9)
        assert len(shown.lost) == run.losses
        sizes |= {span.nodes for span in shown.spans}
    if wait_s == 1e9:
        assert sizes == {0, 8}
    else:
        assert {4, 6, 8} <= sizes <= {0, 2, 4, 6, 8}


def test_a_run_never_uses_nodes_that_are_gone() -> None:
    shown = Timeline()
    simulate(elastic(detect_s=0), Trace(BUSY, nodes=8, seed=4), timeline=shown)
    for span in shown.spans:
        alive = [count for time, count in shown.alive if time < span.end_s]
        assert span.nodes <= alive[-1]


def test_a_run_grows_back_when_nodes_return_but_lets_it_settle() -> None:
    rare = Spot(rate=0.01, notice_s=0, return_s=900, fixed_return=True)
    seed = _of_one_preemption(rare)
    one, shown = elastic(wait_s=0, settle_s=2 * HOUR, detect_s=0), Timeline()
    simulate(one, Trace(rare, nodes=8, seed=seed), timeline=shown)
    assert [(span.phase, span.nodes) for span in shown.spans] == [
        *(("starting", 8), ("training", 8), ("starting", 6), ("training", 6)),
        *(("saving", 6), ("starting", 8), ("training", 8), ("saving", 8)),
    ]
    smaller = shown.spans[3]
    assert smaller.end_s - smaller.start_s == pytest.approx(2 * HOUR)


def _of_one_preemption(spot: Spot) -> int:
    for seed in range(1000):
        trace = Trace(spot, nodes=8, seed=seed)
        if HOUR < trace.event(0).time < 5 * HOUR and trace.event(3).time > 30 * HOUR:
            return seed
    raise AssertionError("none of the seeds preempts once")


def test_the_same_seed_gives_the_same_run_and_another_another() -> None:
    first, again = (outcomes(elastic(), BUSY, runs=10) for _ in range(2))
    assert first == again
    assert len({run.wall_s for run in first}) == 10
    # Whatever another run asked of the same trace before.
    trace = Trace(BUSY, nodes=8, seed=1_000_003)
    simulate(elastic(interval_s=60), trace)
    assert simulate(elastic(), trace) == first[0]


def test_nodes_are_up_as_long_as_rate_and_return_say() -> None:
    run = simulate(elastic(work_s=200 * HOUR), Trace(BUSY, nodes=8, seed=2))
    cycle = HOUR / BUSY.rate + BUSY.notice_s + BUSY.return_s
    up = 1 - BUSY.return_s / cycle
    assert run.node_s / (8 * run.wall_s) == pytest.approx(up, rel=0.03)
    assert run.preemptions == pytest.approx(8 * run.wall_s / cycle, rel=0.15)


def test_a_run_that_cannot_end_is_given_up_and_said_so() -> None:
    hopeless = Spot(rate=60, notice_s=0, return_s=0)
    one = training(interval_s=2 * HOUR)
    seen = traces(hopeless, nodes=1, runs=10, seed=0)
    found = expected(one, seen)
    assert (found.runs, found.unfinished) == (10, 10)
    assert found.wall_s.mean == math.inf


def test_an_interval_at_which_runs_end_is_better_than_any_at_which_they_do_not() -> (
    None
):
    often = Spot(rate=4, notice_s=0, return_s=0)
    one = training(stall_s=2, write_s=2, restart_s=10)
    seen = traces(often, nodes=1, runs=10, seed=0)
    found = sweep(one, seen, shortest_s=5, longest_s=3 * HOUR)
    assert found.best.unfinished == 0
    assert found.points[-1].unfinished == 10
    assert found.alike_s[1] < HOUR


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"write_s": 1}, "includes the stall"),
        ({"speeds": {}}, "no number of nodes"),
        ({"work_s": 0}, "above 0"),
        ({"settle_s": -1}, "settle_s is -1"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        training(**keys)
    with pytest.raises(ValueError, match="sudden is 2"):
        Spot(rate=0, notice_s=0, return_s=0, sudden=2)
    with pytest.raises(ValueError, match="take 10 or more"):
        traces(CALM, nodes=1, runs=3, seed=0)
