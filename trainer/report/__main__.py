"""`python -m trainer.report RUN [RUN ...]`: runs as one page to show.

Owns the command. What is read is in `trainer.report.data`, the page in
`trainer.report.page`, its charts in `trainer.report.charts`.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pipeline.config import parse, run

PROG = "trainer.report"
DESCRIPTION = """\
Write one HTML file that compares runs and opens offline: final numbers, data, curves,
probes, reconstructions, speeds, what differs in their configurations, and commands.

  python -m trainer.report runs/first runs/second --output report.html

Whatever a run does not have yet is named, with the command that makes it. Runs that are
still going, or were killed, are shown as far as they got.
"""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs to show, and where."""

    runs: list[str]
    """Run directories that trainer.pretrain wrote, or their URLs (the first words of
    the command)."""
    output: str = "report.html"
    """The HTML file to write; an old one is replaced."""
    samples: int = 9
    """Sample pairs shown of each dataset."""
    panels: int = 8
    """Panels of reconstructions kept of each run, evenly spaced over its steps."""

    def __post_init__(self) -> None:
        for name in ("samples", "panels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0")


def main(argv: Sequence[str]) -> None:
    """Read the runs, write the page."""
    config = parse(ReportConfig, _runs_as_key(argv), prog=PROG, description=DESCRIPTION)
    from trainer.local_run import local_run
    from trainer.report.data import read_datasets, read_runs
    from trainer.report.page import page

    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(local_run(run)) for run in config.runs]
        runs = read_runs(folders)
        datasets = read_datasets(runs, samples=config.samples)
        text = page(runs, datasets, panels=config.panels)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output)
    print(output)


def _runs_as_key(argv: Sequence[str]) -> list[str]:
    """`RUN RUN --output F` as `--runs=["RUN", "RUN"] --output F`."""
    runs = list(takewhile(lambda word: not word.startswith("-"), argv))
    rest = list(argv[len(runs) :])
    return [f"--runs={json.dumps(runs)}", *rest] if runs else rest


if __name__ == "__main__":
    run(main, PROG)
