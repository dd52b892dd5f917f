"""`make demo`: the bundled corpus to a report, with the commands a user would type.

Owns the order of the commands, what is skipped, and how an interrupt stops them. Does
not own anything they do: every stage is a command that also works when pasted. A stage
is skipped when its product exists and is no older than what it was made from, as in
make; otherwise its command runs, which continues, or says what it finds, by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import yaml

from pipeline.manifest import MANIFEST, load_manifest
from trainer.contract import COMPLETE, valid_world_sizes

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1)
RECIPE = "emoji"
RECIPE_FILE = Path(f"trainer/recipes/{RECIPE}.yaml")
OUT = Path("runs/demo")
SHARDS = OUT / "shards"
REPORT = OUT / "report.html"
# The launcher stops its ranks one after another, and each may be saving a checkpoint.
SECONDS_TO_STOP = 60


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command. It is done when `product` is finished and no older than any of
    `made_from`.
    """

    title: str
    command: Sequence[str]
    product: Path
    made_from: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    finished: Callable[[Path], bool] = Path.is_file
    """Whether a product is whole; most appear only then."""

    def __str__(self) -> str:
        """The command as a user would paste it."""
        variables = [f"{key}={value}" for key, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    @property
    def done(self) -> bool:
        """Whether the product is there and up to date."""
        if not self.finished(self.product):
            return False
        made = self.product.stat().st_mtime
        return all(path.stat().st_mtime <= made for path in self.made_from)


class StageFailedError(Exception):
    """A stage ended without its product; `status` is what to exit with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_directory(seed: int) -> Path:
    """Where the run with `seed` goes."""
    return OUT / f"train-seed{seed}"


def accelerators() -> int:
    """Ranks to start: two on a CPU, else as many GPUs as divide the recipe's lanes."""
    import torch

    gpus = torch.cuda.device_count()
    lanes = yaml.safe_load(RECIPE_FILE.read_text())["lanes"]
    return max(size for size in valid_world_sizes(lanes) if size <= (gpus or 2))


def preprocess() -> Stage:
    """Corpus to shards."""
    config = Path("examples/emoji.yaml")
    command = f"python -m pipeline.preprocess --config {config} --output {SHARDS}"
    return Stage(
        title="Preprocess: corpus to shards",
        command=command.split(),
        product=SHARDS / MANIFEST,
        made_from=(config, Path("examples/emoji.parquet")),
        finished=is_finished_dataset,
    )


def is_finished_dataset(manifest: Path) -> bool:
    """Whether the dataset is whole: a manifest stands there while it grows, too."""
    try:
        load_manifest(manifest.parent)
    except ValueError:
        return False
    return True


def pretrain(seed: int, ranks: int) -> Stage:
    """Shards to a trained run."""
    run = run_directory(seed)
    command = f"deepspeed --num_accelerators {ranks} --module trainer.pretrain "
    command += f"--config {RECIPE} --data {SHARDS} --output {run} --seed {seed}"
    return Stage(
        title=f"Pretrain: seed {seed} on {ranks} ranks",
        command=command.split(),
        product=run / COMPLETE,
        made_from=(preprocess().product, RECIPE_FILE),
        # Two ranks with a thread for every core each would fight for the cores.
        environment={"OMP_NUM_THREADS": "1"},
    )


def evaluate(seed: int) -> Stage:
    """A trained run to probes on held-out pairs."""
    run = run_directory(seed)
    command = f"python -m trainer.evaluate {run} --task probes --data {SHARDS} "
    # A wrong partner is another emoji, and variants of one are resampled together.
    command += "--group base"
    return Stage(
        title=f"Evaluate: seed {seed} on held-out pairs",
        command=command.split(),
        product=run / "probes.json",
        made_from=(run / COMPLETE,),
    )


def report() -> Stage:
    """Everything to one page."""
    runs = " ".join(str(run_directory(seed)) for seed in SEEDS)
    return Stage(
        title="Report",
        command=f"python -m trainer.report {runs} --output {REPORT}".split(),
        product=REPORT,
        made_from=[run_directory(seed) / "probes.json" for seed in SEEDS],
    )


def demo_stages() -> Iterator[Stage]:
    """The demo's stages in order, each planned when the one before has ended."""
    yield preprocess()
    ranks = accelerators()
    for seed in SEEDS:
        yield pretrain(seed, ranks)
        yield evaluate(seed)
        stages = (preprocess(), pretrain(seed, ranks), evaluate(seed))
        # The report shows the commands of each run.
        lines = "".join(f"{stage}\n" for stage in stages)
        (run_directory(seed) / "commands.txt").write_text(lines)
    yield report()


def run_stages(stages: Iterator[Stage]) -> None:
    """Run what is not done, in order.

    Raises:
        StageFailedError: a command failed, or ended well without its product.
    """
    for number, stage in enumerate(stages, start=1):
        print(f"\n== {number}. {stage.title}\n   {stage}", flush=True)
        if stage.done:
            print(f"   already done: {stage.product}", flush=True)
            continue
        started = time.monotonic()
        status = _run_in_group(stage)
        # The deepspeed launcher can exit 0 although a rank was killed, so only the
        # product says that a stage has ended well.
        if status == 0 and not stage.finished(stage.product):
            raise StageFailedError(f"it left no finished {stage.product}", 1)
        if status != 0:
            raise StageFailedError(f"exit status {status}", status)
        print(f"   done in {time.monotonic() - started:.0f} s", flush=True)


def _run_in_group(stage: Stage) -> int:
    """Exit status of the command, run in a process group of its own that does not
    outlive this call: an interrupt reaches the ranks below a launcher, too.
    """
    # The commands are those of the environment that this interpreter belongs to.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, **stage.environment}
    process = subprocess.Popen(stage.command, env=environment, start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        print("\n   stopping ... (once more to stop at once)", flush=True)
        _interrupt_group(process)
        raise
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    return 128 - status if status < 0 else status


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _interrupt_group(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the command and wait until nothing runs in its group.

    A launcher passes the signal on by itself; its ranks would take a second one to mean
    that they must not even save. Only what a launcher left behind is told directly.
    """
    process.send_signal(signal.SIGINT)
    deadline, told = time.monotonic() + SECONDS_TO_STOP, False
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        if not any(_running_in(process.pid, one) for one in psutil.process_iter()):
            return
        if ended and not told:
            _signal_group(process.pid, signal.SIGTERM)
            told = True
        time.sleep(0.2)
    print(f"   still there after {SECONDS_TO_STOP} s: killed", flush=True)


def _running_in(group: int, process: psutil.Process) -> bool:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if os.getpgid(process.pid) == group:
            return process.status() != psutil.STATUS_ZOMBIE
    return False


def summary() -> str:
    """The probes of every run as a small table."""
    lines = [f"{'':8}{'true':>8}{'shuffled':>10}{'gap':>8}   95 % interval"]
    for seed in SEEDS:
        probes = json.loads((run_directory(seed) / "probes.json").read_text())
        lines.append(f"seed {seed}, {probes['pairs']} held-out pairs")
        for task, unit in (("mlm", "nats"), ("recon", "squared error a pixel")):
            conditions = probes[task]["conditions"]
            gap = probes[task]["gaps"]["shuffled"]
            low, high = gap["ci95"]
            lines.append(
                f"  {task:6}{conditions['true']['mean']:8.4f}"
                f"{conditions['shuffled']['mean']:10.4f}{gap['mean']:z8.4f}"
                f"   [{low:z.4f}, {high:z.4f}] {unit}"
            )
    return "\n".join(lines)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(stages: Iterator[Stage]) -> int:
    """Run `stages`; returns the exit status, having said how to continue."""
    # SIGINT too: a background job would ignore it, and so would every child.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    started = time.monotonic()
    try:
        run_stages(stages)
    except StageFailedError as error:
        print(
            f"\ndemo: the last command failed ({error}); its own message stands above. "
            "The same command continues from here; `make clean` starts anew",
            file=sys.stderr,
        )
        return error.status
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"\n== All done in {time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    code = main(demo_stages())
    if code == 0:
        print(f"{summary()}\n\nReport: {REPORT.resolve()} (opens in any browser)")
    sys.exit(code)
