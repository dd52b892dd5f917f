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
    import ray

    stage = config.evaluate
    assert stage
    remote: Any = ray.remote(_measure).options(
        num_cpus=stage.cpus, num_gpus=stage.gpus, max_retries=_TRIES - 1
    )
    reference = remote.remote(list(words), config.trained, config.output)
    while not ray.wait([reference], timeout=_POLL_S)[0]:
        if stop.is_set():
            ray.cancel(reference, force=True)
            raise Stopped
    try:
        failure, lines = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise OSError(f"evaluate: {first_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"evaluate: its node was lost {_TRIES} times ({line}); the same command "
            "tries again"
        ) from error
    for line in lines:
        tell(line)
    if failure:
        raise ValueError(f"evaluate: {failure}")


def _measure(words: list[str], run: str, output: str) -> tuple[str | None, list[str]]:
    """What went wrong, if anything, and what the commands said."""
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
