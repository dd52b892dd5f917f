"""How a run stands, as text for a terminal.

Owns words and columns. Does not own what they say (`cluster.standing`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from cluster.standing import StageStanding, Standing
from pipeline.config import printable

_BAR = 24
_RESTARTS_SHOWN = 5
_STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped, as asked: submit the same command to continue",
    "failed": "failed",
    "gone": "its driver is gone without a word: submit the same command to continue",
}
_CAUSES = {
    "failure": "a process failed",
    "preemption": "a node was taken away",
    "notice": "a node gave notice",
    "growth": "more nodes",
    "stopped": "asked to stop",
}


def text(found: Standing) -> str:
    """Several lines, none of which a terminal could obey."""
    return "\n".join(printable(line) for line in _lines(found))


def duration(seconds: float) -> str:
    """`3 d 4 h`, `4 h 12 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    for size, unit, small, name in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {name}"
    return f"{whole} s"


def _lines(found: Standing) -> Iterator[str]:
    age = duration((found.ended or found.read) - found.started)
    yield f"{found.run}  {_STATES[found.state]}, {age} from its start"
    if found.clock_s:
        how = "ahead of" if found.clock_s > 0 else "behind"
        by = duration(abs(found.clock_s))
        yield f"  the clock here is {by} {how} the driver's, whose times these are"
    if found.said:
        yield f"  {found.said}"
    if found.state not in ("running", "finished"):
        yield f"  {found.command}"
    yield ""
    for stage in found.stages:
        yield from _stage(stage)
    if found.waiting:
        yield f"  waiting: {found.waiting}"
    yield ""
    yield from _nodes(found)
    yield from _restarts(found)


def _stage(stage: StageStanding) -> Iterator[str]:
    spent = f" after {duration(stage.seconds)}" if stage.seconds else ""
    line = f"  {stage.name:<10}  {stage.state:<8}"
    if stage.total:
        share = min(stage.done / stage.total, 1.0)
        full = round(share * _BAR)
        line += f" [{'#' * full}{'.' * (_BAR - full)}] {share:6.1%}"
        line += f"  {stage.done:,.0f} of {stage.total:,.0f} {stage.unit}"
    yield line + (spent if stage.state != "running" else "")
    details = list(_details(stage))
    if details:
        yield f"{'':14}{', '.join(details)}"
    if stage.cause and stage.state == "failed":
        yield f"{'':14}{stage.cause}"


def _details(stage: StageStanding) -> Iterator[str]:
    more = stage.more
    if stage.state == "waiting":
        return
    if more.get("phase") and stage.state == "running":
        yield f"{more['phase']}"
    if more.get("ranges"):
        yield f"{more['ranges_committed']} of {more['ranges']} ranges committed"
    if more.get("shards"):
        yield f"{more['written']:,} samples in {more['shards']:,} shards"
    if more.get("failed"):
        yield f"{more['failed']:,} inputs failed"
    if more.get("nodes") and stage.state == "running":
        yield f"{more['nodes']} nodes, {more['ranks']} ranks"
    if more.get("pairs_per_s"):
        yield f"{more['pairs_per_s']:,.0f} pairs/s"
    elif stage.per_s:
        yield f"{stage.per_s:,.1f} {stage.unit}/s"
    if more.get("loss") is not None:
        yield f"loss {more['loss']:.4f}"
    if stage.state == "running":
        yield f"{duration(stage.seconds)} so far"
    if stage.eta_s is not None:
        yield f"{duration(stage.eta_s)} left"


def _nodes(found: Standing) -> Iterator[str]:
    seconds = found.usage.node_seconds
    if not seconds:
        yield "nodes: none seen yet"
        return
    ago = duration(max(found.read - found.usage.time, 0))
    yield f"nodes, {ago} ago       now      hours       cost"
    for name in sorted(seconds):
        cost = found.costs[name]
        shown = "no price" if cost is None else f"{cost:,.2f} {found.currency}"
        alive = found.usage.alive.get(name, 0) if found.state == "running" else 0
        yield f"  {name:<18} {alive:>5}  {seconds[name] / 3600:>9,.2f}  {shown:>9}"
    known = [cost for cost in found.costs.values() if cost is not None]
    if known:
        partly = " and what has no price" if None in found.costs.values() else ""
        yield f"  in all {sum(known):,.2f} {found.currency}{partly}"
    else:
        yield "  prices: {TYPE: PRICE_OF_AN_HOUR} in run.yaml shows what they cost"


def _restarts(found: Standing) -> Iterator[str]:
    if not found.restarts:
        if found.attempts:
            yield "restarts: none"
        return
    counts = Counter(restart.cause for restart in found.restarts)
    named = ", ".join(
        f"{count} x {_CAUSES.get(cause, cause)}"
        for cause, count in counts.most_common()
    )
    yield f"restarts: {len(found.restarts)} ({named})"
    for restart in found.restarts[-_RESTARTS_SHOWN:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(restart.time))
        at = "" if restart.step is None else f" at step {restart.step:,}"
        detail = f": {restart.detail}" if restart.detail else ""
        yield f"  {when}  {_CAUSES.get(restart.cause, restart.cause)}{at}{detail}"
