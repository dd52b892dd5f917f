"""The last stage: what the model can do, measured on a node of the cluster.

Owns asking for that node and bringing the report to the run's directory. Does not own
what is measured (`trainer.evaluate`) or shown (`trainer.report`).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.commands import EVALUATE, REPORT
from cluster.driver import Stopped
from cluster.options import RunConfig
from cluster.process import run_guarded
from cluster.store import Store, first_line

REPORT_FILE = "report.html"
_TRIES = 4
_POLL_S = 2.0
# What went wrong, if anything, and what the commands said.
Measured = tuple[str | None, list[str]]


def measure(
    config: RunConfig,
    words: Sequence[str],
    *,
    tell: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Run `trainer.evaluate WORDS` and `trainer.report` on a node.

    Raises:
        ValueError: what they say.
        OSError: the nodes that they ran on went away, again and again.
        Stopped: `stop` was set.
    """
    stage = config.evaluate
    assert stage
    for _ in range(_TRIES):
        found = _on_a_node(config, words, stop=stop)
        if found is not None:
            break
    else:
        raise OSError(
            f"evaluate: its node was lost {_TRIES} times; the same command tries again"
        )
    failure, lines = found
    for line in lines:
        tell(line)
    if failure:
        raise ValueError(f"evaluate: {failure}")


class _Evaluator:
    """On the node that measures."""

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def measure(self, words: list[str], run: str, output: str) -> Measured:
        return _measure(words, run, output)


def _on_a_node(
    config: RunConfig, words: Sequence[str], *, stop: threading.Event
) -> Measured | None:
    """What came of it on one node, None where that was lost. An answer of a node that
    was cut off may never come, so the cluster is asked whether it is alive.
    """
    import ray

    stage = config.evaluate
    assert stage
    actor: Any = (
        ray.remote(_Evaluator)
        .options(num_cpus=stage.cpus, num_gpus=stage.gpus, max_concurrency=2)
        .remote()
    )
    try:
        asked = actor.node.remote()
        measured = actor.measure.remote(list(words), config.trained, config.output)
        node = None
        while not ray.wait([measured], timeout=_POLL_S)[0]:
            if stop.is_set():
                raise Stopped
            if node is None and ray.wait([asked], timeout=0)[0]:
                node = ray.get(asked)
            if node and not _is_alive(node):
                return None
        found: Measured = ray.get(measured)
        return found
    except ray.exceptions.RayTaskError as error:
        raise OSError(f"evaluate: {first_line(error.cause)}") from error
    except ray.exceptions.RayError:
        return None
    finally:
        ray.kill(actor)


def _is_alive(node: str) -> bool:
    import ray

    return any(row["NodeID"] == node and row["Alive"] for row in ray.nodes())


def _measure(words: list[str], run: str, output: str) -> Measured:
    lines: list[str] = []
    never = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / REPORT_FILE
        for command in ([EVALUATE, *words], [REPORT, run, f"--output={page}"]):
            told: list[str] = []
            ended = run_guarded(
                command,
                tell=told.append,
                stop=never,
                environment={"TQDM_DISABLE": "1"},
            )
            if command[0] == EVALUATE:
                lines += told
            if ended.status:
                cause = ended.last.partition("error: ")[2] or ended.last
                return cause or f"{command[0]} ended with {ended.status}", lines
        Store(output).write(REPORT_FILE, page.read_bytes())
    return None, lines
