"""Training to the end on nodes that come, go and die.

Owns the order of attempts: what each one starts with, what its end costs, and when to
give up. Does not own one attempt (`cluster.attempt`), nodes (`cluster.demand`) or what
is saved: the trainer goes on from its newest complete checkpoint by itself, at whatever
world size (`trainer.loop`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.attempt import Attempt, Ended, Plan
from cluster.checks import valid_nodes
from cluster.commands import PRETRAIN, Lanes, lanes_of, pretrain_words, resolved
from cluster.demand import Nodes, taken
from cluster.journal import FOLDER, Journal, read_events
from cluster.options import PretrainStage, RunConfig
from cluster.store import Store, run_id
from cluster.trained import is_done, saved_step, taken_step
from pipeline.config import printable
from trainer.contract import LOCKED

_LOGS = "logs"
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0
_TAIL_LINES = 12
# A trainer that was killed, or is on a node that was cut off, takes a while to end.
_LOCKED_TRIES = 20
_POLL_S = 1.0


def pretrain(
    config: RunConfig, journal: Journal, *, stop: threading.Event, grow: bool = False
) -> None:
    """Train until all steps are taken, or `stop` is set, which saves first.

    Args:
        grow: the dataset may still be being made.

    Raises:
        ValueError: a configuration that cannot be trained, before any node is asked
            for or as the trainer's own message.
        OSError: attempts failed too often; the message has the last words of the rank
            that failed, and its log file.
    """
    assert config.pretrain
    words = pretrain_words(
        config.pretrain, data=config.shards, output=config.trained, grow=grow
    )
    found = resolved(PRETRAIN, words)
    lanes = lanes_of(found)
    sizes = valid_nodes(config.pretrain, lanes)
    if is_done(config.trained, lanes):
        return
    if found["storage"].get("writer", "") is None:
        # There is one driver of a run at a time, so its next trainer need not wait
        # until the one before is seen to be dead.
        words.append(f"--storage.writer={run_id(config.output)}")
    _Elastic(config, config.pretrain, journal, tuple(words), lanes, stop).run(sizes)


@dataclass(frozen=True, kw_only=True)
class _Stand:
    """How far a run is."""

    saved: int
    taken: int


class _Elastic:
    def __init__(
        self,
        config: RunConfig,
        stage: PretrainStage,
        journal: Journal,
        words: tuple[str, ...],
        lanes: Lanes,
        stop: threading.Event,
    ) -> None:
        self._config, self._stage, self._journal = config, stage, journal
        self._words, self._lanes, self._stop = words, lanes, stop
        self._failures = self._preemptions = self._locked = 0
        self._waiting = ""
        # Drivers before this one may have made some.
        started = read_events(Store(config.output))
        self._number = sum(event.kind == "attempt_started" for event in started)
        self._checkpoint_s = stage.checkpoint_seconds
        self._proven = False
        self._last_failure: _Stand | None = None
        self._stamp = time.strftime("%Y%m%d-%H%M%S")

    def run(self, sizes: list[int]) -> None:
        wait_seconds = self._stage.wait_seconds
        while not self._stop.is_set():
            with taken(
                self._stage,
                sizes,
                wait_seconds=wait_seconds,
                tell=self._tell_waiting,
                note=lambda text: self._journal.write("note", text, text=text),
                stop=self._stop,
            ) as nodes:
                if nodes is None:
                    return
                ended, before = self._attempt(nodes)
            self._journal.write("released", nodes=nodes.count)
            if ended.cause == "finished":
                return
            self._account(ended, before)
            # What is left goes on at once; what comes back is a reason to grow.
            wait_seconds = 0.0

    def _attempt(self, nodes: Nodes) -> tuple[Ended, _Stand]:
        """One attempt; how it ended, and how far the run was before."""
        self._number += 1
        self._waiting = ""
        before = self._stand()
        plan = Plan(
            stage=self._stage,
            nodes=nodes,
            words=self._words,
            logs=self._log,
            checkpoint_seconds=self._checkpoint_s,
            advanced=lambda: _advanced(before, self._stand()),
        )
        ended = Attempt(
            plan, started=self._tell_start(before), tell=_say, stop=self._stop
        ).run()
        if ended.stop_seconds is not None:
            self._checkpoint_s = ended.stop_seconds
        if ended.cause == "finished" and not is_done(self._config.trained, self._lanes):
            ended = Ended(
                cause="failure",
                detail="the launchers ended with 0, but the run is not complete",
                log=self._log(0),
            )
        self._tell_end(ended)
        return ended, before

    def _account(self, ended: Ended, before: _Stand) -> None:
        """Count an end against its budget, and wait where that helps.

        Raises:
            ValueError, OSError: it is not worth another attempt.
        """
        now = self._stand()
        self._proven |= _advanced(before, now)
        if ended.silent:
            self._await_death(ended.silent)
        if ended.cause in ("preemption", "notice"):
            self._preemptions += 1
            if self._preemptions > self._stage.preemptions:
                raise OSError(
                    f"pretrain: nodes were lost or gave notice {self._preemptions} "
                    f"times, more than pretrain.preemptions {self._stage.preemptions}; "
                    "the same command continues"
                )
        # Each growth takes the run further, so there is an end of them.
        vain = ended.cause == "growth" and now.saved <= before.saved
        if ended.cause != "failure" and not vain:
            return
        if LOCKED in ended.refusal and self._locked < _LOCKED_TRIES:
            self._locked += 1
            self._stop.wait(_backoff(self._locked))
            return
        if ended.refusal and not self._proven:
            raise ValueError(f"pretrain: {ended.refusal}")
        self._failures += 1
        if self._failures > self._stage.failures:
            raise OSError(self._gives_up(ended, now))
        self._last_failure = now
        self._stop.wait(_backoff(self._failures))

    def _gives_up(self, ended: Ended, now: _Stand) -> str:
        same = self._last_failure == now
        where = f"again after step {now.taken}, without getting further" if same else ""
        last = ended.tail.rstrip().splitlines()[-_TAIL_LINES:]
        said = "".join(f"\n  {printable(line)}" for line in last)
        _say(f"last words of {ended.node}:{said}" if said else "no last words")
        return (
            f"pretrain: failed {self._failures} times, the last time "
            f"{where or f'after step {now.taken}'}: {ended.detail}"
            f"{f' on {ended.node}' if ended.node else ''}; see {ended.log or 'above'}. "
            "Correct the cause and give the same command, which continues"
        )

    def _await_death(self, node: str) -> None:
        """Wait until the cluster knows that a silent node is dead, or it would be taken
        again.
        """
        import ray

        deadline = time.monotonic() + 3 * self._stage.silent_seconds
        while time.monotonic() < deadline and not self._stop.wait(_POLL_S):
            if not any(n["NodeID"] == node and n["Alive"] for n in ray.nodes()):
                return

    def _stand(self) -> _Stand:
        run = self._config.trained
        return _Stand(saved=saved_step(run), taken=taken_step(run))

    def _log(self, rank: int) -> str:
        name = f"{self._stamp}-attempt-{self._number:03d}-node-{rank:03d}.log"
        if path := Store(self._config.output).path:
            return str(path / FOLDER / _LOGS / name)
        # A launcher cannot write to a URL: on its node, then.
        folder = f"palimpsest-{run_id(self._config.output)}"
        return str(Path(tempfile.gettempdir()) / folder / name)

    def _tell_waiting(self, wanted: int, there: int) -> None:
        line = f"waiting for nodes: {wanted} wanted, {there} there"
        if line == self._waiting:
            # A week of waiting is no week of events.
            _say(line)
            return
        self._waiting = line
        self._journal.write(
            "waiting",
            line,
            wanted=wanted,
            there=there,
        )

    def _tell_start(self, before: _Stand) -> Callable[[list[str]], None]:
        def tell(nodes: list[str]) -> None:
            ranks = len(nodes) * self._stage.ranks
            self._journal.write(
                "attempt_started",
                f"attempt {self._number}: {ranks} ranks on {len(nodes)} nodes, from "
                f"step {before.saved}",
                attempt=self._number,
                world_size=ranks,
                nodes=nodes,
                step=before.saved,
            )

        return tell

    def _tell_end(self, ended: Ended) -> None:
        now = self._stand()
        where = f" on {ended.node}" if ended.node else ""
        what = f": {ended.detail}" if ended.detail else ""
        self._journal.write(
            "attempt_ended",
            f"attempt {self._number} ended after step {now.taken} (saved: {now.saved})"
            f": {ended.cause}{where}{what}",
            attempt=self._number,
            cause=ended.cause,
            detail=ended.detail,
            node=ended.node,
            step=now.taken,
            saved=now.saved,
            log=ended.log,
            tail=ended.tail[-2000:],
        )


def _advanced(before: _Stand, now: _Stand) -> bool:
    """Whether steps were taken since."""
    # Those that were not saved stay in the metrics until a trainer starts.
    taken = now.taken > before.saved and now.taken != before.taken
    return taken or now.saved > before.saved


def _backoff(times: int) -> float:
    """Seconds to wait after so many failures."""
    return min(_FIRST_WAIT_S * 2 ** (times - 1), _LONGEST_WAIT_S)


def _say(line: str) -> None:
    print("\n".join(map(printable, line.splitlines())), flush=True)
