"""The stages of a run, in order: preprocess, pretrain, evaluate.

Owns what makes a stage done, so that running it again is nothing, and the order of
stages, overlapping or not. Does not own training on nodes that come and go
(`cluster.elastic`) or what the commands do.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from cluster import nodes
from cluster.checks import read_manifest
from cluster.commands import (
    EVALUATE,
    PREPROCESS,
    evaluate_words,
    preprocess_words,
    resolved,
)
from cluster.driver import Stopped, gcs_address
from cluster.elastic import pretrain
from cluster.evaluation import REPORT_FILE, measure
from cluster.journal import Journal
from cluster.options import RunConfig
from cluster.process import run_guarded
from cluster.store import Store, without_password
from pipeline.manifest import Manifest
from trainer.contract import COMPLETE

_FIRST_WAIT_S = 5.0
_POLL_S = 2.0
_BAD_CONFIG = 2
# Ray's word for a cluster that has scaled to zero, which the autoscaler will change.
_NO_NODE_YET = "tasks with infeasible resource requests"
PROBES = "probes.json"
# Of a node for preprocessing; a share of it keeps tasks off the nodes for training.
_CPU_NODE = "cpu_node"
_CPU_NODE_SHARE = 0.001


def run_stages(
    config: RunConfig,
    journal: Journal,
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Run every stage of `config` that is not done.

    Raises:
        ValueError, OSError: a stage cannot be done; the message has the cure.
        Stopped: `stop` was set.
    """
    if config.overlap:
        _overlapping(config, journal, tell=tell, stop=stop)
    else:
        if config.preprocess:
            preprocess(config, journal, tell=tell, stop=stop)
        if config.pretrain:
            train(config, journal, stop=stop)
    if config.evaluate:
        evaluate(config, journal, tell=tell, stop=stop)


