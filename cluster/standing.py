"""How a run stands, read from its storage alone: it needs no cluster and no driver.

Owns what is made of the journal, of preprocessing's progress and of the trainer's
metrics. Does not own how it is shown (`cluster.status_text`) or what writes those
files.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from cluster.journal import (
    CAUSES,
    SIGN_OF_LIFE_SECONDS,
    Event,
    Usage,
    read_events,
    read_usage,
    shows_life,
)
from cluster.options import DATA, PRETRAIN
from cluster.store import Store, without_password
from trainer.contract import COMPLETE, CONFIG, METRICS

STAGES = ("preprocess", "pretrain", "evaluate")
# A driver writes more often than this, and clocks agree better than that.
_SILENT_SECONDS = 60.0
_AHEAD_SECONDS = 10.0
_TAIL_BYTES = 1 << 17
_RECENT_STEPS = 50

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class StageStanding:
    """How one stage stands."""

    name: str
    state: State
    cause: str | None = None
    """Why it failed or stopped."""
    seconds: float = 0.0
    """For how long it has run in all."""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    """Of `done` and `total`: inputs, steps."""
    per_s: float = 0.0
    """Units in a second, lately."""
    eta_s: float | None = None
    """Seconds left at that pace, while it runs."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What only this stage has: shards, loss, ranks, ..."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """An attempt at training that ended, and why."""

    attempt: int
    time: float
    cause: str
    """One of `cluster.journal.CAUSES`."""
    detail: str
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands."""

    run: str
    state: Literal["running", "finished", "stopped", "failed", "gone"]
    """gone: its driver ended without a word."""
    said: str | None
    """Of the last driver, where it failed."""
    command: str
    """Of the last driver: submitted again, it continues."""
    started: float
    """When the first driver started, in seconds since 1970."""
    stages: Sequence[StageStanding]
    usage: Usage
    costs: Mapping[str, float | None]
    """By node type, so far; None where no price is given."""
    currency: str
    attempts: int
    """Attempts at training that were started."""
    restarts: Sequence[Restart]
    waiting: str | None
    """What a driver waits for."""
    read: float
    """When this was read, by the driver's clock as far as that is known."""
    clock_s: float
    """By how much this machine's clock is ahead of the driver's, where a driver was
    seen to live whose stamps are long past or still to come; else 0."""
    ended: float | None
    """When something was last heard of it, where it does not run."""


def standing(
    run: str,
    *,
    clock_s: float = 0.0,
    listen_s: float = SIGN_OF_LIFE_SECONDS,
    tell: Callable[[str], None] = print,
) -> Standing:
    """How the run at `run`, a path or URL, stands.

    Args:
        clock_s: as an earlier look has found it.
        listen_s: how long to listen for a driver whose last stamp is long past or still
            to come: it may be gone, or have another clock.
        tell: prints a line before it listens.

    Raises:
        ValueError: no driver has ever started there.
    """
    store = Store(run)
    events = read_events(store)
    drivers = [event for event in events if event.kind == "driver_started"]
    if not drivers:
        raise ValueError(
            f"{without_password(run)} is no run: nothing has been started with it as "
            "`output` (cluster.run --config run.yaml)"
        )
    config = _config(drivers)
    usage = read_usage(store)
    prices = config.get("prices", {})
    state, said = _ended(events, drivers[-1])
    if state is None:
        age = time.time() - clock_s - _newest(events, usage)
        state = "running"
        if not -_AHEAD_SECONDS <= age <= _SILENT_SECONDS:
            tell(
                f"by the clock here its driver was last heard of {age:.0f} s ago: "
                f"listening for {listen_s:.0f} s"
            )
            heard = _clock_of_living(store, listen_s)
            state, clock_s = ("gone", 0.0) if heard is None else ("running", heard)
    running, now = state == "running", time.time() - clock_s
    stages = [
        _stage(name, config, events, now=now if running else None)
        for name in STAGES
        if config.get(name) is not None
    ]
    return Standing(
        run=without_password(run),
        state=state,
        said=said,
        command=str(drivers[-1].fields.get("command", "")),
        started=drivers[0].time,
        stages=stages,
        usage=usage,
        costs={
            name: prices[name] * seconds / 3600 if name in prices else None
            for name, seconds in sorted(usage.node_seconds.items())
        },
        currency=str(config.get("currency", "")),
        attempts=sum(event.kind == "attempt_started" for event in events),
        restarts=_restarts(events),
        waiting=_waiting(events) if running else None,
        read=now,
        clock_s=clock_s,
        ended=None if running else events[-1].time,
    )


def _config(drivers: Sequence[Event]) -> dict[str, Any]:
    """The newest driver's configuration, with the stages that only others had: each
    stage may have had a driver of its own.
    """
    config: dict[str, Any] = {}
    for event in drivers:
        given = event.fields.get("config")
        if not isinstance(given, Mapping):
            continue
        config |= {key: value for key, value in given.items() if value is not None}
    return config


def _clock_of_living(store: Store, listen_s: float) -> float | None:
    """By how much this machine's clock is ahead of that of a driver that is heard; None
    where none is.
    """
    if not shows_life(store, listen_s):
        return None
    return time.time() - _newest(read_events(store), read_usage(store))


def _newest(events: Sequence[Event], usage: Usage) -> float:
    return max(usage.time, *(event.time for event in events))


