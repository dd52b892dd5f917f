"""One attempt to train on nodes that are taken: from its start to what ended it.

Owns the runners of one attempt, what is asked of them, and the verdict on its end. Does
not own which nodes it has (`cluster.demand`) or what comes after (`cluster.elastic`).

Nothing here waits for an answer: a call to a node that was cut off may never return. A
runner is asked about once a second; the cluster is asked which nodes are alive.

Why an attempt ended (the order matters, because the ranks of sound nodes fail too when
another node is lost):
1. every launcher ended with 0: finished;
2. a node that is not alive any more, or has answered nothing for too long: preemption;
3. every launcher ended after it was asked to stop: what the stop was for;
4. a launcher or runner failed, and every other node has answered since: failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.demand import Nodes, bundle
from cluster.draining import PREEMPTION, cause_of_death, draining
from cluster.options import PretrainStage
from cluster.runner import Launch, Runner, State
from cluster.store import first_line

if TYPE_CHECKING:
    import ray

_POLL_S = 1.0
_ANSWER_S = 5.0
_START_S = 300.0
_END_S = 40.0
# How long the others are listened to after a process failed: one may say why.
_GRACE_S = 5.0
_ASKED_TO_STOP = 128 + 15
# As the launcher passes on the end of a rank that had not begun yet.
_STOPPED = (0, _ASKED_TO_STOP, 256 - 15)
_TAIL = 1 << 13
_REFUSAL = "trainer.pretrain: error: "


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an attempt is to run."""

    stage: PretrainStage
    nodes: Nodes
    words: tuple[str, ...]
    """Arguments of trainer.pretrain."""
    logs: Callable[[int], str]
    """Log file of a node, by its rank."""
    checkpoint_seconds: float
    """How long a stop with a checkpoint takes, as far as is known."""
    advanced: Callable[[], bool]
    """Whether steps were taken, without which it is not stopped to grow."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    cause: str
    """One of `cluster.journal.CAUSES`."""
    detail: str = ""
    node: str = ""
    """Which node was it, where it was one."""
    status: int | None = None
    """Exit status of its launcher, where it was that."""
    tail: str = ""
    """Last words of the launcher or ranks there."""
    log: str = ""
    refusal: str = ""
    """What the trainer says it cannot do, in one line."""
    silent: str = ""
    """Id of a node that answers nothing, but is not known to be dead."""
    stop_seconds: float | None = None
    """How long the stop took, checkpoint included."""


@dataclass(kw_only=True)
class _Member:
    """A runner, and what is known of it."""

    actor: Any
    id: str = ""
    address: str = ""
    log: str = ""
    asked: ray.ObjectRef | None = None
    answered: float = field(default_factory=time.monotonic)
    status: int | None = None
    ended: float = float("inf")
    tail: str = ""
    died: str = ""

    @property
    def name(self) -> str:
        return f"{self.address} ({self.id[:8]})"


class Attempt:
    """Runs once.

    Args:
        started: called with the nodes' names once every launcher is.
        tell: prints what node 0 says.
        stop: set when the driver is asked to stop.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        started: Callable[[list[str]], None],
        tell: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._plan, self._tell, self._stop = plan, tell, stop
        self._on_start = started
        self._members: list[_Member] = []
        self._began = self._trouble = 0.0
        self._wish: Ended | None = None
        self._asked_at = 0.0
        self._told: set[str] = set()

    def run(self) -> Ended:
        """Train until something ends it; then nothing of it is left on any node that
        answers.
        """
        try:
            ended = self._start()
            while ended is None:
                time.sleep(_POLL_S)
                self._look()
                ended = self._verdict()
                if ended is None and self._wish is None:
                    self._act_on(self._wishes())
            return ended
        finally:
            self._end()

    def _start(self) -> Ended | None:
        import ray

        for index in range(self._plan.nodes.count):
            self._members.append(_Member(actor=self._runner(index)))
        try:
            self._find_nodes()
            first = self._members[0]
            (port,) = self._answers([first.actor.free_port.remote(first.address)])
            launches = [
                member.actor.start.remote(self._launch(rank, port))
                for rank, member in enumerate(self._members)
            ]
            logs = self._answers(launches)
            for member, log in zip(self._members, logs, strict=True):
                member.log = log
        except (ray.exceptions.RayError, KeyError) as error:
            return self._not_started(error)
        self._began = time.monotonic()
        for member in self._members:
            member.answered = self._began
        self._on_start([member.name for member in self._members])
        return None

    def _runner(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        amounts = bundle(self._plan.stage)
        return (
            ray.remote(Runner)
            .options(
                num_cpus=amounts.pop("CPU", 0),
                num_gpus=amounts.pop("GPU", 0),
                resources=amounts,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._plan.nodes.group, placement_group_bundle_index=index
                ),
            )
            .remote()
        )

    def _find_nodes(self) -> None:
        import ray

        ids = self._answers([member.actor.node.remote() for member in self._members])
        for member, node in zip(self._members, ids, strict=True):
            member.id = node
        rows = {row["NodeID"]: row for row in ray.nodes()}
        for member in self._members:
            # As the other nodes reach it; a node may not know it by itself.
            member.address = rows[member.id]["NodeManagerAddress"]

    def _answers(self, asked: list[ray.ObjectRef]) -> list[Any]:
        """What runners answer while they start.

        Raises:
            RayError: one did not answer, or its node was lost.
        """
        import ray

        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and not self._stop.is_set():
            _, missing = ray.wait(asked, num_returns=len(asked), timeout=_POLL_S)
            if not missing:
                return list(ray.get(asked, timeout=_ANSWER_S))
            if not self._plan.nodes.whole():
                raise ray.exceptions.NodeDiedError("a node was lost before the start")
        raise ray.exceptions.GetTimeoutError(f"no answer within {_START_S:.0f} s")

    def _launch(self, rank: int, port: int) -> Launch:
        return Launch(
            node=rank,
            nodes=len(self._members),
            ranks=self._plan.stage.ranks,
            own=self._members[rank].address,
            first=self._members[0].address,
            port=port,
            words=self._plan.words,
            log=self._plan.logs(rank),
        )

    def _not_started(self, error: Exception) -> Ended:
        if self._stop.is_set():
            return Ended(cause="stopped", detail="the driver was asked to stop")
        # Of an error in a runner, Ray's own first line names the call alone.
        raised = getattr(error, "cause", None)
        said = first_line(raised or error)
        if isinstance(raised, ValueError):
            return Ended(cause="failure", detail=said, refusal=said)
        # The cluster takes its time to know that a node is lost.
        patience = 0.0 if raised else self._plan.stage.silent_seconds
        deadline = time.monotonic() + patience
        while self._plan.nodes.whole():
            if time.monotonic() >= deadline:
                return Ended(cause="failure", detail=said)
            time.sleep(_POLL_S)
        return Ended(cause="preemption", detail=said)

    def _look(self) -> None:
        """Take the answers that have come, ask again."""
        import ray

        for member in self._members:
            if member.asked is None and not member.died and member.status is None:
                member.asked = member.actor.state.remote()
        asked = {
            member.asked: member for member in self._members if member.asked is not None
        }
        if not asked:
            return
        come, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_POLL_S)
        for reference in come:
            member = asked[reference]
            member.asked = None
            try:
                state = ray.get(reference, timeout=_ANSWER_S)
            except ray.exceptions.ActorDiedError as error:
                member.died = " ".join(str(error).split())
            except (ray.exceptions.RayError, TimeoutError):
                # Asked again; who answers nothing for too long is taken for dead.
                continue
            else:
                self._learn(member, state)

    def _learn(self, member: _Member, state: State) -> None:
        member.answered = time.monotonic()
        member.tail = (member.tail + state.said)[-_TAIL:]
        if state.status is not None:
            member.status, member.ended = state.status, state.ended or time.time()
        if member is self._members[0]:
            for line in state.said.splitlines():
                self._tell(line)

    def _verdict(self) -> Ended | None:
        now = time.monotonic()
        statuses = [member.status for member in self._members]
        if set(statuses) == {0}:
            return self._after_stop(Ended(cause="finished"))
        if lost := self._lost(now):
            return lost
        if None not in statuses and set(statuses) <= set(_STOPPED):
            if self._wish:
                return self._after_stop(self._wish)
            if _ASKED_TO_STOP in statuses:
                detail = "the ranks were asked to stop on their nodes, and saved"
                return Ended(cause="notice", detail=detail)
        if self._wish and now - self._asked_at > self._plan.stage.stop_seconds:
            late = f"not stopped within {self._plan.stage.stop_seconds:.0f} s, killed"
            return replace(self._wish, detail=f"{self._wish.detail}; {late}")
        return self._failed(now)

    def _lost(self, now: float) -> Ended | None:
        """The loss of a node, if there was one."""
        import ray

        rows = {row["NodeID"]: row for row in ray.nodes()}
        for member in self._members:
            row = rows.get(member.id)
            if row is None or not row["Alive"]:
                detail = cause_of_death(row)[1] if row else "the node is gone"
                return Ended(
                    cause="preemption",
                    detail=" ".join(detail.split()),
                    node=member.name,
                )
        silent_s = self._plan.stage.silent_seconds
        for member in self._members:
            if member.status is not None or now - member.answered <= silent_s:
                continue
            # By now a dead runner's node would be known to be dead, if that were so.
            return Ended(
                cause="failure" if member.died else "preemption",
                detail=member.died or f"it has answered nothing for {silent_s:.0f} s",
                node=member.name,
                tail=member.tail,
                log=member.log,
                silent="" if member.died else member.id,
            )
        return None

    def _failed(self, now: float) -> Ended | None:
        """A failure, once nobody else is to blame."""
        fine = _STOPPED if self._wish else (0,)
        failed = [one for one in self._members if one.status not in (None, *fine)]
        if not failed:
            return None
        self._trouble = self._trouble or now
        others = [one for one in self._members if one.status is None]
        if any(one.answered <= self._trouble for one in others):
            # Lost nodes take their time to be known as such; `_lost` sets an end.
            return None
        if others and now - self._trouble < _GRACE_S:
            return None
        return _failure(failed)

    def _wishes(self) -> Ended | None:
        """Why the ranks should be asked to stop now, if they should."""
        if self._stop.is_set():
            return Ended(cause="stopped", detail="the driver was asked to stop")
        for id_, notice in draining().items():
            member = next((one for one in self._members if one.id == id_), None)
            if member is None or notice.reason != PREEMPTION:
                continue
            left = (notice.deadline_ms or 0) / 1000 - time.time()
            if left > self._plan.checkpoint_seconds:
                detail = f"it leaves in {left:.0f} s"
                return Ended(cause="notice", detail=detail, node=member.name)
            if id_ not in self._told:
                self._told.add(id_)
                self._tell(
                    f"{member.name} leaves in {left:.0f} s, too soon for a checkpoint "
                    f"({self._plan.checkpoint_seconds:.0f} s): going on until then"
                )
        size = self._plan.nodes.could_be()
        settled = time.monotonic() - self._began >= self._plan.stage.settle_seconds
        if settled and size > self._plan.nodes.count and self._plan.advanced():
            return Ended(cause="growth", detail=f"to {size} nodes")
        return None

    def _act_on(self, wish: Ended | None) -> None:
        if wish is None:
            return
        self._wish, self._asked_at = wish, time.monotonic()
        for member in self._members:
            member.actor.stop.remote()

    def _after_stop(self, ended: Ended) -> Ended:
        saved = any(member.status == _ASKED_TO_STOP for member in self._members)
        if self._wish is None or not saved:
            return ended
        return replace(ended, stop_seconds=time.monotonic() - self._asked_at)

    def _end(self) -> None:
        """Process trees first, then runners; whoever took the nodes gives them back."""
        import ray

        now = time.monotonic()
        kills = [
            member.actor.kill.remote()
            for member in self._members
            if not member.died and now - member.answered < _ANSWER_S + 2 * _POLL_S
        ]
        if kills:
            ray.wait(kills, num_returns=len(kills), timeout=_END_S)
        for member in self._members:
            ray.kill(member.actor, no_restart=True)


def _failure(failed: Sequence[_Member]) -> Ended:
    """The failure of the member that knows best, or failed first."""
    refusing = [one for one in failed if _REFUSAL in one.tail]
    worst = min(refusing or failed, key=lambda member: member.ended)
    assert worst.status is not None
    refusal = ""
    if refusing and worst.status in (1, 2):
        refusal = worst.tail.rpartition(_REFUSAL)[2].splitlines()[0]
    return Ended(
        cause="failure",
        detail=refusal or f"the launcher ended with status {worst.status}",
        node=worst.name,
        status=worst.status,
        tail=worst.tail,
        log=worst.log,
        refusal=refusal,
    )