def preprocess(
    config: RunConfig,
    journal: Journal,
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Make the dataset, continue it, or see that it is made.

    The command decides which of these it is: it knows whether its configuration is that
    of the dataset. It is started again where it ends early, and goes on from what is
    committed; the same error twice in a row is for good.

    Raises:
        ValueError: it cannot be made.
        Stopped: `stop` was set.
    """
    assert config.preprocess
    words = placed(preprocess_words(config.preprocess, output=config.shards))
    before, wait_s = None, _FIRST_WAIT_S
    with staged("preprocess", journal):
        for number in range(config.preprocess.tries):
            ended = run_guarded(
                [PREPROCESS, *words],
                tell=lambda line: None if _NO_NODE_YET in line else tell(line),
                stop=stop,
                environment={"RAY_ADDRESS": gcs_address()},
            )
            # Whoever stops the job may end the command before this driver does.
            if ended.stopped or (ended.status and stop.is_set()):
                raise Stopped
            if ended.status == 0 and _made(config.shards):
                return
            cause = ended.last.partition("error: ")[2] or ended.last
            cause = cause or f"it ended with status {ended.status} and no word"
            last = number == config.preprocess.tries - 1
            if last or cause == before or ended.status == _BAD_CONFIG:
                raise ValueError(f"preprocess: {cause}")
            before = cause
            journal.write(
                "note",
                f"preprocess ended early ({cause}); starting it again in "
                f"{wait_s:.0f} s, it goes on with what is committed",
                text=f"preprocess ended early: {cause}",
            )
            if stop.wait(wait_s):
                raise Stopped
            wait_s *= 2


def placed(words: Sequence[str]) -> list[str]:
    """Arguments of preprocessing, with which its tasks stay off the nodes for training:
    as they are where they say that themselves, or no node is there for it alone.
    """
    given = resolved(PREPROCESS, words)["task_resources"]
    if given is not None or not nodes.exists(_CPU_NODE):
        return [*words]
    return [*words, f"--task_resources={json.dumps({_CPU_NODE: _CPU_NODE_SHARE})}"]


def train(
    config: RunConfig, journal: Journal, *, stop: threading.Event, grow: bool = False
) -> None:
    """Train to the end of the schedule, on whatever nodes there are.

    Raises:
        ValueError, OSError: it cannot be done.
        Stopped: `stop` was set.
    """
    with staged("pretrain", journal):
        pretrain(config, journal, grow=grow, stop=stop)
        if stop.is_set():
            raise Stopped


def evaluate(
    config: RunConfig,
    journal: Journal,
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Measure the model and write RUN/report.html, unless that was done.

    Raises:
        ValueError: it cannot be done.
        Stopped: `stop` was set.
    """
    assert config.evaluate
    words = evaluate_words(config.evaluate, run=config.trained, data=config.shards)
    where = f"{without_password(config.output)}/{REPORT_FILE}"
    if _is_evaluated(config, shlex.join(["python", "-m", EVALUATE, *words])):
        tell(f"evaluate is done already: {where}")
        return
    with staged("evaluate", journal):
        measure(config, words, tell=tell, stop=stop)
        tell(where)


@contextlib.contextmanager
def staged(name: str, journal: Journal) -> Iterator[None]:
    """Write down when a stage starts and how it ends."""
    started = time.monotonic()
    journal.write("stage_started", f"== {name}", stage=name)
    try:
        yield
    except Stopped:
        journal.write("stage_failed", stage=name, cause="asked to stop")
        raise
    except (ValueError, OSError) as error:
        journal.write("stage_failed", stage=name, cause=str(error))
        raise
    seconds = time.monotonic() - started
    journal.write(
        "stage_finished",
        f"== {name} is done, after {seconds:.0f} s",
        stage=name,
        seconds=seconds,
    )


def committed_samples(manifest: Manifest | None) -> int:
    """Samples to train on that a dataset has so far."""
    if manifest is None:
        return 0
    return sum(one.samples for one in manifest.shards if one.split == "train")


def _overlapping(
    config: RunConfig,
    journal: Journal,
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Train while shards are still being made, once enough are committed."""
    with _beside(stop) as (beside, either):

        def make() -> None:
            preprocess(config, journal, tell=tell, stop=either)

        beside.start(make)
        while beside.running and not stop.wait(_POLL_S):
            if (
                committed_samples(read_manifest(config.shards))
                >= config.overlap_samples
            ):
                break
        beside.raise_failure()
        if stop.is_set():
            raise Stopped
        growing = beside.running
        train(config, journal, stop=either, grow=growing)


class _Beside:
    """One function in a thread of its own."""

    def __init__(self, either: threading.Event) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._either = either

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, function: Callable[[], None]) -> None:
        def call() -> None:
            try:
                function()
            except BaseException as error:
                self._failure = error
                self._either.set()

        self._thread = threading.Thread(target=call, name="preprocess", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread:
            self._thread.join()

    def raise_failure(self) -> None:
        if self._failure and not self.running:
            raise self._failure


@contextlib.contextmanager
def _beside(stop: threading.Event) -> Iterator[tuple[_Beside, threading.Event]]:
    """Something that runs beside the caller, and an event that is set when somebody
    asks to stop or either of the two fails, so that the other does not go on alone.
    """
    either = threading.Event()
    beside = _Beside(either)
    ended = threading.Event()

    def pass_on() -> None:
        while not ended.is_set():
            if stop.wait(_POLL_S):
                either.set()
                return

    threading.Thread(target=pass_on, name="stop", daemon=True).start()
    try:
        yield beside, either
    except Stopped:
        either.set()
        beside.join()
        # What failed beside says more than that this had to stop.
        beside.raise_failure()
        raise
    except BaseException:
        either.set()
        beside.join()
        raise
    else:
        beside.join()
        beside.raise_failure()
    finally:
        ended.set()


def _made(data: str) -> bool:
    manifest = read_manifest(data)
    return manifest is not None and manifest.complete


def _is_evaluated(config: RunConfig, command: str) -> bool:
    """Were these probes measured on the model as it is, and shown?"""
    trained = Store(config.trained)
    try:
        probes = json.loads(trained.read(PROBES) or b"{}")
        complete = json.loads(trained.read(COMPLETE) or b"{}")
    except ValueError:
        return False
    same = probes.get("command") == command and probes.get("step") is not None
    shown = REPORT_FILE in Store(config.output).names()
    return same and shown and probes.get("step") == complete.get("step")