def _ended(events: Sequence[Event], driver: Event) -> tuple[Any, str | None]:
    """How a driver says that it ended, and why; None where it does not."""
    for event in reversed(events):
        if event.kind == "driver_ended" and event.driver == driver.driver:
            status = str(event.fields.get("status"))
            known = status in ("finished", "stopped")
            return (status, None) if known else ("failed", status)
    return None, None


def _stage(
    name: str, config: Mapping[str, Any], events: Sequence[Event], *, now: float | None
) -> StageStanding:
    """`now` is None where the run does not go on."""
    own = [event for event in events if event.fields.get("stage") == name]
    last = own[-1] if own else None
    cause = None
    state: State = "waiting"
    if last and last.kind == "stage_finished":
        state = "done"
    elif last and last.kind == "stage_failed":
        cause = str(last.fields.get("cause"))
        state = "stopped" if cause == "asked to stop" else "failed"
    elif last:
        state = "running" if now is not None else "stopped"
    parts: dict[str, Any] = {
        "state": state,
        "cause": cause,
        "seconds": _seconds(own, now),
    }
    output = str(config.get("output")).rstrip("/")
    # A file that somebody else wrote, or that is damaged, costs its figures alone.
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        if name == "preprocess":
            shards = str(config.get("data") or f"{output}/{DATA}")
            return _preprocess(shards, **parts)
        if name == "pretrain":
            return _pretrain(Store(f"{output}/{PRETRAIN}"), events, **parts)
    return StageStanding(name=name, **parts)


def _seconds(own: Sequence[Event], now: float | None) -> float:
    total, since = 0.0, None
    for event in own:
        if event.kind == "stage_started":
            since = event.time
        elif since is not None:
            total, since = total + event.time - since, None
    return total + (now - since if since is not None and now is not None else 0.0)


def _preprocess(shards: str, **parts: Any) -> StageStanding:
    folder, _, name = shards.rpartition("/")
    found = _json(Store(folder), f"{name}.progress.json")
    ranges = found.get("ranges") or {}
    running = parts["state"] == "running"
    # Once it is complete the file has the dataset's figures instead of a phase's.
    counts, totals = found.get("accounting", {}), found.get("totals", {})
    failed = counts.get("failed", found.get("failed", {}))
    return StageStanding(
        name="preprocess",
        done=float(counts.get("inputs", found.get("done", 0))),
        total=float(counts.get("inputs", found.get("total", 0))),
        unit=str(found.get("unit", "inputs")),
        per_s=float(found.get("per_s", 0)),
        eta_s=found.get("eta_s") if running else None,
        more={
            "phase": found.get("phase"),
            "ranges_committed": ranges.get("committed"),
            "ranges": ranges.get("total"),
            "failed": sum(failed.values()),
            "written": counts.get("written"),
            "shards": sum(row["shards"] for row in totals.values()),
        },
        **parts,
    )


def _pretrain(
    store: Store, events: Sequence[Event], *, state: State, **parts: Any
) -> StageStanding:
    config = _config_of(store)
    rows = _last_rows(store)
    total = config.get("schedule", {}).get("steps", 0)
    if config.get("max_steps") is not None:
        total = min(total, config["max_steps"])
    step = rows[-1]["step"] if rows else 0
    pairs_per_s = statistics.median([row["pairs_per_s"] for row in rows] or [0.0])
    steps_per_s = pairs_per_s / config.get("global_batch", 1)
    started = [event for event in events if event.kind == "attempt_started"]
    now = started[-1].fields if started else {}
    # The moment between the last step and the stage's own word.
    done = bool(_json(store, COMPLETE))
    eta_s = None
    if state == "running" and steps_per_s and not done:
        eta_s = (total - step) / steps_per_s
    return StageStanding(
        name="pretrain",
        state=state,
        done=step,
        total=total,
        unit="steps",
        per_s=steps_per_s,
        eta_s=eta_s,
        more={
            "pairs_per_s": pairs_per_s,
            "loss": rows[-1].get("loss") if rows else None,
            "ranks": now.get("world_size"),
            "nodes": len(now.get("nodes", ())),
        },
        **parts,
    )


def _config_of(store: Store) -> dict[str, Any]:
    """Of the trainer; nothing where it is not one."""
    try:
        found = yaml.safe_load(store.read(CONFIG) or b"")
    except (yaml.YAMLError, UnicodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _restarts(events: Sequence[Event]) -> list[Restart]:
    return [
        Restart(
            attempt=int(event.fields.get("attempt", 0)),
            time=event.time,
            cause=str(event.fields.get("cause")),
            detail=str(event.fields.get("detail") or ""),
            step=event.fields.get("step"),
        )
        for event in events
        if event.kind == "attempt_ended" and event.fields.get("cause") != CAUSES[0]
    ]


def _waiting(events: Sequence[Event]) -> str | None:
    last = events[-1]
    if last.kind != "waiting":
        return None
    wanted, there = last.fields.get("wanted"), last.fields.get("there")
    return f"{wanted} nodes for training wanted, {there} there"


def _last_rows(store: Store) -> list[dict[str, Any]]:
    """The last steps of the trainer's metrics."""
    rows = []
    text = (store.tail(METRICS, _TAIL_BYTES) or b"").decode(errors="replace")
    # The first line may be cut, the last one torn.
    for line in text.split("\n")[-_RECENT_STEPS - 1 : -1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "pairs_per_s" in row:
            rows.append(row)
    return rows


def _json(store: Store, name: str) -> dict[str, Any]:
    try:
        found = json.loads(store.read(name) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
